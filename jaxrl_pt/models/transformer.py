"""The decoder-only transformer: Llama-shaped, or BitNet b1.58 2B4T's with SubLN and ReLU².

    h   = x + W_o · sub_norm(Attention(norm(x)))
    out = h + W_down · sub_norm(act(W_gate · norm(h)) ⊙ W_up · norm(h))

`sub_norm` is the identity without SubLN. With `Quant.weights = 'ternary'` the seven
projections of a block are BitLinear and, with `hadamard`, W_o and W_down rotate their
input; embedding and head stay as they are (2504.12285 section 2, 2504.18415 section 2).
Queries, keys and values may have biases (Qwen2), and the heads of queries and keys an
RMSNorm before RoPE (Qwen3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import adapters, kv_cache, paged_cache
from jaxrl_pt.models.base import Constrain, Model
from jaxrl_pt.nn import embed, packed
from jaxrl_pt.nn.ffn import gated
from jaxrl_pt.nn.linear import add_bias, linear, normed_linear
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.nn.ops import Axes, Ops
from jaxrl_pt.nn.quant import hadamard_factors
from jaxrl_pt.params import Init, ParamSpec, Role, normal, ones, zeros
from jaxrl_pt.types import Array, Params

# attend(q_BSHE, k_BSKE, v_BSKE) → (out_BSHE, cache), of one layer
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

# The projections of a block: logical names of their inputs and outputs.
PROJECTIONS: dict[str, Axes] = {
    'wq': ('embed', 'heads'), 'wk': ('embed', 'kv_heads'), 'wv': ('embed', 'kv_heads'),
    'wo': ('heads', 'embed'), 'w_gate': ('embed', 'ff'), 'w_up': ('embed', 'ff'),
    'w_down': ('ff', 'embed')}


def build(config: cfg.Model, compute: cfg.Compute = cfg.Compute(),
          constrain: Constrain = lambda x, axes: x, ops: Ops = Ops()) -> Model:
  """Builds the model of `config`, computed as `compute` says.

  Args:
    config: the model's shape and quantisation.
    compute: dtype, rematerialisation and unrolling.
    constrain: applied at the model's named activations (embedding, queries, keys and values,
      feed-forward, residual) with their logical axes; `parallel.rules` makes it.
    ops: computes the operations that have kernels; `parallel.kernels` makes it for the chips of a
      mesh.

  Raises:
    UserError: `Quant.hadamard` is set, and a width has no Hadamard matrix here.
  """
  check_rotations(config)
  dtype = jnp.dtype(compute.dtype)
  block = _make_block(config, constrain, ops)
  remat = jax.checkpoint if compute.remat == 'block' else lambda f: f
  unroll = compute.unroll or config.num_layers

  def embed_tokens(params: Params, tokens_BT: Array) -> Array:
    if isinstance(params['embed'], packed.QuantizedTable):
      x_BTD = packed.lookup(params['embed'], tokens_BT, dtype)
      return constrain(x_BTD, ('batch', 'sequence', None))
    whole = lambda table_VD: constrain(table_VD, ('vocab', None))  # Gathered once.
    x_BTD = embed.lookup(params['embed'], tokens_BT, dtype, whole)
    return constrain(x_BTD, ('batch', 'sequence', None))

  def extend(params: Params, tokens_BS: Array, positions_BS: Array, cache: Any,
             attend: kv_cache.Attend | None = None) -> tuple[Array, Any]:
    attend = attend or kv_cache.dense(positions_BS)
    angles = embed.rope(positions_BS, config.head_dim, config.rope_theta, config.rope)

    def layer(x_and_cache: tuple[Array, Any], p_and_i: tuple[Params, Any]
              ) -> tuple[tuple[Array, Any], None]:
      (x_BSD, cache), (p, i) = x_and_cache, p_and_i
      return block(p, x_BSD, angles, lambda q, k, v: attend(q, k, v, cache, i)), None

    x_and_cache = embed_tokens(params, tokens_BS), cache
    if isinstance(params['layers'], tuple):  # As `unstacked` leaves them.
      for p_and_i in zip(params['layers'], range(config.num_layers), strict=True):
        x_and_cache, _ = layer(x_and_cache, p_and_i)
    else:
      layers = params['layers'], jnp.arange(config.num_layers)
      x_and_cache, _ = jax.lax.scan(remat(layer), x_and_cache, layers, unroll=unroll)
    x_BSD, cache = x_and_cache
    return rms_norm(x_BSD, params['final_norm'], config.norm_epsilon), cache

  def apply(params: Params, tokens_BT: Array, positions_BT: Array, segments_BT: Array) -> Array:
    return extend(params, tokens_BT, positions_BT, (), kv_cache.sequences(ops, segments_BT))[0]

  head, logits = _make_head(config, dtype, constrain)

  def init_cache(num_rows: int, num_slots: int) -> kv_cache.KVCache:
    return kv_cache.init(config, num_rows, num_slots, dtype)

  def init_pages(num_pages: int, page_size: int, kv: cfg.KV) -> paged_cache.PagedCache:
    pages = paged_cache.init(config, num_pages, page_size, dtype, kv)
    by_heads = lambda x: constrain(x, ('kv_heads', *[None] * (x.ndim - 1)))
    return jax.tree.map(by_heads, pages)

  specs = adapters.adapt_specs(_specs(config), config)
  return Model(config, specs, apply, extend, head, logits, init_cache, init_pages, ops,
               constrain)


def _make_head(config: cfg.Model, dtype: DTypeLike, constrain: Constrain
               ) -> tuple[Callable[[Params], Array], Callable[[Params, Array], Array]]:
  """`Model.head` and `Model.logits`."""
  def head(params: Params) -> Array:
    table = params['embed'] if config.tied_head else params['head']
    if isinstance(table, packed.QuantizedTable):
      head_DV = packed.dequantised(table, dtype).T
    else:
      head_DV = table.T if config.tied_head else table
    # Gathered once: a product over a split D would add up all logits across chips.
    return constrain(head_DV.astype(dtype), (None, 'vocab'))

  def logits(params: Params, hidden: Array) -> Array:
    table = params['embed'] if config.tied_head else params['head']
    if isinstance(table, packed.QuantizedTable):
      return packed.logits(hidden, table)
    return jnp.matmul(hidden, head(params), preferred_element_type=jnp.float32)

  return head, logits


def check_rotations(config: cfg.Model | cfg.DiT | cfg.VisionTower) -> None:
  """Refuses to rotate widths for which there is no Hadamard matrix."""
  if not config.quant.hadamard:
    return
  for what, width in (('num_heads × head_dim', config.num_heads * config.head_dim),
                      ('d_ff', config.d_ff)):
    try:
      hadamard_factors(width)
    except ValueError as e:
      raise UserError(f'Quant.hadamard rotates {type(config).__name__}.{what} = {width}: {e}, or '
                      'set Quant.hadamard = False.') from e


def _make_block(config: cfg.Model, constrain: Constrain,
                ops: Ops) -> Callable[..., tuple[Array, Any]]:
  quant, epsilon = config.quant, config.norm_epsilon

  def project(p: Params, x: Array, name: str) -> Array:
    return linear(x, p[name], quant, ops, PROJECTIONS[name])

  def project_back(p: Params, x: Array, name: str, gain: str) -> Array:
    """W_o and W_down, after SubLN where the model has it."""
    return normed_linear(x, p[gain] if config.sub_norm else None, epsilon, p[name], quant, ops,
                         PROJECTIONS[name])

  def block(p: Params, x_BTD: Array, angles: tuple[Array, Array],
            attend: Attend) -> tuple[Array, Any]:
    num_rows, length, _ = x_BTD.shape

    def heads(y_BTD: Array, name: str, num_heads: int, axis: str) -> Array:
      x = project(p, y_BTD, f'w{name}')
      x = add_bias(x, p[f'b{name}']) if config.qkv_bias else x
      x = x.reshape(num_rows, length, num_heads, config.head_dim)
      return constrain(x, ('batch', 'sequence', axis, None))

    y_BTD = rms_norm(x_BTD, p['attn_norm'], epsilon)
    q = heads(y_BTD, 'q', config.num_heads, 'heads')
    k = heads(y_BTD, 'k', config.num_kv_heads, 'kv_heads')
    v = heads(y_BTD, 'v', config.num_kv_heads, 'kv_heads')
    if config.qk_norm:
      q, k = rms_norm(q, p['q_norm'], epsilon), rms_norm(k, p['k_norm'], epsilon)
    out, cache = attend(embed.rotate(q, *angles), embed.rotate(k, *angles), v)
    out = out.reshape(num_rows, length, -1)
    x_BTD = x_BTD + project_back(p, out, 'wo', 'attn_sub_norm')

    y_BTD = rms_norm(x_BTD, p['ffn_norm'], epsilon)
    h_BTF = gated(project(p, y_BTD, 'w_gate'), project(p, y_BTD, 'w_up'), config.activation)
    h_BTF = constrain(h_BTF, ('batch', 'sequence', 'ff'))
    x_BTD = x_BTD + project_back(p, h_BTF, 'w_down', 'ffn_sub_norm')
    return constrain(x_BTD, ('batch', 'sequence', None)), cache

  return block


def _specs(config: cfg.Model) -> Any:
  """The tree of ParamSpec.

  Projections start from N(0, 1/fan_in). Those that write into the residual stream are scaled by
  1/√(2L), so that its variance does not grow with depth.
  """
  width = config.d_model
  dtype = jnp.dtype(config.param_dtype)
  specs = {
      'embed': ParamSpec((config.vocab_size, width), dtype, ('vocab', 'embed'),
                         normal(0.02), 'table', 'model.embed_tokens'),
      'layers': _block_specs(config),
      'final_norm': ParamSpec((width,), dtype, ('norm',), ones, 'gain', 'model.norm'),
  }
  if not config.tied_head:
    specs['head'] = ParamSpec((width, config.vocab_size), dtype, ('embed', 'vocab'),
                              normal(width**-0.5), 'head', 'lm_head')
  return specs


def _block_specs(config: cfg.Model) -> dict[str, ParamSpec]:
  """The parameters of all blocks, stacked over layers."""
  depth, width, ff = config.num_layers, config.d_model, config.d_ff
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  residual = (2 * depth) ** -0.5

  def stacked(shape: tuple[int, ...], axes: tuple[str, ...], init: Init, role: Role,
              theirs: str) -> ParamSpec:
    return ParamSpec((depth, *shape), jnp.dtype(config.param_dtype), ('layers', *axes), init,
                     role, f'model.layers.{{layer}}.{theirs}')

  def matrix(name: str, rows: int, columns: int, theirs: str, gain: float = 1.0) -> ParamSpec:
    return stacked((rows, columns), PROJECTIONS[name], normal(gain * rows**-0.5), 'projection',
                   theirs)

  def gains(size: int, theirs: str) -> ParamSpec:
    return stacked((size,), ('norm',), ones, 'gain', theirs)

  def bias(name: str, size: int, theirs: str) -> ParamSpec:
    return stacked((size,), PROJECTIONS[name][1:], zeros, 'bias', theirs)

  specs = {
      'attn_norm': gains(width, 'input_layernorm'),
      'wq': matrix('wq', width, queries, 'self_attn.q_proj'),
      'wk': matrix('wk', width, keys, 'self_attn.k_proj'),
      'wv': matrix('wv', width, keys, 'self_attn.v_proj'),
      'wo': matrix('wo', queries, width, 'self_attn.o_proj', residual),
      'ffn_norm': gains(width, 'post_attention_layernorm'),
      'w_gate': matrix('w_gate', width, ff, 'mlp.gate_proj'),
      'w_up': matrix('w_up', width, ff, 'mlp.up_proj'),
      'w_down': matrix('w_down', ff, width, 'mlp.down_proj', residual),
  }
  if config.sub_norm:
    specs['attn_sub_norm'] = gains(queries, 'self_attn.attn_sub_norm')
    specs['ffn_sub_norm'] = gains(ff, 'mlp.ffn_sub_norm')
  if config.qkv_bias:
    specs['bq'] = bias('wq', queries, 'self_attn.q_proj')
    specs['bk'] = bias('wk', keys, 'self_attn.k_proj')
    specs['bv'] = bias('wv', keys, 'self_attn.v_proj')
  if config.qk_norm:
    specs['q_norm'] = gains(config.head_dim, 'self_attn.q_norm')
    specs['k_norm'] = gains(config.head_dim, 'self_attn.k_norm')
  return specs
