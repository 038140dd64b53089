"""Diffusion: from noise to a frame. Equations, their weights, and the sampler of a game's frames."""
