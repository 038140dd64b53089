"""Playing an environment at the terminal."""

import io
import json
from pathlib import Path
import subprocess
import sys

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import guess, play
from jaxrl_pt.environments.interactive import Problem

ROOT = Path(__file__).resolve().parents[2]
GAME = cfg.GuessNumber(1, 4, 3)
PROBLEM = Problem('game 7')


def _played(*texts: str, as_json: bool = False) -> tuple[bool, str]:
  out = io.StringIO()
  is_over = play.play(cfg.Interactive(GAME), PROBLEM, texts, out, as_json)
  return is_over, out.getvalue()


def test_an_episode_is_shown_turn_by_turn_until_its_end():
  number = guess.secret(GAME, PROBLEM)
  is_over, said = _played('5', str(number), 'never read')
  assert is_over and said.splitlines()[1:] == [
      'lower (2 left)', '[reward 0, guesses 1]', f'Right: it is {number}.',
      '[reward 1, guesses 1]', '[done after 2 turns, reward 1]']
  assert said.startswith('[user] I think of a whole number from 1 to 4.')


def test_texts_that_end_before_the_episode_are_no_end():
  is_over, said = _played('5', as_json=True)
  opening, turn = map(json.loads, said.splitlines())
  assert not is_over and opening['messages'][0]['role'] == 'user'
  assert (turn['observation'], turn['done'], turn['turns']) == ('lower (2 left)', False, 1)


@pytest.mark.parametrize('lines, texts', [
    (['a', 'b'], ['a', 'b']), (['a\\', 'b', 'c'], ['a\nb', 'c']), (['a\\'], ['a']), ([], [])])
def test_a_line_that_ends_with_a_backslash_goes_on(lines, texts):
  assert list(play.joined(lines)) == texts


def test_the_command_plays_a_shipped_environment():
  said = subprocess.run(
      [sys.executable, '-m', 'jaxrl_pt.main', 'play', '--environment', 'calculator', '--prompt',
       '6*7?', '--reference', '42'], cwd=ROOT, capture_output=True, text=True, check=False,
      input='<tool_call>no</tool_call>\n\\boxed{42}\n')
  assert said.returncode == 0, said.stderr
  assert '"type": "not_json"' in said.stdout
  assert said.stdout.endswith('[done after 2 turns, reward 1]\n')
