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

  Args:
    logits: f[..., V].
    sampler: top_k keeps the k largest and what ties with the k-th; top_p keeps, of what is
      left, the smallest set of likeliest tokens whose mass reaches p, and its ties; min_p
      keeps what is at least min_p times as likely as the likeliest.

  Returns:
    f32[..., V].

  Source: nucleus sampling 1904.09751; min-p 2407.01082.
  """
  scaled = _scaled(logits, sampler)
  return jnp.where(_support(scaled, sampler), scaled, MASKED)


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
  scaled = _scaled(logits, sampler)
  if _filters_nothing(sampler):
    return scaled
  drawn = jnp.arange(logits.shape[-1]) == tokens[..., None]
  return jnp.where(_support(scaled, sampler) | drawn, scaled, MASKED)


def _filters_nothing(sampler: Sampler) -> bool:
  return sampler == Sampler(temperature=sampler.temperature) and sampler.temperature > 0


def _scaled(logits: Array, sampler: Sampler) -> Array:
  logits = logits.astype(jnp.float32)
  if sampler.banned:
    logits = logits.at[..., jnp.array(sampler.banned)].set(MASKED, mode='drop')
  return logits / sampler.temperature if sampler.temperature > 0 else logits


def _support(scaled: Array, sampler: Sampler) -> Array:
  """bool[..., V]: which tokens can be drawn. A constant for differentiation."""
  scaled = jax.lax.stop_gradient(scaled)
  vocab_size = scaled.shape[-1]
  if sampler.temperature == 0:
    return jnp.arange(vocab_size) == scaled.argmax(-1, keepdims=True)
  keep = scaled > MASKED / 2
  if 0 < sampler.top_k < vocab_size:
    keep &= scaled >= jax.lax.top_k(scaled, sampler.top_k)[0][..., -1:]
  if sampler.top_p < 1:
    descending = jnp.sort(jnp.where(keep, scaled, MASKED), -1, descending=True)
    keep &= scaled >= _edge_of_nucleus(descending, sampler.top_p)
  if sampler.min_p > 0:
    keep &= scaled >= scaled.max(-1, keepdims=True) + np.log(sampler.min_p)
  return keep


def _edge_of_nucleus(descending: Array, top_p: Array | float) -> Array:
  """f32[..., 1]: the smallest logit in the nucleus, of logits in falling order."""
  probabilities = jax.nn.softmax(descending, -1)
  mass_before = jnp.cumsum(probabilities, -1) - probabilities
  return jnp.where(mass_before < top_p, descending, -MASKED).min(-1, keepdims=True)


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
  min_p: Array  # f32[B]
  banned: Array  # i32[B, M]; V fills up

  @classmethod
  def of(cls, samplers: Sequence[Sampler], vocab_size: int, num_banned: int) -> 'RowSamplers':
    """NumPy rows of these samplers, each with at most `num_banned` banned tokens."""
    banned = np.full((len(samplers), num_banned), vocab_size, np.int32)
    for row, sampler in zip(banned, samplers, strict=True):
      row[:len(sampler.banned)] = sampler.banned
    column = lambda name, dtype: np.array([getattr(s, name) for s in samplers], dtype)
    top_k = column('top_k', np.int32)
    fields: dict[str, Any] = dict(
        temperature=column('temperature', np.float32),
        top_k=np.where(top_k == 0, vocab_size, np.minimum(top_k, vocab_size)),
        top_p=column('top_p', np.float32), min_p=column('min_p', np.float32), banned=banned)
    return cls(**fields)


def filtered_rows(logits_BV: Array, rows: RowSamplers) -> Array:
  """`filtered_logits` with a sampler for each row; sorts only if some row filters.

  Args:
    logits_BV: f[B, V].
    rows: B samplers.

  Returns:
    f32[B, V].
  """
  vocab_size = logits_BV.shape[-1]
  row = jnp.arange(logits_BV.shape[0])[:, None]
  logits = logits_BV.astype(jnp.float32).at[row, rows.banned].set(MASKED, mode='drop')
  greedy = rows.temperature[:, None] == 0
  scaled = logits / jnp.where(greedy, 1.0, rows.temperature[:, None])
  allowed = scaled > MASKED / 2

  def filtered() -> Array:
    # One order serves both filters: the k likeliest, then their nucleus.
    descending = jnp.sort(scaled, -1, descending=True)
    kth = jnp.take_along_axis(descending, rows.top_k[:, None] - 1, -1)
    edge = _edge_of_nucleus(jnp.where(descending >= kth, descending, MASKED),
                            rows.top_p[:, None])
    keep = allowed & (scaled >= kth) & ((scaled >= edge) | (rows.top_p[:, None] >= 1))
    likeliest = scaled.max(-1, keepdims=True)
    return keep & ((scaled >= likeliest + jnp.log(rows.min_p[:, None]))
                   | (rows.min_p[:, None] == 0))

  filters = (rows.top_k < vocab_size) | (rows.top_p < 1) | (rows.min_p > 0)
  support = jax.lax.cond(filters.any(), filtered, lambda: allowed)
  first_best = jnp.arange(vocab_size) == scaled.argmax(-1, keepdims=True)
  return jnp.where(jnp.where(greedy, first_best, support), scaled, MASKED)
