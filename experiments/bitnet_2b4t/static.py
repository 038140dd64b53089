"""Static predictions of BitNet 2B4T on one TPU: decoding at batch 1 to 128, and a prefill of 2,048.

    python experiments/bitnet_2b4t/static.py

Needs libtpu (`make libtpu`) and no TPU. `sampling.step.step` is compiled for each generation with
2-bit weights, embedding and head in 8 bits, and int8 pages of 2,048 cached tokens a row; the
prefill extends one row by 2,048 tokens in chunks of 256, with the kernels of the product. The
compiled program of 2 and of 6 layers is read by `tpu.hlo` and `tpu.roofline`; what 30 layers take
is that of 2, and 28 times what each of the other four adds, since all layers are alike. A
prediction is the larger of bytes over HBM bandwidth and multiply-adds over the MXU's peak: perfect
overlap, no latency, no measurement. `must move` is what an ideal
step reads and writes. Results go to results/static.json.
"""

import json
import math
from pathlib import Path
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.models import paged_cache, transformer
from jaxrl_pt.models.base import for_a_loop
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import AXES
from jaxrl_pt.sampling import groups, state, weight_sync
from jaxrl_pt.sampling.requests import Vocabulary
from jaxrl_pt.sampling.step import step
from jaxrl_pt.tpu import child, chips, hlo, roofline
from jaxrl_pt.types import Prompts

RESULT = Path(__file__).parent / 'results' / 'static.json'
TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
BATCHES, PROMPT, CONTEXT, PAGE, STEPS = (1, 8, 32, 128), 64, 2048, 128, 64
CHUNK = cfg.Slots().prefill_chunk  # tokens of a prompt that go through the model at once
LAYERS, FEW, MORE = 30, 2, 6


def config(num_layers: int) -> cfg.Model:
  return cfg.Model(num_layers, 2560, 6912, 20, 5, 128, 128256, rope_theta=500000.0,
                   activation='relu2', sub_norm=True, quant=cfg.Quant('ternary', 'int8'))


def num_bytes(tree: Any) -> int:
  return sum(math.ceil(x.size * jax.dtypes.itemsize_bits(x.dtype) / 8)
             for x in jax.tree.leaves(tree))


def read(traced: Any, times: int, params: Any) -> dict[str, float]:
  """HBM bytes and multiply-adds of one repetition, and the bytes of the weights."""
  module = hlo.parse(traced.lower().compile().as_text())
  adds = roofline.multiply_adds(traced.jaxpr.jaxpr)
  return {'moves': hlo.hbm_bytes(module) / times, 'weights': num_bytes(params),
          **{kind: n / times for kind, n in adds.items()}}


def decode(model: Any, mesh: Any, params: Any, place: Any, batch: int) -> dict[str, float]:
  shape_of = model.config
  asked = Prompts(jnp.zeros((batch, PROMPT), jnp.int32), jnp.full(batch, PROMPT), jnp.arange(batch))
  shape = groups.shape_of(shape_of.vocab_size, asked, 1, CONTEXT - PROMPT, cfg.Sampler(),
                          cfg.Slots(page_size=PAGE))
  shape = shape._replace(num_pages=1 + batch * CONTEXT // PAGE)
  plain = transformer.build(shape_of, cfg.Compute(dtype='bfloat16'))
  queue, now = jax.eval_shape(lambda: (groups.queue_of(asked, 1, CONTEXT - PROMPT, groups.NO_STOP),
                                       state.init(plain, shape, Vocabulary(), 'int8')))

  def run(params: Any, key: Any, queue: Any, now: Any) -> Any:
    params = for_a_loop(params, shape_of.num_layers)
    return jax.lax.fori_loop(0, STEPS, lambda i, now: step(
        model, shape, Vocabulary(), params, key, 0, queue, now), now)

  traced = jax.jit(run, donate_argnums=3).trace(
      params, place(jax.eval_shape(lambda: jax.random.key(0))), place(queue), place(now))
  return read(traced, STEPS, params)


def prefill(model: Any, mesh: Any, params: Any, place: Any, length: int) -> dict[str, float]:
  num_pages = length // PAGE
  pool = jax.eval_shape(lambda: paged_cache.init(model.config, 1 + num_pages, PAGE, jnp.bfloat16,
                                                 'int8'))

  def run(params: Any, tokens: Any, pool: Any) -> Any:
    params = for_a_loop(params, model.config.num_layers)
    table = 1 + jnp.arange(num_pages)[None]

    def chunk(i: Any, carry: Any) -> Any:
      pool, _ = carry
      start = i * CHUNK
      attend = paged_cache.paged(model.ops, table, jnp.full(1, start), jnp.full(1, CHUNK))
      hidden, pool = model.extend(params, jax.lax.dynamic_slice_in_dim(tokens, start, CHUNK, 1),
                                  start + jnp.arange(CHUNK)[None], pool, attend)
      return pool, hidden[:, -1]

    last = jnp.zeros((1, model.config.d_model), jnp.bfloat16)
    pool, last = jax.lax.fori_loop(0, length // CHUNK, chunk, (pool, last))
    return model.logits(params, last), pool

  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  traced = jax.jit(run, donate_argnums=2).trace(params, place(tokens), place(pool))
  return read(traced, 1, params)


def of_layers(topology: str, what: str, size: int, num_layers: int) -> dict[str, float]:
  devices = np.array(chips.topology_devices(topology)[:1])
  mesh = jax.sharding.Mesh(devices.reshape(1, 1, 1, 1), AXES)
  model = models.build(config(num_layers), cfg.Compute(dtype='bfloat16'), mesh, rules.SAMPLE)
  params = weight_sync.abstract(model, mesh, True, jnp.bfloat16, 'int8')
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  place = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
  return {'decode': decode, 'prefill': prefill}[what](model, mesh, params, place, size)


def measure(topology: str, what: str, size: int) -> dict[str, Any]:
  few, more = (of_layers(topology, what, size, n) for n in (FEW, MORE))
  total = {k: few[k] + (LAYERS - FEW) * (more[k] - few[k]) / (MORE - FEW) for k in few}
  tokens = size if what == 'decode' else 1
  # Keys, values and scales: those cached are read, and new ones written.
  token = 2 * LAYERS * 5 * (128 + 4)
  must = total['weights'] + (tokens * (CONTEXT + 1) if what == 'decode' else size) * token
  chip = chips.chip(chips.generation_of_topology(topology))
  adds = {k: v for k, v in total.items() if k in chip.macs_per_second}
  found = roofline.estimate(chip, adds, total['moves'], 0)  # type: ignore[arg-type]
  rate = (tokens if what == 'decode' else size) / found.seconds
  return {'topology': topology, 'what': what, 'size': size, 'weights_bytes': total['weights'],
          'must_move': must, 'moves': total['moves'], 'ratio': total['moves'] / must,
          'multiply_adds': adds, 'predicted_ms': 1e3 * found.seconds, 'bound': found.bound,
          'hbm_ms': 1e3 * found.hbm, 'mxu_ms': 1e3 * found.mxu, 'predicted_tokens_per_second': rate}


def main() -> None:
  if sys.argv[3:]:
    return print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
  rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
  done = {(r['topology'], r['what'], r['size']) for r in rows}
  for topology in sys.argv[1:] or TOPOLOGIES:
    for case in (*(('decode', b) for b in BATCHES), ('prefill', CONTEXT)):
      if (topology, *case) in done:
        continue
      # Only a process of its own may ask libtpu for a topology.
      compiled = subprocess.run([sys.executable, __file__, topology, *map(str, case)],
                                capture_output=True, text=True, env=child.environment())
      if compiled.returncode:  # Some programs are refused, or end the compiler.
        said = [line for line in compiled.stderr.splitlines() if 'heck failed' in line]
        said = said or compiled.stderr.strip().splitlines()
        rows.append(dict(zip(('topology', 'what', 'size'), (topology, *case), strict=True),
                         refused=(said or ['no message'])[-1].split('] ')[-1][:300]))
        print('{topology} {what} {size} is refused: {refused}'.format(**rows[-1]), flush=True)
      else:
        rows.append(json.loads(compiled.stdout.splitlines()[-1]))
        print('{topology} {what} {size}: {predicted_ms:.2f} ms predicted, bound by {bound}, '
              '{ratio:.3f}× of what must move'.format(**rows[-1]), flush=True)
      RESULT.parent.mkdir(exist_ok=True)
      RESULT.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
  main()
