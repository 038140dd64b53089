"""Games of one player of the textarena library, by name, such as GuessTheNumber-v0.

The game is seeded with a hash of the problem, and its `-raw` form is played: an observation holds
what the game says since the player's last text, and not what the player wrote. A game that needs
several players, a download or a key does not begin, and says so.
"""

from collections.abc import Sequence
import hashlib
import math
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.interactive import Game, Message, Problem, Step, replayed
from jaxrl_pt.errors import UserError


def game(settings: cfg.TextArena) -> Game:
  """The game.

  Raises:
    UserError: the `textarena` extra is missing, or has no game of this name.
  """
  try:
    import textarena
    from textarena.envs import registration
  except ImportError as error:
    raise UserError("TextArena needs the extra `textarena`: pip install 'jaxrl_pt[textarena]'."
                    ) from error
  name = f'{settings.game}-raw'
  if name not in registration.ENV_REGISTRY:
    raise UserError(f'TextArena.game = {settings.game!r}: textarena has no game of this name; '
                    'GuessTheNumber-v0 is one.')
  return replayed(lambda: _Arena(textarena, name))


class _Arena:
  """One episode of a game. Final."""

  def __init__(self, library: Any, name: str) -> None:
    self._library = library
    self._game: Any = library.make(name)

  def reset(self, problem: Problem) -> Sequence[Message]:
    """Begins the game that the problem's hash chooses."""
    text = f'{problem.prompt}\0{problem.reference}'.encode(errors='backslashreplace')
    self._game.reset(num_players=1, seed=int(hashlib.sha256(text).hexdigest()[:8], 16))
    return [Message('user', self._heard())]

  def step(self, text: str) -> Step:
    """Plays the text."""
    done, _ = self._game.step(text)
    if not done:
      return Step(self._heard(), 0.0, False)
    rewards, info = self._game.close()
    reward = float(rewards[0])
    if not math.isfinite(reward):
      raise ValueError(f'the game gave the reward {reward}')
    return Step(str(info[0].get('reason', '')), reward, True)

  def _heard(self) -> str:
    """What the game has said since it was last heard, without the player's own texts."""
    _, messages = self._game.get_observation()
    own = self._library.ObservationType.PLAYER_ACTION
    return '\n'.join(text for _, text, kind in messages if kind is not own).strip()
