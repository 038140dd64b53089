"""Branch rollouts: 64 positions of a document × 8 samples, against one prompt a position.

    python experiments/sampler/branches.py

A document of 1024 tokens, 16 new tokens a sample, the 2.8M Llama shape in float32. `branch`
prefills the document once; `prompts` prefills each position's context (already shared by its
8 samples), in batches of 16 positions of like length. Prefill FLOPs are XLA's count of the
compiled prefill; tokens of both arms are compared. Rounds alternate; results go to
results/branches.json.
"""

import functools
import json
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import branch, groups
from jaxrl_pt.sampling.prefill import prefill as prefill_documents
from jaxrl_pt.types import Prompts

RESULT = Path(__file__).parent / 'results' / 'branches.json'
LENGTH, POSITIONS, SAMPLES, NEW, ROUNDS = 1024, 64, 8, 16, 5
SHAPE = cfg.Model(num_layers=6, d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, head_dim=32,
                  vocab_size=1024)


def main() -> None:
  model = transformer.build(SHAPE)
  params = P.init(model.specs, jax.random.key(0))
  rng = np.random.default_rng(0)
  document = rng.integers(0, 1024, LENGTH).astype(np.int32)
  lengths = np.sort(rng.choice(np.arange(32, LENGTH + 1), POSITIONS, replace=False))
  lengths = lengths.astype(np.int32)
  ids = np.arange(POSITIONS, dtype=np.int32)
  branches = branch.documents(jnp.asarray(document)[None], jnp.asarray(lengths)[None],
                              jnp.asarray(ids)[None])
  asked = dict(sampler=cfg.Sampler(), num_samples=SAMPLES, num_tokens=NEW)
  key = jax.random.key(0)
  generate = jax.jit(functools.partial(groups.generate, model, **asked))

  def prompts(rows: slice) -> Prompts:
    """One prompt a position, padded to the longest of these."""
    width = lengths[rows].max()
    tokens = np.where(np.arange(width) < lengths[rows, None], document[:width], 0)
    return jax.tree.map(jnp.asarray, Prompts(tokens, lengths[rows], ids[rows]))

  # Positions in order of length, so that batches of 16 are padded little.
  batches = [prompts(slice(i, i + 16)) for i in range(0, POSITIONS, 16)]
  arms: dict[str, Any] = {
      'branch': lambda: generate(params, branches, key).tokens,
      'prompts': lambda: jnp.concatenate([generate(params, b, key).tokens for b in batches])}
  drawn, seconds = {}, {name: [] for name in arms}
  for name, run in arms.items():
    drawn[name] = np.asarray(run())
  for _ in range(ROUNDS):
    for name, run in arms.items():
      start = time.perf_counter()
      run().block_until_ready()
      seconds[name].append(time.perf_counter() - start)

  # Unrolled: XLA counts the body of a loop over layers once.
  prefill = jax.jit(functools.partial(prefill_documents, transformer.build(
      SHAPE, cfg.Compute(unroll=0))))
  count = lambda tokens: prefill.lower(params, tokens).compile().cost_analysis()['flops']
  flops = {'branch': count(branches.tokens), 'prompts': sum(count(b.tokens) for b in batches)}
  median = {name: statistics.median(values) for name, values in seconds.items()}
  same = float((drawn['branch'] == drawn['prompts']).mean())
  result = {'prefill_flops': flops, 'prefill_flops_ratio': flops['prompts'] / flops['branch'],
            'prompt_tokens_ratio': float(lengths.sum() / LENGTH),
            'seconds': seconds, 'speedup': median['prompts'] / median['branch'],
            'share_of_equal_tokens': same}
  RESULT.write_text(json.dumps(result, indent=1) + '\n')
  print(json.dumps({k: v for k, v in result.items() if k != 'seconds'}, indent=1))


if __name__ == '__main__':
  main()
