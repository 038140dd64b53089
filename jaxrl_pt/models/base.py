"""A model: pure functions over a parameter tree that is described before it exists."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from jaxrl_pt.config import KV
from jaxrl_pt.config import Model as ModelConfig
from jaxrl_pt.models.kv_cache import Attend, KVCache
from jaxrl_pt.models.paged_cache import PagedCache
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.nn.quant import TernaryWeight
from jaxrl_pt.types import Array, Params

# constrain(x, logical axes) → x; the identity on one device.
Constrain = Callable[[Array, tuple[str | None, ...]], Array]


class Extend(Protocol):
  """extend(params, tokens_BS, positions_BS, cache, attend) → (hidden_BSD, cache).

  It takes S new tokens of each row against a cache of any kind. `attend` reads and writes the
  cache; its default, `kv_cache.dense`, is the one for a KVCache.
  """

  def __call__(self, params: Params, tokens_BS: Array, positions_BS: Array, cache: Any,
               attend: Attend | None = None) -> tuple[Array, Any]: ...


class Specified(Protocol):
  """A model of any kind, of which the state of training knows the parameters alone."""

  @property
  def specs(self) -> Any: ...


class Model(NamedTuple):
  """One forward function, for whole sequences and for new tokens against a cache.

  apply(params, tokens_BT, positions_BT, segments_BT) → hidden_BTD
  extend: see `Extend`; `apply` is `extend` without a cache. It takes `unstacked` parameters too.
  head(params) → f[D, V], so that logits_BTV = hidden_BTD @ head
  logits(params, hidden f[..., D]) → f32[..., V], for sampling: the head may be quantised
  init_cache(num_rows, num_slots) → empty KVCache
  init_pages(num_pages, page_size, kv) → empty PagedCache
  ops: the operations that have kernels, which the block and some attends call.
  constrain: constrains the layout of an activation on the mesh.
  """

  config: ModelConfig
  specs: Any
  apply: Callable[[Params, Array, Array, Array], Array]
  extend: Extend
  head: Callable[[Params], Array]
  logits: Callable[[Params, Array], Array]
  init_cache: Callable[[int, int], KVCache]
  init_pages: Callable[[int, int, KV], PagedCache]
  ops: Ops
  constrain: Constrain


def for_a_loop(params: Params, num_layers: int) -> Params:
  """Parameters as a loop of decode steps reads them; call it before the loop.

  A scan over layers takes each layer's weights out of the stack. Of a stack of 2-bit codes XLA
  cannot take a part on a TPU: it would widen all of them to 8 bits, keep those, and read 8 bits a
  weight in every step. Packed weights are therefore unstacked, for which they are widened once, for
  a moment.
  """
  layers = params['layers']
  is_code = lambda x: isinstance(x, TernaryWeight)
  is_packed = not isinstance(layers, tuple) and any(
      map(is_code, jax.tree.leaves(layers, is_leaf=is_code)))
  return unstacked(params, num_layers) if is_packed else params


def unstacked(params: Params, num_layers: int) -> Params:
  """Parameters whose layers are no longer stacked: each layer's weights are arrays of their own.

  Then the layers are a Python loop and not a scan, so that `attend` gets the layer's number as a
  Python integer, and a cache may be a tuple with an array for each layer. It is no faster on a
  CPU, although a scan copies a layer's weights before it multiplies by them.
  """
  layer = lambda i: jax.tree.map(lambda x: jax.lax.index_in_dim(x, i, keepdims=False),
                                 params['layers'])
  return {**params, 'layers': tuple(map(layer, range(num_layers)))}
