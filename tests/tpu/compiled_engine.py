"""Child of test_engine.py: the sampling engine's program, compiled for a TPU.

Prints a JSON row for each kind of storage: the bytes of the pool of pages, the bytes that the
program updates in place, and its copies of anything as large as the pool.
"""

import json
import sys

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.parallel import model as models
from jaxrl_pt.sampling import slots
from jaxrl_pt.sampling.policies import RowSamplers
from jaxrl_pt.token_bytes import TokenBytes
from jaxrl_pt.tpu import hlo
from tests.tpu.one_chip import one_chip

VOCAB = 512
SHAPE = slots.Shape(slots=8, page_size=16, num_pages=8192, queue=16, prompt_len=256,
                    response_len=256, prefill_chunk=64, num_stop=2, num_forced=2, num_strings=1,
                    string_len=8, num_banned=2, vocab_size=VOCAB)


def main(topology: str, dtype: str) -> None:
  mesh, place = one_chip(topology)
  ints = lambda *dims: place(jax.ShapeDtypeStruct(dims, jnp.int32))
  model = models.build(cfg.Model(2, 256, 512, 2, 2, 128, VOCAB), cfg.Compute(dtype='bfloat16'),
                       mesh)
  spelled = place(TokenBytes(jax.ShapeDtypeStruct((VOCAB, 4), jnp.uint8), ints(VOCAB)))
  vocabulary = lambda spelled: slots.Vocabulary((5, 6), spelled, jnp.ones(VOCAB, bool))
  state = place(jax.eval_shape(lambda: slots.init(
      model, SHAPE, vocabulary(spelled), jnp.dtype(dtype))))
  q = SHAPE.queue
  requests = slots.Requests(
      ints(q, SHAPE.prompt_len), *(ints(q) for _ in range(7)), ints(q, 2), ints(q), ints(q, 2),
      place(jax.ShapeDtypeStruct((q, 1, 8), jnp.uint8)), ints(q, 1),
      place(RowSamplers.of([cfg.Sampler()] * q, VOCAB, 2)),
      place(jax.ShapeDtypeStruct((q,), jnp.bool_)))
  key = place(jax.eval_shape(lambda: jax.random.key(0)))

  def run(params, key, queue, state, steps, spelled):
    return slots.advance(model, SHAPE, vocabulary(spelled), params, key, queue, state, steps)

  compiled = jax.jit(run, donate_argnums=3).trace(
      place(P.abstract(model.specs)), key, slots.Queue(requests, ints(q), ints()), state, ints(),
      spelled).lower().compile()
  pool = state.cache.pages
  shape = f'[{",".join(map(str, pool.shape))}]'
  module = hlo.parse(compiled.as_text())
  copies = [i.name for computation in module.computations.values() for i in computation.values()
            if i.opcode in ('copy', 'copy-start', 'transpose') and shape in i.type]
  print(json.dumps({'pool': pool.size * pool.dtype.itemsize, 'copies': copies,
                    'in_place': compiled.memory_analysis().alias_size_in_bytes}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
