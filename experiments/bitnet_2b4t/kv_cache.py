"""What keys and values of 8, 4 and 3 bits cost: loss on real text, and planted facts read back.

    python experiments/bitnet_2b4t/kv_cache.py --data ../shared/data

Two models, teacher-forced, in which every token sees keys and values as the cache gives them back
(`kv_quant.as_stored`, to which the paged cache is tested equal). stories260K reads 64 stories of
the TinyStories sample, up to 256 tokens of each, [BOS] first. The model of
`experiments/resa/facts.py` is trained here for 130 steps on books with planted facts, and reads 64
rows of 1,024 bytes of them; a letter of a fact that was planted before can only be read off the
context. The arms without the 8 bits of the first token are controls. Intervals are 95 % by
bootstrap over documents, paired with the unrounded cache. Results go to results/kv_cache.json.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.interop import llama2c
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import kv_quant

sys.path.append(str(Path(__file__).parents[1] / 'resa'))
import facts

RESULT = Path(__file__).parent / 'results' / 'kv_cache.json'
STORIES, STORY_TOKENS, ROWS, LENGTH, BOOTSTRAPS = 64, 256, 64, 1024, 4000
ARMS = {'16 bits or more': ('model', True), '8 bits': ('int8', True), '4 bits': ('int4', True),
        '3 bits': ('int3', True), '4 bits, the first token too': ('int4', False),
        '3 bits, the first token too': ('int3', False)}


def scorer(model: Any, kv: Any, first_has_8: bool) -> Callable[..., Any]:
  """score(params, i32[B, T]) → log-probabilities, and whether each is the likeliest."""
  @jax.jit
  def score(params: Any, tokens: Any) -> Any:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)

    def attend(q: Any, k: Any, v: Any, cache: Any, layer: Any) -> Any:
      k, v = (kv_quant.as_stored(x, positions + (not first_has_8), kv) for x in (k, v))
      return model.ops.attention(q, k, v, jnp.ones_like(inputs)), cache

    hidden, _ = model.extend(params, inputs, positions, (), attend)
    logp = jax.nn.log_softmax(hidden @ model.head(params))
    return (jnp.take_along_axis(logp, targets[..., None], -1)[..., 0],
            logp.argmax(-1) == targets)

  return score


def stories(data: Path) -> tuple[Any, Any, np.ndarray, np.ndarray]:
  """stories260K, its tokens i32[B, T + 1], and which targets count."""
  folder = data / 'weights-stories260k'
  config, params = llama2c.load_model(folder / 'stories260K.bin')
  tokenizer = llama2c.load_tokenizer(folder / 'tok512.bin')
  text = (data / 'text-tinystories-sample' / 'tiny_stories.txt').read_text(encoding='utf-8')
  some = [s.strip() for s in text.replace('<|endoftext|>', '\n\n').split('\n\n')
          if len(s.strip()) > 400][:STORIES]
  rows, counted = np.zeros((len(some), STORY_TOKENS + 1), np.int32), []
  for row, story in zip(rows, some, strict=True):
    ids = [llama2c.BOS, *tokenizer.encode(story)][:STORY_TOKENS + 1]
    row[:len(ids)] = ids
    counted.append(np.arange(STORY_TOKENS) < len(ids) - 1)
  return transformer.build(config), params, rows, np.array(counted)


def planted(data: Path) -> tuple[Any, Any, np.ndarray, np.ndarray]:
  """The model of planted facts, trained, with rows and which targets are recalled letters."""
  texts = facts.books(data / 'text-gutenberg')
  facts.STAGES = facts.STAGES[:2]
  params, _ = facts.train(texts)
  rng = np.random.default_rng(10_000)
  rows = [facts.plant(texts[b % len(texts)], LENGTH + 1, rng, 24) for b in range(ROWS)]
  return (transformer.build(facts.MODEL), params, np.stack([t for t, _ in rows]).astype(np.int32),
          np.stack([told for _, told in rows])[:, 1:])


def interval(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
  """The mean over all targets with its interval over documents."""
  picks = np.random.default_rng(0).integers(0, len(sums), (BOOTSTRAPS, len(sums)))
  means = sums[picks].sum(1) / counts[picks].sum(1)
  return {'mean': float(sums.sum() / counts.sum()),
          'interval': [float(x) for x in np.quantile(means, [0.025, 0.975])]}


def measure(model: Any, params: Any, tokens: np.ndarray, counted: np.ndarray,
            told: np.ndarray | None) -> dict[str, Any]:
  """Loss, its excess over the unrounded cache, and the share of recalled letters."""
  results, exact = {}, None
  for name, (kv, first_has_8) in ARMS.items():
    score = scorer(model, kv, first_has_8)
    parts = [score(params, jnp.asarray(tokens[i:i + 8])) for i in range(0, len(tokens), 8)]
    loss = -np.concatenate([np.asarray(logp) for logp, _ in parts])
    right = np.concatenate([np.asarray(r) for _, r in parts])
    exact = loss if exact is None else exact
    row = {'loss': interval((loss * counted).sum(1), counted.sum(1)),
           'excess': interval(((loss - exact) * counted).sum(1), counted.sum(1))}
    if told is not None:
      row['recalled'] = interval((right & told).sum(1), told.sum(1))
    results[name] = row
    print(name, json.dumps(row), flush=True)
  return results


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('--data', type=Path, required=True)
  parser.add_argument('--only', choices=('stories260K', 'planted facts'), help='the results of the '
                      'other one stay')
  args = parser.parse_args()
  found = json.loads(RESULT.read_text()) if args.only and RESULT.exists() else {}
  if args.only != 'planted facts':
    model, params, tokens, counted = stories(args.data)
    found['stories260K'] = measure(model, params, tokens, counted, None)
  if args.only != 'stories260K':
    model, params, tokens, told = planted(args.data)
    found['planted facts'] = measure(model, params, tokens, np.ones_like(told), told)
  RESULT.parent.mkdir(exist_ok=True)
  RESULT.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
