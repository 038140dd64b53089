"""Child of test_kernels.py: on 8 fake CPU devices, a model with kernels (in the plain
interpreter) against the same model without, as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.parallel import kernels, rules
from jaxrl_pt.parallel.mesh import make_mesh

ROWS, LENGTH = 4, 128
QUANTS = {'int8': cfg.Quant('ternary', 'int8', hadamard=True),
          'int4': cfg.Quant('ternary', 'int4', hadamard=True)}


def model_of(quant, mesh, ops):
  config = cfg.Model(num_layers=1, d_model=128, d_ff=256, num_heads=2, num_kv_heads=2,
                     head_dim=128, vocab_size=64, activation='relu2', sub_norm=True, quant=quant)
  return transformer.build(config, constrain=rules.make_constrain(mesh), ops=ops)


def loss_and_grads(model, params, tokens, segments):
  positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)

  def loss(params):
    hidden = model.apply(params, tokens, positions, segments)
    return -token_logprobs(hidden, model.head(params), jnp.roll(tokens, -1, 1)).logp.mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  return float(value), {jax.tree_util.keystr(path): np.asarray(g) for path, g in
                        jax.tree_util.tree_leaves_with_path(grads)}


def main(name, shape):
  mesh = make_mesh(cfg.Mesh(*shape), jax.devices())
  plain = model_of(QUANTS[name], mesh, Ops())
  fast = model_of(QUANTS[name], mesh, kernels.kernel_ops(mesh, rules.TRAIN, 'v5e', True))
  shardings = rules.param_shardings(plain.specs, mesh)
  params = jax.jit(lambda key: P.init(plain.specs, key), out_shardings=shardings)(
      jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 64)
  segments = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 50, 1, 2), tokens.shape)
  tokens, segments = jax.device_put((tokens, segments), rules.row_sharding(mesh))
  expected, expected_grads = loss_and_grads(plain, params, tokens, segments)
  found, found_grads = loss_and_grads(fast, params, tokens, segments)
  distance = {name: float(np.linalg.norm(found_grads[name] - g) / np.linalg.norm(g))
              for name, g in expected_grads.items()}
  print(json.dumps({'expected': expected, 'found': found, 'distance': distance}))


if __name__ == '__main__':
  main(sys.argv[1], [int(n) for n in sys.argv[2].split('x')])
