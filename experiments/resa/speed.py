"""ReSA against the best dense decode that we can write, on this CPU: seconds per token, end to end.

    JAX_PLATFORMS=cpu python experiments/resa/speed.py

A small grouped-query model (2 key/value heads × 4 queries of width 64) decodes greedily against
synthetic caches. Arms of a setting run in turns, on the same machine at the same time:

    ReSA         windows of f = 32 sparse steps and their rectification, on the sampler's pages
    ReSA, deep   the same, but the rectification also reads what the last layer attends to, which is
                 needless: with two layers it costs a layer what it costs in a model of any depth
    pages        steps that read every page of the same cache
    contiguous   steps that read one contiguous array of keys and one of values for each layer, by
                 each of several programs (`DENSE`); the fastest in this setting is the contender

The caches of different arms are different arrays, so that no arm finds its own in a processor's
cache. Also: what the parts of one layer cost; the same ratio with 1, 2, 4 and 8 queries to a
key/value head, since rectification is bound by arithmetic here; and bytes read from the cache,
counted and by the cost model. Results go to results/speed.json and results/speed.png.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

import caches
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import unstacked
from jaxrl_pt.nn import block_selection, sparse_attention
from jaxrl_pt.nn.paged_attention import paged_attention
from jaxrl_pt.sampling import resa, resa_attention, resa_bytes
from pallas_kernels.sparse_decode.reference import block_scores

RESULTS = Path(__file__).parent / 'results'
MODEL = cfg.Model(num_layers=2, d_model=256, d_ff=768, num_heads=8, num_kv_heads=2, head_dim=64,
                  vocab_size=1024)
RESA = cfg.ReSA()
WINDOW = 32
BOOTSTRAPS = 4000


# --- Dense attention to contiguous keys and values ------------------------------------


class Part(NamedTuple):
  """The softmax-weighted sum over a part of the tokens."""

  highest: jax.Array  # f32[B, K, G]
  total: jax.Array  # f32[B, K, G] Σ exp(score − highest)
  out: jax.Array  # f32[B, K, G, E]


def joined(one: Part, other: Part) -> Part:
  highest = jnp.maximum(one.highest, other.highest)
  shares = [jnp.exp(part.highest - highest) for part in (one, other)]
  return Part(highest, *(sum(x * share.reshape(*share.shape, *[1] * (x.ndim - 3))
                             for x, share in zip(of_both, shares, strict=True))
                         for of_both in zip(one[1:], other[1:], strict=True)))


def _one_product(q_BKGE, k_BKCE, v_BKCE, seen_C=None):
  scores = jnp.einsum('bkge,bkce->bkgc', q_BKGE, k_BKCE)
  if seen_C is not None:
    scores = jnp.where(seen_C, scores, -1e30)
  highest = scores.max(-1)
  weights = jnp.exp(scores - highest[..., None])
  return Part(highest, weights.sum(-1), jnp.einsum('bkgc,bkce->bkge', weights, v_BKCE))


def _keys_first(q_BKGE, k_BKCE, v_BKCE):
  scores = jnp.einsum('bkce,bkge->bkcg', k_BKCE, q_BKGE)
  highest = scores.max(2)
  weights = jnp.exp(scores - highest[:, :, None])
  return Part(highest, weights.sum(2), jnp.einsum('bkcg,bkce->bkge', weights, v_BKCE))


def _splits(num, q_BKGE, k_BKCE, v_BKCE):
  """Flash decoding: parts of the context side by side, joined by their largest scores."""
  parts = lambda x: x.reshape(*x.shape[:2], num, -1, x.shape[-1])
  scores = jnp.einsum('bkge,bknce->bkngc', q_BKGE, parts(k_BKCE))
  highest = scores.max(-1)
  weights = jnp.exp(scores - highest[..., None])
  out = jnp.einsum('bkngc,bknce->bknge', weights, parts(v_BKCE))
  share = jnp.exp(highest - highest.max(2, keepdims=True))
  return Part(highest.max(2), (weights.sum(-1) * share).sum(2), (out * share[..., None]).sum(2))


# A running softmax over blocks and products as plain loops took twice as long at 256K.
DENSE = {'one product': _one_product, 'keys first': _keys_first,
         '16 splits': functools.partial(_splits, 16)}


def contiguous(attention, context, i):
  """Attention to one array of keys and one of values for each layer, f[B, K, C, E].

  Tokens of this window lie in arrays of their own, so that nothing as large as the context is
  written: XLA copies what a loop both reads and writes.
  """
  def attend(q, k, v, tails, layer):
    put = lambda x, new: jax.lax.dynamic_update_slice(x, jnp.swapaxes(new, 1, 2), (0, 0, i, 0))
    tail = tuple(put(x, new) for x, new in zip(tails[layer], (k, v), strict=True))
    num_rows, _, num_heads, width = q.shape
    grouped = q.reshape(num_rows, k.shape[2], -1, width) * width**-0.5
    _, total, out = joined(attention(grouped, *context[layer]),
                           _one_product(grouped, *tail, seen_C=jnp.arange(WINDOW) <= i))
    out = (out / total[..., None]).reshape(num_rows, 1, num_heads, width)
    return out, (*tails[:layer], tail, *tails[layer + 1:])

  return attend


# --- Arms -----------------------------------------------------------------------------


LARGE = 2**20  # Tokens of context of all rows above which only one arm's cache is held at a time.


class Arm(NamedTuple):
  """A jitted function (cache, token) → (cache, token), the cache it takes, and its tokens."""

  step: Any
  cache: str
  num_tokens: int


def synthetic(shape: tuple[int, ...]) -> jax.Array:
  """Numbers that cost nothing to make and have no order."""
  count = jax.lax.iota(jnp.uint32, math.prod(shape)).astype(jnp.float32)
  return jnp.sin(count * 1.7).reshape(shape)


def full_cache(config, batch: int, context: int):
  """A cache of ReSA whose pages and descriptors hold synthetic numbers."""
  def make():
    cache = caches.empty(config, batch, context // RESA.block, RESA.block)
    pages = synthetic(cache.pool.pages.shape)
    return cache.replace(pool=dataclasses.replace(cache.pool, pages=pages),
                         bounds=synthetic(cache.bounds.shape))

  return jax.jit(make)()


def rectify_all_layers(model, params, cache, tokens_BF, starts_B):
  """The rectification whose last layer reads its keys and values too; the sum of its results."""
  def some(rows_R, state):
    cache, total = state
    at = jnp.minimum(rows_R, tokens_BF.shape[0] - 1)
    attend = resa_attention.dense(model.ops, rows_R, starts_B[at], jnp.full_like(at, WINDOW))
    hidden, cache = model.extend(params, tokens_BF[at], starts_B[at][:, None] + jnp.arange(WINDOW),
                                 cache, attend)
    return cache, total + hidden.sum()

  return resa_attention.of_rows(starts_B >= 0, resa.RECTIFIED_TOKENS // WINDOW, some,
                                (cache, jnp.zeros(())))


def arms(model, params, batch: int, context: int) -> tuple[dict[str, Arm], dict[str, Any]]:
  """The contenders, and functions that make their caches, which each call donates and returns."""
  config, rows = model.config, jnp.arange(batch)
  start = context - 2 * WINDOW  # Every call decodes the same positions.
  num_dense = WINDOW if batch * context <= 2**16 else 4
  flat = unstacked(params, config.num_layers)
  at = lambda i: jnp.full(batch, start) + i

  def greedy(hidden):
    return (hidden @ model.head(params)).argmax(-1).astype(jnp.int32)

  def window(is_deep, cache, token):
    def step(carry, i):
      cache, token = carry
      hidden, cache = resa.decode(model, flat, RESA, cache, token, at(i), rows >= 0)
      return (cache, greedy(hidden)), token
    (cache, token), fed = jax.lax.scan(step, (cache, token), jnp.arange(WINDOW))
    if not is_deep:
      return resa.rectify(model, flat, cache, fed.T, at(0), jnp.full(batch, WINDOW)), token
    cache, total = rectify_all_layers(model, flat, cache, fed.T, at(0))
    return cache, jnp.where(jnp.isnan(total), 0, token)  # XLA leaves out what nobody reads.

  def decode(attend, cache, token, i):
    hidden, cache = model.extend(flat, token[:, None], at(i)[:, None], cache, attend)
    return cache, greedy(hidden[:, 0])

  @functools.partial(jax.jit, donate_argnums=0)
  def of_pages(cache, token):
    def step(carry, i):
      return decode(resa_attention.dense(model.ops, rows, at(i), jnp.ones(batch, jnp.int32)),
                    *carry, i), None
    return jax.lax.scan(step, (cache, token), jnp.arange(num_dense))[0]

  def of_rows(attention, cache, token):
    held, tails = cache

    def step(carry, i):
      return decode(contiguous(attention, held, i), *carry, i), None
    (tails, token), _ = jax.lax.scan(step, (tails, token), jnp.arange(num_dense))
    return (held, tails), token

  sparse = lambda is_deep: jax.jit(functools.partial(window, is_deep), donate_argnums=0)
  found = {'ReSA': Arm(sparse(False), 'pages', WINDOW),
           'ReSA, deep': Arm(sparse(True), 'pages', WINDOW),
           'pages': Arm(of_pages, 'pages', num_dense)}
  for name, attention in DENSE.items():
    found[name] = Arm(jax.jit(functools.partial(of_rows, attention), donate_argnums=0), 'rows',
                      num_dense)
  shape = lambda length: (batch, config.num_kv_heads, length, config.head_dim)
  layer = jax.jit(lambda length: (synthetic(shape(length)), synthetic(shape(length))),
                  static_argnums=0)
  layers = lambda length: tuple(layer(length) for _ in range(config.num_layers))
  return found, {'pages': lambda: full_cache(config, batch, context),
                 'rows': lambda: (layers(start), layers(WINDOW))}


def measure(model, params, batch: int, context: int, rounds: int, pages: bool = True) -> dict:
  """Milliseconds a token of each arm, wall clock and CPU, in every round; arms take turns."""
  contenders, makers = arms(model, params, batch, context)
  if not pages:
    del contenders['pages']
  held: dict[str, Any] = {}
  times: dict[str, list] = {name: [] for name in contenders}
  token = jnp.zeros(batch, jnp.int32)
  for number in range(rounds + 1):  # The first compiles.
    for name, arm in contenders.items():
      if arm.cache not in held:
        if batch * context > LARGE:
          held.clear()
        # The first call after the cache is made pays for its memory: it is not timed.
        made = jax.block_until_ready(makers[arm.cache]())
        held[arm.cache], token = jax.block_until_ready(arm.step(made, token))
        del made
      wall, cpu = time.perf_counter(), time.process_time()
      held[arm.cache], token = arm.step(held[arm.cache], token)
      jax.block_until_ready(token)
      if number:
        times[name].append(((time.perf_counter() - wall) / arm.num_tokens * 1e3,
                            (time.process_time() - cpu) / arm.num_tokens * 1e3))
  result = {'batch': batch, 'context': context, 'load_average': os.getloadavg()[0]}
  for i, kind in enumerate(('wall', 'cpu')):
    of = {name: np.array([t[i] for t in spent]) for name, spent in times.items()}
    best = min(DENSE, key=lambda name: np.median(of[name]))
    result[kind] = {
        'ms': {name: float(np.median(spent)) for name, spent in of.items()},
        'all ms': {name: spent.round(3).tolist() for name, spent in of.items()},
        'best contiguous': best, 'faster': ratio(of[best], of['ReSA']),
        'faster, deep': ratio(of[best], of['ReSA, deep'])}
    if pages:
      result[kind]['faster than pages'] = ratio(of['pages'], of['ReSA'])
  return result


def ratio(others, mine) -> dict:
  """The ratio of medians, with a 95 % interval by bootstrap over rounds, which both arms share."""
  rng = np.random.default_rng(0)
  picked = rng.integers(len(mine), size=(BOOTSTRAPS, len(mine)))
  ratios = np.median(others[picked], 1) / np.median(mine[picked], 1)
  low, high = np.quantile(ratios, [0.025, 0.975])
  return {'ratio': float(np.median(others) / np.median(mine)), 'low': float(low),
          'high': float(high)}


def crossover(settings: list[dict], kind: str, which: str = 'faster, deep'
              ) -> float | str | None:
  """Tokens of context from which on ReSA is the faster one, interpolated in their logarithm."""
  points = [(math.log(s['context']), math.log(s[kind][which]['ratio'])) for s in settings]
  below = [i for i, (_, y) in enumerate(points) if y < 0]
  if not below:
    return None
  i = max(below)
  if i + 1 == len(points):
    return 'slower at the longest context'
  (x0, y0), (x1, y1) = points[i], points[i + 1]
  return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))


# --- Parts of one layer ---------------------------------------------------------------


def one_layer(context: int, rounds: int) -> dict:
  """Milliseconds of the parts of a step and of a rectification, in turns, and of what bounds them.

  `reading` reads all keys and values once and adds them up; `products` are the matrix products of a
  rectification alone, of contiguous keys, and `exponentials` its exponentials.
  """
  config = dataclasses.replace(MODEL, num_layers=1)
  cache, num_blocks = full_cache(config, 1, context), context // RESA.block
  heads, group, width = config.num_kv_heads, config.num_heads // config.num_kv_heads, 64
  layer, length = jnp.zeros((), jnp.int32), jnp.array([context])
  q, wide = synthetic((1, config.num_heads, width)), synthetic((1, WINDOW, config.num_heads, width))
  selection = resa_attention.selection_of(RESA)
  score = lambda q, bounds: sparse_attention.score_layer(
      block_scores, q, bounds, layer, jnp.array(num_blocks))
  values = jax.jit(score)(q, cache.bounds)
  choose = lambda values: block_selection.select(values, jnp.array([num_blocks]), selection)
  blocks, counts = jax.jit(choose)(values)
  pages, table = cache.pool.pages, cache.table
  k, v = (synthetic((1, heads, context, width)) for _ in range(2))
  q_rows = synthetic((heads, group * WINDOW, width))
  weights = synthetic((heads, group * WINDOW, 4096))
  repeats = context // 4096

  def products(q, k, v):
    def part(i, out):
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x[0], i * 4096, 4096, 1)
      return out + jnp.einsum('kqc,kce->kqe', jnp.einsum('kqe,kce->kqc', q, cut(k)), cut(v))
    return jax.lax.fori_loop(0, repeats, part, jnp.zeros_like(q))

  def exponentials(weights):
    return jax.lax.fori_loop(0, repeats, lambda i, x: jnp.exp(x) - 1.0, weights)

  parts = {
      'scores of all blocks': (score, q, cache.bounds),
      'selection': (choose, values),
      'attention to the selected blocks': (
          lambda q, pages: sparse_attention._attend_listed(
              q, pages, None, table, length, blocks, counts),
          q, pages),
      'rectification': (lambda q, pages: paged_attention(
          q, pages, None, table, length - WINDOW, jnp.array([WINDOW])), wide, pages),
      'reading': (lambda k, v: k.sum() + v.sum(), k, v),
      'products': (products, q_rows, k, v),
      'exponentials': (exponentials, weights),
      **{f'contiguous, {name}': (f, q.reshape(1, heads, group, width), k, v)
         for name, f in DENSE.items()}}
  compiled = {name: (jax.jit(f), args) for name, (f, *args) in parts.items()}
  spent: dict[str, list] = {name: [] for name in parts}
  for number in range(rounds + 1):
    for name, (f, args) in compiled.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(f(*args))
      if number:
        spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  return {name: {'wall_ms': 1e3 * float(np.median([t[0] for t in times])),
                 'least_wall_ms': 1e3 * min(t[0] for t in times),
                 'cpu_ms': 1e3 * float(np.median([t[1] for t in times]))}
          for name, times in spent.items()}


# --- Bytes ----------------------------------------------------------------------------


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
  cache = caches.empty(MODEL, 1, context // RESA.block, RESA.block)
  sizes = cache.bounds.size, cache.pool.pages.size
  length, row = context - WINDOW, jnp.ones(1, jnp.int32)
  step = lambda c: resa.decode(model, params, RESA, c, row, row * (length - 1), row > 0)
  refresh = lambda c: resa.rectify(model, params, c, jnp.zeros((1, WINDOW), jnp.int32),
                                   row * (length - WINDOW), row * WINDOW)
  exact = resa_bytes.attention_bytes(MODEL, RESA, 1, length, context // RESA.block, 4)
  return {'context': context,
          'counted': [*resa_bytes.count_reads(step, (cache,), sizes),
                      resa_bytes.count_reads(refresh, (cache,), sizes)[1]],
          'formula': list(exact)}


# --- Main -----------------------------------------------------------------------------


def plot(results: dict) -> None:
  """Milliseconds a token by context, and the ratio."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(11, 4), layout='constrained')
  batches = sorted({r['batch'] for r in results['settings']})
  axes = figure.subplots(1, len(batches) + 1)
  for axis, batch in zip(axes, batches, strict=False):
    mine = [r for r in results['settings'] if r['batch'] == batch]
    contexts = [r['context'] for r in mine]
    axis.loglog(contexts, [r['cpu']['ms']['ReSA'] for r in mine], 'o-', label='ReSA')
    axis.loglog(contexts, [r['cpu']['ms']['ReSA, deep'] for r in mine], 'o:',
                label='ReSA, deep')
    axis.loglog(contexts, [r['cpu']['ms'][r['cpu']['best contiguous']] for r in mine], 's-',
                label='best contiguous')
    axis.set(xlabel='context, tokens', ylabel='ms of CPU time a step', title=f'batch {batch}')
    axis.legend()
  for batch in batches:
    mine = [r for r in results['settings'] if r['batch'] == batch]
    for kind, style in (('wall', 'o-'), ('cpu', 'x:')):
      faster = [r[kind]['faster'] for r in mine]
      middle = np.array([f['ratio'] for f in faster])
      bars = [middle - [f['low'] for f in faster], [f['high'] for f in faster] - middle]
      axes[-1].errorbar([r['context'] for r in mine], middle, np.maximum(bars, 0), fmt=style,
                       label=f'batch {batch}, {"wall clock" if kind == "wall" else "CPU time"}')
  axes[-1].set(xscale='log', xlabel='context, tokens', title='best contiguous dense over ReSA',
              ylim=(0, None))
  for level in (1, 2.42):
    axes[-1].axhline(level, color='gray', linewidth=0.8)
  axes[-1].legend()
  for axis in axes:
    axis.grid(alpha=0.3)
    axis.set_xticks([2**10, 2**12, 2**14, 2**16, 2**18], ['1K', '4K', '16K', '64K', '256K'])
    axis.minorticks_off()
  figure.savefig(RESULTS / 'speed.png', dpi=130)


def show(row: dict) -> None:
  text = '  '.join(
      f'{kind}: ReSA {row[kind]["ms"]["ReSA"]:.2f} ms, deep '
      f'{row[kind]["ms"]["ReSA, deep"]:.2f} ms, {row[kind]["best contiguous"]} '
      f'{row[kind]["ms"][row[kind]["best contiguous"]]:.2f} ms, faster '
      f'{row[kind]["faster"]["ratio"]:.2f} [{row[kind]["faster"]["low"]:.2f}, '
      f'{row[kind]["faster"]["high"]:.2f}], deep {row[kind]["faster, deep"]["ratio"]:.2f}'
      for kind in ('wall', 'cpu'))
  print(f'batch {row["batch"]}, context {row["context"]}, load {row["load_average"]:.1f}: {text}',
        flush=True)


def save(results: dict) -> None:
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'speed.json').write_text(json.dumps(results, indent=1) + '\n')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--contexts', type=int, nargs='+',
                      default=[2**n for n in (10, 12, 14, 16, 18)])
  parser.add_argument('--groups', type=int, nargs='*', default=[1, 2, 4, 8],
                      help='queries to a key/value head, each at 64K and batch 1')
  args = parser.parse_args()
  build = lambda config: (lambda model: (model, P.init(model.specs, jax.random.key(0))))(
      transformer.build(config))
  model, params = build(MODEL)
  results: dict[str, Any] = {
      'cpus': os.cpu_count(), 'parameters': P.count(model.specs), 'settings': [], 'groups': []}
  for batch in args.batches:
    for context in args.contexts:
      rounds = args.rounds if batch * context < 2**20 else max(3, args.rounds // 3)
      row = measure(model, params, batch, context, rounds)
      row['bytes'] = bytes_read(batch, context)
      results['settings'].append(row)
      jax.clear_caches()
      show(row)
      save(results)
  for group in args.groups:
    config = dataclasses.replace(MODEL, num_kv_heads=MODEL.num_heads // group)
    row = {'group': group, **measure(*build(config), 1, 2**16, args.rounds, pages=False)}
    results['groups'].append(row)
    jax.clear_caches()
    show(row)
  results['crossover, tokens'] = {
      f'batch {batch}, {kind}': crossover(
          [r for r in results['settings'] if r['batch'] == batch], kind)
      for batch in args.batches for kind in ('wall', 'cpu')}
  results['one layer, 256K'] = one_layer(2**18, args.rounds)
  results['bytes counted'] = counted_bytes()
  print(json.dumps({k: results[k] for k in (
      'crossover, tokens', 'one layer, 256K', 'bytes counted')}, indent=1))
  save(results)
  plot(results)


if __name__ == '__main__':
  main()
