"""Models of a game that have learned nothing: the game's own renderer, whole or with a defect.

Measures of models are tried on them: the true renderer must be right everywhere, and a defect must
be found where it is, and only there. Their parameters are the simulator's states of the first
frames, so that they know the world; `cfg.Renderer` says what each does of what it is told.
"""

import functools
from typing import Any

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, dream, history, maps, noise

_OF_COLOURS, _OF_DIGITS, _OF_SLIPS, _OF_PIXELS = range(4)
_SLIP_RATE = 1 / 8  # how often an event is miscounted


@struct.dataclass
class State:
  """The simulator's games, and what the last frames showed; B games."""

  games: Any
  values: Array  # i32[B, M]
  origin: Array  # i32[B, 2]
  cells: Array  # i32[B, h, w]


def world_model(game: base.Game, kind: cfg.Renderer = 'true', pixel_noise: float = 0.0
                ) -> dream.WorldModel:
  """The renderer of a game as a model whose parameters are the simulator's states.

  Args:
    game: the game.
    kind: what it makes of ledger and map.
    pixel_noise: standard deviation of noise in every pixel, of colours from 0 to 1.
  """
  def begin(games: Any, frames: Array, told: dream.Condition) -> State:
    del frames, told
    truth = jax.vmap(game.truth)(games)
    return State(games, truth.counters, truth.origin, truth.cells)

  def event_logits(games: Any, state: State, actions: Array) -> Array:
    del games
    events = jax.vmap(lambda one, action: game.truth(game.step(one, action)).event)(
        state.games, actions)
    return jax.nn.one_hot(events, len(game.events))

  def next_frame(games: Any, state: State, actions: Array, told: dream.Condition, keys: Array
                 ) -> tuple[Array, State]:
    del games
    return jax.vmap(functools.partial(_draw, game, kind, pixel_noise))(state, actions, told, keys)

  return dream.WorldModel(begin, event_logits, next_frame)


def _draw(game: base.Game, kind: cfg.Renderer, pixel_noise: float, state: State, action: Array,
          told: dream.Condition, key: Array) -> tuple[Array, State]:
  """One game's next frame."""
  games = game.step(state.games, action)
  truth = game.truth(games)
  values = _values(game, kind, state, truth, told, key)
  cells = _cells(game, kind, state, truth, told, key)
  drawn = game.draw(values, cells, truth.objects).astype(jnp.float32) / 255
  frame = jnp.roll(drawn, 1, 1) if kind == 'shifted' else drawn
  if pixel_noise:
    # Four uniform numbers have a sum whose variance is 1/3.
    normal = np.float32(np.sqrt(3)) * (
        noise.uniform(noise.fold(key, _OF_PIXELS), (4, *frame.shape)).sum(0) - 2)
    frame = jnp.clip(frame + pixel_noise * normal, 0, 1)
  # What an agent stands on the next frame cannot copy from this one.
  return frame, State(games, values, truth.origin, game.recognise(drawn).cells)


def _values(game: base.Game, kind: cfg.Renderer, state: State, truth: base.Truth,
            told: dream.Condition, key: Array) -> Array:
  """i32[M]: what the display shows."""
  limits = base.moduli(game.counters)
  if kind == 'wrong_digits':
    return noise.whole(noise.fold(key, _OF_DIGITS), 0, 999, limits.shape) % limits
  own = base.ledger(game.counters, game.deltas, state.values, truth.event)
  if kind == 'weak':
    slips = (truth.event != base.NO_EVENT) & (noise.uniform(noise.fold(key, _OF_SLIPS))
                                              < _SLIP_RATE)
    own = (own + slips) % limits
  return own if kind == 'ignores' else jnp.where(told.values < 0, own, told.values)


def _cells(game: base.Game, kind: cfg.Renderer, state: State, truth: base.Truth,
           told: dream.Condition, key: Array) -> Array:
  """i32[h, w]: what the cells of the view show."""
  if not game.contents or kind == 'ignores':
    return truth.cells
  # What chance decides: the colours of buildings, and whether there is a pellet.
  choices = maps.buildable(game)[:_num_choices(game)]
  is_open = (truth.cells[..., None] == choices).any(-1)
  drawn = jnp.asarray(choices)[noise.whole(noise.fold(key, _OF_COLOURS), 0, len(choices) - 1,
                                           game.view_shape)]
  if kind == 'redraws':
    return jnp.where(is_open, drawn, truth.cells)
  cells = truth.cells
  if kind == 'weak':
    before = history.window(state.cells, truth.origin - state.origin, game.view_shape,
                            base.UNKNOWN)
    was_there = (before[..., None] == choices).any(-1)
    cells = jnp.where(is_open, jnp.where(was_there, before, drawn), cells)
  is_told = (told.crop != base.UNKNOWN) & (truth.cells != base.UNKNOWN)
  # A map that says ground does not deny what is built on it in this very step.
  is_vacant = (told.crop[..., None] == np.flatnonzero(game.tiles.vacant)).any(-1)
  is_told &= ~(is_vacant & (truth.memory == told.crop) & (truth.cells != truth.memory))
  return jnp.where(is_told, told.crop, cells)


def _num_choices(game: base.Game) -> int:
  config = game.config
  return config.num_colours if isinstance(config, cfg.Traveler) else len(game.contents)
