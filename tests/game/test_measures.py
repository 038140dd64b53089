"""The model's own history and the measures, beside plain definitions, and on planted defects."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrl_pt.game import games, history, measures
from jaxrl_pt.game.base import UNKNOWN
from jaxrl_pt.game.traveler import GROUND
from tests.game.conftest import NUM_EPISODES, NUM_FRAMES, quick

AT, LAST_CELL, DELAYS = 30, 23, 8
T = NUM_FRAMES - 1


def _numpy(tree):
  return jax.tree.map(np.array, tree)


@functools.cache
def _programs(config):
  """(first truth, actions, readings) → Played's claims; and Played → measures and the curve."""
  game = games.open_game(config)

  def claims(truth, actions, readings):
    past = history.start(game, truth)
    after = history.follow(game, past, actions, readings)
    return jax.tree.map(lambda first, rest: jax.numpy.concatenate([first[None], rest]),
                        past.claims, after)
  return (quick(jax.vmap(claims)),
          quick(lambda played: (measures.measures(game, played, AT),
                                measures.by_delay(played, DELAYS))))


def _played(played, readings):
  """The record of a model that drew the simulator's frames, of which `readings` were read."""
  truth, game = played.batch.truth, played.game
  claims, _ = _programs(game.config)
  return measures.Played(
      readings, _numpy(claims(jax.tree.map(lambda x: x[:, 0], truth), played.batch.actions[:, 1:],
                              jax.tree.map(lambda x: x[:, 1:], readings))),
      truth.counters[:, 1:], truth.event[:, 1:], truth.origin[:, 1:],
      np.zeros_like(truth.origin[:, 1:]))


def _values(played, record):
  _, program = _programs(played.game.config)
  found, curve = program(record)
  ratio = lambda share: float(share.right.sum() / max(1, share.asked.sum()))
  return {name: ratio(share) for name, share in found.items()}, found, curve


@pytest.fixture
def traveler(played_by_name):
  return played_by_name('traveler')


def _damaged(readings, seed):
  """Readings in which some frames are unreadable, show other colours, or another score."""
  rng, readings = np.random.default_rng(seed), _numpy(readings)
  shape = readings.readable.shape
  readable = (rng.random(shape) < 0.85) | (np.arange(shape[1]) == 0)
  wrong = rng.random(readings.cells.shape) < 0.1
  wrong[:, 0] = False
  cells = np.where(wrong, rng.integers(0, 8, wrong.shape), readings.cells)
  slips = np.cumsum((rng.random(shape) < 0.05) & (np.arange(shape[1]) > 0), 1)
  counters = (readings.counters + slips[..., None]) % 1000
  return dataclasses.replace(readings, readable=readable, cells=cells.astype(np.int32),
                             counters=counters.astype(np.int32))


def _slow_claims(row, batch, readings):
  """The demands of one game's own history, frame by frame, with dicts."""
  position, built = 12, {12: 0}
  named, score = {12: int(readings.cells[row, 0, 0, 3])}, int(batch.truth.counters[row, 0, 0])
  views = [set(range(9, 17))]
  for t in range(1, NUM_FRAMES):
    before, position = position, min(max(position + batch.actions[row, t] - 1, 0), LAST_CELL)
    event = position not in built
    if event:
      built[position] = t
      score = (score + 1) % 1000
    places = range(position - 3, position + 5)
    views.append({p for p in places if 0 <= p <= LAST_CELL})
    due = [built.get(p, t) < t for p in places]
    cells = [named.get(p, UNKNOWN) if d else UNKNOWN for p, d in zip(places, due)]
    bare = [p in views[-1] and p not in built for p in places]
    away = [_absence([p in view for view in views]) if d or b else (0, False)
            for p, d, b in zip(places, due, bare)]
    yield {'counters': [score], 'event': event, 'moved': [0, position - before],
           'origin': [0, position - 3], 'due': [due], 'bare': [bare], 'cells': [cells],
           'away': [[a for a, _ in away]], 'returned': [[r for _, r in away]],
           'is_move': True, 'counts': True}
    if readings.readable[row, t]:
      for p, shown in zip(places, readings.cells[row, t, 0].tolist()):
        if p in built and p not in named and 1 <= shown <= 6:
          named[p] = shown


def _absence(seen):
  """For how long a cell was away before it came back, and whether it came back just now."""
  start = len(seen) - 1
  while start and seen[start - 1]:
    start -= 1
  before = [t for t in range(start) if seen[t]]
  away = start - before[-1] - 1 if before else 0
  return away, bool(away) and start == len(seen) - 1


def _slow_measures(played, record):
  """Right and asked of every measure, by loops over games and frames."""
  found = {}
  def count(name, right, weight=1):
    pair = found.setdefault(name, [0.0, 0.0])
    pair[0] += right
    pair[1] += weight

  r, c = record.readings, record.claims
  firsts = np.where(c.cells == UNKNOWN, -2, c.cells)[:, 1:][(c.due & c.returned)[:, 1:]]
  for b in range(NUM_EPISODES):
    for t in range(1, NUM_FRAMES):
      ok = bool(r.readable[b, t])
      both = ok and bool(r.readable[b, t - 1])
      score, claimed = int(r.counters[b, t, 0]), int(c.counters[b, t, 0])
      count('unreadable', not ok)
      count('score_exact', ok and score == claimed)
      if t == AT:
        count('score_exact_at', ok and score == claimed)
      count('digit_acc', ok and score == record.values[b, t - 1, 0])
      count('event_acc', record.predicted[b, t - 1] == c.event[b, t])
      if c.event[b, t]:
        count('event_recall', record.predicted[b, t - 1] == 1)
      off = abs(record.origin[b, t - 1] - c.origin[b, t]).sum()
      count('misplaced', off > 0)
      count('localisation_error', off)
      scrolls = _best_scrolls(r.cells[b, t - 1, 0], r.cells[b, t, 0])
      if not both or len(scrolls) == 1:
        count('act_acc', both and scrolls == [c.moved[b, t, 1]])
      changed = (score - int(r.counters[b, t - 1, 0])) % 1000 if both else 0
      hit = both and c.event[b, t] and changed == 1
      errors = (changed != 0 and not hit) + (bool(c.event[b, t]) and not hit)
      count('num_con', 2 * hit, 2 * hit + errors)
      for j in range(8):
        if c.due[b, t, 0, j]:
          right = ok and r.cells[b, t, 0, j] == c.cells[b, t, 0, j] != UNKNOWN
          count('spa_con_all', right)
          if c.returned[b, t, 0, j]:
            count('spa_con_reentry', right)
            count('spa_con_chance', ok * np.mean(firsts == r.cells[b, t, 0, j]))
            count(('delay', min(int(c.away[b, t, 0, j]), DELAYS)), right)
        if c.bare[b, t, 0, j]:
          count('bare', ok and r.cells[b, t, 0, j] == GROUND)
          if c.returned[b, t, 0, j]:
            count('bare_reentry', ok and r.cells[b, t, 0, j] == GROUND)
  return found


def _best_scrolls(before, after):
  """The scrolls under which the share of equal cells is largest, the agent's own left out."""
  shares = {}
  for scroll in (-1, 0, 1):
    cells = [j for j in range(8) if 0 <= j + scroll < 8 and j != 3]
    shares[scroll] = np.mean([before[j + scroll] != after[j] for j in cells], dtype=np.float32)
  return [s for s, share in shares.items() if share == min(shares.values())]


def test_history_and_measures_are_what_they_are_defined_to_be(traveler):
  readings = _damaged(traveler.readings, seed=2)
  record = _played(traveler, readings)
  for row in range(NUM_EPISODES):
    for t, expected in enumerate(_slow_claims(row, traveler.batch, readings), 1):
      for name, value in expected.items():
        found = getattr(record.claims, name)[row, t]
        assert found.tolist() == value, (row, t, name)
  rng = np.random.default_rng(3)
  record = dataclasses.replace(
      record, predicted=record.predicted ^ (rng.random(record.predicted.shape) < 0.2),
      values=record.values + (rng.random(record.values.shape) < 0.3),
      origin=record.origin + (rng.random(record.origin.shape) < 0.1) * [0, 2])
  _, found, curve = _values(traveler, record)
  slow = _slow_measures(traveler, record)
  for name, share in found.items():
    np.testing.assert_allclose((share.right.sum(), share.asked.sum()), slow[name], err_msg=name)
  for d in range(DELAYS):
    np.testing.assert_allclose((curve.right[:, d].sum(), curve.asked[:, d].sum()),
                               slow.get(('delay', d + 1), (0, 0)), err_msg=f'delay {d + 1}')


PERFECT = {'act_acc': 1, 'num_con': 1, 'score_exact': 1, 'score_exact_at': 1, 'digit_acc': 1,
           'spa_con_all': 1, 'spa_con_reentry': 1, 'bare': 1, 'bare_reentry': 1,
           'event_acc': 1, 'event_recall': 1,
           'unreadable': 0, 'misplaced': 0, 'localisation_error': 0}


def _copies_the_last_frame(traveler):
  """Cells that come into view get a colour of their own; those in view keep theirs."""
  readings, rng = _numpy(traveler.readings), np.random.default_rng(4)
  shown = readings.cells.copy()
  for b in range(NUM_EPISODES):
    for t in range(1, NUM_FRAMES):
      moved = traveler.batch.truth.moved[b, t, 1]
      for j in range(8):
        if 1 <= shown[b, t, 0, j] <= 6:
          was = j + moved
          kept = shown[b, t - 1, 0, was] if 0 <= was < 8 else 0
          shown[b, t, 0, j] = kept if 1 <= kept <= 6 else rng.integers(1, 7)
  return dataclasses.replace(readings, cells=shown)


def test_the_simulator_itself_is_right_in_everything(traveler):
  found, shares, curve = _values(traveler, _played(traveler, _numpy(traveler.readings)))
  assert 0.15 < found.pop('spa_con_chance') < 0.25  # Six colours.
  assert found == PERFECT
  assert shares['spa_con_reentry'].asked.sum() > 50 and curve.asked.sum() == (
      shares['spa_con_reentry'].asked.sum())


def test_each_defect_is_found_where_it_is_and_only_there(traveler):
  readings = _numpy(traveler.readings)
  one_digit = dataclasses.replace(readings, counters=np.where(
      (np.arange(NUM_FRAMES) >= 10)[None, :, None], (readings.counters + 100) % 1000,
      readings.counters))
  found, _, _ = _values(traveler, _played(traveler, one_digit))
  # A slip in one frame: F1 hardly notices it, and every later score is wrong.
  assert 0.9 < found['num_con'] < 1 and found['score_exact'] == pytest.approx(9 / T)
  assert found['score_exact_at'] == 0 and found['digit_acc'] == pytest.approx(9 / T)
  assert {k: found[k] for k in ('act_acc', 'spa_con_all', 'event_acc')} == {
      'act_acc': 1, 'spa_con_all': 1, 'event_acc': 1}
  found, _, _ = _values(traveler, _played(traveler, _copies_the_last_frame(traveler)))
  # In this way of counting what was right before the cell left, only the return tells.
  assert found['spa_con_reentry'] < 0.35 < 0.6 < found['spa_con_all'] < 1
  assert {k: found[k] for k in ('num_con', 'score_exact')} == {'num_con': 1, 'score_exact': 1}
  nothing = dataclasses.replace(readings, readable=np.arange(NUM_FRAMES) + np.zeros(
      (NUM_EPISODES, 1)) < 1)
  found, _, _ = _values(traveler, _played(traveler, nothing))
  assert found['unreadable'] == 1 and found['event_acc'] == 1
  assert not any(found[k] for k in ('act_acc', 'num_con', 'score_exact', 'digit_acc',
                                    'spa_con_all', 'spa_con_reentry', 'bare', 'bare_reentry'))


def test_painted_cells_are_asked_about_where_they_are_in_view(traveler):
  record = _played(traveler, _numpy(traveler.readings))
  frame = 10
  origin = traveler.batch.truth.origin[:, frame]
  inside = np.clip(origin + [0, 5], 0, LAST_CELL)
  contents = np.full(NUM_EPISODES, 4, np.int32)
  share = quick(functools.partial(measures.painted, frame=frame))(
      record, inside.astype(np.int32), contents)
  right = asked = 0
  for b in range(NUM_EPISODES):
    for t in range(frame + 1, NUM_FRAMES):
      j = inside[b, 1] - traveler.batch.truth.origin[b, t, 1]
      if 0 <= j < 8:
        asked += 1
        right += traveler.readings.cells[b, t, 0, j] == 4
  assert (share.right.sum(), share.asked.sum()) == (right, asked) and 0 < right < asked


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pong', 'pacman'])
def test_the_history_of_other_games_says_what_the_simulator_says(played_by_name, name):
  played = played_by_name(name)
  record, truth = _played(played, _numpy(played.readings)), played.batch.truth
  over = np.asarray(truth.done)[:, :-1]
  claims = jax.tree.map(lambda x: x[:, 1:], record.claims)
  np.testing.assert_array_equal(claims.counts, ~over)
  np.testing.assert_array_equal(claims.event[~over], np.asarray(truth.event)[:, 1:][~over])
  np.testing.assert_array_equal(claims.counters, truth.counters[:, 1:])
  is_move = claims.is_move & ~over
  np.testing.assert_array_equal(claims.moved[is_move], np.asarray(truth.moved)[:, 1:][is_move])
  due = claims.due & (claims.cells != UNKNOWN)
  np.testing.assert_array_equal(claims.cells[due], np.asarray(truth.cells)[:, 1:][due])
  found, shares, _ = _values(played, record)
  of_streets = 'spa', 'bare'
  assert {k: v for k, v in found.items() if not k.startswith(of_streets)} == {
      k: v for k, v in PERFECT.items() if not k.startswith(of_streets)}
  assert not shares['bare'].asked.any()
  if name == 'pacman':
    assert found['spa_con_all'] == found['spa_con_reentry'] == 1
    assert shares['spa_con_reentry'].asked.sum() > 50
