"""Attention of many rollouts that share a document: branch decoding."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.branch_decode import kernel_tpu, reference, tuning

Array = jax.Array
merge = reference.merge


def branch_decode(q_NHRE: Array, k_prefix_NKTE: Array, v_prefix_NKTE: Array,
                  prefix_lengths_NR: Array, k_suffix_NKRSE: Array, v_suffix_NKRSE: Array,
                  suffix_lengths_NR: Array, *, generation: dispatch.Generation | None,
                  interpret: Any = False) -> tuple[Array, Array]:
  """One new token of each of R branches of a document, all branches reading one prefix cache.

    out_r = softmax(q_r [K_p[:t_r]; K_r[:s_r]]ᵀ / √E) [V_p[:t_r]; V_r[:s_r]]

  with t_r the prefix length and s_r the suffix length of branch r. The document's keys are
  read once for all branches, where one cache per branch reads them R times.

  All arguments are head-major, so that the keys of a head are contiguous; query head h reads
  key/value head h // (H / K).

  Args:
    q_NHRE: f[N, H, R, E], N documents, R branches of each.
    k_prefix_NKTE, v_prefix_NKTE: f[N, K, T, E] of q's dtype. Finite everywhere.
    prefix_lengths_NR: i32[N, R] in [1, T]: branch r sees the document's positions below it.
      Branches in order of length let the kernel skip most (any order is right).
    k_suffix_NKRSE, v_suffix_NKRSE: f[N, K, R, S, E] of q's dtype. Finite everywhere.
    suffix_lengths_NR: i32[N, R] in [0, S].
    generation: of the TPU to run on; None takes the definition.
    interpret: as in `pl.pallas_call`.

  Returns:
    out f[N, H, R, E] in q's dtype and lse f32[N, H, R], the log-sum-exp of the scaled scores;
    softmax and sums are float32, weights are rounded to q's dtype before they meet the values.

  Raises:
    ValueError: shapes or types that do not fit together.
  """
  args = (q_NHRE, k_prefix_NKTE, v_prefix_NKTE, prefix_lengths_NR, k_suffix_NKRSE,
          v_suffix_NKRSE, suffix_lengths_NR)
  shape = _validate(*args)
  implementations = [dispatch.Implementation('reference', reference.branch_decode)]
  if generation is not None:
    def run(*args: Array) -> tuple[Array, Array]:
      kernel_tpu.check(shape)
      return kernel_tpu.branch_decode(*args, blocks=tuning.blocks(shape, generation),
                                      interpret=interpret)
    implementations.insert(0, dispatch.Implementation('tpu', run))
  return dispatch.first_supported('branch_decode', implementations, *args)


def _validate(q: Array, k_prefix: Array, v_prefix: Array, prefix_lengths: Array,
              k_suffix: Array, v_suffix: Array, suffix_lengths: Array) -> tuning.Shape:
  """The shape of the call.

  Raises:
    ValueError: says which argument does not fit.
  """
  for name, x, axes in (('q', q, 'NHRE'), ('k_prefix', k_prefix, 'NKTE'),
                        ('k_suffix', k_suffix, 'NKRSE')):
    if x.ndim != len(axes):
      raise ValueError(f'{name} must be [{", ".join(axes)}], got {list(x.shape)}')
  (N, H, R, E), (K, T), S = q.shape, k_prefix.shape[1:3], k_suffix.shape[3]
  expected = {'k_prefix': (k_prefix, (N, K, T, E)), 'v_prefix': (v_prefix, (N, K, T, E)),
              'k_suffix': (k_suffix, (N, K, R, S, E)), 'v_suffix': (v_suffix, (N, K, R, S, E)),
              'prefix_lengths': (prefix_lengths, (N, R)),
              'suffix_lengths': (suffix_lengths, (N, R))}
  for name, (x, shape) in expected.items():
    if x.shape != shape:
      raise ValueError(f'{name} must be {list(shape)} beside q {list(q.shape)}, '
                       f'got {list(x.shape)}')
    if name.endswith('lengths'):
      if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f'{name} must be integers, got {x.dtype}')
    elif x.dtype != q.dtype:
      raise ValueError(f'{name} must be {q.dtype} like q, got {x.dtype}')
  if not K or H % K:
    raise ValueError(f'{H} query heads do not share {K} key/value heads evenly')
  return tuning.Shape(H // K, E, R, T, S, str(q.dtype))
