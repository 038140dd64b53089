"""Log-probabilities of given tokens, without ever holding all float32 logits."""

from collections.abc import Callable
import math

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt.nn.linear import matmul
from jaxrl_pt.types import Array

# transform(logits f32[..., V], targets i32[...]) → f32[..., V], e.g. a sampler's filters
Transform = Callable[[Array, Array], Array]


@struct.dataclass
class TokenScores:
  """Scores of each token, which losses and metrics read."""

  logp: Array  # f32[B, T] log-probability of the target
  entropy: Array  # f32[B, T] entropy of the distribution, nats
  correct: Array  # f32[B, T] 1 where the target is the most likely token
  collision: Array  # f32[B, T] Σ p², the chance that two draws agree


def score(logits: Array, targets: Array) -> TokenScores:
  """Scores of targets i32[...] under the softmax of logits f[..., V], computed in float32."""
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, -1)
  target_logit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  log_probabilities = logits - log_z[..., None]
  # The form log Z − Σ p·logit is a difference of large numbers, in which the small entropy of a
  # sure model is lost.
  probabilities = jnp.exp(log_probabilities)
  entropy = -(probabilities * log_probabilities).sum(-1)
  correct = (logits.argmax(-1) == targets).astype(jnp.float32)
  return TokenScores(target_logit - log_z, entropy, correct, jnp.square(probabilities).sum(-1))


def token_logprobs(hidden_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int = 0,
                   transform: Transform = lambda logits, _: logits) -> TokenScores:
  """Scores of the targets under softmax(transform(hidden · head, targets)).

  With `chunk` > 0 a rematerialised scan takes some time steps of all rows at once, about `chunk`
  tokens and at least one step. Only so many rows of float32 logits then exist at a time, in either
  direction. `chunk` = 0 takes all at once. The steps taken together lie equally far apart in time,
  so that rows and time stay split over the devices as they are.

  Args:
    hidden_BTD: f[B, T, D].
    head_DV: f[D, V] in hidden's type, or in a wider type that is rounded to it. Its gradient is
      summed in float32, within a piece and over the pieces.
    targets_BT: i32[B, T].
    chunk: tokens taken at once; 0 takes all.
    transform: what is done to the logits first, such as a sampler's filters.
  """
  # The loop adds up the head's gradient in the type of the head that it sees.
  head32_DV = head_DV.astype(jnp.float32)

  def scores_of(hidden: Array, targets: Array) -> TokenScores:
    logits = matmul(hidden, head32_DV, jnp.float32)
    return score(transform(logits, targets), targets)

  if chunk == 0 or chunk >= targets_BT.size:
    return scores_of(hidden_BTD, targets_BT)
  *rows, length = targets_BT.shape
  together = max(1, chunk // math.prod(rows))
  pieces = -(-length // together)
  padding = [(0, 0)] * len(rows) + [(0, together * pieces - length)]
  time = len(rows)

  def split(x: Array) -> Array:
    x = jnp.pad(x, padding + [(0, 0)] * (x.ndim - time - 1))
    x = x.reshape(*rows, together, pieces, *x.shape[time + 1:])
    return jnp.moveaxis(x, time + 1, 0)

  def join(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, time + 1).reshape(*rows, together * pieces)
    return x[..., :length]

  xs = split(hidden_BTD), split(targets_BT)
  _, scores = jax.lax.scan(lambda _, x: (None, jax.checkpoint(scores_of)(*x)), None, xs)
  return jax.tree.map(join, scores)
