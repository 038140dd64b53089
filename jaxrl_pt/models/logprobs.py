"""Log-probabilities of given tokens, without ever holding all float32 logits."""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array

# transform(logits f32[..., V], targets i32[...]) → f32[..., V], e.g. a sampler's filters
Transform = Callable[[Array, Array], Array]


@struct.dataclass
class TokenScores:
  """What the losses and the metrics need to know of each token."""

  logp: Array  # f32[B, T] log-probability of the target
  entropy: Array  # f32[B, T] entropy of the distribution, nats
  correct: Array  # f32[B, T] 1 where the target is the most likely token


def score(logits: Array, targets: Array) -> TokenScores:
  """log softmax(logits)[target], entropy and argmax hit; logits f[..., V], targets i32[...]."""
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, -1)
  target_logit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  log_probabilities = logits - log_z[..., None]
  # Not log Z − Σ p·logit: that difference of large numbers loses what a sure model has left.
  entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)
  correct = (logits.argmax(-1) == targets).astype(jnp.float32)
  return TokenScores(target_logit - log_z, entropy, correct)


def token_logprobs(hidden_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int = 0,
                   transform: Transform = lambda logits, _: logits) -> TokenScores:
  """Scores of the targets under softmax(transform(hidden · head, targets)).

  With `chunk` > 0 tokens are taken `chunk` at a time under a rematerialised scan, so
  at most f32[chunk, V] of logits exists in either direction; 0 takes them all at once.
  """
  def scores_of(hidden: Array, targets: Array) -> TokenScores:
    logits = jnp.matmul(hidden, head_DV, preferred_element_type=jnp.float32)
    return score(transform(logits, targets), targets)

  num_tokens = targets_BT.size
  if chunk == 0 or chunk >= num_tokens:
    return scores_of(hidden_BTD, targets_BT)
  padding = -num_tokens % chunk
  hidden = jnp.pad(hidden_BTD.reshape(num_tokens, -1), ((0, padding), (0, 0)))
  targets = jnp.pad(targets_BT.reshape(-1), (0, padding))
  xs = hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)
  _, scores = jax.lax.scan(lambda _, x: (None, jax.checkpoint(scores_of)(*x)), None, xs)
  return jax.tree.map(lambda x: x.reshape(-1)[:num_tokens].reshape(targets_BT.shape), scores)
