"""Child of test_vision_shards.py: prints, as JSON, what towers compute on 8 fake CPU devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import vision
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh

_SIZES = {'patch': 2, 'num_layers': 2, 'd_model': 32, 'd_ff': 48, 'num_heads': 4, 'd_out': 16}
TOWERS = {
    'merged': cfg.VisionTower(**_SIZES, pooling=cfg.MergePatches()),
    'ternary': cfg.VisionTower(**_SIZES, positions=cfg.LearnedPositions(16),
                               pooling=cfg.Resampler(4), quant=cfg.Quant('ternary', 'int8'),
                               sub_norm=True)}
MESHES = (1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1)


def compute(config: cfg.VisionTower, shape: tuple[int, ...]) -> tuple[np.ndarray, float, float]:
  """The tokens, the norm of the gradient, and the largest share of the parameters on a device."""
  mesh = make_mesh(cfg.Mesh(*shape), jax.devices()[:int(np.prod(shape))])
  tower = vision.build(config, constrain=rules.make_constrain(mesh))
  shardings = rules.param_shardings(tower.specs, mesh)
  params = jax.jit(lambda key: P.init(tower.specs, key), out_shardings=shardings)(
      jax.random.key(0))
  rng = np.random.default_rng(0)
  pictures = jax.device_put(rng.integers(0, 256, (8, 8, 8, 3), np.uint8), rules.row_sharding(mesh))
  weights = jnp.asarray(rng.normal(size=config.d_out))

  def loss(params, pictures):
    tokens = tower.apply(params, pictures)
    return (tokens * weights).mean(), tokens

  grads, tokens = jax.jit(jax.grad(loss, has_aux=True))(params, pictures)
  norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
  here = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(params))
  return np.asarray(tokens), float(norm), here / P.count(tower.specs)


def main() -> None:
  for name, config in TOWERS.items():
    one, *others = [compute(config, shape) for shape in MESHES]
    for shape, (tokens, norm, share) in zip(MESHES[1:], others, strict=True):
      print(json.dumps({'tower': name, 'mesh': shape, 'devices': jax.device_count(),
                        'size': float(one[0].std()), 'gap': float(np.abs(tokens - one[0]).max()),
                        'norm': one[1], 'norm_gap': abs(norm - one[1]), 'share': share}))


if __name__ == '__main__':
  main()
