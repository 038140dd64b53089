"""The decoder-only transformer: Llama-shaped, or BitNet b1.58 2B4T's with SubLN and ReLU².

    h   = x + W_o · sub_norm(Attention(norm(x)))
    out = h + W_down · sub_norm(act(W_gate · norm(h)) ⊙ W_up · norm(h))

`sub_norm` is the identity without SubLN. With `Quant.weights = 'ternary'` the seven
projections of a block are BitLinear and, with `hadamard`, W_o and W_down rotate their
input; embedding and head stay as they are (2504.12285 section 2, 2504.18415 section 2).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Constrain, Model
from jaxrl_pt.nn import attention as attn
from jaxrl_pt.nn import embed
from jaxrl_pt.nn.ffn import gated
from jaxrl_pt.nn.linear import linear
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.nn.quant import hadamard_factors
from jaxrl_pt.params import ParamSpec, normal, ones
from jaxrl_pt.types import Array, Params

# attend(q_BSHE, k_BSKE, v_BSKE) → (out_BSHE, what the layer leaves behind)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def build(config: cfg.Model, compute: cfg.Compute = cfg.Compute(),
          constrain: Constrain = lambda x, axes: x) -> Model:
  """The model of `config`, computed as `compute` says.

  constrain is applied at the model's named activations (embedding, queries, keys and
  values, feed-forward, residual) with their logical axes; `parallel.rules` makes it.

  Raises:
    UserError: `Quant.hadamard` and a width that no Hadamard matrix here has.
  """
  _check_rotations(config)
  dtype = jnp.dtype(compute.dtype)
  block = _make_block(config, constrain)
  remat = jax.checkpoint if compute.remat == 'block' else lambda f: f
  unroll = compute.unroll or config.num_layers

  def embed_tokens(params: Params, tokens_BT: Array) -> Array:
    return constrain(params['embed'][tokens_BT].astype(dtype), ('batch', 'sequence', None))

  def apply(params: Params, tokens_BT: Array, positions_BT: Array, segments_BT: Array) -> Array:
    angles = embed.rope(positions_BT, config.head_dim, config.rope_theta)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
      return attn.causal_attention(q, k, v, segments_BT), None

    def layer(x_BTD: Array, p: Params) -> tuple[Array, None]:
      return block(p, x_BTD, angles, attend)

    x_BTD, _ = jax.lax.scan(remat(layer), embed_tokens(params, tokens_BT), params['layers'],
                            unroll=unroll)
    return rms_norm(x_BTD, params['final_norm'], config.norm_epsilon)

  def extend(params: Params, tokens_BS: Array, positions_BS: Array,
             cache: kv_cache.KVCache) -> tuple[Array, kv_cache.KVCache]:
    mask = attn.cache_mask(positions_BS, cache.k.shape[2])
    angles = embed.rope(positions_BS, config.head_dim, config.rope_theta)

    def layer(x_BSD: Array, p_and_cache: Any) -> tuple[Array, Any]:
      p, old = p_and_cache

      def attend(q: Array, k: Array, v: Array) -> tuple[Array, kv_cache.KVCache]:
        new = kv_cache.KVCache(kv_cache.write(old.k, k, positions_BS),
                               kv_cache.write(old.v, v, positions_BS))
        return attn.attention(q, new.k.astype(q.dtype), new.v.astype(q.dtype), mask), new

      return block(p, x_BSD, angles, attend)

    x_BSD, cache = jax.lax.scan(remat(layer), embed_tokens(params, tokens_BS),
                                (params['layers'], cache), unroll=unroll)
    return rms_norm(x_BSD, params['final_norm'], config.norm_epsilon), cache

  def head(params: Params) -> Array:
    return (params['embed'].T if config.tied_head else params['head']).astype(dtype)

  def init_cache(num_rows: int, num_slots: int) -> kv_cache.KVCache:
    return kv_cache.init(config, num_rows, num_slots, dtype)

  return Model(config, _specs(config), apply, extend, head, init_cache)


def _check_rotations(config: cfg.Model) -> None:
  if not config.quant.hadamard:
    return
  for what, width in (('num_heads × head_dim', config.num_heads * config.head_dim),
                      ('d_ff', config.d_ff)):
    try:
      hadamard_factors(width)
    except ValueError as e:
      raise UserError(f'Quant.hadamard rotates Model.{what} = {width}: {e}, or set '
                      'Quant.hadamard = False.') from e


def _make_block(config: cfg.Model, constrain: Constrain) -> Callable[..., tuple[Array, Any]]:
  quant = config.quant

  def norm(x: Array, gain: Array) -> Array:
    return rms_norm(x, gain, config.norm_epsilon)

  def block(p: Params, x_BTD: Array, angles: tuple[Array, Array],
            attend: Attend) -> tuple[Array, Any]:
    num_rows, length, _ = x_BTD.shape

    def split_heads(x: Array, num_heads: int, axis: str) -> Array:
      x = x.reshape(num_rows, length, num_heads, config.head_dim)
      return constrain(x, ('batch', 'sequence', axis, None))

    y_BTD = norm(x_BTD, p['attn_norm'])
    q = split_heads(linear(y_BTD, p['wq'], quant), config.num_heads, 'heads')
    k = split_heads(linear(y_BTD, p['wk'], quant), config.num_kv_heads, 'kv_heads')
    v = split_heads(linear(y_BTD, p['wv'], quant), config.num_kv_heads, 'kv_heads')
    out, left_behind = attend(embed.rotate(q, *angles), embed.rotate(k, *angles), v)
    out = out.reshape(num_rows, length, -1)
    if config.sub_norm:
      out = norm(out, p['attn_sub_norm'])
    x_BTD = x_BTD + linear(out, p['wo'], quant, rotate=True)

    y_BTD = norm(x_BTD, p['ffn_norm'])
    h_BTF = gated(linear(y_BTD, p['w_gate'], quant), linear(y_BTD, p['w_up'], quant),
                  config.activation)
    h_BTF = constrain(h_BTF, ('batch', 'sequence', 'ff'))
    if config.sub_norm:
      h_BTF = norm(h_BTF, p['ffn_sub_norm'])
    x_BTD = x_BTD + linear(h_BTF, p['w_down'], quant, rotate=True)
    return constrain(x_BTD, ('batch', 'sequence', None)), left_behind

  return block


def _specs(config: cfg.Model) -> Any:
  """The tree of ParamSpec. Projections draw N(0, 1/fan_in); those that write into the
  residual stream are scaled by 1/√(2L) so that its variance does not grow with depth."""
  depth, width, ff = config.num_layers, config.d_model, config.d_ff
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  residual = (2 * depth) ** -0.5

  def matrix(rows: int, columns: int, axes: tuple[str, str], gain: float = 1.0) -> ParamSpec:
    return ParamSpec((depth, rows, columns), jnp.float32, ('layers', *axes),
                     normal(gain * rows**-0.5))

  def gains(size: int, axis: str) -> ParamSpec:
    return ParamSpec((depth, size), jnp.float32, ('layers', axis), ones)

  layers = {
      'attn_norm': gains(width, 'norm'),
      'wq': matrix(width, queries, ('embed', 'heads')),
      'wk': matrix(width, keys, ('embed', 'kv_heads')),
      'wv': matrix(width, keys, ('embed', 'kv_heads')),
      'wo': matrix(queries, width, ('heads', 'embed'), residual),
      'ffn_norm': gains(width, 'norm'),
      'w_gate': matrix(width, ff, ('embed', 'ff')),
      'w_up': matrix(width, ff, ('embed', 'ff')),
      'w_down': matrix(ff, width, ('ff', 'embed'), residual),
  }
  if config.sub_norm:
    layers['attn_sub_norm'] = gains(queries, 'norm')
    layers['ffn_sub_norm'] = gains(ff, 'norm')
  specs = {
      'embed': ParamSpec((config.vocab_size, width), jnp.float32, ('vocab', 'embed'),
                         normal(0.02)),
      'layers': layers,
      'final_norm': ParamSpec((width,), jnp.float32, ('norm',), ones),
  }
  if not config.tied_head:
    specs['head'] = ParamSpec((width, config.vocab_size), jnp.float32, ('embed', 'vocab'),
                              normal(width**-0.5))
  return specs
