"""Continuous batching: slots refilled on the device against batches that wait for their longest.

    python experiments/sampler/batching.py

256 requests with prompts of 16–64 tokens and response lengths from a heavy tail (log-normal,
σ = 1.2, cut at 512) run through the same compiled engine of 32 slots: all queued, the largest
budget first (`Engine.run`); all queued in order of arrival; and in batches of 32 of which each
waits for its longest response. Program, shapes and tokens are the same. Rounds alternate.
Results go to results/batching.json and .png.
"""

import json
from pathlib import Path
import statistics
import time

import jax
import matplotlib
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling.engine import Engine, Request

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # After the choice of its backend.

RESULT = Path(__file__).parent / 'results' / 'batching.json'
SLOTS, NUM_REQUESTS, LONGEST, ROUNDS = 32, 256, 512, 3
SHAPE = cfg.Model(num_layers=6, d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, head_dim=32,
                  vocab_size=1024)


def requests() -> list[Request]:
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(np.log(60), 1.2, NUM_REQUESTS), 1, LONGEST).astype(int)
  return [Request(tuple(rng.integers(0, 1024, rng.integers(16, 65)).tolist()), i, int(n))
          for i, n in enumerate(lengths)]


def run(engine: Engine, batches: list[list[Request]], in_order: bool) -> dict[str, float]:
  before, start, num_tokens = engine.counters(), time.perf_counter(), 0
  for batch in batches:
    if in_order:  # As if nobody knew how long a response will be.
      for request in batch:
        engine.submit(request)
      while engine.room() < NUM_REQUESTS:
        num_tokens += sum(len(r.tokens) for _, r in engine.advance() if r.finish)
    else:
      num_tokens += sum(len(r.tokens) for group in engine.run(batch) for r in group)
  seconds, after = time.perf_counter() - start, engine.counters()
  steps = after['steps'] - before['steps']
  busy = after['occupancy'] * after['steps'] - before['occupancy'] * before['steps']
  return {'tokens': num_tokens, 'tokens_per_second': num_tokens / seconds, 'steps': steps,
          'occupancy': busy / steps}


def main() -> None:
  model = transformer.build(SHAPE)
  params = P.init(model.specs, jax.random.key(0))
  sizes = cfg.Engine(slots=SLOTS, queue=NUM_REQUESTS, prompt_len=64, response_len=LONGEST,
                     page_size=32, prefill_chunk=64, steps_per_call=LONGEST)
  engine = Engine(model, params, sizes, seed=0, token_bytes=[b'a'] * 1024)
  asked = requests()
  arms = {'continuous': ([asked], False), 'in arrival order': ([asked], True),
          'static': ([asked[i:i + SLOTS] for i in range(0, NUM_REQUESTS, SLOTS)], True)}
  rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
  for _ in range(ROUNDS):
    for name, (batches, in_order) in arms.items():
      rows[name].append(run(engine, batches, in_order))
  median = {name: {k: statistics.median(r[k] for r in values) for k in values[0]}
            for name, values in rows.items()}
  ratio = median['continuous']['tokens_per_second'] / median['static']['tokens_per_second']
  lengths = [r.max_tokens for r in asked]
  RESULT.write_text(json.dumps({'median': median, 'rounds': rows, 'speedup': ratio,
                                'lengths': {'mean': float(np.mean(lengths)),
                                            'median': float(np.median(lengths)),
                                            'longest': max(lengths)}}, indent=1) + '\n')
  for name, row in median.items():
    print(f'{name:16} {row["tokens_per_second"]:8,.0f} tokens/s  occupancy '
          f'{row["occupancy"]:.1%}  {row["steps"]:,.0f} steps')
  print(f'continuous over static: {ratio:.2f}×')
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
  left.hist(lengths, bins=40)
  left.set(title='Response lengths', xlabel='tokens', ylabel='requests')
  right.bar(list(median), [r['tokens_per_second'] for r in median.values()])
  for i, row in enumerate(median.values()):
    right.text(i, row['tokens_per_second'], f'occupancy {row["occupancy"]:.0%}', ha='center',
               va='bottom')
  right.set(title=f'{SLOTS} slots: {ratio:.2f}×', ylabel='tokens/s')
  right.margins(y=0.15)
  figure.tight_layout()
  figure.savefig(RESULT.with_suffix('.png'), dpi=120)


if __name__ == '__main__':
  main()
