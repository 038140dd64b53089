"""Games: guess the number, and textarena's by name."""

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import guess, text_arena
from jaxrl_pt.environments.episodes import EpisodePool, Outcome
from jaxrl_pt.environments.interactive import Problem
from jaxrl_pt.errors import UserError

SETTINGS = cfg.GuessNumber(1, 100, 7)
ONE = cfg.VerifierPool(num_workers=1)


def test_the_number_is_a_function_of_the_problem_and_spread_evenly():
  numbers = [guess.secret(SETTINGS, Problem('guess', str(i))) for i in range(2000)]
  assert numbers == [guess.secret(SETTINGS, Problem('guess', str(i))) for i in range(2000)]
  assert min(numbers) == 1 and max(numbers) == 100 and len(set(numbers)) == 100
  assert 45 < sum(numbers) / len(numbers) < 56
  assert guess.secret(SETTINGS, Problem('guess', '\ud800')) in range(1, 101)


def test_halving_finds_every_number_in_seven_guesses():
  with EpisodePool(cfg.Interactive(cfg.GuessNumber(), max_turns=7), ONE) as pool:
    starts = pool.start([Problem('', str(i)) for i in range(20)])
    bounds = {i: (1, 100, start.episode) for i, start in enumerate(starts)}
    found = 0
    for _ in range(7):
      rows = pool.step([(e, f'Perhaps {(low + high) // 2}.') for low, high, e in bounds.values()])
      for i, row in zip(list(bounds), rows):
        low, high, _ = bounds.pop(i)
        middle = (low + high) // 2
        if row.done:
          assert row.episode.reward == 1.0 and row.text == f'Right: it is {middle}.'
          found += 1
        else:
          bounds[i] = ((middle + 1, high) if row.text.startswith('higher') else
                       (low, middle - 1)) + (row.episode,)
  assert found == 20 and not bounds


@pytest.mark.parametrize('text, said', [
    ('none', 'Write a whole number. (2 left)'), ('', 'Write a whole number. (2 left)'),
    ('0', 'higher (2 left)'), ('-5', 'higher (2 left)'), ('not 1, but 1000000', 'lower (2 left)'),
    ('9' * 5000, 'Write a whole number. (2 left)'), ('3.5', 'Write a whole number. (2 left)')])
def test_the_last_number_of_a_text_counts(text, said):
  game = guess.game(cfg.GuessNumber(1, 100, 3))
  step, state = game.advance(Problem('x'), None, text, ())
  assert step.observation == said and not step.done and step.reward == 0 and state == 1


def test_the_last_guess_ends_the_game():
  game = guess.game(cfg.GuessNumber(1, 100, 1))
  step, _ = game.advance(Problem('x'), None, '0', ())
  number = guess.secret(cfg.GuessNumber(), Problem('x'))
  assert step.done and step.reward == 0 and step.observation == f'It was {number}.'


# --- textarena ------------------------------------------------------------------------


def test_a_game_of_textarena_is_played_by_its_name():
  pytest.importorskip('textarena')
  with EpisodePool(cfg.Interactive(cfg.TextArena('GuessTheNumber-v0'), max_turns=30), ONE) as pool:
    one, other = pool.start([Problem('a'), Problem('b')])
    assert one.outcome is Outcome.OK and 'between 1 and 20' in one.messages[0].content
    episode, seen = one.episode, []
    for number in range(1, 21):
      row, = pool.step([(episode, f'[{number}]')])
      seen.append(row)
      if row.done:
        break
      assert '[' not in row.text and 'higher' in row.text
      episode = row.episode
    assert row.done and row.outcome is Outcome.OK and row.episode.reward == 1.0
    again, = pool.step([(one.episode, '[1]')])
    assert again == seen[0]


@pytest.mark.slow
def test_a_game_that_is_not_there_or_needs_two_players_says_so():
  pytest.importorskip('textarena')
  with pytest.raises(UserError, match="'NoGame-v0': textarena has no game of this name"):
    text_arena.game(cfg.TextArena('NoGame-v0'))
  with pytest.raises(AssertionError, match='player'):
    text_arena.game(cfg.TextArena('TicTacToe-v0')).start(Problem('a'))


def test_a_missing_extra_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'textarena', None)
  with pytest.raises(UserError, match=r'pip install .jaxrl_pt\[textarena\]'):
    text_arena.game(cfg.TextArena('GuessTheNumber-v0'))
