"""Program: operations on a board, one after the other; which of four boards is the result?

The four boards are results of four programs, each of which differs from another of them in one
step. They are drawn before it is drawn which program is asked about, so that the boards alone do
not tell the answer. Pairs of operations in `UNSEEN` are never adjacent in training; programs of the
split `composition` hold at least one of them.
"""

import dataclasses

import numpy as np

from jaxrl_pt.data.spatial import base, boards, canvas
from jaxrl_pt.errors import UserError

OPERATIONS = {
    'turn right': boards.clockwise, 'flip sideways': boards.across, 'shift down': boards.down,
    'turn left': boards.counterclockwise, 'shift left': boards.left,
    'flip upside down': boards.over, 'shift right': boards.right, 'half turn': boards.half_turn}
NAMES = tuple(OPERATIONS)
# Each operation is the first of two unseen pairs, and the second of two.
UNSEEN = frozenset((name, NAMES[(i + k) % len(NAMES)])
                   for i, name in enumerate(NAMES) for k in (1, 3))
NUM_CELLS = 3  # rows and columns of a board
_START = 18, 1  # Where the start begins, in units.
_RESULTS = ((7, 16), (7, 33), (31, 16), (31, 33))
_START_SIZE, _SIZE = 4, 5  # units of a cell
Program = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: the steps of a program."""

  num_steps: int


LEVELS = (Level(1), Level(2), Level(3), Level(4), Level(5))


@dataclasses.dataclass(frozen=True)
class Scene:
  """A board, a program, and four boards among which its result is."""

  look: base.Look
  program: Program
  start: boards.Board
  results: tuple[boards.Board, ...]  # named by boards.LETTERS
  colours: tuple[str, ...]  # of the indices 1, 2, 3 of all boards


def is_unseen(program: Program) -> bool:
  """Whether two operations that are never adjacent in training are adjacent in a program."""
  return not UNSEEN.isdisjoint(zip(program, program[1:], strict=False))


def run(program: Program, board: boards.Board) -> tuple[boards.Board, ...]:
  """The boards after each step of a program."""
  after = []
  for name in program:
    board = OPERATIONS[name](board)
    after.append(board)
  return tuple(after)


def neighbours(program: Program) -> list[Program]:
  """All programs that differ in one step and are unseen in training if and only if this one is."""
  changed = [(*program[:i], name, *program[i + 1:])
             for i in range(len(program)) for name in NAMES if name != program[i]]
  return [other for other in changed if is_unseen(other) == is_unseen(program)]


# --- Scenes ------------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_composed: bool) -> Scene:
  """Draws a board, four programs of different results, and which of them is asked about.

  Raises:
    UserError: a composition of one step is asked for.
  """
  num_steps = LEVELS[level - 1].num_steps
  if is_composed and num_steps < 2:
    raise UserError(f'The task program has no split composition at level {level}, whose programs '
                    'have one step: choose a level from 2 on.')
  results = None
  while results is None:
    programs = [tuple(NAMES[k] for k in rng.integers(len(NAMES), size=num_steps).tolist())]
    if is_unseen(programs[0]) == is_composed:
      start = _board(rng)
      results = _grown(rng, programs, start)
  # The programs came one after the other, so all places are drawn anew.
  order = rng.permutation(len(results)).tolist()
  chosen = tuple(rng.permutation([name for name, _ in look.colours])[:3].tolist())
  return Scene(look, programs[int(rng.integers(len(programs)))], start,
               tuple(results[k] for k in order), chosen)


def _board(rng: np.random.Generator) -> boards.Board:
  """A board of four to six filled cells; indices come in the order in which they are first read."""
  num_filled = int(rng.integers(4, 7))
  filled = [1, 2, 3, *rng.integers(1, 4, size=num_filled - 3).tolist()]
  drawn = rng.permutation(filled + [0] * (NUM_CELLS**2 - num_filled)).tolist()
  seen = [0, *dict.fromkeys(index for index in drawn if index)]
  cells = [seen.index(index) for index in drawn]
  return tuple(tuple(cells[NUM_CELLS * r:NUM_CELLS * (r + 1)]) for r in range(NUM_CELLS))


def _grown(rng: np.random.Generator, programs: list[Program], start: boards.Board
           ) -> list[boards.Board] | None:
  """Adds neighbours to programs until there are four; their results, or None if that fails."""
  results = [run(programs[0], start)[-1]]
  for _ in range(20):
    parent = programs[int(rng.integers(len(programs)))]
    others = neighbours(parent)
    other = others[int(rng.integers(len(others)))] if others else parent
    result = run(other, start)[-1]
    if result not in results:
      programs.append(other)
      results.append(result)
    if len(results) == len(boards.LETTERS):
      return results
  return None


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Changes one step, so that another of the four boards is the result."""
  others = [other for other in neighbours(scene.program)
            if run(other, scene.start)[-1] in scene.results
            and run(other, scene.start)[-1] != run(scene.program, scene.start)[-1]]
  return dataclasses.replace(scene, program=others[int(rng.integers(len(others)))])


# --- What is shown and asked --------------------------------------------------------


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The start on the left, the four boards with their letters on the right."""
  ground = scene.look.background
  picture = canvas.blank(side, ground)
  colours = canvas.faint(ground), *(scene.look.rgb(name) for name in scene.colours)
  boards.paint(picture, scene.start, colours, *_START, _START_SIZE)
  canvas.rectangle(picture, canvas.Box(0, 13, 48, 14), canvas.ink(ground))
  for name, board, (top, left) in zip(boards.LETTERS, scene.results, _RESULTS, strict=True):
    canvas.letter(picture, name, top - 6, left + 5, canvas.ink(ground))
    boards.paint(picture, board, colours, top, left, _SIZE)
  return picture[None]


def question(scene: Scene) -> str:
  """Says the program and asks for the letter of its result."""
  return (f'Board on the left: {", ".join(scene.program)}. Which board comes out? '
          'Answer with its letter.')


def answer(scene: Scene) -> str:
  """By running the program."""
  return boards.LETTERS[scene.results.index(run(scene.program, scene.start)[-1])]


def options(scene: Scene) -> tuple[str, ...]:
  """The letters."""
  del scene
  return boards.LETTERS


def describe(scene: Scene) -> str:
  """All boards by rows."""
  lines = [f'Left: {boards.text(scene.start, scene.colours)}']
  lines += [f'{name}: {boards.text(board, scene.colours)}'
            for name, board in zip(boards.LETTERS, scene.results, strict=True)]
  return '; '.join(lines) + ';'


def trace(scene: Scene) -> tuple[boards.Board, ...]:
  """The boards after each step; index i > 0 is the i-th of the scene's colours."""
  return run(scene.program, scene.start)


def trace_text(scene: Scene) -> str:
  """The boards after each step in words."""
  return boards.steps_text(scene.program, trace(scene), scene.colours)


TASK = base.choosing('program', 'transformation', 'spatial_manipulation', len(LEVELS), 1, draw,
                     twin, pictures, question, answer, options, describe)
