"""The map: retrieval, writing and the sliding window, each beside a plain definition."""

import itertools

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import base, games, localise, maps
from tests.game.conftest import quick

TRAVELER = games.open_game(cfg.Traveler(num_cells=12))
WORLDS = {'street': ((1, 12), (1, 8)), 'maze': ((5, 6), (3, 4))}
HOW = cfg.SlidingWindow(reach=1, margin=0.1, min_known=3)
NUM = 40


def _random(shape, view, seed):
  """Maps, views and origins, of few colours so that some places look alike."""
  rng = np.random.default_rng(seed)
  colours = rng.integers(0, 2, (NUM, *shape, 3)).astype(np.float32)
  known = rng.random((NUM, *shape)) < 0.6
  seen = rng.integers(0, 2, (NUM, *view, 3)).astype(np.float32)
  shown, kept = rng.random((NUM, *view)) < 0.9, rng.random((NUM, *view)) < 0.7
  stays, settled = rng.random((NUM, *view)) < 0.7, rng.random((NUM, *shape)) < 0.8
  origin = np.stack([rng.integers(-(view[i] - 1) if shape[i] > 1 else 0, shape[i], NUM)
                     for i in (0, 1)], -1)
  return (maps.Map(np.where(known[..., None], colours, 0), known, known & settled),
          maps.View(seen, shown, kept & shown, kept & shown & stays), origin.astype(np.int32))


def _cells(view, origin, shape):
  """(row, column) in the view and in the world, of the cells that lie in the world."""
  for i, j in itertools.product(range(view[0]), range(view[1])):
    place = origin[0] + i, origin[1] + j
    if 0 <= place[0] < shape[0] and 0 <= place[1] < shape[1]:
      yield (i, j), place


def _slow_cost(colours, settled, seen, shown, origin):
  errors = [((seen[at] - colours[place]) ** 2).sum()
            for at, place in _cells(shown.shape, origin, settled.shape)
            if settled[place] and shown[at]]
  return (np.mean(errors), len(errors)) if errors else (0.0, 0)


def _slow_link(colours, settled, seen, shown, expected):
  here, _ = _slow_cost(colours, settled, seen, shown, expected)
  best, found = here, (0, 0)
  steps = [range(-1, 2) if size > 1 else (0,) for size in settled.shape]
  for offset in sorted(itertools.product(*steps), key=lambda o: (abs(o[0]) + abs(o[1]), o)):
    cost, count = _slow_cost(colours, settled, seen, shown, expected + np.array(offset))
    if offset != (0, 0) and cost < here - HOW.margin and count >= HOW.min_known and cost < best:
      best, found = cost, offset
  return found


@pytest.mark.parametrize('name', WORLDS)
def test_cells_are_found_written_and_linked_as_defined(name):
  shape, view = WORLDS[name]
  remembered, seen, origin = _random(shape, view, seed=1)

  def fast(one, seen, origin):
    return (maps.retrieve(one, origin, view), maps.write(one, seen, origin, 'first'),
            maps.write(one, seen, origin, 'last'), localise.link(one, seen, origin, HOW))

  (colours, known), first, last, offset = jax.tree.map(
      np.asarray, quick(jax.vmap(fast))(remembered, seen, origin))
  moved = 0
  for n in range(NUM):
    old, *old_marks = remembered.colours[n], remembered.known[n], remembered.settled[n]
    expected = [np.zeros((*view, 3)), np.zeros(view, bool)]
    written = {rule: [x.copy() for x in (old, *old_marks)] for rule in ('first', 'last')}
    for at, place in _cells(view, origin[n], shape):
      expected[0][at], expected[1][at] = old[place], old_marks[0][place]
      for rule, (c, k, s) in written.items():
        if seen.kept[n][at] and (rule == 'last' or not old_marks[1][place]):
          c[place], k[place], s[place] = seen.colours[n][at], True, seen.settled[n][at]
    np.testing.assert_array_equal(colours[n], expected[0])
    np.testing.assert_array_equal(known[n], expected[1])
    for found, rule in ((first, 'first'), (last, 'last')):
      np.testing.assert_array_equal(found.colours[n], written[rule][0])
      np.testing.assert_array_equal(found.known[n], written[rule][1])
      np.testing.assert_array_equal(found.settled[n], written[rule][2])
    slow = _slow_link(old, old_marks[1], seen.colours[n], seen.shown[n], origin[n])
    assert tuple(offset[n]) == slow, n
    moved += slow != (0, 0)
  assert 3 < moved < NUM - 3, 'both outcomes must be tried'


def test_a_frame_is_kept_as_its_colours_and_told_as_its_contents():
  game = TRAVELER
  cells = np.array([[7, 0, 1, 2, 3, 4, 5, 6]], np.int32)

  def program(cells):
    objects = np.array([[0, 3]], np.int32)
    frame = game.draw(np.array([407], np.int32), cells, objects).astype(np.float32) / 255
    told = maps.contents_of(game, maps.colours_of(game, cells) + 0.02, cells != 5)
    by_pixels = maps.see(game, frame, 'colours')
    painted = maps.paint(game, maps.Map.empty((1, 12)), np.array([0, 5]), np.asarray(3))
    emptied = maps.paint(game, painted, np.array([0, 5]), np.asarray(0))
    forgotten = maps.paint(game, painted, np.array([0, 5]), np.asarray(7))
    return maps.see(game, frame, 'contents'), by_pixels, told, painted, emptied, forgotten

  seen, by_pixels, told, painted, emptied, forgotten = jax.tree.map(
      np.asarray, quick(program)(cells))
  assert seen.kept.tolist() == by_pixels.kept.tolist() == [[False, *[True] * 7]]
  assert seen.settled.tolist() == by_pixels.settled.tolist() == [[False, False, *[True] * 6]]
  assert seen.shown.all()
  np.testing.assert_allclose(seen.colours, by_pixels.colours, atol=1e-6)
  np.testing.assert_array_equal(told, np.where(cells == 5, base.UNKNOWN, cells))
  for place, content in enumerate(cells[0]):
    picture = game.tiles.pictures[content] / 255
    np.testing.assert_allclose(seen.colours[0, place], picture.mean((0, 1)), atol=1e-6)
  np.testing.assert_allclose(painted.colours[0, 5], game.tiles.colours[3])
  assert painted.known.sum() == painted.settled.sum() == 1
  np.testing.assert_allclose(emptied.colours[0, 5], game.tiles.colours[0])
  assert emptied.known.sum() == 1 and not emptied.settled.any()
  assert not forgotten.known.any() and not forgotten.colours.any()


def test_the_colours_of_a_map_can_be_told_apart_by_the_margin():
  for config in (cfg.Traveler(), cfg.Traveler('64x64'), cfg.PacMan(), cfg.PacMan('64x64')):
    colours = games.open_game(config).tiles.colours
    apart = ((colours[:, None] - colours[None]) ** 2).sum(-1)
    # One cell of eight that differs is beyond the margin.
    assert apart[~np.eye(len(colours), dtype=bool)].min() / 8 > cfg.SlidingWindow().margin


def test_the_nearest_offset_comes_first():
  assert localise.offsets(2, (1, 9)).tolist() == [[0, 0], [0, -1], [0, 1], [0, -2], [0, 2]]
  assert len(localise.offsets(1, (9, 9))) == 9


@pytest.mark.parametrize('config, memory, expected', [
    (cfg.Pong(), cfg.MapMemory(), 'Pong has no map: choose MaaG.map = @cfg.NoMap'),
    (cfg.PacMan(), cfg.MapMemory('colours'), "choose 'contents'"),
    (cfg.PacMan(), cfg.MapMemory(), 'choose MapMemory.localisation = @cfg.DeadReckoning')])
def test_what_a_game_has_no_map_for_is_refused(config, memory, expected):
  with pytest.raises(UserError, match=expected):
    maps.check(games.open_game(config), memory)


@pytest.mark.parametrize('config', [cfg.Traveler(num_cells=24), cfg.PacMan(), cfg.Pong()], ids=repr)
@pytest.mark.slow
def test_a_perfect_memory_is_what_the_map_of_true_frames_retrieves(config):
  """Frame by frame the map knows exactly what `Truth.memory` says, written by its own view."""
  from jaxrl_pt.game import trajectories
  source = trajectories.Source(cfg.Trajectories(config, num_frames=30), True)
  game, batch = games.open_game(config), source.batch(range(8))

  def episode(frames, truth):
    def turn(remembered, now):
      frame, truth = now
      found = maps.retrieve(remembered, truth.origin, game.view_shape)
      view = maps.see(game, frame, 'contents')
      return maps.write(remembered, view, truth.origin, 'last'), found
    return jax.lax.scan(turn, maps.Map.empty(game.world_shape), (frames, truth))[1]

  colours, known = jax.jit(jax.vmap(episode))(batch.frames, batch.truth)
  told = maps.contents_of(game, colours, known)
  np.testing.assert_array_equal(told, batch.truth.memory)
