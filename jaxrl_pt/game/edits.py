"""What a person changes in a game, checked before anything happens: map cells, scores, actions.

Inside a program a wrong index cannot be refused, so whatever comes from outside is checked here,
on the host. Each function takes the state of one game.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.errors import UserError, shown
from jaxrl_pt.game import base


def paint(game: base.Game, state: Any, cell: tuple[int, int], content: str) -> Any:
  """The state with another content in a cell of the map, which `Truth.memory` then knows.

  Args:
    game: the game.
    state: one game's state.
    cell: row and column in the world.
    content: one of `game.contents`.

  Raises:
    UserError: the cell lies outside the world, or cannot hold that.
  """
  index = check_cell(game, cell, content)
  row, column = cell
  if not bool(game.paintable(state, jnp.asarray(index))[row, column]):
    raise UserError(f'The cell {(row, column)} of {type(game.config).__name__} cannot become '
                    f'{content!r}: choose another cell, away from the rim and from whoever stands '
                    'or starts there.')
  return game.paint(state, jnp.asarray(row), jnp.asarray(column), jnp.asarray(index))


def check_cell(game: base.Game, cell: tuple[int, int], content: str) -> int:
  """The index of a content that is to be painted into a cell of the world.

  Raises:
    UserError: the game has no map, the cell lies outside, or there is no such content.
  """
  name, (rows, columns) = type(game.config).__name__, game.world_shape
  if not game.contents:
    raise UserError(f'{name} has no map: paint in another game.')
  row, column = cell
  if not (0 <= row < rows and 0 <= column < columns):
    raise UserError(f'The cell {(row, column)} lies outside the world of {name}: rows go from 0 to '
                    f'{rows - 1} and columns from 0 to {columns - 1}.')
  if content not in game.contents:
    raise UserError(f'{name} has no {shown(content)} to paint: choose one of '
                    f'{", ".join(game.contents)}.')
  return game.contents.index(content)


def set_counters(game: base.Game, state: Any, values: Sequence[int]) -> Any:
  """The state with other numbers on its display.

  Raises:
    UserError: too few or too many numbers, or one that the display cannot show.
  """
  limits = base.moduli(game.counters)
  names = ', '.join(f'{c.name} from 0 to {limit - 1}'
                    for c, limit in zip(game.counters, limits, strict=True))
  if len(values) != len(limits) or not all(
      0 <= value < limit for value, limit in zip(values, limits, strict=True)):
    raise UserError(f'The display of {type(game.config).__name__} cannot show '
                    f'{shown(list(values))}: give {names}.')
  return state.replace(counters=jnp.asarray(values, jnp.int32))


def check_actions(game: base.Game, actions: Sequence[int] | np.ndarray) -> np.ndarray:
  """The actions as an array, if the game has them all.

  Raises:
    UserError: one of them is outside the game.
  """
  array = np.asarray(actions)
  if not np.issubdtype(array.dtype, np.integer):
    raise UserError(f'Actions are whole numbers, not {array.dtype}: give indices of '
                    f'{", ".join(game.actions)}.')
  wrong = array[(array < 0) | (array >= len(game.actions))]
  if wrong.size:
    raise UserError(f'{type(game.config).__name__} has no action {int(wrong.flat[0])}: give 0 to '
                    f'{len(game.actions) - 1} for {", ".join(game.actions)}.')
  return array.astype(np.int32)
