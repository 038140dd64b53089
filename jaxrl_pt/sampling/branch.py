"""Branch rollouts: many positions of one document, each continued by many samples.

A branch is (document, position, suffix): it sees the document up to its position, then a
suffix that all branches share (a template's question, a think marker), then what it draws.
The document is prefilled once for all of them, and the learner scores all of them in one
packed row under a tree mask. Tokens equal those of independent prompts; log-probabilities
and gradients differ by the order of sums only.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp

from jaxrl_pt.config import Sampler
from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import decode
from jaxrl_pt.types import Array, Params, Rollout


@struct.dataclass
class Branches:
  """N documents with P branch positions each, and the suffix that follows each context."""

  tokens: Array  # i32[N, T] right-padded documents
  lengths: Array  # i32[N, P] document tokens that a branch sees, 1 ≤ length ≤ T
  ids: Array  # i32[N, P] addresses the randomness, as Prompts.ids does
  suffix: Array  # i32[M], M ≥ 0


def generate(model: Model, params: Params, branches: Branches, key: Array, *, sampler: Sampler,
             num_samples: int, num_tokens: int, stop_id: int = decode.NO_STOP,
             version: Array | int = 0) -> Rollout:
  """Draws `num_samples` responses to each branch; see `decode.generate` for the noise.

  Equals `decode.generate` of the N · P prompts tokens[n, :lengths[n, p]] + suffix.

  Returns:
    Rollout of N · P groups, those of a document side by side.
  """
  num_docs, num_positions = branches.lengths.shape
  num_branches = num_positions * num_samples
  lengths_NR = jnp.repeat(branches.lengths, num_samples, 1)
  hidden_NTD, prefix = decode.prefill(model, params, branches.tokens)
  num_own, own = branches.suffix.shape[0], None
  if num_own:
    # Per position, not per sample: the samples of a position share their suffix too.
    hidden_BD, own = _extend_suffix(model, params, branches, prefix, num_samples)
  else:
    last = jnp.take_along_axis(hidden_NTD, (branches.lengths - 1)[..., None], axis=1)
    hidden_BD = jnp.repeat(last, num_samples, 1).reshape(num_docs * num_branches, -1)
  rows = decode.draw_branches(
      model, params, hidden_BD, prefix, lengths_NR,
      decode.sample_keys(key, branches.ids.reshape(-1), num_samples), sampler=sampler,
      num_tokens=num_tokens, stop_id=stop_id, own=own, num_own=num_own)
  tokens, mask, logp = (x.reshape(-1, num_samples, num_tokens) for x in rows)
  return Rollout(tokens, mask, logp, jnp.asarray(version, jnp.int32))


def _extend_suffix(model: Model, params: Params, branches: Branches, prefix: kv_cache.KVCache,
                   num_samples: int) -> tuple[Array, kv_cache.Branches]:
  """Hidden state of each branch's last suffix token f[B, D], and the cache holding it."""
  num_own = branches.suffix.shape[0]
  num_docs, num_positions = branches.lengths.shape
  rows = num_docs * num_positions
  tokens = jnp.broadcast_to(branches.suffix, (rows, num_own))
  positions = branches.lengths.reshape(-1)[:, None] + jnp.arange(num_own)
  cache = kv_cache.branch(prefix, num_positions, num_own)
  attend = kv_cache.branched(model.ops, branches.lengths, 0)
  hidden_BMD, cache = model.extend(params, tokens, positions, cache, attend)
  copies = lambda x: jnp.repeat(x, num_samples, 3)
  cache = dataclasses.replace(cache, k=copies(cache.k), v=copies(cache.v))
  return jnp.repeat(hidden_BMD[:, -1], num_samples, 0), cache


# --- The learner ------------------------------------------------------------------


def tree_hidden(model: Model, params: Params, tokens_NT: Array, lengths_NR: Array,
                own_NRS: Array) -> Array:
  """Hidden states from which each branch's own tokens are predicted, in one packed forward.

  Row n holds [document n | own tokens of its R branches]; the tree mask lets branch r see the
  document's positions below lengths[n, r] and itself. A differentiable function of `params`.

  Args:
    tokens_NT: i32[N, T] right-padded documents.
    lengths_NR: i32[N, R] in [1, T].
    own_NRS: i32[N, R, S] tokens of each branch: suffix and response.

  Returns:
    f[N, R, S, D]; entry s is the state after the token before own token s.
  """
  num_docs, length = tokens_NT.shape
  _, num_branches, num_own = own_NRS.shape
  fed_NRS, num_fed = own_NRS[..., :-1], num_branches * (num_own - 1)
  positions = jnp.broadcast_to(jnp.arange(length), tokens_NT.shape)
  own_positions = lengths_NR[..., None] + jnp.arange(num_own - 1)
  hidden, _ = model.extend(
      params, jnp.concatenate([tokens_NT, fed_NRS.reshape(num_docs, num_fed)], 1),
      jnp.concatenate([positions, own_positions.reshape(num_docs, num_fed)], 1), (),
      kv_cache.tree(model.ops, length, lengths_NR))
  first = jnp.take_along_axis(hidden[:, :length], (lengths_NR - 1)[..., None], axis=1)
  own = hidden[:, length:].reshape(num_docs, num_branches, num_own - 1, hidden.shape[-1])
  return jnp.concatenate([first[:, :, None], own], 2)
