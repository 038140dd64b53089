"""A judge by the engine: verdicts as of single prompts, and prefixes that are computed once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments import judging
from jaxrl_pt.environments.judging import EngineJudge
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving.comparing import Shown, Speaker
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.judge import NONE

MODEL = transformer.build(cfg.Model(num_layers=1, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1,
                                    head_dim=8, vocab_size=257))
PROMPT = cfg.JudgePrompt('', '{query}\nA {first}\nB {second}\n?', cfg.MarkedVerdict())
TOKENIZER = ByteTokenizer()
SPEAKER = Speaker(PROMPT, TOKENIZER, num_tokens=4, is_direct=True)
QUERY = 'Which of these is the better answer to a question that is rather long? ' * 2
CANDIDATES = [f'{i} is one of eight' for i in range(8)]


@functools.lru_cache
def engine() -> Engine:
  params = P.init(MODEL.specs, jax.random.key(0))
  config = dataclasses.replace(judging.engine_config(SPEAKER, 240, 8), prefill_chunk=64)
  return Engine(MODEL, params, config, seed=3, token_bytes=TOKENIZER.token_bytes())


def fresh() -> EngineJudge:
  """A judge whose engine has forgotten all documents."""
  made = engine()
  made.load(made._params, 0)
  return EngineJudge(made, SPEAKER)


def prefilled(ask) -> tuple[int, np.ndarray]:
  """The prompt tokens that went through the model while `ask(judge)` ran, and its result."""
  before = engine().counters()['prefilled']
  found = ask(fresh())
  return engine().counters()['prefilled'] - before, found


def test_a_round_robin_of_eight_prefills_a_third_of_what_single_prompts_do_with_equal_tokens():
  games = tournament.schedule(8)
  shown = [Shown(QUERY, CANDIDATES[a], CANDIDATES[b]) for a, b in games]
  together, judged = prefilled(lambda judge: judge.ask(shown, 2))
  apart = 0
  for c in range(0, len(shown), 9):  # Some are enough to compare; all have prompts of one length.
    alone, one = prefilled(lambda judge, c=c: judge.ask(shown[c:c + 1], 2))
    apart += alone
    assert one.responses[0] == judged.responses[c]
    np.testing.assert_array_equal(one.votes[0], judged.votes[c])
  apart *= len(shown) / len(range(0, len(shown), 9))
  assert apart == pytest.approx(28 * (len(SPEAKER.tokens(shown[0])) - 1))
  assert apart >= 3 * together
  # The query once, each first response once, and of each comparison what only it has.
  query = len(f'{QUERY}\nA ') + 1
  first, second = len(CANDIDATES[0]) + len('\nB '), len(CANDIDATES[0]) + len('\n?') - 1
  assert together <= query + 8 * first + 28 * second


def test_votes_do_not_depend_on_what_else_is_asked_and_cut_into_requests_they_are_the_same():
  shown = [Shown('q', a, b) for a, b in (('x', 'y'), ('y', 'x'), ('x', 'z'))]
  whole = fresh().ask(shown, 40)  # more votes than the queue takes at once
  for order in ([2, 0, 1], [1]):
    part = fresh().ask([shown[i] for i in order], 40)
    np.testing.assert_array_equal(part.votes, whole.votes[order])
  few = fresh().ask(shown, 3)
  np.testing.assert_array_equal(few.votes, whole.votes[:, :3])
  assert whole.votes.shape == (3, 40) and len({r for row in whole.responses for r in row}) > 3
  assert all(r.startswith('#') for row in whole.responses for r in row)


def test_a_prompt_that_is_too_long_gets_no_verdict():
  found = fresh().ask([Shown('q', 'a', 'b'), Shown('q' * 300, 'a', 'b')], 2)
  assert found.too_long.tolist() == [False, True]
  assert (found.votes[1] == NONE).all() and found.num_tokens[1].sum() == 0
  assert found.num_tokens[0].min() > 0


def test_a_tournament_asks_about_the_candidates_of_its_queries():
  asked = []

  class Asked(EngineJudge):
    def ask(self, comparisons, num_votes):
      asked.extend(comparisons)
      return super().ask(comparisons, num_votes)

  judge = Asked(engine(), SPEAKER).of_candidates(['p', 'q'], [['a', 'b'], ['c', 'd', 'e']], 1)
  ended = tournament.knockout([2, 3], judge)
  assert [e.num_comparisons for e in ended] == [1, 2]
  assert sorted(s.query for s in asked) == ['p', 'q', 'q']
  assert all({s.first, s.second} <= set({'p': 'ab', 'q': 'cde'}[s.query]) for s in asked)


def test_comparisons_of_some_queries_take_turns():
  order = judging.in_waves(['a', 'a', 'a', 'b', 'b', *map(str, range(7)), '6'])
  assert order == [0, 3, 5, 6, 7, 8, 9, 10, 1, 4, 2, 11, 12]


def test_the_bound_of_a_prompt_holds_for_all_pairs():
  most = judging.longest(SPEAKER, [QUERY, 'q'], [CANDIDATES, ['a' * 300, 'b', 'c']])
  for query, texts in ((QUERY, CANDIDATES), ('q', ['a' * 300, 'b', 'c'])):
    assert all(len(SPEAKER.tokens(Shown(query, a, b))) <= most for a in texts for b in texts
               if a != b)
