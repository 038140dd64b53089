"""ReSA against dense decoding on this CPU: seconds per token, end to end, by context and batch.

    python experiments/resa/speed.py

A small grouped-query model (2 key/value heads × 4 queries of width 64) decodes greedily
against synthetic caches. Arms of a setting run in turns, on the same machine at the same time:

    ReSA         windows of f = 32 sparse steps and their rectification
    dense        steps that read every page of the same cache, in the same loop over pages
    generate     the dense decode loop of `sampling.decode` (rows of slots), where memory allows

Also: one layer's attention at 256K tokens in parts, against a plain product with contiguous
keys; and bytes read from the cache, counted and by the cost model. Results go to
results/speed.json and results/speed.png.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from pathlib import Path
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import kv_cache, transformer
from jaxrl_pt.sampling import resa, resa_attention, resa_bytes, resa_selection
from pallas_kernels.sparse_decode import Selection
from pallas_kernels.sparse_decode.reference import block_scores

RESULTS = Path(__file__).parent / 'results'
MODEL = cfg.Model(num_layers=2, d_model=256, d_ff=768, num_heads=8, num_kv_heads=2, head_dim=64,
                  vocab_size=1024)
RESA = cfg.ReSA()
WINDOW = 32
# Settings whose dense arms all fit into memory beside one another.
LARGEST_ROWS_OF_SLOTS = 2**20  # tokens of all rows


class Arm(NamedTuple):
  """A jitted function (cache, token) → (cache, token), its cache, and the tokens it decodes."""

  step: object
  cache: object
  num_tokens: int


def synthetic(shape: tuple[int, ...]) -> jax.Array:
  """Numbers that cost nothing to make and have no order."""
  count = jax.lax.iota(jnp.uint32, math.prod(shape)).astype(jnp.float32)
  return jnp.sin(count * 1.7).reshape(shape)


def arms(model, params, batch: int, context: int) -> dict[str, Arm]:
  """The contenders; ReSA and dense share one cache, which each call donates and returns."""
  block, rows = RESA.block, jnp.arange(batch)
  table, num_pages = resa_attention.rows_of_pages(batch, context // block)
  start = context - 2 * WINDOW  # Every call decodes the same positions.

  @jax.jit
  def make_cache():
    cache = resa_attention.init(MODEL, table, num_pages, block, jnp.float32)
    return cache.replace(pages=synthetic(cache.pages.shape), bounds=synthetic(cache.bounds.shape))

  def greedy(hidden):
    return (hidden @ model.head(params)).argmax(-1).astype(jnp.int32)

  def at(i):
    return jnp.full(batch, start + i)

  @functools.partial(jax.jit, donate_argnums=0)
  def window(cache, token):
    def step(carry, i):
      cache, token = carry
      hidden, cache = resa.decode(model, params, RESA, cache, token, at(i), rows >= 0)
      return (cache, greedy(hidden)), token
    (cache, token), fed = jax.lax.scan(step, (cache, token), jnp.arange(WINDOW))
    cache = resa.rectify(model, params, cache, fed.T, at(0), jnp.full(batch, WINDOW))
    return cache, token

  @functools.partial(jax.jit, donate_argnums=0)
  def dense(cache, token):
    attend = resa_attention.dense(rows, at(0)[:, None], jnp.ones((batch, 1), bool))
    hidden, cache = model.extend(params, token[:, None], at(0)[:, None], cache, attend)
    return cache, greedy(hidden[:, 0])

  cache = make_cache()
  found = {'ReSA': Arm(window, cache, WINDOW), 'dense': Arm(dense, cache, 1)}
  if batch * context <= LARGEST_ROWS_OF_SLOTS:
    shape = (MODEL.num_layers, batch, MODEL.num_kv_heads, context, MODEL.head_dim)
    prefix = jax.jit(lambda: kv_cache.KVCache(synthetic(shape), synthetic(shape)))()

    @functools.partial(jax.jit, donate_argnums=0)
    def generate(cache, token):
      attend = kv_cache.branched(model.ops, at(0)[:, None], 0)
      hidden, cache = model.extend(params, token[:, None], at(0)[:, None], cache, attend)
      return cache, greedy(hidden[:, 0])

    found['generate'] = Arm(generate, kv_cache.branch(prefix, 1, WINDOW), 1)
  return found


def measure(model, params, batch: int, context: int, rounds: int) -> dict:
  """Seconds per token of each arm, wall clock and CPU, in every round; arms take turns."""
  contenders = arms(model, params, batch, context)
  shared, own = contenders['ReSA'].cache, None
  if 'generate' in contenders:
    own = contenders['generate'].cache
  times = {name: [] for name in contenders}
  token = jnp.zeros(batch, jnp.int32)
  for number in range(rounds + 1):  # The first compiles.
    for name, arm in contenders.items():
      cache = own if name == 'generate' else shared
      repeats = 1 if arm.num_tokens > 1 else 4
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(repeats):
        cache, token = arm.step(cache, token)
      jax.block_until_ready(token)
      per = repeats * arm.num_tokens
      spent = (time.perf_counter() - wall) / per, (time.process_time() - cpu) / per
      if name == 'generate':
        own = cache
      else:
        shared = cache
      if number:
        times[name].append(spent)
  result = {'batch': batch, 'context': context}
  for name, spent in times.items():
    walls, cpus = zip(*spent, strict=True)
    result[name] = {'wall_ms': [1e3 * t for t in walls], 'cpu_ms': [1e3 * t for t in cpus],
                    'median_wall_ms': 1e3 * statistics.median(walls),
                    'median_cpu_ms': 1e3 * statistics.median(cpus)}
  for kind in ('wall', 'cpu'):
    result[f'faster_{kind}'] = {
        name: result[name][f'median_{kind}_ms'] / result['ReSA'][f'median_{kind}_ms']
        for name in times if name != 'ReSA'}
  return result


def timed(f, *args, rounds: int) -> dict:
  """Median milliseconds of a jitted function."""
  f = jax.jit(f)
  jax.block_until_ready(f(*args))
  walls, cpus = [], []
  for _ in range(rounds):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(f(*args))
    walls.append(1e3 * (time.perf_counter() - wall))
    cpus.append(1e3 * (time.process_time() - cpu))
  return {'median_wall_ms': statistics.median(walls), 'least_wall_ms': min(walls),
          'median_cpu_ms': statistics.median(cpus)}


def one_layer(context: int, rounds: int) -> dict:
  """The parts of a sparse step and of a rectification in one layer, and plain products."""
  block, groups, width = RESA.block, MODEL.num_kv_heads, MODEL.head_dim
  group = MODEL.num_heads // groups
  table, num_pages = resa_attention.rows_of_pages(1, context // block)
  one = dataclasses.replace(MODEL, num_layers=1)
  cache = jax.jit(lambda: (lambda c: c.replace(
      pages=synthetic(c.pages.shape), bounds=synthetic(c.bounds.shape)))(
          resa_attention.init(one, table, num_pages, block, jnp.float32)))()
  selection = Selection(RESA.active, RESA.min_blocks, RESA.local_blocks)
  layer, position = jnp.zeros((), jnp.int32), jnp.array([context - 1])
  q, blocks_B = synthetic((1, 1, MODEL.num_heads, width)), jnp.array([context // block])
  scores = lambda q, c: resa_selection.score_layer(block_scores, q[:, 0], c.bounds, layer,
                                                    blocks_B[0])
  values = jax.jit(scores)(q, cache)
  blocks, counts = jax.jit(lambda s: resa_selection.select(s, blocks_B, selection))(values)

  def attend(q, cache, blocks, positions, first_masked, end):
    lists = resa_attention.PageLists(blocks, cache.table, first_masked, end)
    return resa_attention.attend_pages(q, positions, cache, layer, lists)

  every = jnp.arange(context // block)[None, None]
  window = context - WINDOW + jnp.arange(WINDOW)[None]
  wide = synthetic((1, WINDOW, MODEL.num_heads, width))
  parts = {
      'scores of all blocks': timed(scores, q, cache, rounds=rounds),
      'selection': timed(lambda s: resa_selection.select(s, blocks_B, selection), values,
                         rounds=rounds),
      'selection by jax.lax.top_k': timed(
          lambda s: jnp.sort(jax.lax.top_k(s, blocks.shape[-1])[1]), values, rounds=rounds),
      'attention to the selected blocks': timed(
          attend, q, cache, blocks, position[:, None], counts[0] - 1, counts[0], rounds=rounds),
      'attention to all blocks': timed(
          attend, q, cache, every, position[:, None], blocks_B[0] - 1, blocks_B[0],
          rounds=rounds),
      'rectification': timed(attend, wide, cache, every, window, (context - WINDOW) // block,
                             blocks_B[0], rounds=max(3, rounds // 3)),
  }
  del cache
  k, v = (synthetic((groups, context, width)) for _ in range(2))

  def plain(q, k, v):
    weights = jax.nn.softmax(jnp.einsum('kge,kce->kgc', q, k))
    return jnp.einsum('kgc,kce->kge', weights, v)

  parts['plain dense products'] = timed(plain, synthetic((groups, group, width)), k, v,
                                        rounds=rounds)
  return parts


def bytes_read(batch: int, context: int) -> dict:
  """Bytes per decoded token of the whole batch: exact, modelled, dense."""
  length = context - WINDOW
  exact = resa_bytes.attention_bytes(MODEL, RESA, batch, length, context // RESA.block, 4)
  modelled = batch * resa_bytes.modelled_bytes(MODEL, RESA, length, 4)
  return {'descriptors': exact.descriptors, 'pages': exact.pages,
          'rectification_per_token': exact.rectification / WINDOW,
          'per_token': exact.per_token(WINDOW), 'modelled': modelled,
          'over_model': exact.per_token(WINDOW) / modelled,
          'dense_over_resa': batch * resa_bytes.dense_bytes(MODEL, length, 4)
          / exact.per_token(WINDOW)}


def counted_bytes() -> dict:
  """The instrument at a size that runs an operation at a time, against the formula."""
  context, model = 4096, transformer.build(MODEL)
  params = P.init(model.specs, jax.random.key(0))
  table, num_pages = resa_attention.rows_of_pages(1, context // RESA.block)
  cache = resa_attention.init(MODEL, table, num_pages, RESA.block, jnp.float32)
  sizes = cache.bounds.size, cache.pages.size
  length, row = context - WINDOW, jnp.ones(1, jnp.int32)
  step = lambda c: resa.decode(model, params, RESA, c, row, row * (length - 1), row > 0)
  refresh = lambda c: resa.rectify(model, params, c, jnp.zeros((1, WINDOW), jnp.int32),
                                   row * (length - WINDOW), row * WINDOW)
  exact = resa_bytes.attention_bytes(MODEL, RESA, 1, length, context // RESA.block, 4)
  return {'context': context,
          'counted': [*resa_bytes.count_reads(step, (cache,), sizes),
                      resa_bytes.count_reads(refresh, (cache,), sizes)[1]],
          'formula': list(exact)}


def plot(results: dict) -> None:
  """Seconds per token by context, and the ratio."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(11, 4), layout='constrained')
  axes = figure.subplots(1, 3)
  for axis, batch in zip(axes, (1, 8), strict=False):
    mine = [r for r in results['settings'] if r['batch'] == batch]
    for name, style in (('ReSA', 'o-'), ('dense', 's-'), ('generate', '^:')):
      points = [(r['context'], r[name]['median_wall_ms']) for r in mine if name in r]
      axis.loglog(*zip(*points, strict=True), style, label=name)
    axis.set(xlabel='context, tokens', ylabel='ms per step', title=f'batch {batch}')
    axis.legend()
  for batch in (1, 8):
    mine = [r for r in results['settings'] if r['batch'] == batch]
    for kind, style in (('wall', 'o-'), ('cpu', 'x:')):
      axes[2].semilogx([r['context'] for r in mine],
                       [min(r[f'faster_{kind}'].values()) for r in mine], style,
                       label=f'batch {batch}, {"wall clock" if kind == "wall" else "CPU time"}')
  axes[2].axhline(2.42, color='gray', linewidth=0.8)
  axes[2].set(xlabel='context, tokens', title='fastest dense arm over ReSA', ylim=(0, None))
  axes[2].legend()
  for axis in axes:
    axis.grid(alpha=0.3)
    axis.set_xticks([2**14, 2**16, 2**18], ['16K', '64K', '256K'])
    axis.minorticks_off()
  figure.savefig(RESULTS / 'speed.png', dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--contexts', type=int, nargs='+', default=[2**14, 2**16, 2**18])
  parser.add_argument('--parts', action='store_true',
                      help="measure one layer's parts again and put them into the results")
  args = parser.parse_args()
  if args.parts:
    results = json.loads((RESULTS / 'speed.json').read_text())
    results['one layer, 256K'] = one_layer(2**18, 15)
    (RESULTS / 'speed.json').write_text(json.dumps(results, indent=1) + '\n')
    return
  model = transformer.build(MODEL)
  params = P.init(model.specs, jax.random.key(0))
  results = {'cpus': os.cpu_count(), 'parameters': P.count(model.specs), 'settings': []}
  for batch in args.batches:
    for context in args.contexts:
      rounds = args.rounds if batch * context < 2**20 else 3
      row = measure(model, params, batch, context, rounds)
      row['load_average'] = os.getloadavg()[0]
      row['bytes'] = bytes_read(batch, context)
      results['settings'].append(row)
      jax.clear_caches()
      print(batch, context, {n: round(row[n]['median_wall_ms'], 2) for n in
                             ('ReSA', 'dense', 'generate') if n in row},
            {k: {n: round(x, 2) for n, x in row[f'faster_{k}'].items()} for k in ('wall', 'cpu')},
            f"bytes {row['bytes']['dense_over_resa']:.2f}x fewer", flush=True)
  results['one layer, 256K'] = one_layer(2**18, 9)
  results['bytes counted'] = counted_bytes()
  print(json.dumps({k: results[k] for k in ('one layer, 256K', 'bytes counted')}, indent=1))
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'speed.json').write_text(json.dumps(results, indent=1) + '\n')
  plot(results)


if __name__ == '__main__':
  main()
