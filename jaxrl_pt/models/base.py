"""A model: pure functions over a parameter tree that is described before it exists."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_pt.config import Model as ModelConfig
from jaxrl_pt.models.kv_cache import KVCache
from jaxrl_pt.types import Array, Params

# constrain(x, logical axes) → x; the identity on one device.
Constrain = Callable[[Array, tuple[str | None, ...]], Array]


class Model(NamedTuple):
  """One forward function, for whole sequences and for new tokens against a cache.

  apply(params, tokens_BT, positions_BT, segments_BT) → hidden_BTD
  extend(params, tokens_BS, positions_BS, cache) → (hidden_BSD, cache)
  head(params) → f[D, V], so that logits_BTV = hidden_BTD @ head
  init_cache(num_rows, num_slots) → empty KVCache
  """

  config: ModelConfig
  specs: Any
  apply: Callable[[Params, Array, Array, Array], Array]
  extend: Callable[[Params, Array, Array, KVCache], tuple[Array, KVCache]]
  head: Callable[[Params], Array]
  init_cache: Callable[[int, int], KVCache]
