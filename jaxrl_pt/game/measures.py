"""What a model's frames are worth: shares, each a sum of what is right over what is asked.

For B games of a model, each of which went on for T frames after a first true one, what was read of
the frames is compared with the claims of the model's own history (`history.Claims`):

    act_acc          the agent has moved as the action says
    num_con          F1 over events: 2 TP / (2 TP + FP + FN). A display that changes by exactly what
                     the event adds is a true positive, any other change a false one
    score_exact      the display shows what the first frame showed and events since have added
    score_exact_at   the same in one late frame alone
    digit_acc        the display shows the ledger with which the frame was drawn
    spa_con_all      a cell shows what it showed first, of all cells that were seen before
    spa_con_reentry  the same, in the very frame in which a cell comes back into view
    spa_con_chance   the same, if a cell that comes back were compared with what any of those cells
                     showed first: a model that draws mostly red is not at 1 in 6
    bare             a cell on which nothing was ever built shows that there is nothing
    bare_reentry     the same, in the very frame in which it comes back into view
    event_acc        LogicNet expects what happens; event_recall, where something happens
    unreadable       frames that cannot be read
    misplaced        frames whose view the modules take to be elsewhere than it is, and
                     localisation_error, by how many cells

An unreadable frame is right in nothing. Steps whose movement two readable frames leave in doubt are
not asked about; frames after the end of an episode neither.

Source: MaaG (arXiv 2503.21172) names ActAcc, NumCon (an F-measure over numerical events), SpaCon
and the accuracy of digits; how each is counted is our own.
"""

from typing import NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.game import base, dream, history, reading


@struct.dataclass
class Played:
  """B games; frame 0 is the simulator's, the T frames after it are the model's."""

  readings: base.Reading  # [B, T + 1, ...] what is read of each frame
  claims: history.Claims  # [B, T + 1, ...] what must be true of it
  values: Array  # i32[B, T, M] the ledger with which each frame was drawn
  predicted: Array  # i32[B, T] the event that LogicNet expected
  origin: Array  # i32[B, T, 2] where the modules take the view to begin
  offset: Array  # i32[B, T, 2] by how much linking has moved it


class Share(NamedTuple):
  """What is right of what is asked, of each game; both f32[B]. Their sums' ratio is the measure."""

  right: Array
  asked: Array


def measures(game: base.Game, played: Played, at: int) -> dict[str, Share]:
  """Every measure of the module's docstring, of each of B games.

  Args:
    game: the game.
    played: what was read and what had to be.
    at: the frame of score_exact_at, at most T.
  """
  readings, claims = played.readings, jax.tree.map(lambda x: x[:, 1:], played.claims)
  before, shown = (jax.tree.map(lambda x, span=span: x[:, span], readings)
                   for span in (slice(-1), slice(1, None)))
  readable, asked = shown.readable, claims.counts
  exact = readable & (shown.counters == claims.counters).all(-1)
  told = readable & (shown.counters == played.values).all(-1)
  same = readable[..., None, None] & (shown.cells == claims.cells) & (
      claims.cells != base.UNKNOWN)
  due, bare = (cells & asked[..., None, None] for cells in (claims.due, claims.bare))
  empty = readable[..., None, None] & (
      shown.cells[..., None] == np.flatnonzero(game.tiles.vacant)).any(-1)
  is_event = asked & (claims.event != base.NO_EVENT)
  expects = played.predicted == claims.event
  off = jnp.abs(played.origin - claims.origin).sum(-1)
  returned = due & claims.returned
  first = jax.nn.one_hot(jnp.where(returned, claims.cells, base.UNKNOWN), len(game.contents)).sum(
      range(due.ndim)) / jnp.maximum(returned.sum(), 1)
  chance = readable[..., None, None] * (
      jax.nn.one_hot(shown.cells, len(game.contents)) * first).sum(-1)
  at_frame = jnp.arange(1, readable.shape[1] + 1) == at
  return {
      'act_acc': _act_acc(game, before, shown, claims),
      'num_con': _num_con(game, before, shown, claims),
      'score_exact': _share(exact, asked),
      'score_exact_at': _share(exact, asked & at_frame),
      'digit_acc': _share(told, asked),
      'spa_con_all': _share(same, due),
      'spa_con_reentry': _share(same, returned),
      'spa_con_chance': _share(chance, returned),
      'bare': _share(empty, bare),
      'bare_reentry': _share(empty, bare & claims.returned),
      'event_acc': _share(expects, asked),
      'event_recall': _share(expects, is_event),
      'unreadable': _share(~readable, jnp.ones_like(readable)),
      'misplaced': _share(off > 0, asked),
      'localisation_error': _share(off, asked)}


def _share(right: Array, asked: Array) -> Share:
  """Sums over all axes but the first; what is not asked is not right either."""
  axes = tuple(range(1, asked.ndim))
  return Share((right * asked).sum(axes).astype(jnp.float32), asked.sum(axes).astype(jnp.float32))


def _act_acc(game: base.Game, before: base.Reading, shown: base.Reading, claims: history.Claims
             ) -> Share:
  moved, is_decided = jax.vmap(jax.vmap(game.moved))(before, shown)
  readable = before.readable & shown.readable
  asked = claims.counts & claims.is_move & (is_decided | ~readable)
  return _share(readable & (moved == claims.moved).all(-1), asked)


def _num_con(game: base.Game, before: base.Reading, shown: base.Reading, claims: history.Claims
             ) -> Share:
  limits = base.moduli(game.counters)
  changed = (shown.counters - before.counters) % limits
  due = jnp.asarray(game.deltas)[claims.event] % limits
  # What changes in a frame that cannot be read nobody knows: it is no true positive, and no false.
  known = before.readable & shown.readable & claims.counts
  has_changed, is_due = known & (changed != 0).any(-1), claims.counts & (due != 0).any(-1)
  hit = has_changed & is_due & (changed == due).all(-1)
  false, missed = has_changed & ~hit, is_due & ~hit
  twice = 2.0 * hit.sum(1)
  return Share(twice, twice + false.sum(1) + missed.sum(1))


def by_delay(played: Played, num_bins: int) -> Share:
  """spa_con_reentry by how long a cell was out of view: f32[B, D] for 1 … D frames.

  The last bin holds all longer absences too.
  """
  claims, shown = (jax.tree.map(lambda x: x[:, 1:], tree)
                   for tree in (played.claims, played.readings))
  same = shown.readable[..., None, None] & (shown.cells == claims.cells) & (
      claims.cells != base.UNKNOWN)
  asked = claims.due & claims.returned & claims.counts[..., None, None]
  delay = jnp.minimum(claims.away, num_bins)[..., None] == jnp.arange(1, num_bins + 1)
  count = lambda mask: (mask[..., None] & delay).sum((1, 2, 3)).astype(jnp.float32)
  return Share(count(same & asked), count(asked))


def painted(played: Played, cells: Array, contents: Array, frame: int) -> Share:
  """How often the frames after `frame` show a painted content where it is in view.

  Args:
    played: the games.
    cells: i32[B, 2] the painted cell of each game.
    contents: i32[B] what was painted.
    frame: the last frame before it can show.
  """
  shown = jax.tree.map(lambda x: x[:, frame + 1:], played.readings)
  place = cells[:, None] - played.claims.origin[:, frame + 1:]
  rows, columns = shown.cells.shape[2:]
  here = ((jnp.arange(rows) == place[..., :1])[..., None]
          & (jnp.arange(columns) == place[..., 1:])[..., None, :])
  asked = here & played.claims.counts[:, frame + 1:, None, None]
  right = shown.readable[..., None, None] & (shown.cells == contents[:, None, None, None])
  return _share(right, asked)


# --- Recording --------------------------------------------------------------------


@struct.dataclass
class Carry:
  """B games that go on: what a recording needs of the frames so far, all that is saved of it."""

  dream: dream.Dream
  past: history.History  # of each game, with a leading axis


def begin(world: dream.World, params: object, frames: Array, truth: base.Truth, keys: Array
          ) -> tuple[Carry, Played]:
  """The games at their first frames u8[B, H, W, 3], and a record of these alone (T = 0)."""
  started = dream.start(world, params, frames, truth, keys)
  past = jax.vmap(lambda one: history.start(world.game, one))(truth)
  seen = jax.vmap(lambda frame: reading.read(world.game, frame))(frames)
  first = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
  none = lambda array: array[:, None][:, :0]
  return Carry(started, past), Played(
      first(seen), first(past.claims), none(started.values), none(started.frame + truth.event),
      none(started.origin), none(started.origin))


def record(world: dream.World, params: object, carry: Carry, now_T: dream.Given,
           on: dream.Switches, num_kept: int) -> tuple[Carry, Played, Array]:
  """Plays on and reads every frame.

  Args:
    world: the game and its model.
    params: the model's parameters.
    carry: the games up to now.
    now_T: T steps of what comes from outside, with a leading axis.
    on: what is on.
    num_kept: of how many games the frames are kept.

  Returns:
    The games after the last step; the record of the T frames, whose readings and claims have no
    frame 0; and the frames u8[num_kept, T, H, W, 3].
  """
  def turn(carry: Carry, now: dream.Given) -> tuple[Carry, tuple[Played, Array]]:
    after, drawn = dream.step(world, params, carry.dream, now, on)
    seen = jax.vmap(lambda frame: reading.read(world.game, frame))(drawn.frames)
    past = jax.vmap(world.game.follow)(carry.past, now.actions, seen)
    kept = jnp.round(jnp.clip(drawn.frames[:num_kept], 0, 1) * 255).astype(jnp.uint8)
    record = Played(seen, past.claims, drawn.values, drawn.predicted, drawn.origin, drawn.offset)
    return Carry(after, past), (record, kept)

  carry, found = jax.lax.scan(turn, carry, now_T)
  played, frames = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
  return carry, played, frames


def joined(first: Played, *others: Played) -> Played:
  """One record of several that follow each other in time."""
  whole: Played = jax.tree.map(lambda *x: jnp.concatenate(x, 1), first, *others)
  return whole
