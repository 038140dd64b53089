"""The HBM traffic of one decode step of BitNet 2B4T at 8K context against the bytes that must move.

    python experiments/sampler/step_floor.py

Needs libtpu (`make libtpu`) and no TPU. `sampling.step.step` is compiled for v5e and v6e, for 32
slots on one chip and for 256 slots on eight, which decode 32 each and wait for nobody. Each slot
has 8,192 tokens in its pages. What must move is each packed weight, the head, one row of the
embedding a slot, the pages of all tokens, and the new token's: nothing else is read or written in
an ideal step. The step's traffic is what `tpu.hlo` reads from the compiled program: a prediction,
no time. Results go to results/step_floor.json.
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
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import for_a_loop
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import AXES
from jaxrl_pt.sampling import groups, state, weight_sync
from jaxrl_pt.sampling.requests import Vocabulary
from jaxrl_pt.sampling.step import step
from jaxrl_pt.tpu import child, chips, hlo
from jaxrl_pt.types import Prompts

RESULT = Path(__file__).parent / 'results' / 'step_floor.json'
SLOTS_OF_A_CHIP, PROMPT, CONTEXT, PAGE, STEPS = 32, 64, 8192, 128, 128
TWO_B = cfg.Model(30, 2560, 6912, 20, 5, 128, 128256, rope_theta=500000.0, activation='relu2',
                  sub_norm=True, quant=cfg.Quant('ternary', 'int8'))
CASES = [(topology, slots, pages) for topology in ('v5e:2x4', 'v6e:2x4') for slots in (32, 256)
         for pages in ('int8', 'bfloat16') if (topology, pages) != ('v5e:2x4', 'bfloat16')]


def measure(topology: str, slots: int, pages: str) -> dict[str, Any]:
  num_chips = slots // SLOTS_OF_A_CHIP
  devices = np.array(chips.topology_devices(topology)[:num_chips])
  mesh = jax.sharding.Mesh(devices.reshape(num_chips, 1, 1, 1), AXES)
  model = models.build(TWO_B, cfg.Compute(dtype='bfloat16'), mesh, rules.SHARD)
  params = weight_sync.abstract(model, mesh, True, jnp.bfloat16)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(rules.ROWS))
  place = lambda tree, where: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
  asked = Prompts(jnp.zeros((SLOTS_OF_A_CHIP, PROMPT), jnp.int32),
                  jnp.full(SLOTS_OF_A_CHIP, PROMPT), jnp.arange(SLOTS_OF_A_CHIP))
  shape = groups.shape_of(TWO_B.vocab_size, asked, 1, CONTEXT - PROMPT, cfg.Sampler(),
                          cfg.Slots(page_size=PAGE))
  shape = shape._replace(num_pages=1 + SLOTS_OF_A_CHIP * CONTEXT // PAGE)
  of_one = transformer.build(TWO_B, cfg.Compute(dtype='bfloat16'))
  of_chip = jax.eval_shape(lambda: (
      groups.queue_of(asked, 1, CONTEXT - PROMPT, groups.NO_STOP),
      state.init(of_one, shape, Vocabulary(), 'int8' if pages == 'int8' else 'model')))
  of_all = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_chips, *x.shape), x.dtype), of_chip)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def run(params: Any, key: Any, version: Any, queue_and_state: Any) -> Any:
    queue, now = jax.tree.map(lambda x: x[0], queue_and_state)
    params = for_a_loop(params, TWO_B.num_layers)
    now = jax.lax.fori_loop(0, STEPS, lambda i, now: step(
        model, shape, Vocabulary(), params, key, version, queue, now), now)
    return jax.tree.map(lambda x: x[None], (queue, now))

  rows, same = jax.sharding.PartitionSpec(rules.ROWS), jax.sharding.PartitionSpec()
  sharded = jax.shard_map(run, mesh=mesh, axis_names=set(rules.ROWS), check_vma=False,
                          in_specs=(same, same, same, rows), out_specs=rows)
  compiled = jax.jit(sharded, donate_argnums=3).lower(
      params, place(key, whole), place(jax.ShapeDtypeStruct((), jnp.int32), whole),
      place(of_all, split)).compile()
  module = hlo.parse(compiled.as_text())
  num_bytes = lambda x: math.ceil(x.size * jax.dtypes.itemsize_bits(x.dtype) / 8)
  weights = sum(map(num_bytes, jax.tree.leaves(params)))  # Embedding and head are one matrix.
  token = 2 * TWO_B.num_layers * TWO_B.num_kv_heads * (
      TWO_B.head_dim * jnp.dtype(pages).itemsize + (4 if pages == 'int8' else 0))
  must = weights + SLOTS_OF_A_CHIP * (
      TWO_B.d_model * 2 + CONTEXT * token + token)
  moved = hlo.hbm_bytes(module) / STEPS
  chip = chips.chip(chips.generation_of_topology(topology))
  return {'topology': topology, 'chips': num_chips, 'slots': slots, 'pages': pages,
          'weights_bytes': weights, 'must_move': must, 'moves': moved, 'ratio': moved / must,
          'collectives': len(hlo.collectives(module)),
          'predicted_ms': 1e3 * moved / chip.hbm_bytes_per_second}


def main() -> None:
  if sys.argv[1:]:
    topology, slots, pages = sys.argv[1:]
    return print(json.dumps(measure(topology, int(slots), pages)))
  rows = []
  for case in CASES:
    # Only a process of its own may ask libtpu for a topology.
    done = subprocess.run([sys.executable, __file__, *map(str, case)], capture_output=True,
                          text=True, env=child.environment())
    if done.returncode:
      raise SystemExit(f'{case}: {done.stderr[-2000:]}')
    rows.append(json.loads(done.stdout.splitlines()[-1]))
    print('{topology} {slots} slots, {pages} pages: {ratio:.3f}× of what must move, '
          '{predicted_ms:.1f} ms predicted'.format(**rows[-1]), flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
  main()
