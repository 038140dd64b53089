"""Where a dense float32 training step on this CPU spends its time, by taking parts away.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/foundation/step_account.py

The step of throughput.py (2.8M weights unless --shape says otherwise) is timed whole and
with one part removed, and its matrix products alone, all in one process on the same inputs;
rounds alternate between the programs. What is compared is processor time, summed over cores,
and the least of the rounds: both change far less than the wall clock when the machine is
shared. A part is the difference of two programs, so what XLA fuses across their border goes
to either, and a difference carries the noise of both. Results: results/step_account.json.
"""

import argparse
from collections.abc import Callable
import functools
import json
import os
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from throughput import B1, B2, CLIP, DECAY, LEARNING_RATE, SHAPES, Shape, batch_of

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.train import losses, optim

RESULT = Path(__file__).parent / 'results' / 'step_account.json'


def programs(shape: Shape) -> dict[str, Callable[[], Any]]:
  """The step and what is left of it, each compiled on its first call."""
  model = transformer.build(cfg.Model(*shape[:7]), cfg.Compute(unroll=0))
  no_attention = transformer.build(cfg.Model(*shape[:7]), cfg.Compute(unroll=0),
                                   ops=Ops(attention=lambda q, k, v, segments: q + _mean(k, v)))
  params, batch = P.init(model.specs, jax.random.key(0)), batch_of(shape)
  optimizer = optim.make_optimizer(
      cfg.AdamW(cfg.ConstantRate(LEARNING_RATE), B1, B2, weight_decay=DECAY, clip_norm=CLIP), 1000,
      model.specs)
  loss, loss_no_attention = (losses.next_token(m, 0) for m in (model, no_attention))

  def loss_no_head(params: Any, batch: Any) -> Any:
    return jnp.square(model.apply(params, batch.tokens, batch.positions, batch.segments)).sum()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: Any, batch: Any) -> Any:
    updates, opt_state = optimizer.update(jax.grad(loss)(state[0], batch), state[1], state[0])
    return optax.apply_updates(state[0], updates), opt_state

  state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))

  def whole_step() -> None:
    nonlocal state
    state = jax.block_until_ready(step(state, batch))

  def timed(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(f(*args))

  return {
      'whole step': whole_step,
      'forward and backward': timed(jax.jit(jax.grad(loss)), params, batch),
      'forward': timed(jax.jit(loss), params, batch),
      'forward and backward, no attention': timed(jax.jit(jax.grad(loss_no_attention)), params,
                                                  batch),
      'forward and backward, no head': timed(jax.jit(jax.grad(loss_no_head)), params, batch),
      **{name: timed(jax.jit(f), *inputs) for name, (f, inputs) in matmuls(shape).items()},
  }


def _mean(k: Any, v: Any) -> Any:
  """Keeps keys and values, and so their projections, alive: [B, T, 1, E]."""
  return (k + v).mean(axis=2, keepdims=True)


def weights_of(shape: Shape) -> tuple[list[tuple[int, int]], tuple[int, int]]:
  """Input and output widths of a block's projections, and of the head."""
  d, q = shape.d_model, shape.num_heads * shape.head_dim
  kv = shape.num_kv_heads * shape.head_dim
  block = [(d, q), (d, kv), (d, kv), (q, d), (d, shape.d_ff), (d, shape.d_ff), (shape.d_ff, d)]
  return block, (d, shape.vocab_size)


def matmuls(shape: Shape) -> dict[str, tuple[Callable[..., Any], Any]]:
  """The three products of each projection, x w, dy wᵀ and xᵀ dy, and nothing else."""
  def products(pairs: Any) -> Any:
    return [(x @ w, dy @ w.T, x.T @ dy) for x, w, dy in pairs]

  def inputs(sizes: list[tuple[int, int]]) -> Any:
    rows, key = shape.batch_size * shape.seq_len, jax.random.key(1)
    return [tuple(jax.random.normal(key, s) for s in ((rows, i), (i, o), (rows, o)))
            for i, o in sizes]

  block, head = weights_of(shape)
  return {'matrix products of the projections': (products, (inputs(block * shape.num_layers),)),
          'matrix products of the head': (products, (inputs([head]),))}


def account(ms: dict[str, float]) -> dict[str, float]:
  """CPU milliseconds of each part of the step; they add up to the whole."""
  attention = ms['forward and backward'] - ms['forward and backward, no attention']
  head = ms['forward and backward'] - ms['forward and backward, no head']
  parts = {
      'projections: matrix products': ms['matrix products of the projections'],
      'attention between its projections': attention,
      'head: matrix products': ms['matrix products of the head'],
      'head: softmax, loss and their gradients': head - ms['matrix products of the head'],
      'clip and AdamW': ms['whole step'] - ms['forward and backward']}
  rest = ms['whole step'] - sum(parts.values())
  return {**parts, 'remainder: norms, RoPE, SwiGLU, residuals, embedding': rest}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--shape', choices=SHAPES, default='2.8M')
  parser.add_argument('--rounds', type=int, default=15)
  args = parser.parse_args()
  shape = SHAPES[args.shape]
  everything = programs(shape)
  seconds: dict[str, list[float]] = {name: [] for name in everything}
  for program in everything.values():
    program()  # Compiles.
  load = os.getloadavg()[0]
  for _ in range(args.rounds):
    for name, program in everything.items():
      program()  # What the program before it freed or evicted is its own affair.
      started = time.process_time()
      program()
      seconds[name].append(time.process_time() - started)
  ms = {name: 1e3 * min(times) for name, times in seconds.items()}
  parts = account(ms)
  block, head = weights_of(shape)
  flops = 6 * shape.batch_size * shape.seq_len * shape.num_layers * sum(i * o for i, o in block)
  rate = flops / ms['matrix products of the projections'] / 1e6
  RESULT.write_text(json.dumps({
      'shape': shape._asdict(), 'rounds': args.rounds, 'cores': os.cpu_count(),
      'load_average_before': load, 'GLIBC_TUNABLES': os.environ.get('GLIBC_TUNABLES', ''),
      'projections_gflop_per_cpu_second': round(rate),
      'cpu_milliseconds_least': {k: round(v, 1) for k, v in ms.items()},
      'cpu_milliseconds_median': {k: round(1e3 * statistics.median(v), 1)
                                  for k, v in seconds.items()},
      'share_of_step': {k: round(v / ms['whole step'], 3) for k, v in parts.items()},
  }, indent=1) + '\n')
  for name, value in parts.items():
    print(f'{name:55s} {value:7.1f} ms  {100 * value / ms["whole step"]:5.1f} %')
  print(f'{"whole step":55s} {ms["whole step"]:7.1f} ms; projections at {rate:.0f} GFLOP/CPU-s')


if __name__ == '__main__':
  main()
