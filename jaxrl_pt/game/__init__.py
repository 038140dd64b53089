"""Games whose every frame can be read back: worlds for a model to learn, with an exact oracle.

`open_game` in `games.py` makes a `Game` (`base.py`) of its settings: pure functions of a state,
for one game each, which `jax.vmap` batches. `traveler.py`, `pong.py` and `pacman.py` are the games;
`reading.py` reads frames, `trajectories.py` plays episodes as a function of (seed, index).
"""
