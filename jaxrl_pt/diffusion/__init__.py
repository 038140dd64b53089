"""From noise to a frame: equations, weights of their errors, and how a game's frames are drawn."""
