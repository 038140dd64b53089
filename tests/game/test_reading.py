"""The reader says exactly what is true of a clean frame, and gives up on a damaged one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.game import display, games, inspection, reading, trajectories
from tests.game.conftest import NUM_EPISODES, NUM_FRAMES, as_floats, quick


def _is_exact(readings, truth):
  same = [np.asarray(getattr(readings, name)) == getattr(truth, name)
          for name in ('counters', 'cells', 'objects')]
  return readings.readable & np.all([x.reshape(*x.shape[:2], -1).all(-1) for x in same], axis=0)


def test_every_frame_is_read_exactly(played):
  readings, truth = played.readings, played.batch.truth
  assert _is_exact(readings, truth).all()
  assert readings.residual.max() < 1e-3 and readings.blend.max() < 1e-3


def test_movements_are_read_from_two_frames(played):
  before, after = (jax.tree.map(lambda x, s=s: x[:, s], played.readings)
                   for s in (slice(-1), slice(1, None)))
  moved, decided = quick(jax.vmap(jax.vmap(played.game.moved)))(before, after)
  right = (np.asarray(moved) == played.batch.truth.moved[:, 1:]).all(-1)
  assert right[np.asarray(decided)].all() and np.mean(decided) > 0.9


def _reread(played, frames):
  found = played.read(np.asarray(frames, np.float32))
  return jax.tree.map(lambda x: np.asarray(x).reshape(NUM_EPISODES, NUM_FRAMES, *x.shape[1:]),
                      found)


def test_damaged_frames_are_unreadable_and_little_noise_is_not(played):
  clean, rng = as_floats(played.batch.frames), np.random.default_rng(0)
  assert not _reread(played, rng.random(clean.shape)).readable.any()
  grey = np.full_like(clean, 0.5)
  assert not _reread(played, grey).readable.any()
  faint = _reread(played, clean + rng.normal(0, 0.02, clean.shape))
  assert _is_exact(faint, played.batch.truth).all()
  # The display moved by a pixel, so that every digit is in the wrong place.
  moved = clean.copy()
  moved[:, :6 * (clean.shape[2] // 32)] = np.roll(moved[:, :6 * (clean.shape[2] // 32)], 1, 2)
  assert not _reread(played, moved).readable.any()


def test_what_lies_between_two_frames_is_unreadable(played):
  clean, truth = as_floats(played.batch.frames), played.batch.truth
  other = np.roll(clean, NUM_FRAMES, 0)  # the frame of another episode
  rows = display.NUM_ROWS * (clean.shape[2] // 32) - (clean.shape[2] // 32)
  blended = clean.copy()
  blended[:, :rows] = (clean[:, :rows] + other[:, :rows]) / 2
  differs = (truth.counters != np.roll(truth.counters, 1, 0)).any(-1)
  readable = _reread(played, blended).readable
  assert differs.mean() > 0.3 and not readable[differs].any() and readable[~differs].all()
  # A sixth of another frame leaves no doubt which one is shown.
  mostly = _reread(played, clean * 5 / 6 + other / 6)
  assert not (mostly.readable & ~_is_exact(mostly, truth)).any()


def test_each_limit_notices_what_the_other_does_not(played_by_name):
  played = played_by_name('traveler')
  clean = as_floats(played.batch.frames)
  foreign = clean.copy()
  foreign[:, 1:5, 20:24] = 1  # beside the digits, where nothing is recognised
  found = _reread(played, foreign)
  assert found.blend.max() < 0.01 and not found.readable.any()
  glyphs = display.Digits(1, 3, 1).templates / 255
  doubtful = clean.copy()
  doubtful[:, 1:6, 9:12] = 0.65 * glyphs[8] + 0.35 * glyphs[0]
  found = _reread(played, doubtful)
  assert (found.counters % 10 == 8).all() and found.residual.max() < reading.MAX_RESIDUAL
  assert not found.readable.any()


def test_glyphs_are_three_dots_apart():
  flat = display.FONT.reshape(10, -1)
  apart = (flat[:, None] != flat[None]).sum(-1)
  assert apart[~np.eye(10, dtype=bool)].min() == 3


def test_the_share_of_a_rival():
  templates = np.array([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]])
  tiles = np.stack([templates[0], 0.7 * templates[0] + 0.3 * templates[2],
                    0.4 * templates[1] + 0.6 * templates[2]])
  classify = quick(lambda tiles: reading.classify(tiles, templates))
  best, share = classify(jnp.asarray(tiles, jnp.float32))
  assert best.tolist() == [0, 0, 2]
  np.testing.assert_allclose(share, [0, 0.3, 0.4], atol=1e-6)


def test_digits_are_split_and_joined():
  digits = display.Digits(1, 3, 1)
  values = np.arange(1000)
  parts = np.asarray(digits.split(values))
  assert parts[407].tolist() == [4, 0, 7] and (np.asarray(digits.join(parts)) == values).all()


@pytest.mark.parametrize('frame', [
    np.zeros((24, 32, 1), np.uint8), np.zeros((32, 24, 3), np.uint8),
    np.zeros((64, 64, 3), np.float32), np.zeros((24, 32, 3), np.int32)])
def test_another_shape_is_no_frame(frame):
  with pytest.raises(ValueError, match=r'Traveler is u8 or f32 of shape \(24, 32, 3\)'):
    reading.read(games.open_game(cfg.Traveler()), frame)


@pytest.mark.slow
@pytest.mark.parametrize('config', [
    cfg.Traveler(), cfg.Traveler('64x64'), cfg.Traveler(num_colours=1), cfg.Traveler(period=2),
    cfg.Pong(), cfg.Pong('64x64', paddle_speed=1, ball_speed=3, opponent_skill=0.2), cfg.PacMan(),
    cfg.PacMan('64x64', wall_share=1.0, ghost_rate=1.0, lives=1), cfg.PacMan(wall_share=0.0)],
    ids=repr)
def test_many_frames_are_read_exactly(config):
  found = inspection.inspect(trajectories.Source(cfg.Trajectories(config)), 256)
  assert found['frames'] == 256 * 48
  assert (found['unreadable'], found['misread'], found['misread_moves']) == (0, 0, 0)
  # Where all buildings look alike, or every second one, a scroll cannot be told from another.
  is_repetitive = isinstance(config, cfg.Traveler) and (config.num_colours == 1 or config.period)
  assert (found['doubtful_moves'] > 0.2 * found['frames']) == bool(is_repetitive)
