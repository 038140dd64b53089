"""What is true of frames that a model has made: its own history, not the simulator's.

A model draws the colours of new buildings and the moves of ghosts and balls by itself, so that no
simulator can say what its next frame should show. Its past frames and the executed actions can: a
building has the colour with which it was first shown, a score has what it began with and what the
events since have added, and an agent is where the action leads. `Claims` are these demands on one
frame, and each game's `follow` makes them (`base.Game.follow`).

An event follows from the actions and the visited cells where they suffice (Traveler), and from what
the frames show of ghosts and balls where chance has a part in it (Pac-Man, Pong).

Source: our own; the MaaG paper (arXiv 2503.21172) does not define its metrics.
"""

import dataclasses

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp

from jaxrl_pt.game import base


@struct.dataclass
class Claims:
  """What must be true of one frame; M counters, a view of h × w cells."""

  counters: Array  # i32[M]
  event: Array  # i32[] the event of the step that led to this frame
  moved: Array  # i32[2] by how much the action moves the agent
  is_move: Array  # bool[] whether `moved` is demanded: not of an agent that has died
  counts: Array  # bool[] whether anything is demanded: not once the episode is over
  origin: Array  # i32[2] world coordinates of the view's first cell, by the executed actions
  due: Array  # bool[h, w] cells that must show what they showed before
  bare: Array  # bool[h, w] cells on which nothing was ever built or put, which must show that
  cells: Array  # i32[h, w] what they must show; UNKNOWN where no frame could be read
  away: Array  # i32[h, w] frames that a cell was out of view before it came back; 0 if it was not
  returned: Array  # bool[h, w] it came back in this very frame


@struct.dataclass
class History:
  """One game's frames up to now, as far as later frames depend on them."""

  claims: Claims  # on the last frame
  frame: Array  # i32[] its number
  pose: Array  # i32[2] the agent's world coordinates
  origin: Array  # i32[2] world coordinates of the view's first cell
  starts: Array  # i32[K, 2] where agent, opponents and balls were in the first frame
  objects: Array  # i32[K, 2] where they are
  read_at: Array  # i32[] the last frame that could be read
  done: Array  # bool[] the episode is over after this frame
  world: Array  # i32[rows, columns] what a readable frame first showed of each cell, or UNKNOWN
  since: Array  # i32[rows, columns] the frame from which on there is something, −1 for none
  sightings: base.Sightings


def start(game: base.Game, truth: base.Truth) -> History:
  """The history of a first frame, of which the simulator knows what is true."""
  tiles = game.tiles
  inside = window(jnp.ones(game.world_shape, bool), truth.origin, game.view_shape, False)
  is_seen = inside & (truth.cells != base.UNKNOWN)
  is_settled = is_seen
  if len(tiles.kept):
    is_settled &= jnp.asarray(tiles.settled)[truth.cells]
  back = lambda array, outside: window(array, -truth.origin, game.world_shape, outside)
  world = back(jnp.where(is_settled, truth.cells, base.UNKNOWN), base.UNKNOWN)
  since = jnp.where(world == base.UNKNOWN, -1, 0)
  none = jnp.zeros(game.view_shape, bool)
  claims = Claims(
      truth.counters, truth.event, truth.moved, jnp.asarray(False), ~truth.done, truth.origin, none,
      none, jnp.full(game.view_shape, base.UNKNOWN, jnp.int32),
      jnp.zeros(game.view_shape, jnp.int32), none)
  zero = jnp.asarray(0)
  sightings = base.Sightings.none(game.world_shape).see(back(is_seen, False), zero)
  return History(claims, zero, truth.pose, truth.origin, truth.objects, truth.objects, zero,
                 truth.done, world, since, sightings)


def window(array: Array, origin: Array, shape: tuple[int, int], outside: bool | int) -> Array:
  """[h, w, ...]: the part of an array [rows, columns, ...] that begins at `origin`.

  With −origin and the shape of the whole it puts a part back where `window` took it from.

  Args:
    array: the whole.
    origin: i32[2], which may lie outside.
    shape: h and w.
    outside: what lies outside of the array.
  """
  if 0 in (*array.shape[:2], *shape):
    return jnp.zeros((*shape, *array.shape[2:]), array.dtype)
  row, column = (origin[axis] + jnp.arange(shape[axis]) for axis in (0, 1))
  rows, columns = array.shape[:2]
  is_inside = (((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None])
  found = array[jnp.clip(row, 0, rows - 1)][:, jnp.clip(column, 0, columns - 1)]
  return jnp.where(is_inside.reshape(*shape, *(1,) * (array.ndim - 2)), found, outside)


def claim(past: History, sightings: base.Sightings, origin: Array, *, is_due: Array,
          is_bare: Array, event: Array, counters: Array, moved: Array,
          is_move: Array | bool = True) -> Claims:
  """The demands on the frame after `past`.

  Args:
    past: the history before it, whose `world` says what cells must show.
    sightings: with the new frame.
    origin: i32[2] where the frame's view begins.
    is_due: bool[rows, columns] the cells of the world that must show what they showed before.
    is_bare: bool[rows, columns] those that must show that there is nothing; False for none.
    event, counters, moved, is_move: as in `Claims`.
  """
  shape = past.claims.due.shape
  assert len(shape) == 2
  view = lambda array, outside: window(array, origin, shape, outside)
  due, bare = view(is_due, False), view(is_bare, False)
  return Claims(
      counters, event, moved, jnp.asarray(is_move), ~past.done, origin, due, bare,
      jnp.where(due, view(past.world, base.UNKNOWN), base.UNKNOWN),
      jnp.where(due | bare, view(sightings.away, 0), 0),
      (due | bare) & view(sightings.returned(past.frame + 1), False))


def freeze(past: History, after: History) -> History:
  """`after` with the frame's number, or `past` with it where the episode was over before."""
  chosen = base.unless(past.done, after, dataclasses.replace(
      past, claims=dataclasses.replace(past.claims, counts=jnp.asarray(False))))
  frozen: History = dataclasses.replace(chosen, frame=past.frame + 1)
  return frozen


def set_counters(past: History, values: Array) -> History:
  """The history after somebody has set the numbers of the display, i32[M]."""
  return dataclasses.replace(past, claims=dataclasses.replace(past.claims, counters=values))


def paint(past: History, cell: Array, content: Array) -> History:
  """The history after somebody has painted a content, i32[], into a cell of the world, i32[2]."""
  here = base.is_at(past.world.shape, cell)
  return dataclasses.replace(
      past, world=jnp.where(here, content, past.world),
      since=jnp.where(here & (past.since < 0), past.frame, past.since))


def follow(game: base.Game, past: History, actions_T: Array, shown_T: base.Reading) -> Claims:
  """The demands on each of T frames of one game.

  Args:
    game: the game.
    past: the history up to the frame before the first of them.
    actions_T: i32[T] the action that led to each.
    shown_T: what is read of each, with a leading axis.
  """
  def turn(past: History, seen: tuple[Array, base.Reading]) -> tuple[History, Claims]:
    after = game.follow(past, *seen)
    return after, after.claims

  _, claims = jax.lax.scan(turn, past, (actions_T, shown_T))
  return claims
