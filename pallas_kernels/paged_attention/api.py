"""Attention of new tokens to keys and values that lie in pages of a pool."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import kernel_tpu, reference, tuning

Array = jax.Array


def paged_attention(q_BSHE: Array, pages: Array, scales: Array | None, table_BP: Array,
                    starts_B: Array, counts_B: Array, *, generation: dispatch.Generation | None,
                    blocks: tuning.Blocks | None = None, interpret: Any = False) -> Array:
  """Attention of S new tokens of each row to the row's tokens up to each of them.

    out_s = softmax(q_s K[:t]ᵀ / √E) V[:t],   t = start + s + 1

  Keys and values of the new tokens are already in their pages. S = 1 decodes, a larger S is a
  chunk of a prompt or a draft. No layer of the pool is copied: with the pages of all layers side
  by side, page p of layer l is entry l · N + p of the table.

  Args:
    q_BSHE: f[B, S, H, E] after RoPE; H / K query heads to each key/value head.
    pages: f or i8[K, N, 2, page, E]: keys after RoPE, then values. Or [K, N, page, 2E]: each
      token's key beside its value, which keeps heads of 64 channels whole lanes in HBM. Slots
      that no live query sees may hold anything.
    scales: f32[K, N, 2, page] of int8 pages, else None.
    table_BP: i32[B, P] pages of each row; entries beyond a row's tokens may hold anything.
    starts_B: i32[B] position of each row's first new token.
    counts_B: i32[B] new tokens of each row, at most S; 0 for idle rows.
    generation: of the TPU to run on; None takes the definition.
    blocks: block sizes other than the tuned ones.
    interpret: as in `pl.pallas_call`.

  Returns:
    f[B, S, H, E] in q's dtype. Softmax and sums are float32; weights are rounded to q's dtype
    before they meet the values. The results of padding, s ≥ count, are finite and mean nothing;
    of idle rows they are 0.

  Raises:
    ValueError: shapes or types that do not fit together.
  """
  args = (q_BSHE, pages, scales, table_BP, starts_B, counts_B)
  _validate(*args)
  implementations = [dispatch.Implementation('reference', reference.paged_attention)]
  if generation is not None:
    def run(*args: Any) -> Array:
      check(q_BSHE, pages)
      shape = tuning.shape_of(q_BSHE, pages)
      return kernel_tpu.paged_attention(
          *args, blocks=blocks or tuning.blocks(shape, generation),
          num_cores=2 if generation in ('v4', 'v5p') else 1, interpret=interpret)
    implementations.insert(0, dispatch.Implementation('tpu', run))
  return dispatch.first_supported('paged_attention', implementations, *args)


def check(q_BSHE: Array, pages: Array) -> None:
  """Checks that the kernel takes queries and pages, whichever of their heads a chip has.

  A caller with a definition of its own asks here first; `paged_attention` falls back on one that
  gathers all pages of the table at once.

  Raises:
    NotImplementedError: only the definition takes them; says what the kernel takes.
  """
  kernel_tpu.check(tuning.shape_of(q_BSHE, pages))


def _validate(q: Array, pages: Array, scales: Array | None, table: Array, starts: Array,
              counts: Array) -> None:
  """Checks shapes and types.

  Raises:
    ValueError: says which argument does not fit.
  """
  if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f'q must be f[B, S, H, E], got {q.dtype}{list(q.shape)}')
  B, _, H, E = q.shape
  if pages.ndim == 4 and pages.shape[-1] != 2 * E or pages.ndim not in (4, 5) or (
      pages.ndim == 5 and (pages.shape[2], pages.shape[4]) != (2, E)):
    raise ValueError(f'pages must be [K, N, 2, page, {E}] or [K, N, page, {2 * E}] beside q '
                     f'{list(q.shape)}, got {list(pages.shape)}')
  if H % pages.shape[0]:
    raise ValueError(f'{H} query heads do not share {pages.shape[0]} key/value heads evenly')
  if (pages.dtype == jnp.int8) != (scales is not None):
    raise ValueError(f'int8 pages come with scales, others without; got {pages.dtype} pages '
                     f'{"with" if scales is not None else "without"} scales')
  expected = (*pages.shape[:2], 2, pages.shape[-2])
  if scales is not None and (scales.shape != expected or scales.dtype != jnp.float32):
    raise ValueError(f'scales must be float32{list(expected)} beside pages '
                     f'{list(pages.shape)}, got {scales.dtype}{list(scales.shape)}')
  if table.ndim != 2 or table.shape[0] != B:
    raise ValueError(f'table must be [{B}, P], got {list(table.shape)}')
  for name, x in (('starts', starts), ('counts', counts)):
    if x.shape != (B,):
      raise ValueError(f'{name} must be [{B}], got {list(x.shape)}')
  for name, x in (('table', table), ('starts', starts), ('counts', counts)):
    if x.dtype != jnp.int32:
      raise ValueError(f'{name} must be int32, got {x.dtype}')
