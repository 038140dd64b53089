"""Rollouts inside models that have learned nothing: modules beside plain loops, edits, resume.

One program plays a third of an episode; all ordinary tests run it with other inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, dream, games, maps, measures, noise, renderers, trajectories
from tests.game import test_measures
from tests.game.conftest import NUM_EPISODES, NUM_FRAMES, quick, source_of
from tests.game.test_maps import _slow_cost

GAME = games.open_game(cfg.Traveler(num_cells=24))
PART = (NUM_FRAMES - 1) // 3
HOW = cfg.SlidingWindow()
MODULES = cfg.MaaG(map=cfg.MapMemory(localisation=HOW))
OFF = cfg.MaaG(shows_counters=False, map=cfg.NoMap())


@functools.cache
def _programs(kind):
  world = dream.World(GAME, renderers.world_model(GAME, kind), MODULES.map)

  def begin(rows, frames, truth):
    keys = jax.vmap(lambda row: trajectories.key_of(source_of('traveler'), row))(rows)
    games_B = jax.vmap(lambda key: GAME.init(noise.fold(key, 0)))(keys)
    return games_B, *measures.begin(world, games_B, frames, truth, keys)
  return quick(begin), quick(functools.partial(measures.record, world, num_kept=2))


def _begin(batch, kind='weak', rows=None):
  """(parameters, carry, record of the first frame); `rows` chooses and orders the games."""
  rows = np.arange(NUM_EPISODES) if rows is None else rows
  truth = jax.tree.map(lambda x: x[rows, 0], batch.truth)
  return _programs(kind)[0](rows.astype(np.uint32), batch.frames[rows, 0], truth)


def _given(batch, part, rows=None, nudges=None):
  rows = np.arange(NUM_EPISODES) if rows is None else rows
  times = slice(1 + part * PART, 1 + (part + 1) * PART)
  zero = np.zeros((PART, len(rows), 2), np.int32)
  return dream.Given(batch.actions[rows, times].T, np.asarray(batch.truth.event)[rows, times].T,
                     zero if nudges is None else nudges[part])


def _play(batch, kind='weak', modules=MODULES, shuffled=False, rows=None, nudges=None,
          edit=lambda carry: carry):
  """Three parts; `edit` changes the games after the first one."""
  params, carry, record = _begin(batch, kind, rows)
  parts, on = [record], dream.switches(modules, shuffled)
  for part in range(3):
    carry, record, frames = _programs(kind)[1](params, carry, _given(batch, part, rows, nudges), on)
    parts.append(record)
    carry = edit(carry) if part == 0 else carry
  return carry, measures.joined(*parts), frames


def _values(record):
  found, _ = test_measures._programs(GAME.config)[1](record)
  return {name: float(x.right.sum() / x.asked.sum()) for name, x in found.items()
          if name != 'spa_con_chance'}


@pytest.fixture(scope='module')
def batch():
  return source_of('traveler').batch(np.arange(NUM_EPISODES, dtype=np.uint32))


@pytest.fixture(scope='module')
def nudges():
  rng = np.random.default_rng(5)
  columns = rng.integers(-1, 2, (3, PART, NUM_EPISODES)) * (rng.random((3, PART, 1)) < 0.2)
  return np.stack([np.zeros_like(columns), columns], -1).astype(np.int32)


def test_modules_make_a_weak_model_right_and_only_they_do(batch):
  """The same program with other switches: the weak model sees one frame back and cannot count."""
  found = _values(_play(batch)[1])
  assert found == {name: 0 if name in ('unreadable', 'misplaced', 'localisation_error') else 1
                   for name in found}
  found = _values(_play(batch, modules=OFF)[1])
  assert found['spa_con_reentry'] < 0.4 and 0.75 < found['num_con'] < 1
  assert found['score_exact_at'] < 0.5 and found['act_acc'] > 0.97
  found = _values(_play(batch, shuffled=True)[1])
  assert found['spa_con_reentry'] < 0.6 and found['score_exact'] == 1


def test_ledger_pose_and_map_are_those_of_a_plain_loop(batch, nudges):
  # A model that obeys the map would draw what the wrong place says; this one is not shown it.
  carry, record, _ = _play(batch, modules=OFF, nudges=nudges)
  record, linked = jax.tree.map(np.asarray, record), 0
  known = np.asarray(carry.dream.map.known)[:, 0]
  told = np.asarray(quick(functools.partial(maps.contents_of, GAME))(
      carry.dream.map.colours, carry.dream.map.known))[:, 0]
  for row in range(NUM_EPISODES):
    score, origin = int(batch.truth.counters[row, 0, 0]), 9
    entries, ground = {12: int(batch.truth.cells[row, 0, 0, 3])}, dict.fromkeys(range(9, 17), 0)
    for t in range(1, NUM_FRAMES):
      score = (score + int(record.predicted[row, t - 1] == 1)) % 1000
      expected = min(max(origin + batch.actions[row, t] - 1, -3), 20)
      expected += nudges[(t - 1) // PART, (t - 1) % PART, row, 1]
      cells = record.readings.cells[row, t, 0]
      origin = expected + _slow_link(entries, cells, expected)
      linked += origin != expected
      for j, content in enumerate(cells.tolist()):
        if 1 <= content <= 6 and 0 <= origin + j < 24:
          entries.setdefault(origin + j, content)
        if content == 0 and 0 <= origin + j < 24:
          ground[origin + j] = 0
      assert record.values[row, t - 1, 0] == score
      assert record.origin[row, t - 1].tolist() == [0, origin], (row, t)
      assert record.offset[row, t - 1].tolist() == [0, origin - expected]
    assert (dict(zip(np.flatnonzero(known[row]).tolist(), told[row, known[row]].tolist()))
            == ground | entries)
  assert linked > 10


def _slow_link(entries, cells, expected):
  colours = np.zeros((1, 24, 3), np.float32)
  known = np.zeros((1, 24), bool)
  for place, content in entries.items():
    colours[0, place], known[0, place] = GAME.tiles.colours[content], True
  seen, shown = GAME.tiles.colours[cells][None], np.ones((1, 8), bool)
  cost = lambda o: _slow_cost(colours, known, seen, shown, np.array([0, expected + o]))
  best, found = cost(0)[0] - HOW.margin, 0
  for offset in (-1, 1):
    value, count = cost(offset)
    if value < best and count >= HOW.min_known:
      best, found = value, offset
  return found


@pytest.mark.slow
def test_a_saved_rollout_goes_on_as_if_it_had_not_been(batch, tmp_path):
  params, carry, _ = _begin(batch)
  on, (_, play) = dream.switches(MODULES), _programs('weak')
  carry, _, _ = play(params, carry, _given(batch, 0), on)
  with checkpoint.Checkpointer(tmp_path, cfg.Checkpoint()) as saver:
    saver.save(PART, carry, {})
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                          carry)
  restored = checkpoint.restore(tmp_path, abstract).state
  jax.tree.map(np.testing.assert_array_equal, play(params, restored, _given(batch, 1), on),
               play(params, carry, _given(batch, 1), on))


def test_a_game_does_not_depend_on_its_batch(batch):
  rows = np.arange(NUM_EPISODES)[::-1]
  carry, record, _ = _play(batch, modules=OFF)
  turned_carry, turned, _ = _play(batch, modules=OFF, rows=rows)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)[rows]), turned, record)
  np.testing.assert_array_equal(turned_carry.dream.map.colours, carry.dream.map.colours[rows])


def test_edits_in_the_middle_show(batch):
  def add(carry):
    return dataclasses.replace(carry, dream=dream.add(GAME, carry.dream, 37))
  _, record, _ = _play(batch, edit=add)
  before, after = record.readings.counters[:, PART, 0], record.readings.counters[:, PART + 1, 0]
  np.testing.assert_array_equal((after - before - record.claims.event[:, PART + 1]) % 1000, 37)
  assert _values(record)['digit_acc'] == 1

  cells = np.asarray(batch.truth.origin)[:, PART] + [0, 5]
  cells = np.clip(cells, 0, 23).astype(np.int32)
  contents = np.arange(NUM_EPISODES, dtype=np.int32) % 6 + 1

  def paint(carry):
    painted = quick(functools.partial(dream.paint, GAME))(carry.dream, cells, contents)
    return dataclasses.replace(carry, dream=painted)
  _, record, _ = _play(batch, edit=paint)
  share = quick(functools.partial(measures.painted, frame=PART))(record, cells, contents)
  assert share.asked.sum() > 30
  np.testing.assert_array_equal(share.right, share.asked)


def test_switches_say_whose_events_count(batch):
  for events, expected in (('none', 0), ('every_step', 1)):
    _, record, _ = _play(batch, modules=dataclasses.replace(MODULES, events=events))
    steps = np.diff(np.asarray(record.values)[..., 0], axis=1) % 1000
    assert (steps == expected).all() and _values(record)['digit_acc'] == 1
  params, carry, _ = _begin(batch)
  on = dream.switches(dataclasses.replace(MODULES, events='true'))
  given = dataclasses.replace(_given(batch, 0), events=np.ones((PART, NUM_EPISODES), np.int32))
  _, record, _ = _programs('weak')[1](params, carry, given, on)
  assert (np.diff(np.asarray(record.values)[..., 0], axis=1) % 1000 == 1).all()


# --- Every renderer, and the other games -------------------------------------------

BAD = {'unreadable', 'misplaced', 'localisation_error'}
# What each renderer is bad at, with all modules on.
DEFECTS = {'true': set(), 'weak': set(), 'ignores': set(),
           'redraws': {'act_acc', 'spa_con_all', 'spa_con_reentry', 'misplaced',
                       'localisation_error'},
           'wrong_digits': {'num_con', 'score_exact', 'score_exact_at', 'digit_acc'},
           'shifted': {'act_acc', 'num_con', 'score_exact', 'score_exact_at', 'digit_acc',
                       'spa_con_all', 'spa_con_reentry', 'bare', 'bare_reentry', 'unreadable'}}


@pytest.mark.slow
@pytest.mark.parametrize('kind', DEFECTS)
def test_a_defect_is_found_where_it_is(batch, kind):
  found = _values(_play(batch, kind)[1])
  wrong = {name for name, value in found.items() if value != (0 if name in BAD else 1)}
  assert wrong == DEFECTS[kind]


@pytest.mark.slow
@pytest.mark.parametrize('config, memory', [
    (cfg.Pong(), cfg.NoMap()),
    (cfg.PacMan(), cfg.MapMemory(writes='last', localisation=cfg.DeadReckoning()))], ids=repr)
def test_other_games_stay_true_with_their_modules(config, memory):
  source = trajectories.Source(cfg.Trajectories(config, num_frames=40, seed=2), True)
  game, found = games.open_game(config), {}
  batch = source.batch(range(16))
  keys = jnp.stack([trajectories.key_of(source, i) for i in np.arange(16, dtype=np.uint32)])
  params = jax.vmap(lambda key: game.init(noise.fold(key, 0)))(keys)
  truth = jax.tree.map(lambda x: x[:, 0], batch.truth)
  for kind in ('true', 'weak'):
    for modules in (cfg.MaaG(map=memory), OFF):
      world = dream.World(game, renderers.world_model(game, kind), modules.map)

      @jax.jit
      def play(world=world, modules=modules):
        carry, first = measures.begin(world, params, batch.frames[:, 0], truth, keys)
        _, rest, _ = measures.record(world, params, carry, dream.given(batch.actions[:, 1:].T),
                                     dream.switches(modules), 1)
        return measures.measures(game, measures.joined(first, rest), 39)
      found[kind, modules == OFF] = {
          name: float(x.right.sum() / max(1, x.asked.sum())) for name, x in play().items()}
  shown = {'act_acc', 'num_con', 'score_exact', 'digit_acc', *(
      {'spa_con_all', 'spa_con_reentry'} if game.contents else ())}
  for case in (('true', False), ('true', True), ('weak', False)):
    assert {found[case][name] for name in shown} == {1.0}, (case, found[case])
  weak = found['weak', True]
  assert weak['act_acc'] == 1 and weak['num_con'] < 1 and weak['digit_acc'] < 1
  if game.contents:
    assert weak['spa_con_reentry'] < 0.9 < weak['spa_con_all']


@pytest.mark.slow
def test_where_all_places_look_alike_only_the_margin_keeps_the_place():
  """G4: localisation errors with pixels as entries, noise in them, and no planted error."""
  def misplaced(num_colours, margin):
    config = cfg.Traveler(num_colours=num_colours, num_cells=128)
    source = trajectories.Source(cfg.Trajectories(config, 'out_and_back', 41), True)
    game, batch = games.open_game(config), source.batch(range(16))
    keys = jnp.stack([trajectories.key_of(source, i) for i in np.arange(16, dtype=np.uint32)])
    params = jax.vmap(lambda key: game.init(noise.fold(key, 0)))(keys)
    memory = cfg.MapMemory('colours', localisation=cfg.SlidingWindow(margin=margin, min_known=1))
    world = dream.World(game, renderers.world_model(game, 'ignores', 0.02), memory)

    @jax.jit
    def play():
      carry, first = measures.begin(world, params, batch.frames[:, 0],
                                    jax.tree.map(lambda x: x[:, 0], batch.truth), keys)
      _, rest, _ = measures.record(world, params, carry, dream.given(batch.actions[:, 1:].T),
                                   dream.switches(cfg.MaaG(map=memory)), 1)
      return measures.measures(game, measures.joined(first, rest), 40)['misplaced']
    share = play()
    return float(share.right.sum() / share.asked.sum())

  assert misplaced(1, 0.005) == misplaced(6, 0.005) == 0
  assert misplaced(1, 0.0) > 0.5 > misplaced(6, 0.0)


def test_a_drawn_event_is_one_of_the_game():
  assert dream.EVENTS == ('predicted', 'none', 'every_step', 'true')
  events = dream._event(jnp.asarray(dream.TRUE), jnp.asarray([2, 2]), jnp.asarray([0, 1]))
  assert events.tolist() == [0, 1] and base.NO_EVENT == 0
