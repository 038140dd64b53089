"""What a person changes in a game shows in the next frame, or is refused in one sentence."""

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import edits, games, noise
from tests.game.conftest import quick

TRAVELER = games.open_game(cfg.Traveler(num_cells=24))
PACMAN = games.open_game(cfg.PacMan())


@pytest.mark.slow
def test_painted_buildings_are_remembered_and_ground_is_built_on_again():
  game = TRAVELER
  step, truth = quick(game.step), quick(game.truth)
  state = edits.set_counters(game, quick(game.init)(noise.key(1)), [999])
  state = edits.paint(game, state, (0, 14), 'teal')
  seen = truth(state)
  assert game.contents[int(seen.cells[0, 5])] == 'teal' and seen.memory.tolist() == [[-1] * 8]
  state = step(state, 2)
  seen = truth(state)
  assert seen.counters.tolist() == [0] and seen.event == 1  # 999 + 1 wraps.
  assert [game.contents[i] for i in (seen.cells[0, 4], seen.memory[0, 4])] == ['teal', 'teal']
  state = step(state, 2)
  assert truth(state).event == 0, 'somebody has built here already'
  state = edits.paint(game, state, (0, 13), 'ground')
  seen = truth(state)
  assert seen.cells[0, 2] == seen.memory[0, 2] == 0 and not seen.away.any()
  assert truth(step(state, 0)).event == 1


@pytest.mark.parametrize('game, cell, content, expected', [
    (TRAVELER, (0, 24), 'red', 'outside the world of Traveler: rows go from 0 to 0 and columns '
     'from 0 to 23'),
    (TRAVELER, (0, -1), 'red', 'outside the world'),
    (TRAVELER, (1, 0), 'red', 'outside the world'),
    (TRAVELER, (0, 0), 'pink', "no 'pink' to paint: choose one of ground, red"),
    (PACMAN, (9, 0), 'wall', 'outside the world of PacMan'),
    (games.open_game(cfg.Pong()), (0, 0), 'wall', 'Pong has no map')])
def test_an_edit_outside_the_world_is_refused(game, cell, content, expected):
  with pytest.raises(UserError, match=expected):
    edits.paint(game, None, cell, content)


@pytest.mark.parametrize('values', [[1000], [-1], [1, 2], []])
def test_a_score_that_the_display_cannot_show_is_refused(values):
  with pytest.raises(UserError, match='give score from 0 to 999'):
    edits.set_counters(TRAVELER, None, values)


@pytest.mark.parametrize('actions, expected', [
    ([0, 3], 'Traveler has no action 3: give 0 to 2 for left, stay, right'),
    ([-1], 'no action -1'), ([0.5], 'whole numbers')])
def test_an_action_outside_the_game_is_refused(actions, expected):
  with pytest.raises(UserError, match=expected):
    edits.check_actions(TRAVELER, actions)


@pytest.mark.slow
def test_a_maze_is_painted_away_from_its_rim_and_its_people():
  game = PACMAN
  state = jax.jit(game.init)(noise.key(2))
  agent, ghost = np.asarray(state.places).tolist()
  for cell, content in (((0, 3), 'empty'), (agent, 'wall'), (agent, 'pellet'), (ghost, 'wall')):
    with pytest.raises(UserError, match='cannot become'):
      edits.paint(game, state, tuple(cell), content)
  free = next((r, c) for r in (1, 3, 5, 7) for c in (1, 3, 5, 7) if [r, c] not in (agent, ghost))
  seen = game.truth(edits.paint(game, state, free, 'wall'))
  assert seen.cells[free] == seen.memory[free] == 1
  for row in range(1, 8):
    for column in range(1, 8):
      if game.contents[int(state.content[row, column])] == 'pellet':
        state = edits.paint(game, state, (row, column), 'empty')
  assert game.truth(state).done
