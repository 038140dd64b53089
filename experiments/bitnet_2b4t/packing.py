"""Decode tokens/s on this CPU from packed ternary weights and from the trainer's float32 ones.

    python experiments/bitnet_2b4t/packing.py

What RL with `Slots.packed` and `sample`, `chat` and `serve` with `--packed` draw with on one
device, against the trainer's weights, which `groups.generate` quantises again in every step. How
many tokens both draw alike is measured too; calls alternate. Results go to results/packing.json.
"""

import functools
import json
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import groups, weight_sync
from jaxrl_pt.types import Prompts

RESULT = Path(__file__).parent / 'results' / 'packing.json'
PROMPT, NEW, ROUNDS = 32, 64, 3
SHAPES = {'2.8M': (6, 192, 512, 6, 2, 32, 1024), '15.7M': (8, 384, 1024, 6, 2, 64, 4096)}


def measure(shape: str, rows: int) -> dict[str, Any]:
  model = transformer.build(cfg.Model(*SHAPES[shape], activation='relu2', sub_norm=True,
                                      quant=cfg.Quant('ternary', 'int8')))
  latent = jax.jit(lambda key: P.init(model.specs, key))(jax.random.key(0))
  held = {'float32': latent, 'packed': jax.jit(weight_sync.for_one_device(
      model, jax.devices()[0], 'float32', packed=True))(latent)}
  ids = np.random.default_rng(0).integers(3, SHAPES[shape][-1], (rows, PROMPT))
  prompts = Prompts(jnp.asarray(ids, jnp.int32), jnp.full(rows, PROMPT), jnp.arange(rows))
  generate = jax.jit(functools.partial(groups.generate, model, sampler=cfg.Sampler(),
                                       num_samples=1, num_tokens=NEW))
  drawn = {name: np.asarray(generate(p, prompts, jax.random.key(0)).tokens)
           for name, p in held.items()}
  speeds: dict[str, list[float]] = {name: [] for name in held}
  for _ in range(ROUNDS):
    for name, params in held.items():
      start = time.perf_counter()
      generate(params, prompts, jax.random.key(0)).tokens.block_until_ready()
      speeds[name].append(rows * NEW / (time.perf_counter() - start))
  ratios = [a / b for a, b in zip(speeds['packed'], speeds['float32'], strict=True)]
  return {'shape': shape, 'batch': rows, 'tokens_per_second': speeds,
          'ratio_of_each_round': ratios, 'ratio': statistics.median(ratios),
          'same_tokens': float((drawn['packed'] == drawn['float32']).mean()),
          'bytes': {name: sum(x.nbytes for x in jax.tree.leaves(p['layers']))
                    for name, p in held.items()}}


def main() -> None:
  RESULT.parent.mkdir(exist_ok=True)
  rows = []
  for shape in SHAPES:
    for batch in (1, 16, 64):
      rows.append(measure(shape, batch))
      print(json.dumps(rows[-1]), flush=True)
      RESULT.write_text(json.dumps(rows, indent=1) + '\n')  # What is finished stays.


if __name__ == '__main__':
  main()
