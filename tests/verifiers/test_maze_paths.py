"""The verifier of maze paths on arrays equals the simulation in plain Python."""

import jax
import numpy as np
import pytest

from jaxrl_pt.data.spatial import base, maze
from jaxrl_pt.verifiers import maze_paths

SIZE, LENGTH, PER_BOARD = 8, 20, 60
NAMES = tuple(maze.ACTIONS)


@pytest.fixture(scope='module')
def scenes():
  keys = [(level, index) for level in range(1, 7) for index in range(8 if level < 5 else 2)]
  return [maze.draw(base.generator(0, 'test', 'maze', *key), key[0], base.TRAINED_LOOK, False)
          for key in keys]


def _actions(rng, scene):
  """Actions that are random, or right but for a few changes, among them numbers of no action."""
  answer = [NAMES.index(action) for action in maze.shortest(scene)][:LENGTH]
  actions = rng.integers(4, size=LENGTH)
  kind = rng.integers(4)
  if kind > 0:
    actions[:len(answer)] = answer
  if kind > 1:
    actions[rng.integers(LENGTH)] = rng.integers(4)
  if kind > 2:
    actions[rng.integers(LENGTH)] = rng.choice([-2**31, -1, 4, 5, 2**31 - 1])
  return actions, rng.choice([0, 1, len(answer) - 1, len(answer), len(answer), LENGTH])


def test_arrays_equal_the_simulation(scenes):
  rng = np.random.default_rng(0)
  batch = [(scene, *_actions(rng, scene)) for scene in scenes for _ in range(PER_BOARD)]
  holes = np.ones((len(batch), SIZE, SIZE), bool)
  for k, (scene, _, _) in enumerate(batch):
    size = len(scene.board)
    holes[k, :size, :size] = np.array(scene.board) == maze.HOLE
  found = jax.jit(maze_paths.verify_paths)(
      holes, np.array([scene.start for scene, _, _ in batch], np.int32),
      np.array([scene.goal for scene, _, _ in batch], np.int32),
      np.array([actions for _, actions, _ in batch]).astype(np.int32),
      np.array([length for _, _, length in batch], np.int32))
  found = jax.tree.map(np.asarray, found)
  for k, (scene, actions, length) in enumerate(batch):
    words = [NAMES[a] if 0 <= a < 4 else 'none' for a in actions[:length].tolist()]
    expected = maze.follow(scene, words)
    there = slice(int(length))
    assert tuple(found.valid[k, there].tolist()) == expected.is_valid
    assert tuple(found.shorter[k, there].tolist()) == expected.is_shorter
    assert tuple(found.reward[k, there].tolist()) == expected.rewards
    assert not found.valid[k, length:].any() and not found.shorter[k, length:].any()
    assert not found.reward[k, length:].any()
    assert bool(found.exact[k]) == expected.exact
    assert found.progress[k] == np.float32(expected.progress)
  assert len(batch) > 2000 and 0.1 < found.exact.mean() < 0.9
  assert {-5.0, 0.0, 1.0} == set(found.reward.reshape(-1).tolist())


def test_distances_equal_the_search(scenes):
  distances = jax.jit(maze_paths.distances)
  for scene in scenes[::6]:
    holes = np.ones((SIZE + 2, SIZE + 2), bool)
    size = len(scene.board)
    holes[1:size + 1, 1:size + 1] = np.array(scene.board) == maze.HOLE
    found = np.asarray(distances(holes, np.array(scene.goal) + 1))
    expected = np.full_like(found, holes.size)
    for (row, column), distance in maze.distances(scene).items():
      expected[row + 1, column + 1] = distance
    np.testing.assert_array_equal(found, expected)
