"""Coloured shapes on a plane: what most tasks of relations are asked about."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl_pt.data.spatial import canvas
from jaxrl_pt.data.spatial.base import Look


@dataclass(frozen=True, order=True)
class Thing:
  """A shape in a square of `size` units (odd) whose middle unit is (row, column)."""

  row: int
  column: int
  colour: str
  shape: str
  size: int

  @property
  def name(self) -> str:
    """What questions call it."""
    return f'{self.colour} {self.shape}'

  @property
  def box(self) -> canvas.Box:
    """The square that it fills, in units."""
    return canvas.around(self.row, self.column, self.size)


def names(rng: np.random.Generator, look: Look, count: int) -> list[tuple[str, str]]:
  """Different pairs of a colour and a shape, drawn without replacement."""
  chosen = rng.permutation(len(look.colours) * len(look.shapes))[:count].tolist()
  return [(look.colours[k // len(look.shapes)][0], look.shapes[k % len(look.shapes)])
          for k in chosen]


def is_apart(one: Thing, other: Thing, gap: int) -> bool:
  """Whether at least `gap` units lie between the squares of two things."""
  reach = (one.size + other.size) // 2 + gap
  return abs(one.row - other.row) >= reach or abs(one.column - other.column) >= reach


def places(size: int, others: Sequence[Thing], gap: int) -> np.ndarray:
  """Where a thing may lie inside the picture and apart from others, bool[48, 48]."""
  free = np.zeros((canvas.UNITS, canvas.UNITS), bool)
  half = size // 2
  free[half:canvas.UNITS - half, half:canvas.UNITS - half] = True
  for other in others:
    reach = (size + other.size) // 2 + gap - 1
    top, left = max(other.row - reach, 0), max(other.column - reach, 0)
    free[top:other.row + reach + 1, left:other.column + reach + 1] = False
  return free


def pick(rng: np.random.Generator, allowed: np.ndarray) -> tuple[int, int] | None:
  """One of the units that are allowed, bool[48, 48], as (row, column); None if there is none."""
  found = np.flatnonzero(allowed)
  if len(found) == 0:
    return None
  row, column = divmod(int(found[rng.integers(len(found))]), canvas.UNITS)
  return row, column


def paint(picture: np.ndarray, look: Look, things: Sequence[Thing]) -> None:
  """Draws things, later ones over earlier ones."""
  for thing in things:
    canvas.shape(picture, thing.shape, thing.box, look.rgb(thing.colour))


def listed(things: Sequence[Thing]) -> str:
  """Things in words, with the units of their middles."""
  return '; '.join(f'{t.name} at row {t.row}, column {t.column}' for t in things)
