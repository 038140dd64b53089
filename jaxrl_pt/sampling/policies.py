"""From a model's logits to the distribution that tokens are drawn from.

`filtered_logits` applies the settings of `config.Sampler`: temperature, banned tokens, then
top-k, top-p and min-p. The learner uses the same functions, so that sampler and trainer speak of
the same distribution. `RowSamplers` holds such settings as arrays with one row for each request,
for batches of unlike requests. `draw` draws a token from filtered logits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.config import Sampler
from jaxrl_pt.types import Array

# Finite, so that 0 · log 0 stays 0 in entropies and gradients.
MASKED = -1e30


def filtered_logits(logits: Array, sampler: Sampler) -> Array:
  """Logits whose softmax is the distribution that tokens are drawn from.

    z / temperature on the support, −1e30 elsewhere; temperature 0 keeps the first argmax

  The support is never empty: however small top_p is, the likeliest token and its ties stay, and
  where every token is banned, the first of the likeliest stays.

  Args:
    logits: f[..., V].
    sampler: top_k keeps the k largest logits and those that tie with the k-th; top_p keeps, of
      the tokens that are left, the smallest set of likeliest ones whose mass reaches p, and its
      ties; min_p keeps the tokens that are at least min_p times as likely as the likeliest.

  Returns:
    f32[..., V].

  Source: nucleus sampling 1904.09751; min-p 2407.01082.
  """
  settings = _settings(sampler, logits.shape[-1])
  scaled = _scaled(logits, settings)
  return jnp.where(_support(scaled, settings), scaled, MASKED)


def learner_logits(logits: Array, tokens: Array, sampler: Sampler) -> Array:
  """`filtered_logits` whose support always holds the token that was drawn.

  The learner recomputes the logits in another order of summation. Without this rule a drawn token
  at the edge of the support could fall out of it and get log-probability −1e30.

  Args:
    logits: f[..., V].
    tokens: i32[...] drawn tokens, whose leading dimensions broadcast with those of the logits.
    sampler: the settings that the tokens were drawn with.

  Returns:
    f32[..., V].
  """
  settings = _settings(sampler, logits.shape[-1])
  scaled = _scaled(logits, settings)
  if _filters_nothing(settings, logits.shape[-1]):
    return scaled
  drawn = jnp.arange(logits.shape[-1]) == tokens[..., None]
  return jnp.where(_support(scaled, settings) | drawn, scaled, MASKED)


class _Settings(NamedTuple):
  """A sampler's settings in the types of the arithmetic, where Python's 1e-300 is float32's 0."""

  temperature: np.float32  # 0 is greedy
  top_k: int  # in [1, V]; V filters nothing
  top_p: np.float32  # in [0, 1]; 1 filters nothing
  log_min_p: np.float32  # at most 0; −∞ filters nothing
  banned: tuple[int, ...]  # each in [0, V)


def _settings(sampler: Sampler, vocab_size: int) -> _Settings:
  return _Settings(
      np.float32(sampler.temperature), min(sampler.top_k or vocab_size, vocab_size),
      np.float32(sampler.top_p),
      np.float32(np.log(sampler.min_p) if sampler.min_p > 0 else -np.inf),
      tuple(sorted({token for token in sampler.banned if token < vocab_size})))


def _filters_nothing(settings: _Settings, vocab_size: int) -> bool:
  return bool(settings.temperature > 0 and settings.top_k == vocab_size and settings.top_p == 1
              and settings.log_min_p == -np.inf and not settings.banned)


def _scaled(logits: Array, settings: _Settings) -> Array:
  scaled = logits.astype(jnp.float32)
  if settings.temperature > 0:
    scaled = scaled / settings.temperature
  if not settings.banned:
    return scaled
  # The mask comes after the division: a large temperature would bring −1e30 back among the logits.
  is_banned = np.isin(np.arange(scaled.shape[-1]), settings.banned)
  return _without(scaled, jnp.asarray(is_banned))


def _without(scaled: Array, is_banned: Array) -> Array:
  """The logits with `MASKED` at banned tokens, except the first of the likeliest if all are banned.

  Args:
    scaled: f32[..., V].
    is_banned: bool[V] or bool[..., V].
  """
  likeliest = jnp.arange(scaled.shape[-1]) == scaled.argmax(-1, keepdims=True)
  stays = is_banned.all(-1, keepdims=True) & likeliest
  return jnp.where(is_banned & ~stays, MASKED, scaled)


def _support(scaled: Array, settings: _Settings) -> Array:
  """bool[..., V]: which tokens can be drawn, at least one. No gradient passes through it."""
  scaled = jax.lax.stop_gradient(scaled)
  vocab_size = scaled.shape[-1]
  if settings.temperature == 0:
    return jnp.arange(vocab_size) == scaled.argmax(-1, keepdims=True)
  keep = scaled > MASKED / 2
  if settings.top_k < vocab_size:
    keep &= scaled >= jax.lax.top_k(scaled, settings.top_k)[0][..., -1:]
  if settings.top_p < 1:
    descending = jnp.sort(jnp.where(keep, scaled, MASKED), -1, descending=True)
    keep &= scaled >= _edge_of_nucleus(descending, settings.top_p)
  if settings.log_min_p > -np.inf:
    keep &= scaled >= scaled.max(-1, keepdims=True) + settings.log_min_p
  return keep


def _edge_of_nucleus(descending: Array, top_p: Array | np.float32) -> Array:
  """f32[..., 1]: the smallest logit in the nucleus of logits that are sorted in falling order."""
  probabilities = jax.nn.softmax(descending, -1)
  mass_before = jnp.cumsum(probabilities, -1) - probabilities
  edge = jnp.where(mass_before < top_p, descending, -MASKED).min(-1, keepdims=True)
  # The likeliest token has mass 0 before it, and 0 < top_p fails where float32 rounds top_p to 0.
  return jnp.minimum(edge, descending[..., :1])


# --- Drawing --------------------------------------------------------------------------

# Tokens of a block in `draw`. √V would need the fewest random numbers, but with one width for all
# vocabularies a vocabulary can be padded and draw the same tokens.
BLOCK = 64
# Chips over which a vocabulary is split at most, for which its blocks should divide.
_MOST_SHARDS = 8


class Drawn(NamedTuple):
  """Tokens and their log-probabilities under the distribution that they were drawn from."""

  token: Array  # i32[...]
  logp: Array  # f32[...]


def draw(keys: Array, logits: Array, whole: Callable[[Array], Array] = lambda x: x) -> Drawn:
  """Draws a token from the softmax of each row: first a block of tokens, then a token of the block.

    b = argmax_b log Σ_{v ∈ b} e^{z_v} + Gumbel_b,   v = argmax_{v ∈ b} z_v + Gumbel_v

  P(b) P(v | b) is the softmax, as with Gumbel-max over all tokens. Two stages need V / BLOCK +
  BLOCK random numbers in place of V, which in small batches cost more than the model's head. As
  with Gumbel-max, and unlike with the inverse of a cumulative sum, rounding of the logits changes
  a draw only at a near tie.

  Args:
    keys: key[...], one for each row.
    logits: f32[..., V]; some of a row may be `MASKED`, but not all.
    whole: keeps an array whole on every chip where the vocabulary is split over chips. XLA would
      split the noise and then move its pieces by a collective that joins all chips.
  """
  shape, vocab_size = logits.shape[:-1], logits.shape[-1]
  num_blocks = -(-vocab_size // BLOCK)
  if vocab_size % (BLOCK * _MOST_SHARDS):
    logits = whole(logits)  # Whole blocks do not divide over the chips.
  z_BNW = jnp.pad(logits.reshape(-1, vocab_size), [(0, 0), (0, num_blocks * BLOCK - vocab_size)],
                  constant_values=MASKED).reshape(-1, num_blocks, BLOCK)
  top_B = z_BNW.max((1, 2))
  mass_BN = jnp.exp(z_BNW - top_B[:, None, None]).sum(-1)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (BLOCK + num_blocks,)))(keys.reshape(-1))
  block_B = (jnp.log(mass_BN) + whole(noise[:, BLOCK:])).argmax(-1)
  z_BW = jnp.take_along_axis(z_BNW, block_B[:, None, None], 1)[:, 0]
  inside_B = (z_BW + whole(noise[:, :BLOCK])).argmax(-1)
  drawn_B = jnp.take_along_axis(z_BW, inside_B[:, None], -1)[:, 0]
  logp_B = drawn_B - top_B - jnp.log(mass_BN.sum(-1))
  token_B = block_B * BLOCK + inside_B
  return Drawn(token_B.astype(jnp.int32).reshape(shape), logp_B.reshape(shape))


def sample_keys(key: Array, ids_N: Array, num_samples: int, first_N: Array | None = None) -> Array:
  """key[N · G]: fold_in(fold_in(key, id), sample), where samples count from `first_N` (or 0) on."""
  per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, ids_N)
  per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  first = jnp.zeros_like(ids_N) if first_N is None else first_N
  return per_sample(per_prompt, first[:, None] + jnp.arange(num_samples)).reshape(-1)


# --- A sampler for each row -----------------------------------------------------------


@struct.dataclass
class RowSamplers:
  """Settings of `config.Sampler` as arrays with one row for each request."""

  temperature: Array  # f32[B]
  top_k: Array  # i32[B]; V where nothing is filtered
  top_p: Array  # f32[B]
  log_min_p: Array  # f32[B]; −∞ where nothing is filtered
  banned: Array  # i32[B, M] banned tokens, padded with V

  @classmethod
  def of(cls, samplers: Sequence[Sampler], vocab_size: int, num_banned: int) -> 'RowSamplers':
    """NumPy arrays with a row for each sampler, which has at most `num_banned` banned tokens."""
    rows = [_settings(sampler, vocab_size) for sampler in samplers]
    banned = np.full((len(samplers), num_banned), vocab_size, np.int32)
    for padded, settings in zip(banned, rows, strict=True):
      padded[:len(settings.banned)] = settings.banned
    column = lambda name, dtype: np.array([getattr(row, name) for row in rows], dtype)
    fields: dict[str, Any] = dict(
        temperature=column('temperature', np.float32), top_k=column('top_k', np.int32),
        top_p=column('top_p', np.float32), log_min_p=column('log_min_p', np.float32),
        banned=banned)
    return cls(**fields)


def filtered_rows(logits_BV: Array, rows: RowSamplers, is_token: Array) -> Array:
  """`filtered_logits` with settings of its own for each row; it sorts only if some row filters.

  Args:
    logits_BV: f[B, V].
    rows: the settings of B rows.
    is_token: bool[V] or bool[B, V], False for ids that are banned in all rows or in one.

  Returns:
    f32[B, V].
  """
  vocab_size = logits_BV.shape[-1]
  row = jnp.arange(logits_BV.shape[0])[:, None]
  greedy = rows.temperature[:, None] == 0
  is_banned = jnp.broadcast_to(~is_token, logits_BV.shape).at[row, rows.banned].set(
      True, mode='drop')
  scaled = _without(
      logits_BV.astype(jnp.float32) / jnp.where(greedy, 1.0, rows.temperature[:, None]), is_banned)
  allowed = scaled > MASKED / 2

  def filtered() -> Array:
    # One order serves both filters: the k likeliest, then their nucleus.
    descending = jnp.sort(scaled, -1, descending=True)
    kth = jnp.take_along_axis(descending, rows.top_k[:, None] - 1, -1)
    edge = _edge_of_nucleus(jnp.where(descending >= kth, descending, MASKED),
                            rows.top_p[:, None])
    keep = allowed & (scaled >= kth) & ((scaled >= edge) | (rows.top_p[:, None] >= 1))
    return keep & (scaled >= scaled.max(-1, keepdims=True) + rows.log_min_p[:, None])

  filters = (rows.top_k < vocab_size) | (rows.top_p < 1) | (rows.log_min_p > -jnp.inf)
  support = jax.lax.cond(filters.any(), filtered, lambda: allowed)
  first_best = jnp.arange(vocab_size) == scaled.argmax(-1, keepdims=True)
  return jnp.where(jnp.where(greedy, first_best, support), scaled, MASKED)
