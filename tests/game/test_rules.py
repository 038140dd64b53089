"""Each game's rules, followed frame by frame in plain Python."""

import numpy as np
import pytest

from jaxrl_pt.game import pacman, pong, traveler
from jaxrl_pt.game.base import UNKNOWN


def _frames(batch, row):
  """(action, truth as a namespace of arrays) of each frame of an episode."""
  truth = batch.truth
  for t in range(batch.actions.shape[1]):
    yield batch.actions[row, t], truth.replace(
        **{name: np.asarray(value)[row, t] for name, value in vars(truth).items()})


def test_counters_follow_the_table_of_events(played):
  game, truth = played.game, played.batch.truth
  deltas = np.asarray(game.deltas)[truth.event]
  limits = [10**counter.num_digits for counter in game.counters]
  expected = (truth.counters[:, :1] + np.cumsum(deltas, 1)) % limits
  np.testing.assert_array_equal(truth.counters, expected)
  assert (truth.event[:, 0] == 0).all() and (played.batch.actions[:, 0] == game.stay).all()
  assert set(np.unique(truth.event)) == set(range(len(game.events))), 'no such event was played'


def test_the_street_remembers_what_was_built(played_by_name):
  batch = played_by_name('traveler').batch
  last_cell, wraps, ends = 23, 0, 0
  for row in range(len(batch.actions)):
    built, seen, views, position = {}, set(), [], 12
    for t, (action, truth) in enumerate(_frames(batch, row)):
      known = dict(built)
      after = min(max(position + action - 1, 0), last_cell)
      assert truth.moved.tolist() == [0, after - position]
      assert truth.pose.tolist() == [0, after] and truth.origin.tolist() == [0, after - 3]
      is_new = after not in built
      assert truth.event == (is_new and t > 0)
      if is_new:
        built[after] = truth.cells[0, 3]
        assert 1 <= built[after] <= 6
      position, places = after, range(after - 3, after + 5)
      ends += places[0] < 0 or places[-1] > last_cell
      inside = [0 <= place <= last_cell for place in places]
      shown = [built.get(p, traveler.GROUND) if i else traveler.EDGE
               for p, i in zip(places, inside)]
      assert truth.cells[0].tolist() == shown
      assert truth.memory[0].tolist() == [
          known.get(p, traveler.GROUND if p in seen else UNKNOWN) for p in places]
      views.append({p for p, i in zip(places, inside) if i})
      seen |= views[-1]
      for j, place in enumerate(places):
        away, returned = _absence([place in view for view in views])
        assert (truth.away[0, j], truth.returned[0, j]) == (away, returned), (row, t, place)
      wraps += truth.counters[0] < batch.truth.counters[row, 0, 0]
    assert truth.objects.tolist() == [[0, 3]] and not truth.done
  assert ends, 'nobody came near the end of the street'
  assert batch.truth.returned.sum() > 50


def _absence(seen):
  """By its history, how long a cell was away before it came back, and whether it came just now."""
  if not seen[-1]:
    return 0, False
  start = len(seen) - 1
  while start and seen[start - 1]:
    start -= 1
  before = [t for t in range(start) if seen[t]]
  away = start - before[-1] - 1 if before else 0
  return away, bool(away) and start == len(seen) - 1


def test_worlds_differ_and_colours_are_spread(played_by_name):
  batch = played_by_name('traveler').batch
  agents = batch.truth.cells[:, :, 0, 3][np.asarray(batch.truth.event) == 1]
  shares = np.bincount(agents, minlength=7)[1:] / len(agents)
  # Six colours: the share of each is 1/6 with a standard deviation below 0.03 here.
  assert len(agents) > 150 and (abs(shares - 1 / 6) < 0.12).all(), shares
  assert len({frames.tobytes() for frames in batch.frames}) == len(batch.frames)


@pytest.mark.slow
def test_the_ball_flies_is_sent_back_and_is_missed(played_by_name):
  batch = played_by_name('pong').batch
  height, speed, sent_back = 16, 2, 0
  for row in range(len(batch.actions)):
    before = None
    for action, truth in _frames(batch, row):
      (player, _), (opponent, _), ball = truth.objects.tolist()
      assert 0 <= ball[0] <= height - 2 and pong.FIRST <= ball[1] <= pong.LAST
      assert truth.pose.tolist() == [player, 0]
      assert truth.done == (truth.counters.max() >= 21)
      if before is not None and not before.done:
        old, flown = before.objects.tolist(), ball[1] - before.objects[2, 1]
        assert player == min(max(old[0][0] + (action - 1) * 2, 0), height - 5)
        assert truth.moved.tolist() == [player - old[0][0], 0]
        assert abs(opponent - old[1][0]) <= 2
        if truth.event:
          assert ball == [7, 15]
          # Whoever scores, the ball was on its way to the other side.
          near = pong.LAST - old[2][1] if truth.event == 1 else old[2][1] - pong.FIRST
          assert near < speed
        elif abs(flown) != speed:  # A paddle was in the way.
          sent_back += 1
          paddle = player if ball[1] < 15 else opponent
          assert paddle - 2 < ball[0] < paddle + 5
      if before is not None and before.done:
        assert truth.objects.tolist() == before.objects.tolist() and not truth.event
      before = truth
  assert sent_back > 5


@pytest.mark.slow
def test_the_maze_is_eaten_and_the_ghost_kills(played_by_name):
  batch = played_by_name('pacman').batch
  steps = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])
  deaths = 0
  for row in range(len(batch.actions)):
    content, memory, seen, before = None, np.full((9, 9), UNKNOWN), [], None
    for action, truth in _frames(batch, row):
      agent, ghost = truth.objects
      is_shown = np.ones((9, 9), bool)
      is_shown[tuple(ghost)] = False
      assert (truth.cells == UNKNOWN).tolist() == (~is_shown).tolist()
      if before is None:
        start, content = truth.objects, np.where(is_shown, truth.cells, pacman.PELLET)
        assert (agent + ghost == 8).all()
      elif not before.done:
        content = np.where((content == UNKNOWN) & is_shown, truth.cells, content)
        target = before.objects[0] + steps[action]
        target = before.objects[0] if content[tuple(target)] == pacman.WALL else target
        if truth.event == pacman.DIED:
          deaths += 1
          assert truth.objects.tolist() == start.tolist()
        else:
          assert agent.tolist() == target.tolist() and agent.tolist() != ghost.tolist()
          assert abs(ghost - before.objects[1]).sum() <= 1
          assert content[tuple(ghost)] != pacman.WALL
          assert (truth.event == pacman.ATE) == (content[tuple(agent)] == pacman.PELLET)
          content[tuple(agent)] = pacman.EMPTY
        assert truth.moved.tolist() == (agent - before.objects[0]).tolist()
      if before is None:  # What the ghost hides at first is known once it has gone.
        content[tuple(ghost)] = _first_shown(batch.truth.cells[row, :, ghost[0], ghost[1]])
      assert truth.memory.tolist() == memory.tolist()
      assert truth.cells[is_shown].tolist() == content[is_shown].tolist()
      memory = np.where(is_shown, truth.cells, memory)
      seen.append(is_shown)
      history = np.stack(seen)
      absences = [_absence(history[:, r, c].tolist()) for r in range(9) for c in range(9)]
      assert truth.away.ravel().tolist() == [away for away, _ in absences]
      assert truth.returned.ravel().tolist() == [back for _, back in absences]
      assert truth.done == (truth.counters[1] == 0 or not (content == pacman.PELLET).any())
      before = truth
  assert deaths


def _first_shown(contents):
  shown = contents[contents != UNKNOWN]
  return shown[0] if len(shown) else pacman.PELLET


@pytest.mark.slow
def test_every_open_cell_of_a_maze_is_reached(played_by_name):
  for cells in played_by_name('pacman').batch.truth.cells[:, 0]:
    is_open = cells != pacman.WALL
    assert not is_open[[0, -1]].any() and not is_open[:, [0, -1]].any()
    reached = np.zeros_like(is_open)
    reached[1, 1] = True
    for _ in range(81):
      spread = reached.copy()
      for axis in (0, 1):
        spread |= np.roll(reached, 1, axis) | np.roll(reached, -1, axis)
      reached = spread & is_open
    assert (reached == is_open).all()
