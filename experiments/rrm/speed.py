"""A knockout of many queries as large batches of the engine, against one call for each comparison.

    python experiments/rrm/speed.py [--queries 64] [--candidates 16] [--votes 5] [--slots 64]

A random judge of gin/model/tiny.gin's shape, whose responses have random lengths. The same engine
answers both ways: a whole round at once, or comparison by comparison, of which --single many are
timed. Verdicts must be equal. Writes results/speed.json.
"""

import argparse
import json
from pathlib import Path
import time

import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments import judging
from jaxrl_pt.environments.judging import EngineJudge
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving.comparing import Shown, Speaker
from jaxrl_pt.verifiers import tournament

HERE = Path(__file__).parent
TOKENIZER = ByteTokenizer()
PROMPT = cfg.JudgePrompt('', '{query}\nA {first}\nB {second}\n?', cfg.MarkedVerdict())
MODEL = cfg.Model(num_layers=4, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2, head_dim=32,
                  vocab_size=257, activation='relu2', sub_norm=True)
MOST_TOKENS = 64


class StoppingOften(ByteTokenizer):
  """Bytes, of which any above 249 ends a response: a random model draws about 37 before that."""

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return tuple(range(250, 257))


def make_judge(slots: int) -> EngineJudge:
  """A random judge that states verdicts now and then."""
  model = transformer.build(MODEL)
  params = P.init(model.specs, jax.random.key(0))
  speaker = Speaker(PROMPT, StoppingOften(), num_tokens=MOST_TOKENS)
  config = judging.engine_config(speaker, 256, slots)
  engine = Engine(model, params, config, seed=0, token_bytes=TOKENIZER.token_bytes())
  return EngineJudge(engine, speaker)


def texts(num_queries: int, num_candidates: int) -> tuple[list[str], list[list[str]]]:
  """Queries of about 80 and candidates of about 30 characters."""
  rng = np.random.default_rng(0)
  words = lambda num: ' '.join(''.join(map(chr, rng.integers(97, 123, 5))) for _ in range(num))
  return ([words(14) for _ in range(num_queries)],
          [[words(5) for _ in range(num_candidates)] for _ in range(num_queries)])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (('queries', 64), ('candidates', 16), ('votes', 5), ('slots', 64),
                        ('single', 48)):
    parser.add_argument(f'--{name}', type=int, default=default)
  args = parser.parse_args()
  queries, candidates = texts(args.queries, args.candidates)
  judge = make_judge(args.slots)
  asked: list[Shown] = []
  ask = judge.of_candidates(queries, candidates, args.votes)

  def noted(games: np.ndarray) -> np.ndarray:
    asked.extend(Shown(queries[q], candidates[q][a], candidates[q][b]) for q, a, b in games)
    return ask(games)

  judge.ask([Shown('a', 'b', 'c')], args.votes)  # compiles
  before, began = judge.engine.counters(), time.perf_counter()
  ended = tournament.knockout([args.candidates] * args.queries, noted)
  seconds = time.perf_counter() - began
  after = judge.engine.counters()
  steps = after['steps'] - before['steps']
  busy = after['occupancy'] * after['steps'] - before['occupancy'] * before['steps']
  num = sum(end.num_comparisons for end in ended)

  chosen = asked[::max(1, len(asked) // args.single)][:args.single]
  began = time.perf_counter()
  alone = np.concatenate([judge.ask([shown], args.votes).votes for shown in chosen])
  each = (time.perf_counter() - began) / len(chosen)
  together = judge.ask(chosen, args.votes).votes
  np.testing.assert_array_equal(alone, together)
  result = {
      **vars(args), 'comparisons': num, 'verdicts': num * args.votes, 'rounds': ended[0].num_rounds,
      'seconds': round(seconds, 2), 'slot_occupancy': round(busy / steps, 4),
      'comparisons_per_second': round(num / seconds, 2),
      'one_call_each_per_second': round(1 / each, 2), 'ratio': round(num / seconds * each, 2),
      'prefilled_tokens': int(after['prefilled'] - before['prefilled']),
      'prompt_tokens': sum(len(judge.speaker.tokens(shown)) - 1 for shown in asked)}
  print(json.dumps(result, indent=1))
  (HERE / 'results').mkdir(exist_ok=True)
  (HERE / 'results' / 'speed.json').write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
