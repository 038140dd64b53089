"""A game played inside a model: ledger, map and pose round it, as one pytree that a scan carries.

A step of B games, for the actions a (arXiv 2503.21172; `cfg.MaaG` says what of it is on):

    e ← argmax of LogicNet's logits (or what a switch says)       the event
    N ← (N + deltas[e]) mod 10^digits                             the ledger, by arithmetic alone
    q̂ ← scroll(q, a);  C ← M[q̂ + view], with what is known        dead reckoning and retrieval
    x ← the model's next frame, given its history, a, N and C
    q ← q̂ + o*;  M ← write(M, x, q)                               link and write

Whatever the model is, it is three functions (`WorldModel`). All noise is addressed by a game's key
and the number of the frame, so that no game depends on the others of its batch, and a `Dream` that
was saved goes on bit for bit as if it had not been.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, localise, maps, noise

# Values of `Switches.events`, in the order of `cfg.Events`.
PREDICTED, NONE, EVERY_STEP, TRUE = range(4)
EVENTS: tuple[cfg.Events, ...] = 'predicted', 'none', 'every_step', 'true'


@struct.dataclass
class Condition:
  """What a model is told of the frame that it shall draw; B games."""

  values: Array  # i32[B, M] what the display must show; −1 says nothing
  crop: Array  # i32[B, h, w] what the map says of the cells of the view, or UNKNOWN


class WorldModel(NamedTuple):
  """A model of a game; B games at once, parameters as an argument.

  init: parameters, first frames f32[B, H, W, 3] from 0 to 1, Condition of them → state.
  event_logits: parameters, state, actions i32[B] → f32[B, E + 1].
  next_frame: parameters, state, actions i32[B], Condition, keys u32[B, 2] → frames
    f32[B, H, W, 3] from 0 to 1, state.
  """

  init: Callable[[Any, Array, Condition], Any]
  event_logits: Callable[[Any, Any, Array], Array]
  next_frame: Callable[[Any, Any, Array, Condition, Array], tuple[Array, Any]]


@struct.dataclass
class Dream:
  """B games inside a model, after a frame."""

  model: Any  # the model's own state
  frame: Array  # i32[] the frame's number
  keys: Array  # u32[B, 2] of each game
  values: Array  # i32[B, M] the ledger
  origin: Array  # i32[B, 2] where the view begins, as far as is known
  map: maps.Map  # of each game, with a leading axis


@struct.dataclass
class Switches:
  """What is on; arrays, so that a person may change it between two frames of one program."""

  events: Array  # i32[] PREDICTED, NONE, EVERY_STEP or TRUE
  counters: Array  # bool[] the model is told the ledger
  map: Array  # bool[] the model is shown the map
  shuffled: Array  # bool[] each game is shown the map of its neighbour, as a control


@struct.dataclass
class Given:
  """What comes from outside in a step."""

  actions: Array  # i32[B]
  events: Array  # i32[B] the true events, which are read only where the switch is TRUE
  nudges: Array  # i32[B, 2] a planted error of the pose


@struct.dataclass
class Drawn:
  """What a step has made."""

  frames: Array  # f32[B, H, W, 3]
  predicted: Array  # i32[B] the event that LogicNet expects
  values: Array  # i32[B, M] the ledger with which the frame was drawn
  origin: Array  # i32[B, 2] where the view begins, after linking
  offset: Array  # i32[B, 2] by how much linking has moved it


class World(NamedTuple):
  """A game, a model of it, and which modules stand round it."""

  game: base.Game
  model: WorldModel
  memory: cfg.MapMemory | cfg.NoMap


def switches(modules: cfg.MaaG, is_shuffled: bool = False) -> Switches:
  """The switches as the settings have them."""
  return Switches(jnp.asarray(EVENTS.index(modules.events)), jnp.asarray(modules.shows_counters),
                  jnp.asarray(not isinstance(modules.map, cfg.NoMap)), jnp.asarray(is_shuffled))


def given(actions: Array) -> Given:
  """Actions i32[..., B] without true events or planted errors."""
  return Given(actions, jnp.zeros_like(actions), jnp.zeros((*actions.shape, 2), jnp.int32))


def start(world: World, params: Any, frames: Array, truth: base.Truth, keys: Array) -> Dream:
  """B games whose first frames, u8[B, H, W, 3], the simulator has drawn.

  Args:
    world: the game and its model.
    params: the model's parameters.
    frames: the first frames.
    truth: what is true of them: counters and places.
    keys: u32[B, 2] of each game (`noise`).
  """
  game, frames = world.game, frames.astype(jnp.float32) / 255
  empty = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(frames), *x.shape)),
                       maps.Map.empty(game.world_shape))
  # An empty map cannot say that the view is elsewhere.
  origin, remembered = jax.vmap(lambda *one: _link_and_write(world, *one))(
      frames, empty, truth.origin)
  told = Condition(truth.counters, jnp.full((len(frames), *game.view_shape), base.UNKNOWN))
  started = Dream(world.model.init(params, frames, told), jnp.asarray(0), keys, truth.counters,
                  origin, remembered)
  # A program compiled for this dream then takes the dreams after it too: their types are no weaker.
  fixed: Dream = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), started)
  return fixed


def fold(keys: Array, number: Array | int) -> Array:
  """u32[B, 2]: a key of each game for a number."""
  return jax.vmap(lambda key: noise.fold(key, number))(keys)


def step(world: World, params: Any, dream: Dream, now: Given, on: Switches) -> tuple[Dream, Drawn]:
  """The next frame of B games; equations above."""
  game, frame = world.game, dream.frame + 1
  predicted = world.model.event_logits(params, dream.model, now.actions).argmax(-1)
  event = _event(on.events, predicted.astype(jnp.int32), now.events)
  values = base.ledger(game.counters, game.deltas, dream.values, event)
  expected = jax.vmap(game.scroll)(dream.origin, now.actions) + now.nudges
  frames, state = world.model.next_frame(
      params, dream.model, now.actions, _condition(world, dream.map, expected, values, on),
      fold(dream.keys, frame))
  origin, remembered = jax.vmap(lambda *one: _link_and_write(world, *one))(
      frames, dream.map, expected)
  after = Dream(state, frame, dream.keys, values, origin, remembered)
  return after, Drawn(frames, predicted, values, origin, origin - expected)


def _event(switch: Array, predicted: Array, true: Array) -> Array:
  """i32[B]: the events that count."""
  choices = jnp.stack([predicted, jnp.zeros_like(predicted), jnp.ones_like(predicted), true])
  return choices[switch]


def _condition(world: World, remembered: maps.Map, origin: Array, values: Array, on: Switches
               ) -> Condition:
  """What the model is told: the ledger and what the map knows, or nothing of either."""
  game = world.game

  def crop(one: maps.Map, origin: Array) -> Array:
    return maps.contents_of(game, *maps.retrieve(one, origin, game.view_shape))

  shown = jax.tree.map(lambda x: jnp.where(on.shuffled, jnp.roll(x, 1, 0), x), remembered)
  cells = jax.vmap(crop)(shown, origin)
  return Condition(jnp.where(on.counters, values, -1), jnp.where(on.map, cells, base.UNKNOWN))


def _link_and_write(world: World, frame: Array, remembered: maps.Map, expected: Array
                    ) -> tuple[Array, maps.Map]:
  """Where one game's frame is seen from, and the map with it."""
  memory = world.memory
  if isinstance(memory, cfg.NoMap):
    return expected, remembered
  view = maps.see(world.game, frame, memory.entries)
  match memory.localisation:
    case cfg.SlidingWindow() as how:
      origin = expected + localise.link(remembered, view, expected, how)
    case cfg.DeadReckoning():
      origin = expected
  return origin, maps.write(remembered, view, origin, memory.writes)


def rollout(world: World, params: Any, dream: Dream, now_T: Given, on: Switches
            ) -> tuple[Dream, Drawn]:
  """T steps, as one scan.

  Args:
    world: the game and its model.
    params: the model's parameters.
    dream: where it begins.
    now_T: what comes from outside, with a leading axis of T steps.
    on: what is on in all of them.

  Returns:
    The dream after the last step, and what each step has drawn, with a leading axis.
  """
  return jax.lax.scan(lambda dream, now: step(world, params, dream, now, on), dream, now_T)


# --- Edits ------------------------------------------------------------------------


def set_values(dream: Dream, values: Array) -> Dream:
  """The dream with other ledgers, i32[B, M]."""
  return dataclasses.replace(dream, values=values)


def add(game: base.Game, dream: Dream, amount: int) -> Dream:
  """The dream with an amount added to the first counter of every game; it wraps."""
  changed = dream.values.at[:, 0].add(amount) % base.moduli(game.counters)
  return dataclasses.replace(dream, values=changed)


def paint(game: base.Game, dream: Dream, cells: Array, contents: Array) -> Dream:
  """The dream with a content, i32[B], in a cell of each map, i32[B, 2]; see `maps.paint`."""
  painted = jax.vmap(lambda one, cell, content: maps.paint(game, one, cell, content))(
      dream.map, cells, contents)
  return dataclasses.replace(dream, map=painted)
