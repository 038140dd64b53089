"""Maze: the shortest way from one thing to another, round holes, one cell at a time.

An action moves by one cell; one that leaves the board or enters a hole is invalid and moves
nowhere. With d the distance to the goal by breadth-first search and n that of the start,

    exact match EM = the states are those of some shortest path, from the start to the goal
    progress rate PR = longest correct prefix / n, maximised over shortest paths.

A sequence of states is the beginning of some shortest path if and only if each step makes d smaller
by one, so that PR is the number of such steps at the beginning over n, and EM asks for n of them
and no more. The reward of a step (the transition reward of Visual Planning, arXiv 2505.11409) is 1
if it makes d smaller, 0 if it is valid but does not, and −5 if it is invalid.
`jaxrl_pt.verifiers.maze_paths` has the same as arrays.
"""

from collections import deque
from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from jaxrl_pt.data.spatial import base, boards, canvas

FREE, HOLE, GOAL, AGENT = range(4)  # Cells of a trace's boards.
# What an action is called, and how far down and right it goes.
ACTIONS = {'up': (-1, 0), 'down': (1, 0), 'left': (0, -1), 'right': (0, 1)}
SHORTER, NOT_SHORTER, FORBIDDEN = 1.0, 0.0, -5.0
_NAMES = ('hole', 'goal', 'agent')


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: rows and columns, holes, the least length of the way.

  blind_exact, blind_progress: the mean EM and PR of the single path that does best, measured by a
    beam search over paths on 1000 scenes or more.
  """

  size: int
  num_holes: int
  min_length: int
  blind_exact: float
  blind_progress: float


LEVELS = (Level(3, 2, 3, 0.061, 0.137), Level(4, 4, 4, 0.024, 0.124), Level(5, 7, 5, 0.011, 0.098),
          Level(6, 10, 6, 0.007, 0.086), Level(7, 14, 7, 0.006, 0.083),
          Level(8, 19, 8, 0.003, 0.069))


@dataclasses.dataclass(frozen=True)
class Scene:
  """A board of FREE and HOLE, and two things of which the first shall go to the second."""

  look: base.Look
  board: boards.Board
  start: boards.Cell
  goal: boards.Cell
  agent: tuple[str, str]  # its colour and shape
  flag: tuple[str, str]  # the goal's

  def is_free(self, cell: boards.Cell) -> bool:
    """Whether a cell lies on the board and is no hole."""
    size = len(self.board)
    return (0 <= cell[0] < size and 0 <= cell[1] < size
            and self.board[cell[0]][cell[1]] == FREE)


# --- The verifier -------------------------------------------------------------------


class Followed(NamedTuple):
  """What a sequence of actions does.

  states: the cells of the start and after each action.
  is_valid, is_shorter: of each action, whether it moves, and whether it comes closer to the goal.
  exact, progress: EM and PR.
  """

  states: tuple[boards.Cell, ...]
  is_valid: tuple[bool, ...]
  is_shorter: tuple[bool, ...]
  exact: bool
  progress: float

  @property
  def num_invalid(self) -> int:
    """How many actions are invalid."""
    return self.is_valid.count(False)

  @property
  def rewards(self) -> tuple[float, ...]:
    """The transition reward of each action."""
    return tuple(SHORTER if shorter else NOT_SHORTER if valid else FORBIDDEN
                 for valid, shorter in zip(self.is_valid, self.is_shorter, strict=True))


def moved(cell: boards.Cell, action: str) -> boards.Cell:
  """The cell to which an action leads, on the board or not."""
  down, right = ACTIONS[action]
  return cell[0] + down, cell[1] + right


def distances(scene: Scene) -> dict[boards.Cell, int]:
  """Steps to the goal from each cell from which it can be reached, by breadth-first search."""
  found, queue = {scene.goal: 0}, deque([scene.goal])
  while queue:
    cell = queue.popleft()
    for action in ACTIONS:
      other = moved(cell, action)
      if scene.is_free(other) and other not in found:
        found[other] = found[cell] + 1
        queue.append(other)
  return found


def follow(scene: Scene, actions: Sequence[str]) -> Followed:
  """Simulates actions; words that are no action are invalid ones."""
  distance = distances(scene)
  states, is_valid, is_shorter = [scene.start], [], []
  for action in actions:
    other = moved(states[-1], action) if action in ACTIONS else None
    is_valid.append(other is not None and scene.is_free(other))
    if other is None or not is_valid[-1]:
      other = states[-1]
    is_shorter.append(distance[other] < distance[states[-1]])
    states.append(other)
  num_steps = distance[scene.start]
  prefix = is_shorter.index(False) if False in is_shorter else len(is_shorter)
  exact = prefix == len(is_shorter) == num_steps
  return Followed(tuple(states), tuple(is_valid), tuple(is_shorter), exact, prefix / num_steps)


def parse(scene: Scene, text: str) -> tuple[str, ...] | None:
  """The actions of an answer's text, words with blanks between them; None if it is no answer.

  An answer has at most four actions for each cell of the board.
  """
  actions = tuple((base.folded(text) or '').split())
  is_answer = 0 < len(actions) <= 4 * len(scene.board)**2 and set(actions) <= set(ACTIONS)
  return actions if is_answer else None


def grade(scene: Scene, text: str) -> base.Grade:
  """EM as correct and PR as the score."""
  actions = parse(scene, text)
  if actions is None:
    return base.INVALID
  followed = follow(scene, actions)
  return base.Grade(followed.exact, followed.progress, True)


def shortest(scene: Scene) -> tuple[str, ...]:
  """The actions of a shortest path; of several that come closer the first of ACTIONS is taken."""
  distance, cell, actions = distances(scene), scene.start, []
  while cell != scene.goal:
    action = next(a for a in ACTIONS
                  if distance.get(moved(cell, a), distance[cell]) < distance[cell])
    actions.append(action)
    cell = moved(cell, action)
  return tuple(actions)


# --- Scenes ------------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws boards until the way is long enough and one cell can change it."""
  base.no_composition('maze', is_unseen)
  grows = LEVELS[level - 1]
  colours = rng.permutation([name for name, _ in look.colours])[:2].tolist()
  shapes = rng.permutation(look.shapes)[:2].tolist()
  while True:
    cells = [divmod(k, grows.size) for k in rng.permutation(grows.size**2).tolist()]
    holes = set(cells[2:2 + grows.num_holes])
    board = tuple(tuple(HOLE if (r, c) in holes else FREE for c in range(grows.size))
                  for r in range(grows.size))
    scene = Scene(look, board, cells[0], cells[1], (colours[0], shapes[0]),
                  (colours[1], shapes[1]))
    if (distances(scene).get(scene.start, 0) >= grows.min_length
        and any(_is_twin(scene, other) for other in _changed(scene))):
      return scene


def _changed(scene: Scene) -> list[Scene]:
  """The scenes with one hole more or less."""
  found = []
  for r, row in enumerate(scene.board):
    for c, content in enumerate(row):
      if (r, c) not in (scene.start, scene.goal):
        changed = (*row[:c], FREE if content == HOLE else HOLE, *row[c + 1:])
        board = (*scene.board[:r], changed, *scene.board[r + 1:])
        found.append(dataclasses.replace(scene, board=board))
  return found


def _is_twin(scene: Scene, other: Scene) -> bool:
  """Whether neither's answer is right in the other."""
  return (scene.start in distances(other) and not follow(other, shortest(scene)).exact
          and not follow(scene, shortest(other)).exact)


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Makes one hole, or fills one, so that another way is the shortest."""
  changed = _changed(scene)
  return next(changed[k] for k in rng.permutation(len(changed)).tolist()
              if _is_twin(scene, changed[k]))


# --- What is shown and asked --------------------------------------------------------


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The board, u8[1, side, side, 3]."""
  ground, num_cells = scene.look.background, len(scene.board)
  picture = canvas.blank(side, ground)
  size = canvas.UNITS // num_cells
  edge = (canvas.UNITS - size * num_cells) // 2
  colours = canvas.faint(ground), canvas.ink(ground)
  canvas.rectangle(picture, canvas.Box(0, 0, canvas.UNITS, canvas.UNITS), canvas.ink(ground))
  canvas.rectangle(picture, canvas.Box(edge, edge, canvas.UNITS - edge, canvas.UNITS - edge),
                   ground)
  boards.paint(picture, scene.board, colours, edge, edge, size)
  for (row, column), (colour, shape) in ((scene.start, scene.agent), (scene.goal, scene.flag)):
    top, left = edge + row * size, edge + column * size
    box = canvas.Box(top, left, top + size - 1, left + size - 1)
    canvas.shape(picture, shape, box, scene.look.rgb(colour))
  return picture[None]


def question(scene: Scene) -> str:
  """Says from where to where, and how to write a way."""
  agent, flag = ' '.join(scene.agent), ' '.join(scene.flag)
  return (f'What is a shortest way from the {agent} to the {flag}, past the grey cells? Answer '
          'with up, down, left or right for each step.')


def answer(scene: Scene) -> str:
  """A shortest path."""
  return ' '.join(shortest(scene))


def options(scene: Scene) -> tuple[str, ...]:
  """None: there are too many ways."""
  del scene
  return ()


def describe(scene: Scene) -> str:
  """The board by rows."""
  board = boards.text(_state(scene, scene.start), ('grey', *_NAMES[1:]))
  return f'{board}; agent: {" ".join(scene.agent)}; goal: {" ".join(scene.flag)};'


def _state(scene: Scene, agent: boards.Cell) -> boards.Board:
  """A board of FREE, HOLE, GOAL and AGENT."""
  marks = {scene.goal: GOAL, agent: AGENT}
  return tuple(tuple(marks.get((r, c), content) for c, content in enumerate(row))
               for r, row in enumerate(scene.board))


def trace(scene: Scene) -> tuple[boards.Board, ...]:
  """The board after each step of the answer; of FREE, HOLE, GOAL and AGENT."""
  return tuple(_state(scene, cell) for cell in follow(scene, shortest(scene)).states[1:])


def trace_text(scene: Scene) -> str:
  """The board after each step in words."""
  return boards.steps_text(shortest(scene), trace(scene), _NAMES)


def chance(scene: Scene) -> float:
  """The progress rate of the path that does best on boards of this size."""
  return next(level.blind_progress for level in LEVELS if level.size == len(scene.board))


TASK = base.Task('maze', 'navigation', 'logical_deduction', len(LEVELS), 1, draw, twin, pictures,
                 question, answer, options, describe, grade, chance)
