"""Where the view is: the actions say it, and the map may correct them.

After a frame has been drawn, the cells that it shows are compared with the map round the place to
which the actions lead (q̂):

    o* = argmin_{|o| ≤ w} Σ_settled ‖x − M[q̂ + o]‖² / #settled

over the cells of which the map knows something that stays: what was ground may have been built on.
o* ≠ 0 is accepted only if there are at least u of them and it beats o = 0 by the margin τ;
otherwise the actions are believed. Where places look alike, several offsets fit equally well, and
without the margin noise chooses among them.

Source: MaaG (arXiv 2503.21172) aligns map and view by a sliding window and names repetitive scenes
as its limit; window, margin and the least overlap are our choices.
"""

import itertools

from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import history, maps, reading


def offsets(reach: int, world_shape: tuple[int, int]) -> np.ndarray:
  """i32[O, 2]: the offsets that are tried, the nearest first; a street has no rows to try."""
  steps = [range(-reach, reach + 1) if size > 1 else range(1) for size in world_shape]
  return np.array(sorted(itertools.product(*steps), key=lambda o: (abs(o[0]) + abs(o[1]), o)),
                  np.int32)


def cost(remembered: maps.Map, view: maps.View, origin: Array) -> tuple[Array, Array]:
  """The mean squared difference between a view and the map at i32[2] `origin`.

  Returns:
    f32[] and i32[], the number of cells that are compared; 0 and 0 where there is none.
  """
  shape = view.shown.shape
  assert len(shape) == 2
  colours, _ = maps.retrieve(remembered, origin, shape)
  compared = history.window(remembered.settled, origin, shape, False) & view.shown
  error = jnp.where(compared, ((view.colours - colours) ** 2).sum(-1), 0.0)
  count = compared.sum()
  return error.sum() / jnp.maximum(count, 1), count


def link(remembered: maps.Map, view: maps.View, expected: Array, how: cfg.SlidingWindow) -> Array:
  """i32[2]: by how much the view is elsewhere than the actions say, one game's.

  Args:
    remembered: the map.
    view: what the new frame shows.
    expected: i32[2] q̂, where the view begins according to the actions.
    how: window, margin and the least overlap.
  """
  shape = remembered.known.shape
  assert len(shape) == 2
  tried = offsets(how.reach, shape)
  costs, counts = zip(*(cost(remembered, view, expected + o) for o in tried), strict=True)
  # Nothing is elsewhere if nothing is settled where the view is expected.
  here = costs[0]
  elsewhere = jnp.stack([here, *(
      jnp.where((c < here - how.margin) & (n >= how.min_known), c, jnp.inf)
      for c, n in zip(costs[1:], counts[1:], strict=True))])
  return jnp.asarray(tried)[reading.lowest(elsewhere[None])[0]]
