"""Does the error of sparse decoding accumulate, and does rectification stop it?

    python experiments/resa/quality.py --data ../shared/data/text-gutenberg

Trains a tiny model on books with planted facts (`facts.py`), unless --work holds it already.
Then decodes the same 1,024 bytes after the same 4,096 bytes of context, teacher-forced, and
compares each next-byte distribution with that of dense decoding. Arms:

    p in {0.05, 0.1, 0.2}, f = 32, f = infinity, and f = 1, which reads a dense cache
    ("decode-only", the ceiling); at p = 0.1 also random blocks and no local block

The paper's claim: KL grows with the decode position for f = infinity (positive slope) and
stays flat with f = 32. Intervals are 95 % by bootstrap over documents. Results go to
results/quality.json and results/quality.png.
"""

import argparse
import functools
import json
from pathlib import Path
import time

import caches
import facts
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.sparse_attention import sparse_attention
from jaxrl_pt.sampling import resa, resa_attention
from pallas_kernels.sparse_decode.reference import block_scores

RESULTS = Path(__file__).parent / 'results'
ROWS, PROMPT, STEPS, WINDOW = 16, 4096, 1024, 32
BLOCK, MIN_BLOCKS = 16, 4
BOOTSTRAPS = 4000


def documents(texts: list[bytes]) -> tuple[jnp.ndarray, np.ndarray]:
  """Tokens i32[B, T], and whether a position of the decoded part can be read off the context.

  No fact is told twice before the decoded part, where 60 % of the facts are known ones.
  """
  rng = np.random.default_rng(10_000)
  rows = [facts.plant(texts[b % len(texts)], PROMPT + STEPS + 1, rng, 48, first_recall=PROMPT)
          for b in range(ROWS)]
  tokens = np.stack([t for t, _ in rows]).astype(np.int32)
  return jnp.asarray(tokens), np.stack([t for _, t in rows])[:, PROMPT + 1:]


def random_scores(q, bounds):
  """Scores that know nothing of the keys."""
  seed = jax.lax.bitcast_convert_type(q.sum(), jnp.int32)
  return jax.random.normal(jax.random.fold_in(jax.random.key(1), seed), bounds.shape[:3])


def decode(model, params, tokens, cache, settings: cfg.ReSA, scores=block_scores) -> np.ndarray:
  """f32[B, S, V]: log-probabilities after each decoded token."""
  every = isinstance(settings.refresh, cfg.RefreshEvery)
  window = settings.refresh.tokens if every else WINDOW
  rows = jnp.arange(ROWS)
  ops = model.ops._replace(sparse=functools.partial(sparse_attention, scores=scores))

  def step(cache, i):
    positions = jnp.full(ROWS, PROMPT) + i
    attend = resa_attention.sparse(ops, settings, positions, rows >= 0)
    hidden, cache = model.extend(params, tokens[rows, positions][:, None], positions[:, None],
                                 cache, attend)
    logits = hidden[:, 0] @ model.head(params)
    return cache, jax.nn.log_softmax(logits.astype(jnp.float32))

  def run_window(cache, number):
    steps = number * window + jnp.arange(window)
    cache, logp = jax.lax.scan(step, cache, steps)
    if every:
      starts = jnp.full(ROWS, PROMPT) + number * window
      fed = jnp.take_along_axis(tokens, starts[:, None] + jnp.arange(window), 1)
      cache = resa.rectify(model, params, cache, fed, starts, jnp.full(ROWS, window))
    return cache, logp

  run = jax.jit(lambda c: jax.lax.scan(run_window, c, jnp.arange(STEPS // window))[1])
  logp = np.asarray(run(cache))
  return logp.reshape(STEPS, ROWS, -1).swapaxes(0, 1)


def slope(kl_BS: np.ndarray) -> np.ndarray:
  """f[B]: least squares, nats per 1,000 tokens."""
  at = np.arange(STEPS) - (STEPS - 1) / 2
  return 1000 * (kl_BS @ at) / (at @ at)


def interval(values_B: np.ndarray) -> dict:
  """Mean over documents with its 95 % bootstrap interval."""
  rng = np.random.default_rng(0)
  means = values_B[rng.integers(len(values_B), size=(BOOTSTRAPS, len(values_B)))].mean(1)
  low, high = np.quantile(means, [0.025, 0.975])
  return {'mean': float(values_B.mean()), 'low': float(low), 'high': float(high)}


def summarise(kl_BS: np.ndarray, logp: np.ndarray, tokens, told: np.ndarray) -> dict:
  """Of one arm: KL, its slope, by quarter, on recalled letters, and the accuracy there."""
  targets = np.asarray(tokens)[:, PROMPT + 1:PROMPT + STEPS + 1]
  right = logp.argmax(-1) == targets
  nll = -np.take_along_axis(logp, targets[..., None], -1)[..., 0]
  return {'kl': interval(kl_BS.mean(1)), 'slope per 1000 tokens': interval(slope(kl_BS)),
          'kl by quarter': [float(q.mean()) for q in np.split(kl_BS, 4, 1)],
          'kl on recalled letters': float(kl_BS[told].mean()),
          'recall accuracy': float(right[told].mean()), 'nats per byte': float(nll.mean())}


def plot(kls: dict[str, np.ndarray]) -> None:
  """KL against decode position, in bins of 64 tokens with the standard error over documents."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(12, 4), layout='constrained')
  axes = figure.subplots(1, 3, sharey=True)
  for axis, share in zip(axes, (0.05, 0.1, 0.2), strict=True):
    for name in ('f=inf', 'f=32', 'f=1'):
      bins = kls[f'p={share} {name}'].reshape(ROWS, -1, 64).mean(2)
      axis.errorbar(32 + 64 * np.arange(bins.shape[1]), bins.mean(0),
                    bins.std(0, ddof=1) / ROWS**0.5, fmt='o-', markersize=3, label=name)
    axis.set(title=f'p = {share}', xlabel='decode position, bytes', ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
  axes[0].set_ylabel('KL(dense ‖ sparse), nats')
  figure.savefig(RESULTS / 'quality.png', dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=Path, required=True, help='folder of books, *.txt')
  parser.add_argument('--work', type=Path, default=Path('runs/resa'))
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  texts, weights, curve = facts.books(args.data), args.work / 'facts.npz', args.work / 'curve.json'
  if not weights.is_file():
    params, trained = facts.train(texts)
    facts.save(weights, params)
    curve.write_text(json.dumps(trained))
  params, model = facts.load(weights), transformer.build(facts.MODEL)
  tokens, told = documents(texts)
  cache = caches.empty(facts.MODEL, ROWS, -(-(PROMPT + STEPS) // BLOCK), BLOCK)
  cache = jax.jit(functools.partial(caches.prefill, model, params))(cache, tokens[:, :PROMPT])

  def settings(share, refresh, local_blocks=1):
    return cfg.ReSA(BLOCK, share, MIN_BLOCKS, local_blocks, refresh)

  dense = decode(model, params, tokens, cache, settings(1.0, cfg.RefreshNever()))
  arms = {f'p={share} {name}': (settings(share, refresh), block_scores)
          for share in (0.05, 0.1, 0.2)
          for name, refresh in (('f=inf', cfg.RefreshNever()), ('f=32', cfg.RefreshEvery(32)),
                                ('f=1', cfg.RefreshEvery(1)))}
  arms['p=0.1 f=32 random blocks'] = settings(0.1, cfg.RefreshEvery(32)), random_scores
  arms['p=0.1 f=32 no local block'] = settings(0.1, cfg.RefreshEvery(32), 0), block_scores
  kls, results = {}, {'dense': summarise(np.zeros((ROWS, STEPS)), dense, tokens, told)}
  for name, (chosen, scores) in arms.items():
    began = time.perf_counter()
    logp = decode(model, params, tokens, cache, chosen, scores)
    kls[name] = (np.exp(dense) * (dense - logp)).sum(-1)
    results[name] = summarise(kls[name], logp, tokens, told)
    print(f'{name}: KL {results[name]["kl"]["mean"]:.4f}, slope '
          f'{results[name]["slope per 1000 tokens"]}, recall '
          f'{results[name]["recall accuracy"]:.3f}, {time.perf_counter() - began:.0f} s',
          flush=True)
  differences = {}
  for share in (0.05, 0.1, 0.2):
    inf, fixed, ceiling = (kls[f'p={share} f={f}'] for f in ('inf', '32', '1'))
    differences[f'p={share}'] = {
        'slope, inf minus 32': interval(slope(inf) - slope(fixed)),
        'KL, inf minus 32': interval((inf - fixed).mean(1)),
        'KL, 32 minus 1': interval((fixed - ceiling).mean(1)),
        'KL in the last quarter, inf minus 32': interval((inf - fixed)[:, -STEPS // 4:].mean(1))}
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'quality.json').write_text(json.dumps({
      'rows': ROWS, 'prompt': PROMPT, 'steps': STEPS, 'block': BLOCK, 'min_blocks': MIN_BLOCKS,
      'recalled letters': int(told.sum()), 'training': json.loads(curve.read_text()),
      'arms': results, 'paired differences': differences}, indent=1) + '\n')
  plot(kls)
  print(json.dumps(differences, indent=1))


if __name__ == '__main__':
  main()
