"""Perspectives, views, mazes and walks: from words or pixels, against definitions of their own."""

import cmath
import math
import re

import numpy as np
import pytest

from jaxrl_pt.data.spatial import base, canvas, maze, perspective, views, walk
from tests.data.spatial.test_transformations import drawn

SIDES = ('front', 'left', 'behind', 'right')  # Counterclockwise in quarter turns.
DIRECTIONS = ('right', 'above right', 'above', 'above left', 'left', 'below left', 'below',
              'below right')


def listed(text):
  """The things that words name, each as a complex number: to the right, and i upwards."""
  return {name: complex(int(column), -int(row)) for name, row, column in re.findall(
      r'(\w+ \w+) at row (-?\d+), column (-?\d+)', text)}


def side_of(heading, offset):
  """The side by the angle of an offset from the heading, which is clear by 14 degrees or more."""
  quarters = cmath.phase(offset / heading) / (math.pi / 2)
  assert abs(quarters - round(quarters)) < (45 - 14) / 90
  return SIDES[round(quarters) % 4]


# --- Perspectives -----------------------------------------------------------------


def test_perspectives_are_angles():
  turns = {'left': 1j, 'right': -1j, 'around': -1}
  for scene in drawn(perspective.TASK, 12):
    things = listed(perspective.describe(scene))
    at, ahead, subject = re.search(r'at the (\w+ \w+), face the (\w+ \w+).* is the (\w+ \w+)\?',
                                   perspective.question(scene)).groups()
    heading = things[ahead] - things[at]
    for turn in re.findall(r'turn (\w+)', perspective.question(scene)):
      heading *= turns[turn]
    assert perspective.answer(scene) == side_of(heading, things[subject] - things[at])


def test_pictures_show_the_things_and_nothing_else():
  for task in (perspective.TASK, views.TASK):
    for scene in drawn(task, 4):
      shown = views.shown(scene) if task is views.TASK else [scene.things]
      for picture, things in zip(task.pictures(scene, 48), shown, strict=True):
        expected = canvas.blank(48, scene.look.background)
        for thing in things:
          top, left = thing.row - 3, thing.column - 3
          assert 0 <= top <= 41 and 0 <= left <= 41
          expected[top:top + 7, left:left + 7][canvas.mask(thing.shape, 7, 7)] = (
              scene.look.rgb(thing.colour))
        np.testing.assert_array_equal(picture, expected)


# --- Views ------------------------------------------------------------------------


def test_one_turn_and_place_alone_fit_both_views():
  middle = complex(24, -24)
  for scene in drawn(views.TASK, 5):
    first, second = map(listed, views.describe(scene).split('Second picture'))
    shared = sorted(first.keys() & second.keys())
    assert len(shared) >= 2
    fits = {}
    for turn in (1, 1j, -1, -1j):
      turned = {name: (place - middle) * turn + middle for name, place in second.items()}
      offset = first[shared[0]] - turned[shared[0]]
      if all(abs(turned[name] + offset - first[name]) < 1e-9 for name in shared):
        fits[turn] = {name: place + offset for name, place in turned.items()}
    assert len(fits) == 1
    (placed,) = fits.values()
    subject, origin = re.search(r'where is the (\w+ \w+) from the (\w+ \w+)\?',
                                views.question(scene)).groups()
    assert subject not in first and origin not in second
    eighths = cmath.phase(placed[subject] - first[origin]) / (math.pi / 4)
    assert abs(eighths - round(eighths)) * 45 < 22.5 - 7.9
    assert views.answer(scene) == DIRECTIONS[round(eighths) % 8]


def test_views_are_turned_from_the_second_level_on():
  turns = [{scene.turns for scene in drawn(views.TASK, 10, levels=[level])} for level in (1, 2)]
  assert turns == [{0}, {0, 1, 2, 3}]


# --- Walks ------------------------------------------------------------------------


def _tiles(scene):
  """Floors and turns of the tiles of a picture, by their colours and the base of the arrow."""
  picture, ground = walk.pictures(scene, 48)[0], scene.look.background
  across = math.ceil(math.sqrt(len(scene.floors)))
  size = 48 // across
  names = {rgb: name for name, rgb in scene.look.colours} | {canvas.ink(ground): 'plain'}
  floors, turns = [], []
  for k in range(across**2):
    top, left = size * (k // across), size * (k % across)
    if tuple(picture[top, left]) == ground:
      break
    floors.append(names[tuple(picture[top, left].tolist())])
    inner = (picture[top + 1:top + size - 2, left + 1:left + size - 2] == ground).all(-1)
    bases = inner[-1].all(), inner[:, 0].all(), inner[0].all(), inner[:, -1].all()
    turns.append(('straight', 'right', 'around', 'left')[bases.index(True)] if any(bases) else '')
  return floors, turns


def test_walks_are_replayed_from_pixels():
  for scene in drawn(walk.TASK, 5):
    floors, turns = _tiles(scene)
    assert tuple(floors) == scene.floors and turns[0] == ''
    place, heading, floor_at = 0, 1j, {0: floors[0]}
    for turn, floor in zip(turns[1:], floors[1:], strict=True):
      heading *= {'straight': 1, 'right': -1j, 'left': 1j, 'around': -1}[turn]
      place += heading
      assert floor_at.setdefault(place, floor) == floor  # A cell looks the same again.
    target = re.search(r'the (\w+) floor\?', walk.question(scene))[1]
    where, = (cell for cell, floor in floor_at.items() if floor == target)
    assert walk.answer(scene) == side_of(heading, where - place)


def test_walks_come_back_and_their_twins_differ_in_one_turn():
  for level, grows in enumerate(walk.LEVELS, 1):
    rng = base.generator(5, 'test', 'walk', level, 0)
    scene = walk.draw(rng, level, base.TRAINED_LOOK, False)
    cells, _ = walk.replay(scene.turns)
    assert len(cells) - len(set(cells)) >= grows.num_revisits
    assert len(scene.turns) == grows.num_steps
    twin = walk.twin(rng, scene)
    assert twin.floors == scene.floors
    assert sum(a != b for a, b in zip(scene.turns, twin.turns)) == 1


def test_floors_that_no_map_has_are_found():
  turns = ('right',) * 4
  scene = walk.Scene(base.TRAINED_LOOK, turns, ('red', 'plain', 'plain', 'blue', 'red'), 'blue')
  assert walk.is_consistent(scene)
  for floors in (('red', 'plain', 'plain', 'blue', 'plain'),
                 ('red', 'blue', 'plain', 'blue', 'red')):
    assert not walk.is_consistent(walk.Scene(base.TRAINED_LOOK, turns, floors, 'blue'))


# --- Mazes ------------------------------------------------------------------------


def _board(scene):
  """The holes of a picture, and the cells of the things that the question names."""
  picture, size = maze.pictures(scene, 48)[0], 48 // len(scene.board)
  edge = (48 - size * len(scene.board)) // 2
  colours = re.search(r'the (\w+) \w+ to the (\w+) ', maze.question(scene)).groups()
  has = lambda cell, rgb: (cell == rgb).all(-1).any()
  cells = {(r, c): picture[edge + r * size:edge + (r + 1) * size - 1,
                           edge + c * size:edge + (c + 1) * size - 1]
           for r in range(len(scene.board)) for c in range(len(scene.board))}
  holes = {place for place, cell in cells.items() if has(cell, canvas.ink(scene.look.background))}
  start, goal = (next(p for p, cell in cells.items() if has(cell, scene.look.rgb(colour)))
                 for colour in colours)
  return cells.keys() - holes, start, goal


def _shortest_paths(free, start, goal):
  """The states of all shortest paths, from all paths of growing length that visit no cell twice."""
  paths = [[start]]
  while not (done := [path for path in paths if path[-1] == goal]):
    paths = [[*path, near] for path in paths
             for near in ((path[-1][0] + dr, path[-1][1] + dc)
                          for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)))
             if near in free and near not in path]
  return done


def _graded(free, paths, actions):
  """EM and PR by their definitions: states are compared with those of every shortest path."""
  states = [paths[0][0]]
  for action in actions:
    dr, dc = {'up': (-1, 0), 'down': (1, 0), 'left': (0, -1), 'right': (0, 1)}[action]
    near = states[-1][0] + dr, states[-1][1] + dc
    states.append(near if near in free else states[-1])
  prefixes = [next((k for k, (a, b) in enumerate(zip(states[1:], path[1:])) if a != b),
                   min(len(states), len(path)) - 1) for path in paths]
  return states in paths, max(prefixes) / (len(paths[0]) - 1)


def _sequences(rng, answer):
  """Random actions, and the right ones cut, changed and continued."""
  names = tuple(maze.ACTIONS)
  for _ in range(8):
    yield [names[k] for k in rng.integers(4, size=rng.integers(1, 12)).tolist()]
    k = int(rng.integers(len(answer)))
    yield [*answer[:k], names[rng.integers(4)], *answer[k:]]
    yield [*answer[:k], names[rng.integers(4)], *answer[k + 1:]]
  yield from (list(answer), [*answer, 'up'], list(answer[:-1]), [*answer, *answer])


def test_paths_are_compared_with_every_shortest_path():
  rng, num = np.random.default_rng(1), 0
  for scene in drawn(maze.TASK, 5, levels=[1, 2, 3]):
    free, start, goal = _board(scene)
    paths = _shortest_paths(free, start, goal)
    answer = maze.answer(scene).split()
    assert _graded(free, paths, answer) == (True, 1.0)
    for actions in _sequences(rng, answer):
      if actions:
        num += 1
        exact, progress = _graded(free, paths, actions)
        grade = maze.grade(scene, ' '.join(actions))
        assert (grade.correct, grade.score, grade.valid) == (exact, pytest.approx(progress), True)
  assert num > 800


def test_bigger_boards_are_read_from_pixels_too():
  for scene in drawn(maze.TASK, 2, levels=[4, 5, 6]):
    free, start, goal = _board(scene)
    assert (start, goal) == (scene.start, scene.goal)
    assert free == {(r, c) for r, row in enumerate(scene.board) for c, cell in enumerate(row)
                    if cell == maze.FREE}


def test_invalid_actions_are_counted_and_stay():
  board = ((0, 1, 0), (0, 0, 0), (0, 0, 0))
  scene = maze.Scene(base.TRAINED_LOOK, board, (0, 0), (0, 2), ('red', 'disc'), ('blue', 'plus'))
  followed = maze.follow(scene, ('up', 'right', 'jump', 'down', 'up', 'down', 'right'))
  assert followed.states == ((0, 0), (0, 0), (0, 0), (0, 0), (1, 0), (0, 0), (1, 0), (1, 1))
  assert followed.num_invalid == 3 and not followed.exact and followed.progress == 0
  assert followed.rewards == (-5, -5, -5, 1, 0, 1, 1)
  assert maze.shortest(scene) == ('down', 'right', 'right', 'up')


def test_texts_that_are_no_paths_are_invalid():
  scene = next(drawn(maze.TASK, 1))
  right = maze.answer(scene)
  for text in ('', ' ', 'north', 'u', right.replace(' ', ','), f'{right} .', 'up ' * 37,
               'up' * 10**6, right.replace(' ', ''), 'nan', f'({right})'):
    assert maze.grade(scene, text) == base.INVALID
  assert maze.grade(scene, f' {right.upper()}\n').correct
  assert maze.grade(scene, ('up ' * 36)).valid


def test_traces_of_mazes_move_the_agent_to_the_goal():
  for scene in drawn(maze.TASK, 2):
    trace = maze.trace(scene)
    agents = [np.argwhere(np.array(board) == maze.AGENT).tolist() for board in trace]
    assert all(len(found) == 1 for found in agents) and agents[-1] == [list(scene.goal)]
    steps = np.abs(np.diff([list(scene.start), *(found[0] for found in agents)], axis=0)).sum(1)
    assert (steps == 1).all() and len(steps) == len(maze.answer(scene).split())
    assert all((np.array(board) == maze.GOAL).sum() == (k < len(trace) - 1)
               for k, board in enumerate(trace))
    assert maze.trace_text(scene).split('\n')[0].startswith(maze.answer(scene).split()[0] + ': ')


def test_twins_of_mazes_differ_in_one_cell():
  for index in range(6):
    rng = base.generator(5, 'test', 'maze', 2, index)
    scene = maze.draw(rng, 2, base.TRAINED_LOOK, False)
    twin = maze.twin(rng, scene)
    assert (np.array(scene.board) != np.array(twin.board)).sum() == 1
