"""Guess the number: a hash of the problem's reference chooses it, and each guess is told apart."""

from collections.abc import Sequence
import hashlib
import re
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.interactive import Game, Message, Problem, Step

_NUMBER = re.compile(r'(?<![\d.])-?\d{1,18}(?![\d]|\.\d)')


def game(settings: cfg.GuessNumber) -> Game:
  """The game; its state is the number of guesses so far."""
  def start(problem: Problem) -> Sequence[Message]:
    del problem
    return [Message('user', f'I think of a whole number from {settings.low} to {settings.high}. '
                            f'Guess it: you have {settings.max_guesses} guesses, and I say '
                            '"higher" or "lower" to each. The last number that you write counts.')]

  def advance(problem: Problem, state: Any, text: str, outputs: Sequence[str]
              ) -> tuple[Step, Any]:
    del outputs
    num_guesses = (state or 0) + 1
    number, said = secret(settings, problem), _NUMBER.findall(text)
    if said and int(said[-1]) == number:
      return Step(f'Right: it is {number}.', 1.0, True, {'guesses': 1.0}), num_guesses
    done = num_guesses == settings.max_guesses
    left = settings.max_guesses - num_guesses
    hint = ('Write a whole number.' if not said else
            'higher' if int(said[-1]) < number else 'lower')
    ending = f'It was {number}.' if done else f'{hint} ({left} left)'
    return Step(ending, 0.0, done, {'guesses': float(bool(said))}), num_guesses

  return Game(start, advance)


def secret(settings: cfg.GuessNumber, problem: Problem) -> int:
  """The number of a problem: low + sha256(prompt, reference) mod (high − low + 1)."""
  text = f'{problem.prompt}\0{problem.reference}'.encode(errors='backslashreplace')
  drawn = int.from_bytes(hashlib.sha256(text).digest(), 'big')
  return settings.low + drawn % (settings.high - settings.low + 1)
