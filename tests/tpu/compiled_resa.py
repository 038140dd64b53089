"""Child of test_resa.py: rectified sparse decoding, compiled for a TPU with its kernels.

Prints a JSON row: the kernels in the program, the bytes of the pages, and the instructions that
copy as much, with the times that they run.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.parallel import model as models
from jaxrl_pt.sampling import groups
from jaxrl_pt.tpu import hlo
from jaxrl_pt.types import Prompts
from tests.tpu.one_chip import one_chip

ROWS, LENGTH, NEW, BLOCK = 4, 8192, 64, 16


def main(topology: str) -> None:
  mesh, place = one_chip(topology)
  ints = lambda *dims: place(jax.ShapeDtypeStruct(dims, jnp.int32))
  config = cfg.Model(2, 512, 1024, 4, 2, 128, 512)
  model = models.build(config, cfg.Compute(dtype='bfloat16'), mesh)
  prompts = Prompts(ints(ROWS, LENGTH), ints(ROWS), ints(ROWS))
  draw = functools.partial(
      groups.generate, model, sampler=cfg.Sampler(), sparse=cfg.ReSA(block=BLOCK), num_samples=1,
      num_tokens=NEW)
  compiled = jax.jit(draw).trace(place(P.abstract(model.specs)), prompts, place(
      jax.eval_shape(lambda: jax.random.key(0)))).lower().compile()
  module = hlo.parse(compiled.as_text())
  pages = 2 * 2 * config.num_layers * config.num_kv_heads * ROWS * LENGTH * config.head_dim
  copies = [(run.instruction.name, run.times) for run in hlo.runs(module)
            if run.instruction.opcode in ('copy', 'copy-start', 'transpose')
            and sum(a.num_bytes for a in hlo.arrays(run.instruction.type)) >= pages
            # The prefill moves documents whole, before they lie in pages.
            and f',{LENGTH},' not in run.instruction.type]
  print(json.dumps({'pages': pages, 'copies': copies,
                    'kernels': {name: n for name, (_, n) in hlo.kernels(module).items()}}),
        flush=True)


if __name__ == '__main__':
  main(sys.argv[1])
