"""Child of test_engine.py: the sampling engine's program, compiled for a TPU.

Prints a JSON row for each kind of storage: the bytes of the pool of pages, the bytes that the
program updates in place, its copies of anything as large as the pool, and what in its loops holds
the packed weights of all layers at 8 bits.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.parallel import model as models
from jaxrl_pt.sampling import engine_rows, slots, state, weight_sync
from jaxrl_pt.sampling.prefix_cache import PrefixCache
from jaxrl_pt.sampling.requests import Shape, Vocabulary
from jaxrl_pt.token_bytes import TokenBytes
from jaxrl_pt.tpu import hlo
from tests.tpu.one_chip import one_chip

VOCAB = 512
SHAPE = Shape(slots=8, page_size=16, num_pages=8192, documents=20, queue=16, document_len=256,
              tail_len=1, response_len=256, lanes=2, chunk=64, vocab_size=VOCAB, num_stop=2,
              num_forced=2, num_strings=1, string_len=8, num_banned=2)


def main(topology: str, kv: str) -> None:
  mesh, place = one_chip(topology)
  ints = lambda *dims: place(jax.ShapeDtypeStruct(dims, jnp.int32))
  ternary = cfg.Model(2, 256, 512, 2, 2, 128, VOCAB, quant=cfg.Quant('ternary', 'int8'))
  model = models.build(ternary, cfg.Compute(dtype='bfloat16'), mesh)
  spelled = place(TokenBytes(jax.ShapeDtypeStruct((VOCAB, 4), jnp.uint8), ints(VOCAB)))
  vocabulary = lambda spelled: Vocabulary((5, 6), spelled, jnp.ones(VOCAB, bool))
  slots_now = place(jax.eval_shape(lambda: state.init(
      model, SHAPE, vocabulary(spelled), kv)))
  empty = engine_rows.empty_queue(SHAPE, PrefixCache(SHAPE.documents, SHAPE.document_len))
  queue = place(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty))
  key = place(jax.eval_shape(lambda: jax.random.key(0)))

  def run(params, key, queue, state, turns, spelled):
    return slots.advance(model, SHAPE, vocabulary(spelled), params, key, 0, queue, state, turns)

  params = weight_sync.abstract(model, mesh, True, jnp.bfloat16)
  compiled = jax.jit(run, donate_argnums=3).trace(
      params, key, queue, slots_now, ints(), spelled).lower().compile()
  # Packed pages have codes and each page's first token.
  pool = jax.tree.leaves(slots_now.cache.pages)[0]
  shape = f'[{",".join(map(str, pool.shape))}]'
  module = hlo.parse(compiled.as_text())
  copies = [i.name for computation in module.computations.values() for i in computation.values()
            if i.opcode in ('copy', 'copy-start', 'transpose') and shape in i.type]
  stack = re.compile(r's8\[2,(256|512),')
  widened = [run.instruction.name for run in hlo.runs(module)
             if run.times > 1 and stack.search(run.instruction.type)]
  print(json.dumps({'pool': pool.size * pool.dtype.itemsize, 'copies': copies, 'widened': widened,
                    'in_place': compiled.memory_analysis().alias_size_in_bytes}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
