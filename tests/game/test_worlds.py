"""Clips of episodes: what a model of a game sees, is told and is to draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt import params as P
from jaxrl_pt.game import base, games, maps, worlds
from jaxrl_pt.models import world
from tests.game.conftest import NUM_FRAMES, quick

EXACT = cfg.Diffusion(windows=5, map_dropout=0.0, pose_jitter=0.0, paint_rate=0.0)
MODEL = cfg.DiT(1, 16, 16, 2, 4, cfg.FrameHistory(3))


@pytest.mark.parametrize('game', [cfg.Traveler(), cfg.Traveler('128x128'), cfg.Pong(),
                                  cfg.PacMan(), cfg.PacMan('64x64')], ids=repr)
def test_cells_lie_in_the_frame_where_the_shape_says(game):
  opened = games.open_game(game)
  shape = worlds.shape_of(opened)
  top, left, height, width = shape.grid
  rows, columns = shape.view
  assert top + rows * height <= shape.frame[0] and left + columns * width <= shape.frame[1]
  assert (height == 0) == (not opened.contents) and shape.digits[0] in (2, 3)
  if not opened.contents:
    return
  counters = jnp.zeros(len(opened.counters), int)
  objects = jnp.zeros((opened.num_objects, 2), int)
  first, second = (np.asarray(opened.draw(counters, jnp.full(shape.view, content), objects))
                   for content in (0, 1))
  changed = np.argwhere((first != second).any(-1))
  assert (changed.min(0) >= [top, left]).all()
  assert (changed.max(0) < [top + rows * height, left + columns * width]).all()
  assert np.ptp(changed[:, 0]) >= (rows - 1) * height


@pytest.mark.slow
def test_a_clip_is_a_frame_with_those_before_it(played_by_name):
  played = played_by_name('traveler')
  cut = quick(lambda episodes, keys: worlds.clips(
      played.game, EXACT, MODEL, episodes, keys))
  found = cut(played.batch, jax.random.split(jax.random.key(0), len(played.batch.actions)))
  assert found.frames.shape == (16, 5, 4, 24, 32, 3)
  places = []
  for row in range(16):
    truth = jax.tree.map(lambda x, row=row: x[row], played.batch.truth)
    for n in range(5):
      # The frame is told by its score, place and map: the only one of the episode with all three.
      same = [t for t in range(1, NUM_FRAMES)
              if (played.batch.frames[row, t] == found.frames[row, n, -1]).all()
              and (truth.memory[t] == found.crop[row, n]).all()
              and (truth.counters[t] == found.counters[row, n]).all()
              and truth.event[t] == found.event[row, n]
              and played.batch.actions[row, t] == found.action[row, n]
              and all((played.batch.frames[row, max(t - k, 0)] == found.frames[row, n, 3 - k]).all()
                      for k in range(1, 4))]
      assert same, (row, n)
      places.append(same[0])
  assert min(places) <= 3 and max(places) >= NUM_FRAMES - 4 and len(set(places)) > 20


def test_rare_events_count_as_much_as_others():
  event = jnp.array([[0, 0, 0, 1], [0, 0, 0, 0]])
  weight = np.asarray(worlds.balanced(event, 3))
  np.testing.assert_allclose(weight[event == 1], 4)
  np.testing.assert_allclose(weight[event == 0], 4 / 7)
  np.testing.assert_allclose(worlds.balanced(jnp.zeros((2, 2), int), 3), 1)


@pytest.mark.slow
def test_the_map_has_holes_and_is_off_by_one_at_times():
  traveler, pacman = (games.open_game(g) for g in (cfg.Traveler(), cfg.PacMan()))
  crop = jnp.arange(8)[None] % 6 + 1
  keys = jax.random.split(jax.random.key(1), 2000)
  noisy = lambda game, crop, **noise: np.asarray(jax.jit(jax.vmap(
      lambda key: worlds.noisy_crop(game, dataclasses.replace(EXACT, **noise), crop, key)))(keys))
  holes = noisy(traveler, crop, map_dropout=0.2)
  assert abs((holes == -1).mean() - 0.2) < 0.02 and ((holes == -1) | (holes == crop)).all()
  moved = noisy(traveler, crop, pose_jitter=0.3)[:, 0]
  left, right = np.append(crop[0, 1:], -1), np.insert(crop[0, :-1], 0, -1)
  shares = [(moved == row).all(1).mean() for row in (crop[0], left, right)]
  np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.03)
  maze = jnp.arange(81).reshape(9, 9) % 3
  assert (noisy(pacman, maze, pose_jitter=1.0) == maze).all()


@pytest.mark.parametrize('config', [cfg.Traveler(num_cells=24), pytest.param(
    cfg.PacMan(), marks=pytest.mark.slow)], ids=repr)
def test_what_is_painted_is_told_and_shown_and_stands_where_nobody_does(config):
  game, number = games.open_game(config), 3000
  state = quick(game.init)(jnp.array([3, 4], jnp.uint32))
  for action in (0, 1, 2, 2, 2) if game.stay == 1 else (0, 2, 1, 3, 3):
    state = quick(game.step)(state, action)
  truth = quick(game.truth)(state)
  keys = jax.random.split(jax.random.key(2), number)
  found = jax.tree.map(np.asarray, quick(jax.vmap(
      lambda key: worlds.painted(game, 0.5, truth, key)))(keys))
  truth = jax.tree.map(np.asarray, truth)
  changed = (found.cells != truth.cells).reshape(number, -1)
  assert set(changed.sum(1).tolist()) == {0, 1}
  kinds = len(maps.buildable(game))
  # A cell that is painted as it is has not changed; of bare ground none can be.
  is_free = np.isin(truth.cells, [*maps.buildable(game), *np.flatnonzero(game.tiles.vacant)])
  for row, column in truth.objects.tolist():
    is_free[row, column] = False
  same = np.isin(truth.cells[is_free], maps.buildable(game)).mean() / kinds
  assert abs(changed.any(1).mean() - 0.5 * (1 - same)) < 0.04
  assert (changed.any(0) == is_free.ravel()).all()
  drawn = found.cells.reshape(number, -1)[changed]
  shares = np.bincount(drawn, minlength=len(game.contents))
  assert (shares > 0).nonzero()[0].tolist() == maps.buildable(game).tolist()
  told = found.memory != truth.memory
  assert (found.memory[told] == found.cells[told]).all()
  unlike = (found.memory != found.cells) & (found.cells != base.UNKNOWN)
  assert (unlike <= (truth.memory != truth.cells)).all()


@pytest.mark.slow
def test_a_painted_clip_shows_it_in_its_last_frame_and_only_to_who_sees_the_map(played_by_name):
  played = played_by_name('traveler')
  keys = jax.random.split(jax.random.key(0), len(played.batch.actions))
  def cut(rate, **changes):
    clips = quick(lambda episodes: worlds.clips(
        played.game, dataclasses.replace(EXACT, paint_rate=rate),
        dataclasses.replace(MODEL, **changes), episodes, keys))(played.batch)
    return jax.tree.map(np.asarray, dataclasses.replace(clips, keys=0))
  plain, painted = cut(0.0), cut(1.0)
  np.testing.assert_array_equal(painted.frames[:, :, :-1], plain.frames[:, :, :-1])
  told = painted.crop != plain.crop
  assert set(told.sum((2, 3)).ravel().tolist()) == {0, 1} and told.mean((0, 1, 2))[3] == 0
  top, left, height, width = played.game.grid
  shown = (painted.frames != plain.frames)[:, :, -1].any(-1)
  assert not shown[:, :, :top].any() and not shown[:, :, top + height:].any()
  cells = shown[:, :, top:top + height].reshape(*told.shape[:2], height, 8, width).any((2, 4))
  assert (cells <= told[:, :, 0]).all() and cells.any((1, 2)).all()
  unseen = cut(1.0, conditions=cfg.Conditions(map=False))
  jax.tree.map(np.testing.assert_array_equal, unseen, plain)


@pytest.mark.parametrize('name, trained, frozen', [
    ('maag_tiny', 1_041_010, 0), ('maag_recurrent_tiny', 904_146, 159_243),
    # The base model has about 33M parameters (2412.00887), and LogicNet 0.4M of them.
    ('maag_pgg', 32_944_866, 53_221_387)])
def test_counts_of_the_shipped_models(name, trained, frozen):
  run, _ = gin_bindings.load([f'gin/run/{name}.gin'], ["cfg.Diffusion.vae_from = 'a'"]
                             if frozen else [])
  specs = world.build(run.model, worlds.shape_of(games.open_game(run.data.game))).specs
  assert P.count(P.trained(specs, specs)) == trained
  assert P.count(specs) - trained == frozen
