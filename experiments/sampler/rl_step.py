"""The rollouts of an RL step whose lengths nobody knows: refilled slots against static batches.

    python experiments/sampler/rl_step.py

16 problems of reasoning-gym's basic_arithmetic, 16 responses each of at most 256 tokens, by a
random policy of 2.6M parameters whose stop token is chosen so that the mean response has a quarter
of the most tokens; some never stop. The arms draw the same tokens: `groups.generate` with 32, 16
and 8 slots, with a slot for every response, and the static batch of `static.py`, of all rows at
once and of 32 rows at a time. Rounds alternate.
Results go to results/rl_step.json and .png.
"""

from collections.abc import Callable
import functools
import json
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import reasoning_gym
import static

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import groups, slots, state
from jaxrl_pt.sampling.requests import Vocabulary
from jaxrl_pt.types import Prompts

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # After the choice of its backend.

RESULT = Path(__file__).parent / 'results' / 'rl_step.json'
PROMPTS, SAMPLES, PROMPT, LONGEST, ROUNDS = 16, 16, 64, 256, 3
ROWS = PROMPTS * SAMPLES
REFILLED = (32, 16, 8)
SHAPE = cfg.Model(num_layers=6, d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, head_dim=32,
                  vocab_size=128)
MODEL = transformer.build(SHAPE)
SAMPLER = cfg.Sampler()


def policy() -> Any:
  """Random parameters with opinions, so that prompts differ in how long their responses are."""
  params = P.init(MODEL.specs, jax.random.key(0))
  return {**params, 'embed': params['embed'] * 3}


def prompts() -> Prompts:
  """The problems as bytes of ASCII, cut to their last PROMPT."""
  problems = reasoning_gym.create_dataset('basic_arithmetic', size=PROMPTS, seed=0)
  texts = [problem['question'].encode()[-PROMPT:] for problem in problems]
  tokens = [list(text) + [0] * (PROMPT - len(text)) for text in texts]
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray([len(text) for text in texts]),
                 jnp.arange(PROMPTS, dtype=jnp.int32))


def lengths_by(tokens: np.ndarray, stop: int) -> np.ndarray:
  """The lengths of responses that a stop token ends, of responses that nothing has ended."""
  is_stop = tokens == stop
  return np.where(is_stop.any(-1), is_stop.argmax(-1) + 1, LONGEST)


def arms(stop: int | None) -> dict[str, Callable[[Any, Prompts, Any], Any]]:
  kwargs = {'sampler': SAMPLER, 'num_samples': SAMPLES, 'num_tokens': LONGEST,
            'stop_ids': (stop,) if stop is not None else ()}
  some = 32 // SAMPLES
  at_once = jax.jit(functools.partial(static.generate, MODEL, **kwargs))

  def in_batches(params: Any, asked: Prompts, key: Any) -> Any:
    parts = [at_once(params, jax.tree.map(lambda x, i=i: x[i:i + some], asked), key)
             for i in range(0, PROMPTS, some)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  refilled = lambda num: jax.jit(functools.partial(
      groups.generate, MODEL, slots=cfg.Slots(slots=num), **kwargs))
  return {f'static, {ROWS} rows': at_once, 'static, 32 rows': in_batches,
          f'{ROWS} slots': refilled(0), **{f'{num} slots': refilled(num) for num in REFILLED}}


def occupancy(params: Any, asked: Prompts, key: Any, stop: int, num: int) -> dict[str, float]:
  """What `groups.generate` counts on the device and does not return."""
  shape = groups.shape_of(SHAPE.vocab_size, asked, SAMPLES, LONGEST, SAMPLER, cfg.Slots(slots=num))
  queue = groups.queue_of(asked, SAMPLES, LONGEST, (stop,))
  begin = state.init(MODEL, shape, Vocabulary(), 'model')
  end = jax.jit(lambda p, k, q, s: slots.advance(
      MODEL, shape, Vocabulary(), p, k, 0, q, s, groups.most_turns(shape, has_all_pages=True)))(
          params, key, queue, begin)
  steps, busy = int(end.counters.steps), int(end.counters.busy)
  return {'decode_steps': steps, 'occupancy': busy / steps / num}


def main() -> None:
  params, asked, key = policy(), prompts(), jax.random.key(1)
  endless = arms(None)[f'{ROWS} slots'](params, asked, key)
  tokens = np.asarray(endless.tokens)
  stop = min(range(SHAPE.vocab_size),
             key=lambda t: abs(lengths_by(tokens, t).mean() - LONGEST / 4))
  programs = arms(stop)
  drawn = {name: jax.block_until_ready(program(params, asked, key))
           for name, program in programs.items()}
  reference = drawn[f'static, {ROWS} rows']
  lengths = np.asarray(reference.lengths())
  differ = {name: float((rollouts.tokens != reference.tokens).any(-1).mean())
            for name, rollouts in drawn.items()}
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(ROUNDS):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(params, asked, key))
      seconds[name].append(time.perf_counter() - start)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  best = min(median[name] for name in median if name.startswith('static'))
  counted = {f'{num} slots': occupancy(params, asked, key, stop, num) for num in REFILLED}
  RESULT.write_text(json.dumps({
      'lengths': {'mean': float(lengths.mean()), 'median': float(np.median(lengths)),
                  'percentile 90': float(np.percentile(lengths, 90)), 'most': int(lengths.max()),
                  'share that never stops': float((lengths == LONGEST).mean())},
      'seconds': seconds, 'median': median, 'best static over': {
          name: best / value for name, value in median.items()},
      'counted': counted, 'responses that differ': differ}, indent=1) + '\n')
  print(f'lengths: mean {lengths.mean():.0f} of at most {LONGEST}')
  for name, value in median.items():
    print(f'{name:17} {value:7.2f} s  {best / value:5.2f}×  {counted.get(name, "")}')
  plot(lengths, median, best)


def plot(lengths: np.ndarray, median: dict[str, float], best: float) -> None:
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
  left.hist(lengths.ravel(), bins=40)
  left.set(title='Response lengths', xlabel='tokens', ylabel='responses')
  right.barh(list(median), [best / value for value in median.values()])
  right.invert_yaxis()
  right.axvline(1, color='black', linewidth=0.8)
  right.set(title='Speed of generation', xlabel='over the faster static batch')
  figure.tight_layout()
  figure.savefig(RESULT.with_suffix('.png'), dpi=120)


if __name__ == '__main__':
  main()
