"""The definition of branch decoding, in plain jnp.

Layouts are head-major: the keys that a kernel streams for one head lie next to each other in
HBM, and the queries of a key/value head form one matrix without moving a byte.
"""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def branch_decode(q_NHRE: Array, k_prefix_NKTE: Array, v_prefix_NKTE: Array,
                  prefix_lengths_NR: Array, k_suffix_NKRSE: Array, v_suffix_NKRSE: Array,
                  suffix_lengths_NR: Array) -> tuple[Array, Array]:
  """Attention of each branch over concat(prefix[:prefix length], its suffix[:suffix length]).

  Arguments and results are those of `api.branch_decode`.
  """
  num_documents, num_heads, num_branches, head_dim = q_NHRE.shape
  num_groups, num_prefix = k_prefix_NKTE.shape[1:3]
  q = q_NHRE.reshape(num_documents, num_groups, -1, num_branches, head_dim)
  scores = jnp.concatenate([
      jnp.einsum('nkgre,nkte->nkgrt', q, k_prefix_NKTE, preferred_element_type=jnp.float32),
      jnp.einsum('nkgre,nkrse->nkgrs', q, k_suffix_NKRSE, preferred_element_type=jnp.float32),
  ], -1) / math.sqrt(head_dim)
  num_slots = k_suffix_NKRSE.shape[3]
  mask = jnp.concatenate([
      jnp.arange(num_prefix) < prefix_lengths_NR[..., None],
      jnp.arange(num_slots) < suffix_lengths_NR[..., None],
  ], -1)
  scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=-1)
  weights = jnp.exp(scores - lse[..., None]).astype(v_prefix_NKTE.dtype)
  out = (jnp.einsum('nkgrt,nkte->nkgre', weights[..., :num_prefix], v_prefix_NKTE,
                    preferred_element_type=jnp.float32)
         + jnp.einsum('nkgrs,nkrse->nkgre', weights[..., num_prefix:], v_suffix_NKRSE,
                      preferred_element_type=jnp.float32))
  return (out.astype(q_NHRE.dtype).reshape(q_NHRE.shape),
          lse.reshape(num_documents, num_heads, num_branches))


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
  """Attention over the union of two disjoint sets of keys, from attention over each.

    lse = log(exp lse_a + exp lse_b),  out = exp(lse_a − lse) out_a + exp(lse_b − lse) out_b

  Args:
    out_a, out_b: f[..., E].
    lse_a, lse_b: f32[...], log-sum-exp of the scaled scores; −inf where a set is empty.

  Returns:
    out f[..., E] in out_a's dtype and lse f32[...]. Where both sets are empty, out is NaN.

  Source: the online softmax of 2205.14135, section 3.1.
  """
  lse = jnp.logaddexp(lse_a, lse_b)
  # A weight of 0 hides what an empty set holds, even NaN.
  weighted = [jnp.where(part[..., None] == -jnp.inf, 0,
                        jnp.exp(part - lse)[..., None] * out.astype(jnp.float32))
              for out, part in ((out_a, lse_a), (out_b, lse_b))]
  return (weighted[0] + weighted[1]).astype(out_a.dtype), lse
