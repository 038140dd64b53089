"""From a model's logits to the distribution that tokens are drawn from.

Banned tokens, temperature, then top-k, top-p and min-p, as settings of `config.Sampler`. The
learner uses the same functions, so that sampler and trainer speak of the same distribution.
`RowSamplers` has the settings as arrays, one row each, for batches of unlike requests. `draw`
takes a token of it.
"""

from collections.abc import Sequence
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
  """Logits whose softmax is the distribution drawn from.

    z / temperature on the support, −1e30 elsewhere; temperature 0 keeps the first argmax

  The support is never empty: however small top_p is, the likeliest token and its ties stay,
  and where every token is banned, the first of the likeliest.

  Args:
    logits: f[..., V].
    sampler: top_k keeps the k largest and what ties with the k-th; top_p keeps, of what is
      left, the smallest set of likeliest tokens whose mass reaches p, and its ties; min_p
      keeps what is at least min_p times as likely as the likeliest.

  Returns:
    f32[..., V].

  Source: nucleus sampling 1904.09751; min-p 2407.01082.
  """
  settings = _settings(sampler, logits.shape[-1])
  scaled = _scaled(logits, settings)
  return jnp.where(_support(scaled, settings), scaled, MASKED)


def learner_logits(logits: Array, tokens: Array, sampler: Sampler) -> Array:
  """`filtered_logits` whose support always holds the token that was drawn.

  The learner recomputes the logits in another order of summation. A drawn token at the
  edge of the support could so fall out of it and get log-probability −1e30.

  Args:
    logits: f[..., V].
    tokens: i32[...] drawn tokens; leading dimensions broadcast with those of logits.
    sampler: as the tokens were drawn.

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
  """A sampler's numbers as the arithmetic takes them. Python's 1e-300 is float32's 0."""

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
  # After the division, which by a large temperature would bring the mask back among the rest.
  is_banned = np.isin(np.arange(scaled.shape[-1]), settings.banned)
  return _without(scaled, jnp.asarray(is_banned))


def _without(scaled: Array, is_banned: Array) -> Array:
  """`MASKED` where banned, but for the first of the likeliest where all are; bool[..., V]."""
  likeliest = jnp.arange(scaled.shape[-1]) == scaled.argmax(-1, keepdims=True)
  stays = is_banned.all(-1, keepdims=True) & likeliest
  return jnp.where(is_banned & ~stays, MASKED, scaled)


def _support(scaled: Array, settings: _Settings) -> Array:
  """bool[..., V]: which tokens can be drawn, at least one. A constant for differentiation."""
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
  """f32[..., 1]: the smallest logit in the nucleus, of logits in falling order."""
  probabilities = jax.nn.softmax(descending, -1)
  mass_before = jnp.cumsum(probabilities, -1) - probabilities
  edge = jnp.where(mass_before < top_p, descending, -MASKED).min(-1, keepdims=True)
  # The mass before the likeliest is 0, which a top_p that float32 rounds to 0 does not exceed.
  return jnp.minimum(edge, descending[..., :1])


# --- Drawing --------------------------------------------------------------------------

# Tokens that are summed before the draw. √V would need the fewest numbers; a width that is the
# same for all vocabularies lets padding a vocabulary change no draw.
BLOCK = 64


class Drawn(NamedTuple):
  """Tokens and their log-probabilities under the distribution that they were drawn from."""

  token: Array  # i32[...]
  logp: Array  # f32[...]


def draw(keys: Array, logits: Array) -> Drawn:
  """Draws a token from each row's softmax: a block of tokens first, then a token of it.

    b = argmax_b log Σ_{v ∈ b} e^{z_v} + Gumbel_b,   v = argmax_{v ∈ b} z_v + Gumbel_v

  P(b) P(v | b) is the softmax, as it is for Gumbel-max over all tokens, but needs V / BLOCK +
  BLOCK random numbers in place of V, which cost more than the model's head where a row has
  few neighbours. Like Gumbel-max, and unlike the inverse of a cumulative sum, it lets rounding
  of the logits flip no draw but a near tie.

  Args:
    keys: key[...], one a row.
    logits: f32[..., V]; a row's smallest may be `MASKED`, never all of them.
  """
  shape, vocab_size = logits.shape[:-1], logits.shape[-1]
  num_blocks = -(-vocab_size // BLOCK)
  z_BNW = jnp.pad(logits.reshape(-1, vocab_size), [(0, 0), (0, num_blocks * BLOCK - vocab_size)],
                  constant_values=MASKED).reshape(-1, num_blocks, BLOCK)
  top_B = z_BNW.max((1, 2))
  mass_BN = jnp.exp(z_BNW - top_B[:, None, None]).sum(-1)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (BLOCK + num_blocks,)))(keys.reshape(-1))
  block_B = (jnp.log(mass_BN) + noise[:, BLOCK:]).argmax(-1)
  z_BW = jnp.take_along_axis(z_BNW, block_B[:, None, None], 1)[:, 0]
  inside_B = (z_BW + noise[:, :BLOCK]).argmax(-1)
  drawn_B = jnp.take_along_axis(z_BW, inside_B[:, None], -1)[:, 0]
  logp_B = drawn_B - top_B - jnp.log(mass_BN.sum(-1))
  token_B = block_B * BLOCK + inside_B
  return Drawn(token_B.astype(jnp.int32).reshape(shape), logp_B.reshape(shape))


# --- A sampler for each row -----------------------------------------------------------


@struct.dataclass
class RowSamplers:
  """Settings of `Sampler`, one row each."""

  temperature: Array  # f32[B]
  top_k: Array  # i32[B]; V where nothing is filtered
  top_p: Array  # f32[B]
  log_min_p: Array  # f32[B]; −∞ where nothing is filtered
  banned: Array  # i32[B, M]; V fills up

  @classmethod
  def of(cls, samplers: Sequence[Sampler], vocab_size: int, num_banned: int) -> 'RowSamplers':
    """NumPy rows of these samplers, each with at most `num_banned` banned tokens."""
    settings = [_settings(sampler, vocab_size) for sampler in samplers]
    banned = np.full((len(samplers), num_banned), vocab_size, np.int32)
    for row, one in zip(banned, settings, strict=True):
      row[:len(one.banned)] = one.banned
    column = lambda name, dtype: np.array([getattr(one, name) for one in settings], dtype)
    fields: dict[str, Any] = dict(
        temperature=column('temperature', np.float32), top_k=column('top_k', np.int32),
        top_p=column('top_p', np.float32), log_min_p=column('log_min_p', np.float32),
        banned=banned)
    return cls(**fields)


def filtered_rows(logits_BV: Array, rows: RowSamplers, is_token_V: Array) -> Array:
  """`filtered_logits` with a sampler for each row; sorts only if some row filters.

  Args:
    logits_BV: f[B, V].
    rows: B samplers.
    is_token_V: bool[V] False for ids that are banned in all rows.

  Returns:
    f32[B, V].
  """
  vocab_size = logits_BV.shape[-1]
  row = jnp.arange(logits_BV.shape[0])[:, None]
  greedy = rows.temperature[:, None] == 0
  is_banned = jnp.broadcast_to(~is_token_V, logits_BV.shape).at[row, rows.banned].set(
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
