"""Pong: two paddles and a ball; the player has the left paddle, and whoever misses gives a point.

Positions are whole units. A paddle sends the ball back at an angle that says where it was hit. The
opponent follows the ball with a probability of its skill in each step; that, and the serve after a
point, follow from the key of the world and the number of the frame. The episode is over when
a side has the winning score.

Source: MaaG (arXiv 2503.21172) names the game; its rules here are our own.
"""

import dataclasses

from flax import struct
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, display, history, noise, reading

ACTIONS = ('up', 'stay', 'down')
STAY = 1
PADDLE, BALL = 5, 2  # the paddle's height and the ball's side, in units
FIRST, LAST = 2, 28  # columns of the ball's left side; the paddles stand in two units beyond
PLAYER, OPPONENT, THE_BALL = 0, 1, 2  # rows of `Truth.objects`
_COUNTERS = (base.Counter('player', 2), base.Counter('opponent', 2))
_DELTAS = np.array([[0, 0], [1, 0], [0, 1]], np.int32)
_TOP = display.NUM_ROWS + 1  # the first row of the field, below a line
_NO_CELLS = 0, 0
# What a frame's chance is needed for.
_OF_SCORE, _OF_SIDE, _OF_SLOPE, _OF_OPPONENT = range(4)

_FIELD, _LINE = (20, 70, 50), (200, 200, 200)
_COLOURS = (90, 170, 255), (255, 110, 90), (255, 230, 110)  # player, opponent, ball


@struct.dataclass
class State:
  """Positions and speeds are in units of the field, whose first row is 0."""

  key: Array  # u32[2] the key of the world
  frame: Array  # i32[] the number of the frame
  paddles: Array  # i32[2] the top rows of player and opponent
  ball: Array  # i32[2] its upper left corner
  speed: Array  # i32[2] rows and columns in a step
  counters: Array  # i32[2]
  event: Array  # i32[] 1: the player scored, 2: the opponent did
  moved: Array  # i32[2]
  done: Array  # bool[]


def make(config: cfg.Pong) -> base.Game:
  """The game with these settings."""
  shape = display.scale(config.frame)
  height = shape.rows - _TOP
  picture = _Picture(shape)
  return base.Game(
      config=config, actions=ACTIONS, stay=STAY, events=('none', 'player_scored',
                                                         'opponent_scored'),
      deltas=_DELTAS, counters=_COUNTERS, worth=np.array([1, -1]), contents=(),
      frame_shape=shape.frame_shape,
      world_shape=_NO_CELLS, view_shape=_NO_CELLS, grid=(0, 0, 0, 0),
      tiles=base.NO_TILES, num_objects=3,
      init=lambda key: _init(config, height, key),
      step=lambda state, action: _step(config, height, state, action), truth=_truth,
      scroll=lambda origin, action: origin, draw=picture.draw,
      recognise=picture.recognise, moved=_moved,
      follow=lambda past, action, shown: _history(config, height, past, action, shown),
      paint=lambda state, row, column, content: state,
      paintable=lambda state, content: jnp.zeros(_NO_CELLS, bool),
      policies={'random': base.random_policy(len(ACTIONS)), 'follow': _follow})


# --- Rules ------------------------------------------------------------------------


def _init(config: cfg.Pong, height: int, key: Array) -> State:
  first = noise.fold(key, 0)
  scores = noise.whole(noise.fold(first, _OF_SCORE), 0, config.start_high, (2,))
  ball, speed = _serve(config, height, first)
  paddles = jnp.full(2, (height - PADDLE) // 2)
  return State(key, jnp.asarray(0), paddles, ball, speed, scores, jnp.asarray(base.NO_EVENT),
               jnp.zeros(2, jnp.int32), jnp.asarray(False))


def _serve(config: cfg.Pong, height: int, key: Array) -> tuple[Array, Array]:
  """A ball in the middle, and its speed towards one of the sides."""
  side = 2 * noise.whole(noise.fold(key, _OF_SIDE), 0, 1) - 1
  slope = noise.whole(noise.fold(key, _OF_SLOPE), -1, 1)
  middle = jnp.array([(height - BALL) // 2, (FIRST + LAST) // 2])
  return middle, jnp.stack([slope, side * config.ball_speed])


def _step(config: cfg.Pong, height: int, state: State, action: Array) -> State:
  frame = state.frame + 1
  chance = noise.fold(state.key, frame)
  paddles = _move_paddles(config, height, state, action, chance)
  ball, speed, event = _fly(height, state, paddles)
  served, serve_speed = _serve(config, height, chance)
  is_point = event != base.NO_EVENT
  counters = base.ledger(_COUNTERS, _DELTAS, state.counters, event)
  moved = jnp.stack([paddles[PLAYER] - state.paddles[PLAYER], jnp.zeros_like(frame)])
  after = dataclasses.replace(
      state, frame=frame, paddles=paddles, ball=jnp.where(is_point, served, ball),
      speed=jnp.where(is_point, serve_speed, speed), counters=counters, event=event, moved=moved,
      done=(counters >= config.winning_score).any())
  return base.unless(state.done, after, dataclasses.replace(
      state, frame=frame, event=jnp.zeros_like(event), moved=jnp.zeros_like(moved)))


def _move_paddles(config: cfg.Pong, height: int, state: State, action: Array, key: Array) -> Array:
  """i32[2]: the paddles after the player's action and the opponent's reaction."""
  towards = state.ball[0] + BALL // 2 - (state.paddles[OPPONENT] + PADDLE // 2)
  follows = noise.uniform(noise.fold(key, _OF_OPPONENT)) < config.opponent_skill
  follows &= state.speed[1] > 0
  steps = jnp.stack([(action - STAY) * config.paddle_speed,
                     follows * jnp.clip(towards, -config.paddle_speed, config.paddle_speed)])
  return jnp.clip(state.paddles + steps, 0, height - PADDLE)


def _fly(height: int, state: State, paddles: Array) -> tuple[Array, Array, Array]:
  """The ball after a step, its speed, and the event: a paddle is hit or missed at its column."""
  row, column = state.ball + state.speed
  low = height - BALL
  is_off = (row < 0) | (row > low)
  row = jnp.where(row < 0, -row, jnp.where(row > low, 2 * low - row, row))
  slope = jnp.where(is_off, -state.speed[0], state.speed[0])
  at_left, at_right = column < FIRST, column > LAST
  paddle = jnp.where(at_left, paddles[PLAYER], paddles[OPPONENT])
  hits = (row + BALL > paddle) & (row < paddle + PADDLE)
  # Twice the distance between the middles of ball and paddle, an odd number.
  off = 2 * row + BALL - (2 * paddle + PADDLE)
  slope = jnp.where((at_left | at_right) & hits,
                    jnp.sign(off) * jnp.minimum(2, jnp.abs(off) // 2), slope)
  column = jnp.where(at_left, 2 * FIRST - column, jnp.where(at_right, 2 * LAST - column, column))
  across = jnp.where(at_left | at_right, -state.speed[1], state.speed[1])
  event = jnp.where(at_right & ~hits, 1, jnp.where(at_left & ~hits, 2, base.NO_EVENT))
  return jnp.stack([row, column]), jnp.stack([slope, across]), event


def _truth(state: State) -> base.Truth:
  top, none = state.paddles[PLAYER], jnp.zeros_like(state.frame)
  pose = jnp.stack([top, none])
  cells = jnp.zeros(_NO_CELLS, jnp.int32)
  objects = jnp.stack([pose, jnp.stack([state.paddles[OPPONENT], none]), state.ball])
  return base.Truth(
      counters=state.counters, event=state.event, moved=state.moved, pose=pose,
      origin=jnp.zeros(2, jnp.int32), cells=cells, memory=cells, away=cells,
      returned=cells.astype(bool), objects=objects, done=state.done)


def _history(config: cfg.Pong, height: int, past: history.History, action: Array,
             shown: base.Reading) -> history.History:
  """A ball that is elsewhere than it can have flown has been served: one side has scored.

  In an unreadable frame the paddle is taken to be where the action leads, and nothing else moves.
  """
  top, column = past.objects[PLAYER, 0], past.objects[THE_BALL, 1]
  target = jnp.clip(top + (action - STAY) * config.paddle_speed, 0, height - PADDLE)
  assumed = past.objects.at[PLAYER, 0].set(target)
  objects = jnp.where(shown.readable, shown.objects, assumed)
  frame = past.frame + 1
  furthest = config.ball_speed * (frame - past.read_at)
  is_served = (jnp.abs(objects[THE_BALL, 1] - column) > furthest) & shown.readable
  event = jnp.where(is_served, jnp.where(column < (FIRST + LAST) // 2, 2, 1), base.NO_EVENT)
  counters = base.ledger(_COUNTERS, _DELTAS, past.claims.counters, event)
  claims = history.claim(past, past.sightings, past.origin, is_due=jnp.zeros(_NO_CELLS, bool),
                         is_bare=jnp.zeros(_NO_CELLS, bool), event=event, counters=counters,
                         moved=jnp.stack([target - top, jnp.zeros_like(top)]))
  after = dataclasses.replace(
      past, claims=claims, pose=objects[PLAYER], objects=objects,
      read_at=jnp.where(shown.readable, frame, past.read_at),
      done=past.done | (counters >= config.winning_score).any())
  return history.freeze(past, after)


def _moved(before: base.Reading, after: base.Reading) -> tuple[Array, Array]:
  return after.objects[PLAYER] - before.objects[PLAYER], jnp.asarray(True)


# --- Policies ---------------------------------------------------------------------


def _follow(state: State, turn: base.Turn) -> Array:
  """Follows the ball, and one time in ten does anything at all."""
  towards = jnp.sign(state.ball[0] + BALL // 2 - (state.paddles[PLAYER] + PADDLE // 2))
  anything = noise.whole(noise.fold(turn.key, 1), 0, len(ACTIONS) - 1)
  return jnp.where(noise.uniform(turn.key) < 0.1, anything, STAY + towards)


# --- Frames -----------------------------------------------------------------------


class _Picture:
  """How a frame is drawn and recognised: two scores, two paddles and the ball."""

  def __init__(self, shape: display.Scale) -> None:
    self._unit, self._height = shape.unit, shape.rows - _TOP
    self._background = display.background(shape, (_TOP - 1, _LINE), (_TOP, _FIELD))
    self._digits = [display.Digits(column, counter.num_digits, shape.unit)
                    for column, counter in zip((1, 24), _COUNTERS, strict=True)]
    tops = np.arange(self._height - PADDLE + 1)[:, None]
    rows = np.arange(self._height)
    # f32[K, rows]: where a paddle is at each of its K places.
    self._paddles = ((rows >= tops) & (rows < tops + PADDLE)).astype(np.float32)

  def draw(self, counters: Array, cells: Array, objects: Array) -> Array:
    del cells
    canvas = jnp.asarray(self._background)
    for digits, value in zip(self._digits, counters, strict=True):
      canvas = digits.draw(canvas, value)
    height, width, _ = self._background.shape
    row = (np.arange(height) // self._unit - _TOP)[:, None]
    column = (np.arange(width) // self._unit)[None]
    # Each one's top row, left column and height.
    boxes: tuple[tuple[Array, Array | int, int], ...] = (
        (objects[PLAYER, 0], 0, PADDLE), (objects[OPPONENT, 0], LAST + BALL, PADDLE),
        (objects[THE_BALL, 0], objects[THE_BALL, 1], BALL))
    for (top, left, box_height), colour in zip(boxes, _COLOURS, strict=True):
      inside = ((row >= top) & (row < top + box_height) & (column >= left)
                & (column < left + BALL))
      canvas = jnp.where(inside[..., None], np.array(colour, np.uint8), canvas)
    return canvas

  def recognise(self, frame: Array) -> base.Parts:
    values, blends = [], []
    for digits in self._digits:
      found, blend = reading.classify(digits.cut(frame), digits.templates / 255)
      values.append(digits.join(found))
      blends.append(blend)
    field = frame[_TOP * self._unit:]
    tops = []
    for index, left in ((PLAYER, 0), (OPPONENT, LAST + BALL)):
      strip = self._coverage(field, _COLOURS[index])[:, left:left + BALL].mean(-1)
      top, blend = reading.classify(strip[None], self._paddles)
      tops.append(jnp.stack([top[0], jnp.zeros_like(top[0])]))
      blends.append(blend)
    ball, blend = _find_ball(
        self._coverage(field, _COLOURS[THE_BALL])[:, FIRST:LAST + BALL])
    objects = jnp.stack([*tops, ball + jnp.array([0, FIRST])])
    return base.Parts(jnp.stack(values), jnp.zeros(_NO_CELLS, jnp.int32), objects,
                      jnp.concatenate([*blends, blend]).max())

  def _coverage(self, field: Array, colour: tuple[int, int, int]) -> Array:
    """f32[rows, 32]: how much of each unit of the field is of that colour: 0 the field, 1 all."""
    empty = np.array(_FIELD, np.float32) / 255
    line = np.array(colour, np.float32) / 255 - empty
    covered = ((field - empty) * line).sum(-1) / (line**2).sum()
    return covered.reshape(-1, self._unit, 32, self._unit).mean((1, 3))


def _find_ball(covered: Array) -> tuple[Array, Array]:
  """Where the ball's upper left corner is, and the largest share of any other place.

  Args:
    covered: f32[rows, columns] as `_coverage` gives it, of the columns that a ball may take.

  Returns:
    i32[2] row and column, f32[1].
  """
  rows = covered[:-1] + covered[1:]
  sums = rows[:, :-1] + rows[:, 1:]
  row, column = jnp.unravel_index(sums.argmax(), sums.shape)
  down = jnp.maximum(BALL - jnp.abs(np.arange(sums.shape[0]) - row), 0)
  across = jnp.maximum(BALL - jnp.abs(np.arange(sums.shape[1]) - column), 0)
  apart = 2 * (BALL * BALL - down[:, None] * across[None])
  share = reading.rival_share(-2 * sums.reshape(1, -1), apart.reshape(1, -1))
  return jnp.stack([row, column]), share
