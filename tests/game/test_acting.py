"""What a policy earns, beside plain loops over frames, in the true game and inside models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.game import acting, base, dream, games, reading, renderers, trajectories
from jaxrl_pt.models.game_policy import windows
from tests.game.conftest import CONFIGS, quick

# Scores begin just below the number after which the display wraps.
GAME = games.open_game(cfg.Traveler(num_cells=16, start_low=997, start_high=998))
NUM_GAMES, NUM_ACTIONS, NUM_PAST = 3, 8, 2
SOURCE = trajectories.Source(cfg.Trajectories(GAME.config, num_frames=NUM_ACTIONS + 1, size=8))
KEYS = jax.random.split(jax.random.key(3), NUM_GAMES)


def act(seen, keys_B):
  """Mostly to the right; the probability also says what the policy has seen."""
  drawn = jax.vmap(lambda key: jax.random.choice(key, jnp.array([0, 1, 2, 2, 2])))(keys_B)
  return drawn.astype(jnp.int32), seen.mean((1, 2, 3, 4))


@functools.cache
def worlds():
  return quick(jax.vmap(functools.partial(trajectories.world_of, SOURCE)))(jnp.arange(NUM_GAMES))


@functools.cache
def program(pays, is_renderer=False):
  environment = acting.true_game(GAME)
  environment = environment._replace(step=functools.partial(_lie, environment))
  if is_renderer:
    modules = cfg.MaaG()
    environment = acting.inside(
        dream.World(GAME, renderers.world_model(GAME, 'true'), modules.map), modules)
  setting = acting.Setting(GAME, environment, pays, NUM_PAST)
  return quick(lambda params, worlds_B: acting.play(
      setting, jax.vmap(GAME.init)(worlds_B) if is_renderer else params, act, worlds_B, KEYS,
      NUM_ACTIONS))


@functools.cache
def played(place, pays='events'):
  """In the 'true' game; by a 'liar', which is the true game but for some frames; 'inside'."""
  run = program(pays, place == 'inside')
  return jax.tree.map(np.asarray, run(place == 'liar', worlds()))


def _lie(environment, lies, state, actions):
  """Frames 2 and 3 are half grey; frame 5 shows 37 more, and frame 7 one more than is true."""
  frames, after = environment.step({}, state, actions)
  frame = lies * after.frame[0]
  more = jnp.where(frame == 5, 37, jnp.where(frame == 7, 1, 0))
  lying = jax.vmap(GAME.truth)(after)
  lying = dataclasses.replace(lying, counters=(lying.counters + more) % 1000)
  shown = jax.vmap(lambda one: reading.as_float(base.render(GAME, one)))(lying)
  return jnp.where((frame == 2) | (frame == 3), frames / 2 + 0.25, shown), after


def _scores(found, game):
  """The true score of each frame: one more wherever a cell is entered for the first time."""
  score = int(reader()(found.frames[game, 0]).counters[0])
  place, entered, scores = 8, {8}, [score]
  for action in found.actions[game].tolist():
    place = min(max(place + action - 1, 0), 15)
    score = (score + (place not in entered)) % 1000
    entered.add(place)
    scores.append(score)
  return scores


@functools.cache
def reader():
  return quick(functools.partial(reading.read, GAME))


def _loop(found, pays):
  """What each frame earns, one after the other, in whole numbers of Python."""
  read = reader()
  rewards, false = np.zeros(found.rewards.shape), np.zeros(found.rewards.shape)
  for game in range(NUM_GAMES):
    true = _scores(found, game)
    shown, due, steps = int(read(found.frames[game, 0]).counters[0]), true[0], 0
    for time in range(NUM_ACTIONS):
      frame, steps = read(found.frames[game, time + 1]), steps + 1
      if not frame.readable:
        continue
      more = int(frame.counters[0]) - shown
      more = min((more, more + 1000, more - 1000), key=abs)
      if pays == 'changes' or 0 <= more <= steps:
        rewards[game, time] = more
      false[game, time] = more % 1000 != (true[time + 1] - due) % 1000
      shown, due, steps = int(frame.counters[0]), true[time + 1], 0
  return rewards, false


@pytest.mark.parametrize('place, pays', [('liar', 'events'), pytest.param(
    'liar', 'changes', marks=pytest.mark.slow)])
def test_rewards_equal_a_loop_over_the_frames(place, pays):
  found = played(place, pays)
  rewards, false = _loop(found, pays)
  np.testing.assert_array_equal(found.rewards, rewards)
  np.testing.assert_array_equal(found.false, false)
  true = np.diff([_scores(found, game) for game in range(NUM_GAMES)]) % 1000
  np.testing.assert_array_equal(found.true_rewards, true)
  np.testing.assert_array_equal(found.readable[:, [1, 2]], 0)
  np.testing.assert_array_equal(found.rewards[:, [1, 2]], 0)
  assert found.readable.sum() == NUM_GAMES * (NUM_ACTIONS - 2)
  assert found.rewards[:, 3].max() > 1  # What was built in frames that cannot be read is paid.
  assert false[:, [4, 5, 6, 7]].all() and not false[:, 3].any()
  # What the display says too much pays nothing, or it pays and is taken back.
  if pays == 'events':
    assert (found.rewards[:, 4] == 0).all()
  else:
    assert (found.rewards[:, 4] >= 37).all() and (found.rewards[:, 5] <= -36).all()


def test_the_true_game_pays_what_is_true():
  found = played('true')
  np.testing.assert_array_equal(found.rewards, found.true_rewards)
  np.testing.assert_array_equal(found.rewards, _loop(found, 'events')[0])
  assert found.readable.all() and found.counts.all() and not found.false.any()
  scores = [_scores(found, game) for game in range(NUM_GAMES)]
  assert found.rewards.sum(1).tolist() == [(one[-1] - one[0]) % 1000 for one in scores]
  assert any((np.diff(one) < 0).any() for one in scores)  # One of them has wrapped.
  assert len({tuple(actions) for actions in found.actions.tolist()}) == NUM_GAMES


def test_inside_a_renderer_that_draws_the_truth_nothing_differs():
  true, inside = played('true'), played('inside')
  for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (true, inside)),
                               strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_a_policy_sees_the_last_frames_as_a_learner_does():
  found = played('true')
  seen = np.asarray(windows(found.frames[:, :-1], NUM_PAST))
  np.testing.assert_allclose(found.logp, seen.mean((2, 3, 4, 5)), rtol=1e-5)
  np.testing.assert_array_equal(seen[:, 0, 0], found.frames[:, 0])
  np.testing.assert_array_equal(seen[:, 5], found.frames[:, 4:6])


@pytest.mark.parametrize('name', CONFIGS)
def test_only_what_an_event_adds_is_paid(name):
  game = games.open_game(CONFIGS[name])
  limits = base.moduli(game.counters)
  before = np.stack(np.meshgrid(*(np.array([0, 5, limit - 1]) for limit in limits)), -1)
  before = before.reshape(-1, len(limits))
  for number, delta in enumerate(game.deltas):
    after = base.ledger(game.counters, game.deltas, jnp.asarray(before), jnp.asarray(number))
    changed = acting.change(game, jnp.asarray(before), after)
    np.testing.assert_array_equal(changed, np.broadcast_to(delta, before.shape))
    for pays in ('events', 'changes'):
      np.testing.assert_array_equal(acting.pay(game, changed, 1, pays),
                                    (delta * game.worth).sum())
  twice, both = jnp.asarray(game.deltas[1:] * 2), jnp.asarray(game.deltas.sum(0))
  for other, steps, is_paid in ((twice, 1, False), (twice, 2, True), (-twice, 9, False),
                                (both, len(game.deltas) - 1, True), (both * 10 + 7, 9, False)):
    want = other @ game.worth
    np.testing.assert_array_equal(acting.pay(game, other, steps, 'events'), is_paid * want)
    np.testing.assert_array_equal(acting.pay(game, other, steps, 'changes'), want)
  assert {'traveler': [0, 1], 'pong': [0, 1, -1], 'pacman': [0, 10, 0]}[name] == (
      game.deltas @ game.worth).tolist()
