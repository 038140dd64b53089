"""Folding: a sheet is folded, punched and unfolded; which of four sheets is it?

A fold takes the outer rows or columns of what is left of the sheet, half of them at most, over onto
the rest. A punch goes through all layers of a cell. To unfold is exact: a cell of the flap has a
hole if and only if the cell on which it lay has one,

    holes before the fold = holes ∪ {m(h) : h a hole, m(h) in the flap},  m the mirror at the fold.

The four sheets are results of four recipes, each of which differs from another in one fold or one
punch, and it is drawn last which of them is asked about.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from jaxrl_pt.data.spatial import base, boards, canvas

AWAY, PAPER, HOLE = 0, 1, 2  # Cells of a trace's boards.
SIDES = ('left', 'right', 'top', 'bottom')
_QUARTERS = ((0, 0), (0, 24), (24, 0), (24, 24))  # units
_NAMES = ('x', 'o')  # of paper and hole in descriptions
Holes = frozenset[boards.Cell]


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: rows and columns of the sheet, folds, punches."""

  size: int
  num_folds: int
  num_punches: int


LEVELS = (Level(4, 1, 1), Level(4, 2, 1), Level(4, 2, 2), Level(6, 3, 1), Level(6, 3, 2))


@dataclasses.dataclass(frozen=True)
class Fold:
  """The outer `count` rows or columns on a side go over onto the rest."""

  side: str
  count: int

  @property
  def name(self) -> str:
    """What traces call it."""
    return f'{self.side} {self.count}'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Folds, and the cells that are then punched, in the order of rows and columns."""

  folds: tuple[Fold, ...]
  punches: tuple[boards.Cell, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
  """A recipe, and the holes of four unfolded sheets among which its result is."""

  look: base.Look
  size: int
  recipe: Recipe
  results: tuple[tuple[boards.Cell, ...], ...]  # sorted; named by boards.LETTERS
  colour: str


# --- Folds ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Area:
  """What is left of the sheet after some folds; bottom and right are outside."""

  top: int
  left: int
  bottom: int
  right: int

  def __contains__(self, cell: boards.Cell) -> bool:
    return self.top <= cell[0] < self.bottom and self.left <= cell[1] < self.right

  def cells(self) -> Iterator[boards.Cell]:
    """All its cells."""
    return ((r, c) for r in range(self.top, self.bottom) for c in range(self.left, self.right))

  def folded(self, fold: Fold) -> 'Area | None':
    """What is left after a fold; None if the flap would reach beyond the rest."""
    length = self.right - self.left if fold.side in SIDES[:2] else self.bottom - self.top
    if 2 * fold.count > length:
      return None
    match fold.side:
      case 'left':
        return dataclasses.replace(self, left=self.left + fold.count)
      case 'right':
        return dataclasses.replace(self, right=self.right - fold.count)
      case 'top':
        return dataclasses.replace(self, top=self.top + fold.count)
      case _:
        return dataclasses.replace(self, bottom=self.bottom - fold.count)

  def mirror(self, fold: Fold, cell: boards.Cell) -> boards.Cell:
    """Where a cell lies on the other side of the line along which this area was folded."""
    row, column = cell
    match fold.side:
      case 'left':
        return row, 2 * (self.left + fold.count) - 1 - column
      case 'right':
        return row, 2 * (self.right - fold.count) - 1 - column
      case 'top':
        return 2 * (self.top + fold.count) - 1 - row, column
      case _:
        return 2 * (self.bottom - fold.count) - 1 - row, column


def areas(size: int, folds: tuple[Fold, ...]) -> list[Area] | None:
  """The whole sheet and what is left after each fold; None if a fold is impossible."""
  found = [Area(0, 0, size, size)]
  for fold in folds:
    left = found[-1].folded(fold)
    if left is None:
      return None
    found.append(left)
  return found


def unfold(size: int, recipe: Recipe) -> list[Holes]:
  """The holes in the folded sheet and after unfolding each fold, the last one first."""
  before = areas(size, recipe.folds)
  assert before is not None
  holes = [frozenset(recipe.punches)]
  for area, left, fold in reversed(list(zip(before, before[1:], recipe.folds, strict=False))):
    opened = {area.mirror(fold, hole) for hole in holes[-1]}
    holes.append(holes[-1] | {cell for cell in opened if cell in area and cell not in left})
  return holes


def is_possible(size: int, recipe: Recipe) -> bool:
  """Whether all folds can be made, and all punches meet different cells of what is left."""
  left = areas(size, recipe.folds)
  return (left is not None and len(set(recipe.punches)) == len(recipe.punches)
          and all(cell in left[-1] for cell in recipe.punches))


def _all_folds(size: int) -> list[Fold]:
  return [Fold(side, count) for side in SIDES for count in range(1, size // 2 + 1)]


def neighbours(size: int, recipe: Recipe) -> list[Recipe]:
  """All possible recipes that differ in one fold or in the place of one punch."""
  sheet = Area(0, 0, size, size)
  found = [Recipe((*recipe.folds[:i], fold, *recipe.folds[i + 1:]), recipe.punches)
           for i in range(len(recipe.folds)) for fold in _all_folds(size)]
  found += [Recipe(recipe.folds, tuple(sorted({*recipe.punches, cell} - {punch})))
            for punch in recipe.punches for cell in sheet.cells()]
  return [other for other in found if other != recipe and is_possible(size, other)
          and len(other.punches) == len(recipe.punches)]


def result(size: int, recipe: Recipe) -> tuple[boards.Cell, ...]:
  """The holes of the unfolded sheet, in the order of rows and columns."""
  return tuple(sorted(unfold(size, recipe)[-1]))


# --- Scenes ------------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws four recipes of different results, and which of them is asked about."""
  base.no_composition('folding', is_unseen)
  size = LEVELS[level - 1].size
  recipes = [_recipe(rng, LEVELS[level - 1])]
  results = [result(size, recipes[0])]
  while len(results) < len(boards.LETTERS):
    others = neighbours(size, recipes[int(rng.integers(len(recipes)))])
    other = others[int(rng.integers(len(others)))]
    if result(size, other) not in results:
      recipes.append(other)
      results.append(result(size, other))
  order = rng.permutation(len(results)).tolist()
  colour = look.colours[int(rng.integers(len(look.colours)))][0]
  asked = recipes[int(rng.integers(len(recipes)))]
  return Scene(look, size, asked, tuple(results[k] for k in order), colour)


def _recipe(rng: np.random.Generator, level: Level) -> Recipe:
  every = _all_folds(level.size)
  while True:
    folds = tuple(every[int(rng.integers(len(every)))] for _ in range(level.num_folds))
    left = areas(level.size, folds)
    cells = list(left[-1].cells()) if left else []
    if len(cells) > level.num_punches:
      chosen = rng.permutation(len(cells))[:level.num_punches].tolist()
      return Recipe(folds, tuple(sorted(cells[k] for k in chosen)))


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Changes one fold or moves one punch, so that another of the four sheets is the result."""
  others = [other for other in neighbours(scene.size, scene.recipe)
            if result(scene.size, other) in scene.results
            and result(scene.size, other) != result(scene.size, scene.recipe)]
  return dataclasses.replace(scene, recipe=others[int(rng.integers(len(others)))])


# --- What is shown and asked --------------------------------------------------------


def sheet(size: int, area: Area, holes: Holes) -> boards.Board:
  """A board of AWAY, PAPER and HOLE."""
  return tuple(tuple(AWAY if (r, c) not in area else HOLE if (r, c) in holes else PAPER
                     for c in range(size)) for r in range(size))


def folded_sheets(scene: Scene) -> list[boards.Board]:
  """The sheet before and after each fold; the last one is punched."""
  left = areas(scene.size, scene.recipe.folds)
  assert left is not None
  shown = [sheet(scene.size, area, frozenset()) for area in left[:-1]]
  return [*shown, sheet(scene.size, left[-1], frozenset(scene.recipe.punches))]


def results(scene: Scene) -> list[boards.Board]:
  """The four unfolded sheets."""
  whole = Area(0, 0, scene.size, scene.size)
  return [sheet(scene.size, whole, frozenset(holes)) for holes in scene.results]


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The sheet before and after each fold, and the four sheets with their letters."""
  ground = scene.look.background
  colours = canvas.faint(ground), scene.look.rgb(scene.colour), ground
  size = 4 if scene.size == 4 else 3
  both = np.stack([canvas.blank(side, ground)] * 2)
  for picture, shown in zip(both, (folded_sheets(scene), results(scene)), strict=True):
    for board, (top, left) in zip(shown, _QUARTERS, strict=False):
      # A ground for the whole sheet, so that a hole at its edge has a border too.
      end = size * scene.size
      whole = canvas.Box(top + 5, left + 2, top + 6 + end, left + 3 + end)
      canvas.rectangle(picture, whole, colours[AWAY])
      boards.paint(picture, board, colours, top + 6, left + 3, size)
  for name, (top, left) in zip(boards.LETTERS, _QUARTERS, strict=True):
    canvas.letter(both[1], name, top, left + 3, canvas.ink(ground))
  for number, (top, left) in enumerate(_QUARTERS[:len(scene.recipe.folds) + 1], 1):
    canvas.letter(both[0], str(number), top, left + 3, canvas.ink(ground))
  return both


def question(scene: Scene) -> str:
  """Says how to read the pictures and asks for a letter."""
  del scene
  return ('The first picture shows a sheet being folded, faint cells over onto the rest, and then '
          'punched. Which sheet of the second is it, unfolded? Answer with its letter.')


def answer(scene: Scene) -> str:
  """By exact unfolding."""
  return boards.LETTERS[scene.results.index(result(scene.size, scene.recipe))]


def options(scene: Scene) -> tuple[str, ...]:
  """The letters."""
  del scene
  return boards.LETTERS


def describe(scene: Scene) -> str:
  """The folded sheet and the four sheets by rows, x for paper and o for holes."""
  lines = [f'{number}: {boards.text(board, _NAMES)}'
           for number, board in enumerate(folded_sheets(scene), 1)]
  lines += [f'{name}: {boards.text(board, _NAMES)}'
            for name, board in zip(boards.LETTERS, results(scene), strict=True)]
  return f'x is paper, o is a hole. {"; ".join(lines)};'


def trace(scene: Scene) -> tuple[boards.Board, ...]:
  """The sheet after unfolding each fold, the last fold first; of AWAY, PAPER and HOLE."""
  left = areas(scene.size, scene.recipe.folds)
  assert left is not None
  holes = unfold(scene.size, scene.recipe)
  return tuple(sheet(scene.size, area, opened)
               for area, opened in zip(left[-2::-1], holes[1:], strict=True))


def trace_text(scene: Scene) -> str:
  """The sheet after unfolding each fold in words."""
  steps = [f'unfold {fold.name}' for fold in reversed(scene.recipe.folds)]
  return boards.steps_text(steps, trace(scene), _NAMES)


TASK = base.choosing('folding', 'transformation', 'spatial_manipulation', len(LEVELS), 2, draw,
                     twin, pictures, question, answer, options, describe)
