"""The blocks of a diffusion transformer with adaLN-zero (DiT, 2212.09748).

    s₁, c₁, g₁, s₂, c₂, g₂ = W_mod SiLU(c) + b_mod
    h   = x + g₁ ⊙ W_o · sub_norm(Attention((1 + c₁) ⊙ LayerNorm(x) + s₁))
    out = h + g₂ ⊙ W_down · sub_norm(GELU(W_up · ((1 + c₂) ⊙ LayerNorm(h) + s₂)))

All tokens of an image see each other, and c is the embedding of what holds for the whole image.
W_mod and b_mod begin at zero, so that each block begins as the identity. With
`Quant.weights = 'ternary'` the six projections of a block are BitLinear, exactly as in the language
model; `sub_norm` is the identity without SubLN. W_mod stays as it is: it multiplies one row for a
whole image.

Departs from the paper: no biases beside those of the modulation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Constrain
from jaxrl_pt.nn.attention import attention
from jaxrl_pt.nn.linear import add_bias, linear, matmul, normed_linear
from jaxrl_pt.nn.norm import EPSILON, layer_norm
from jaxrl_pt.nn.ops import Axes, Ops
from jaxrl_pt.params import Init, ParamSpec, Role, normal, ones, zeros
from jaxrl_pt.types import Array, Params

# The projections of a block: logical names of their inputs and outputs.
PROJECTIONS: dict[str, Axes] = {
    'wq': ('embed', 'heads'), 'wk': ('embed', 'heads'), 'wv': ('embed', 'heads'),
    'wo': ('heads', 'embed'), 'w_up': ('embed', 'ff'), 'w_down': ('ff', 'embed')}


def modulate(x_BSD: Array, shift_BD: Array, scale_BD: Array) -> Array:
  """(1 + scale) ⊙ x + shift, with one shift and scale for all tokens of an image."""
  return x_BSD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def modulation(p: Params, condition_BD: Array, parts: int) -> list[Array]:
  """`parts` times f[B, D]: W_mod SiLU(c) + b_mod."""
  raw = matmul(jax.nn.silu(condition_BD), p['modulation'])
  return jnp.split(add_bias(raw, p['modulation_bias']), parts, -1)


def build(config: cfg.DiT, compute: cfg.Compute, constrain: Constrain, ops: Ops
          ) -> Callable[[Params, Array, Array], Array]:
  """blocks(stacked parameters, tokens f[B, S, D], condition f[B, D]) → f[B, S, D].

  Args:
    config: sizes and quantisation.
    compute: rematerialisation and unrolling.
    constrain: applied to heads, feed-forward and residual with their logical axes.
    ops: the operations that have kernels.
  """
  block = _make_block(config, constrain, ops)
  remat = jax.checkpoint if compute.remat == 'block' else lambda f: f
  unroll = compute.unroll or config.num_layers

  def blocks(layers: Params, tokens_BSD: Array, condition_BD: Array) -> Array:
    layer = lambda x_BSD, p: (block(p, x_BSD, condition_BD), None)
    return jax.lax.scan(remat(layer), tokens_BSD, layers, unroll=unroll)[0]

  return blocks


def _make_block(config: cfg.DiT, constrain: Constrain, ops: Ops
                ) -> Callable[[Params, Array, Array], Array]:
  quant = config.quant

  def project(p: Params, x: Array, name: str) -> Array:
    return linear(x, p[name], quant, ops, PROJECTIONS[name])

  def project_back(p: Params, x: Array, name: str, gain: str) -> Array:
    return normed_linear(x, p[gain] if config.sub_norm else None, EPSILON, p[name], quant, ops,
                         PROJECTIONS[name])

  def block(p: Params, x_BSD: Array, condition_BD: Array) -> Array:
    num, length, _ = x_BSD.shape
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(p, condition_BD, 6)

    def heads(y_BSD: Array, name: str) -> Array:
      x = project(p, y_BSD, name).reshape(num, length, config.num_heads, config.head_dim)
      return constrain(x, ('batch', None, 'heads', None))

    y_BSD = modulate(layer_norm(x_BSD), shift_1, scale_1)
    everywhere = jnp.ones((num, length, length), bool)
    q, k, v = (heads(y_BSD, name) for name in ('wq', 'wk', 'wv'))
    out = attention(q, k, v, everywhere)
    out = project_back(p, out.reshape(num, length, -1), 'wo', 'attn_sub_norm')
    x_BSD = x_BSD + gate_1[:, None] * out

    y_BSD = modulate(layer_norm(x_BSD), shift_2, scale_2)
    h_BSF = constrain(jax.nn.gelu(project(p, y_BSD, 'w_up')), ('batch', None, 'ff'))
    x_BSD = x_BSD + gate_2[:, None] * project_back(p, h_BSF, 'w_down', 'ffn_sub_norm')
    return constrain(x_BSD, ('batch', None, None))

  return block


def specs(config: cfg.DiT) -> dict[str, ParamSpec]:
  """The parameters of all blocks, stacked over layers; projections start from N(0, 1/fan_in)."""
  width, ff = config.d_model, config.d_ff

  def stacked(shape: tuple[int, ...], axes: tuple[str, ...], init: Init, role: Role) -> ParamSpec:
    return ParamSpec((config.num_layers, *shape), jnp.dtype('float32'), ('layers', *axes), init,
                     role)

  sizes = {'embed': width, 'heads': width, 'ff': ff}
  found = {name: stacked((sizes[rows], sizes[columns]), (rows, columns),
                         normal(sizes[rows]**-0.5), 'projection')
           for name, (rows, columns) in PROJECTIONS.items()}
  found['modulation'] = stacked((width, 6 * width), ('embed', 'whole'), zeros, 'dense')
  found['modulation_bias'] = stacked((6 * width,), ('whole',), zeros, 'bias')
  if config.sub_norm:
    found['attn_sub_norm'] = stacked((width,), ('norm',), ones, 'gain')
    found['ffn_sub_norm'] = stacked((ff,), ('norm',), ones, 'gain')
  return found
