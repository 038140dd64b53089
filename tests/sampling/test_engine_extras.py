"""The engine's constraints, likeliest tokens, prompt scores and kept documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.config import Sampler
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import engine, policies
from jaxrl_pt.sampling.engine import Request
from tests.sampling.test_engine import MODEL, PARAMS, PROMPTS, STOP, VOCAB, expected, flat, make


def log_softmax_after(tokens):
  tokens = jnp.asarray(tokens)[None]
  hidden = MODEL.apply(PARAMS, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
  return np.asarray(jax.nn.log_softmax(hidden[0] @ MODEL.head(PARAMS)))


def test_likeliest_tokens_are_those_of_a_whole_forward():
  request = Request(PROMPTS[0], 0, 6, 2, Sampler(), (STOP,), top_logprobs=3)
  one = make()
  other = Request(PROMPTS[1], 1, 6, 1, Sampler(), (STOP,))
  done = one.run([request, other])
  assert done[1][0].top_tokens is None
  for response in done[0]:
    sequence = [*PROMPTS[0], *response.tokens.tolist()]
    logp = log_softmax_after(sequence[:-1])[len(PROMPTS[0]) - 1:]
    best = np.argsort(-logp, -1)[:, :3]
    np.testing.assert_array_equal(response.top_tokens, best)
    np.testing.assert_allclose(response.top_logp, np.take_along_axis(logp, best, 1), atol=2e-5)


@pytest.mark.parametrize('max_tokens', [0, 2])
def test_a_prompt_is_scored(max_tokens):
  request = Request(PROMPTS[2], 5, max_tokens, 1, prompt_logprobs=True, top_logprobs=2)
  (response,) = make().run([request])[0]
  assert len(response.tokens) == max_tokens and response.finish == 'length'
  logp = log_softmax_after(PROMPTS[2])
  wanted = [logp[i, t] for i, t in enumerate(PROMPTS[2][1:])]
  np.testing.assert_allclose(response.prompt.logp, [0, *wanted], atol=2e-5)
  np.testing.assert_array_equal(response.prompt.top_tokens[1:], np.argsort(-logp, -1)[:-1, :2])


class Alternating:
  """Even and odd tokens by turns, then the stop token."""

  def __init__(self, taken=()):
    self.taken = list(taken)

  @property
  def is_done(self):
    return len(self.taken) == 5

  def allowed(self):
    return [STOP] if self.is_done else [t for t in range(VOCAB) if t % 2 == len(self.taken) % 2
                                        and t != STOP]

  def mask(self):
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in self.allowed():
      words[token // 32] |= np.uint32(1 << token % 32)
    return words

  def accept(self, token):
    assert token in self.allowed()
    self.taken.append(token)

  def copy(self):
    return Alternating(self.taken)


def test_a_constraint_masks_before_the_draw_and_counts_in_the_log_probability():
  one = make(constrained=3)
  free = Request(PROMPTS[0], 0, 20, 3, Sampler(), (STOP,))
  bound, later = (Request(PROMPTS[1], i, 20, 3, Sampler(), (STOP,), constraint=Alternating())
                  for i in (1, 2))
  done = one.run([free, bound, later])
  assert all(r.tokens[-1] == STOP for r in done[2])  # It has waited for masks.
  for response in done[0]:  # The neighbours of constrained responses are as ever.
    np.testing.assert_array_equal(response.tokens, expected(Sampler())[0, response.sample][0])
  for response in done[1]:
    tokens = response.tokens.tolist()
    assert [t % 2 for t in tokens[:-1]] == [0, 1, 0, 1, 0] and tokens[-1] == STOP
    state, logits = Alternating(), log_softmax_after([*PROMPTS[1], *tokens])
    for i, token in enumerate(tokens):
      z = np.full(VOCAB, policies.MASKED)
      z[state.allowed()] = logits[len(PROMPTS[1]) - 1 + i][state.allowed()]
      assert response.logp[i] == pytest.approx(float(jax.nn.log_softmax(z)[token]), abs=2e-5)
      if token != STOP:
        state.accept(token)
  assert len({tuple(r.tokens) for r in done[1]}) > 1
  with pytest.raises(UserError, match='4 constrained responses at once; at most 3'):
    one.submit(dataclasses.replace(bound, num_samples=4, max_tokens=1))


def test_what_begins_alike_is_prefilled_once_whatever_the_turn():
  """Ten turns of a conversation: prompt, answer, next question; each goes on from kept pages."""
  one = make(prompt_len=96, queue=17)
  before = one.counters()
  talk, num_new = (1, 2, 3), 2
  for turn in range(10):
    drawn = one.run([Request(talk, turn, 5, 1, Sampler(), ())])[0][0].tokens.tolist()
    alone = make().run([Request(talk[-8:], turn, 5, 1, Sampler(), ())]) if len(talk) <= 8 else None
    assert alone is None or alone[0][0].tokens.tolist() == drawn
    tokens = log_softmax_after([*talk, *drawn])  # The kept pages hold what a whole forward has.
    greedy = one.run([Request((*talk, *drawn), 100 + turn, 1, 1, Sampler(0.0), ())])[0][0]
    assert int(greedy.tokens[0]) == int(tokens[-1].argmax())
    talk = (*talk, *drawn, 4, 5)
    num_new += 2 + 1  # The last drawn token, which was never fed, and the question.
  after = one.counters()
  prefilled = after['prefilled'] - before['prefilled']
  assert prefilled <= num_new
  assert after['prefix_hits'] - before['prefix_hits'] >= 19
  assert after['kept_pages'] == after['pages_in_use'] > 0


def test_kept_pages_make_room_and_nothing_is_lost_in_many_requests():
  """A pool of little more than one response; 60 prompts, half of them cancelled."""
  one = make(num_pages=11, slots=2)
  rng = np.random.default_rng(0)
  for i in range(60):
    prompt = tuple(rng.integers(0, 9, rng.integers(1, 9)).tolist())
    handle = one.submit(Request(prompt, i, int(rng.integers(1, 20)), 1, Sampler(), (STOP,)))
    if i % 2:
      one.advance(1)
      one.cancel(handle)
    done = []
    for _ in range(30):
      done += [r for _, r in one.advance(5) if r.finish]
      if done:
        break
    assert len(done) == 1, i
  counters = one.counters()
  assert counters['pages_in_use'] == counters['kept_pages'] <= 10 and one.room() == 16
  wanted = expected(Sampler())
  for response in flat(one.run([Request(p, i, 20, 3, Sampler(), (STOP,))
                                for i, p in enumerate(PROMPTS)])):
    np.testing.assert_array_equal(response.tokens, wanted[response.id, response.sample][0])


def test_known_prompts_take_hardly_more_steps_than_new_ones():
  """What has been kept of their responses makes room for new ones, in a pool that it fills."""
  one, rng = make(num_pages=28, queue=8), np.random.default_rng(1)
  asked = [Request(tuple(rng.integers(0, VOCAB, 8).tolist()), i, 24, 1, Sampler(), ())
           for i in range(8)]
  first = one.run(asked)
  steps = one.counters()['steps']
  again = one.run(asked)
  assert one.counters()['steps'] - steps <= 1.5 * steps
  for before, after in zip(first, again, strict=True):
    np.testing.assert_array_equal(after[0].tokens, before[0].tokens)


def test_a_documents_row_that_holds_another_text_is_read_anew():
  model = transformer.build(cfg.Model(2, 16, 32, 2, 1, 8, 19))
  params = P.init(model.specs, jax.random.key(0))
  requests = [Request(tuple((7 * i + 3 * j + i * j) % 19 for j in range(5)), i, 4, 1)
              for i in range(12)]

  def engine_of(queue):
    sizes = cfg.Engine(slots=2, queue=queue, prompt_len=8, response_len=4, page_size=2,
                       prefill_chunk=8)
    return engine.Engine(model, params, sizes, seed=1, token_bytes=[b'a'] * 19)

  few_rows, a_row_each = engine_of(2), engine_of(12)
  want = [tokens_of(responses) for responses in a_row_each.run(requests)]
  assert [tokens_of(few_rows.run([request])[0]) for request in requests] == want


def tokens_of(responses):
  return [response.tokens.tolist() for response in responses]
