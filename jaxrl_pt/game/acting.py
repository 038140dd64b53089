"""A policy plays B games, in the true game or inside a model of it, and is paid by what it sees.

    a_t ~ π(· | the last K frames),   x_{t+1} = the environment's next frame
    r_t = Σ_m worth_m · (N_m(x_{t+1}) − N_m(x_s)),  s ≤ t the last frame that could be read

N(x) are the numbers that the game's reader finds in the frame x (`game.reading`), and their
difference is that of numbers that wrap, so that 000 after 999 is one more. The reader is the only
source of the reward: what a model says about itself pays nothing, and neither does a frame that
cannot be read. With `pays = 'events'` a change that the events of t + 1 − s steps cannot have made
pays nothing either.

Beside the rewards stands what is true. `true_rewards` are those of the true game in the same world
with the same actions. In Traveler they are what the actions deserve. In Pong and Pac-Man, where
chance moves balls and ghosts, the actions answer the frames of another game, and what counts there
is `false`: how often a frame shows other numbers than the game's own history demands
(`game.history`). Where a model pays for nothing, both say so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, dream, history, reading
from jaxrl_pt.types import GameRollouts

_OF_ACTIONS, _OF_FRAMES = range(2)  # what a game's key is folded with

# act(the last K frames f32[B, K, H, W, 3], key[B]) → actions i32[B], log-probabilities f32[B].
Act = Callable[[Array, Array], tuple[Array, Array]]


class Environment(NamedTuple):
  """Where B games are played, with parameters as an argument.

  start: parameters, the simulator's states at the first frame, keys u32[B, 2] of the games' noise
    → first frames f32[B, H, W, 3] from 0 to 1, state.
  step: parameters, state, actions i32[B] → frames f32[B, H, W, 3], state.
  """

  start: Callable[[Any, Any, Array], tuple[Array, Any]]
  step: Callable[[Any, Any, Array], tuple[Array, Any]]


def true_game(game: base.Game) -> Environment:
  """The game itself, whose parameters are not read."""
  def drawn(games: Any) -> Array:
    return jax.vmap(lambda one: reading.as_float(base.render(game, game.truth(one))))(games)

  def start(params: Any, games: Any, noise_B: Array) -> tuple[Array, Any]:
    del params, noise_B
    return drawn(games), games

  def step(params: Any, games: Any, actions: Array) -> tuple[Array, Any]:
    del params
    after = jax.vmap(game.step)(games, actions)
    return drawn(after), after

  return Environment(start, step)


def inside(world: dream.World, modules: cfg.MaaG) -> Environment:
  """A model of a game with modules round it; its parameters are the model's."""
  on = dream.switches(modules)

  def start(params: Any, games: Any, noise_B: Array) -> tuple[Array, Any]:
    truth = jax.vmap(world.game.truth)(games)
    frames = jax.vmap(lambda one: base.render(world.game, one))(truth)
    return reading.as_float(frames), dream.start(world, params, frames, truth, noise_B)

  def step(params: Any, state: Any, actions: Array) -> tuple[Array, Any]:
    after, drawn = dream.step(world, params, state, dream.given(actions), on)
    return drawn.frames, after

  return Environment(start, step)


# --- Rewards ----------------------------------------------------------------------


def change(game: base.Game, before: Array, after: Array) -> Array:
  """i32[..., M]: by how much each counter, i32[..., M], has changed, the shorter way round."""
  limits = base.moduli(game.counters)
  more = (after - before) % limits
  return jnp.where(more > limits // 2, more - limits, more)


def pay(game: base.Game, changed: Array, steps: Array | int, pays: cfg.Paid) -> Array:
  """f32[...]: what a change i32[..., M] of the display pays.

  Args:
    game: its events, and what its counters are worth.
    changed: from `change`.
    steps: i32[...] the number of steps in which it has changed, in each of which there is at most
      one event.
    pays: whether any change pays, or only one that events can have made.
  """
  is_paid = jnp.ones(changed.shape[:-1], bool)
  if pays == 'events':
    # An event of a game changes one counter, and no other event changes that one.
    assert ((game.deltas != 0).sum(0) <= 1).all() and ((game.deltas != 0).sum(1) <= 1).all()
    added = game.deltas.sum(0)
    times = changed // np.where(added, added, 1)
    is_paid = ((times * added == changed) & (times >= 0)).all(-1) & (times.sum(-1) <= steps)
  return (is_paid * (changed * game.worth).sum(-1)).astype(jnp.float32)


# --- Games ------------------------------------------------------------------------


class Setting(NamedTuple):
  """What is played: the game, where, what pays, and how many frames the policy sees."""

  game: base.Game
  environment: Environment
  pays: cfg.Paid
  num_past: int


@struct.dataclass
class _Games:
  """B games after a frame."""

  state: Any  # the environment's
  seen: Array  # f32[B, K, H, W, 3] the last frames
  true: Any  # the simulator's games with the same actions
  past: history.History
  shown: Array  # i32[B, M] what the last readable frame showed
  due: Array  # i32[B, M] what its history demanded of it
  steps: Array  # i32[B] steps since that frame


def play(setting: Setting, params: Any, act: Act, worlds_B: Array, keys_B: Array, num_actions: int
         ) -> GameRollouts:
  """Plays B games for S actions, as one scan.

  Args:
    setting: what is played.
    params: the environment's parameters.
    act: the policy.
    worlds_B: u32[B, 2] keys of the worlds, of which several games may have the same.
    keys_B: key[B] of each game, which decides its actions and the noise of its frames.
    num_actions: S.

  Returns:
    The rollouts, with B in place of N and G.
  """
  game, environment, pays, num_past = setting
  games = jax.vmap(game.init)(worlds_B)
  truth = jax.vmap(game.truth)(games)
  fold = jax.vmap(jax.random.fold_in, (0, None))
  first, state = environment.start(params, games, jax.random.key_data(fold(keys_B, _OF_FRAMES)))
  of_actions = fold(keys_B, _OF_ACTIONS)

  def turn(now: _Games, number: Array) -> tuple[_Games, dict[str, Array]]:
    actions, logp = act(now.seen, fold(of_actions, number))
    frames, state = environment.step(params, now.state, actions)
    true = jax.vmap(game.step)(now.true, actions)
    read = jax.vmap(lambda frame: reading.read(game, frame))(frames)
    past = jax.vmap(game.follow)(now.past, actions, read)
    counters = [jax.vmap(game.truth)(games).counters for games in (now.true, true)]
    demanded = past.claims.counters
    changed = change(game, now.shown, read.counters)
    counts, readable = past.claims.counts, read.readable & past.claims.counts
    is_false = (changed != change(game, now.due, demanded)).any(-1)
    found = {
        'frames': frames, 'actions': actions, 'logp': logp, 'counts': counts,
        'rewards': readable * pay(game, changed, now.steps + 1, pays),
        'true_rewards': pay(game, change(game, *counters), 1, pays), 'readable': readable,
        'changed': readable & (changed != 0).any(-1), 'false': readable & is_false}
    is_read = readable[:, None]
    after = _Games(state, jnp.concatenate([now.seen[:, 1:], frames[:, None]], 1), true, past,
                   jnp.where(is_read, read.counters, now.shown),
                   jnp.where(is_read, demanded, now.due),
                   jnp.where(readable, 0, now.steps + 1))
    return after, found

  past = jax.vmap(lambda one: history.start(game, one))(truth)
  begun = _Games(state, jnp.repeat(first[:, None], num_past, 1), games, past, truth.counters,
                 truth.counters, jnp.zeros(len(worlds_B), jnp.int32))
  _, found = jax.lax.scan(turn, begun, jnp.arange(num_actions))
  by_game = {name: jnp.moveaxis(x, 0, 1) for name, x in found.items()}
  of_bool = {name: x.astype(jnp.float32) for name, x in by_game.items() if x.dtype == bool}
  frames = jnp.concatenate([first[:, None], by_game['frames']], 1)
  return GameRollouts(**{**by_game, **of_bool, 'frames': frames})
