"""The engine against `generate`, which is itself tested against a loop of whole forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.config import Sampler
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import ops, quant
from jaxrl_pt.sampling import engine, groups
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.types import Prompts

VOCAB = 19
CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8,
                   vocab_size=VOCAB, activation='relu2', sub_norm=True)
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
# A random model is near uniform; a larger embedding (tied head) makes it have opinions.
PARAMS = {**PARAMS, 'embed': PARAMS['embed'] * 25}
SEED, STOP = 7, 12
PROMPTS = [(3, 1, 4, 1, 5), (9, 2), (6, 5, 3, 5, 8, 9, 7, 1), (11,), (4, 4, 4, 4)]
TOKEN_BYTES = [bytes([65 + i]) for i in range(VOCAB - 1)] + [b'xyz']
SIZES = cfg.Engine(slots=3, queue=16, prompt_len=8, response_len=24, page_size=4,
                   prefill_chunk=4, steps_per_call=5)
THINK_END, THINK_START = (10, 11), (8, 2)


@functools.lru_cache
def make(think_end=(), model=MODEL, **sizes):
  return engine.Engine(model, PARAMS, dataclasses.replace(SIZES, **sizes), seed=SEED,
                       token_bytes=TOKEN_BYTES, think_end=think_end,
                       think_start=THINK_START if think_end else ())


def requests(sampler=Sampler(), num_tokens=20, num_samples=3, **fields):
  return [Request(prompt, i, num_tokens, num_samples, sampler, (STOP,), **fields)
          for i, prompt in enumerate(PROMPTS)]


@functools.lru_cache
def expected(sampler, num_tokens=20, num_samples=3):
  """By `generate`: {(prompt, sample): (tokens, logp)}."""
  tokens = np.zeros((len(PROMPTS), 8), np.int32)
  for row, prompt in zip(tokens, PROMPTS):
    row[:len(prompt)] = prompt
  n = len(PROMPTS)
  prompts = Prompts(jnp.asarray(tokens), jnp.array([len(p) for p in PROMPTS]), jnp.arange(n))
  rollout = jax.jit(functools.partial(
      groups.generate, MODEL, sampler=sampler, num_samples=num_samples, num_tokens=num_tokens,
      stop_ids=(STOP,)))(PARAMS, prompts, jax.random.key(SEED))
  tokens, mask, logp = (np.asarray(x) for x in (rollout.tokens, rollout.in_response, rollout.logp))
  return {(i, g): (tokens[i, g][mask[i, g] > 0], logp[i, g][mask[i, g] > 0])
          for i in range(n) for g in range(num_samples)}


def assert_equal(responses, wanted, atol=1e-5):
  for response in responses:
    tokens, logp = wanted[response.id, response.sample]
    np.testing.assert_array_equal(response.tokens, tokens)
    np.testing.assert_allclose(response.logp, logp, atol=atol)
    assert (response.sampled == 1).all()
    assert response.finish == ('stop' if tokens[-1] == STOP else 'length')


def test_ids_without_a_token_are_never_drawn():
  """Of the model's 19 ids the tokenizer has 9, one of them unused."""
  made = engine.Engine(MODEL, PARAMS, SIZES, seed=SEED, token_bytes=TOKEN_BYTES[:9],
                       unused_ids=(4,))
  drawn = {int(t) for group in made.run(requests(Sampler(temperature=3.0)))
           for response in group for t in response.tokens}
  assert len(drawn) >= 7 and drawn <= {0, 1, 2, 3, 5, 6, 7, 8}


def flat(done):
  return [response for group in done for response in group]


@pytest.mark.parametrize('sampler', [
    Sampler(), Sampler(0.0), Sampler(0.7, top_k=5), Sampler(1.3, top_p=0.8),
    Sampler(min_p=0.2, banned=(1, 5)), Sampler(0.9, top_k=9, top_p=0.9, min_p=0.05)],
    ids=lambda s: f't{s.temperature}k{s.top_k}p{s.top_p}m{s.min_p}')
def test_equals_generate(sampler):
  responses = flat(make().run(requests(sampler)))
  assert len(responses) == 15
  assert_equal(responses, expected(sampler))


@pytest.mark.parametrize('sizes', [
    {'slots': 1}, {'page_size': 1}, {'prefill_chunk': 8}, {'num_pages': 11, 'slots': 4},
    pytest.param({'slots': 8}, marks=pytest.mark.slow),
    pytest.param({'page_size': 16}, marks=pytest.mark.slow)], ids=str)
def test_sizes_do_not_change_tokens(sizes):
  assert_equal(flat(make(**sizes).run(requests())), expected(Sampler()))


def test_order_of_requests_does_not_change_tokens():
  asked = requests()
  shuffled = [asked[i] for i in (3, 1, 4, 0, 2)]
  assert_equal(flat(make().run(shuffled)), expected(Sampler()))
  one_by_one = [r for a in shuffled for r in flat(make().run([a]))]
  assert_equal(one_by_one, expected(Sampler()))


def test_interrupted_and_asked_again():
  one = make()
  handles = [one.submit(r) for r in requests(num_samples=1)]
  one.advance(7)
  for handle in handles:
    one.cancel(handle)
  cancelled = [r for _, r in one.advance(30) if r.finish == 'cancelled']
  assert cancelled
  for response in cancelled:  # What had been drawn is a beginning of the whole.
    tokens, _ = expected(Sampler())[response.id, 0]
    n = min(len(response.tokens), len(tokens))
    np.testing.assert_array_equal(response.tokens[:n], tokens[:n])
  assert_equal(flat(one.run(requests())), expected(Sampler()))
  counters = one.counters()
  assert counters["pages_in_use"] == counters["kept_pages"] <= SIZES.slots * 8


def test_unlike_samplers_in_one_batch():
  samplers = [Sampler(), Sampler(0.0), Sampler(0.7, top_k=5), Sampler(1.3, top_p=0.8),
              Sampler(min_p=0.2, banned=(1, 5))]
  asked = [dataclasses.replace(r, sampler=s) for r, s in zip(requests(), samplers)]
  for response in flat(make().run(asked)):
    assert_equal([response], expected(samplers[response.id]))


def test_responses_grow_from_call_to_call_and_are_reported_once_whole():
  one = make()
  handles = {one.submit(r): r.id for r in requests(num_samples=1)}
  seen: dict[int, list[int]] = {}
  finished = []
  while len(finished) < len(handles):
    for handle, response in one.advance(3):
      tokens = response.tokens.tolist()
      assert tokens[:len(seen.get(handle, []))] == seen.get(handle, [])
      assert handles[handle] == response.id and handle not in finished
      seen[handle] = tokens
      if response.finish:
        finished.append(handle)
  assert one.room() == SIZES.queue and one.advance(3) == []


def test_a_groups_prompt_is_computed_once():
  one = make(slots=4)
  before = one.counters()['prefilled']
  one.run(requests(num_samples=9))
  assert one.counters()['prefilled'] - before == sum(len(p) - 1 for p in PROMPTS)


def test_forced_tokens_are_not_drawn():
  forced = (2, 7, 1)
  for response in flat(make().run(requests(Sampler(0.0), forced=forced, num_samples=1))):
    assert response.tokens[:3].tolist() == list(forced)
    assert response.sampled[:3].tolist() == [0, 0, 0] and (response.sampled[3:] == 1).all()
    assert (response.logp[:3] == 0).all()
    prompt = PROMPTS[response.id] + forced
    again = Request(prompt[-8:], response.id, 5, 1, Sampler(0.0), (STOP,))
    if len(prompt) <= 8:  # A forced beginning is a longer prompt.
      rest = make().run([again])[0][0].tokens
      n = min(len(rest), len(response.tokens) - 3)
      np.testing.assert_array_equal(rest[:n], response.tokens[3:3 + n])


@pytest.mark.parametrize('max_thought', [0, 4])
def test_thought_and_answer_budgets(max_thought):
  one = make(THINK_END)
  asked = requests(Sampler(1.5), 24, max_thought=max_thought, max_answer=3)
  for response in flat(one.run([dataclasses.replace(r, stop=()) for r in asked])):
    tokens, sampled = response.tokens.tolist(), response.sampled.tolist()
    ends = [i for i in range(1, len(tokens)) if tuple(tokens[i - 1:i + 1]) == THINK_END]
    assert ends and ends[0] <= max_thought + 1
    if sampled[ends[0]] == 0:  # Forced: exactly when the budget was used up.
      assert sampled[:ends[0] + 1] == [1] * max_thought + [0, 0]
    assert len(tokens) == ends[0] + 1 + 3 and response.finish == 'length'


@pytest.mark.parametrize(('max_thought', 'max_answer'), [(0, None), (4, 3)])
def test_a_budget_holds_if_the_policy_chooses_to_think(max_thought, max_answer):
  """What is forced is the start marker, a part of it or nothing."""
  one, seen = make(THINK_END), []
  for forced in (THINK_START, THINK_START[:1], ()):
    for number in range(1 if len(forced) == 2 else 5):
      asked = [dataclasses.replace(r, stop=(), id=r.id + 10 * number) for r in requests(
          Sampler(3.0), 24, forced=forced, max_thought=max_thought, max_answer=max_answer,
          begins_thinking=False)]
      for response in flat(one.run(asked)):
        tokens, sampled = response.tokens.tolist(), response.sampled.tolist()
        thinks = tuple(tokens[:2]) == THINK_START
        seen.append((len(forced), thinks))
        if not thinks:  # Nothing is forced, and all of it is the answer.
          assert sampled == [0] * len(forced) + [1] * (len(tokens) - len(forced))
          assert len(tokens) == (max_answer or 24)
          continue
        ends = [i for i in range(3, len(tokens)) if tuple(tokens[i - 1:i + 1]) == THINK_END]
        assert ends and ends[0] <= 2 + max_thought + 1
        if sampled[ends[0]] == 0:
          assert sampled[2:ends[0] + 1] == [1] * max_thought + [0, 0]
        assert len(tokens) == (24 if max_answer is None else ends[0] + 1 + max_answer)
  assert {(2, True), (1, True), (1, False), (0, False)} <= set(seen)


def test_stop_strings_end_a_response_with_the_token_that_completes_them():
  plain = flat(make().run(requests(num_samples=2)))
  texts = [b''.join(TOKEN_BYTES[t] for t in r.tokens) for r in plain]
  some = next(t for t in texts if len(t) > 8)
  for stop in (some[3:5], some[4:5], some[1:6]):
    asked = requests(num_samples=2, stop_strings=('nothing', stop.decode()))
    for response, text in zip(flat(make().run(asked)), texts):
      drawn = b''.join(TOKEN_BYTES[t] for t in response.tokens)
      at = text.find(stop)
      if at < 0:
        assert drawn == text and response.finish != 'stop_string'
      else:
        assert response.finish == 'stop_string' and text.startswith(drawn)
        last = TOKEN_BYTES[response.tokens[-1]]
        assert stop in drawn and stop not in drawn[:-len(last)]


def test_int8_cache_is_near_and_its_error_is_that_of_its_rounding():
  exact, rough = make().run(requests(Sampler(0.0))), make(kv='int8').run(requests(Sampler(0.0)))
  first = np.array([[r.logp[0], q.logp[0]] for r, q in zip(flat(exact), flat(rough))])
  np.testing.assert_allclose(first[:, 0], first[:, 1], atol=0.05)
  same = [a.tokens.tolist() == b.tokens.tolist() for a, b in zip(flat(exact), flat(rough))]
  assert np.mean(same) > 0.5


def test_the_policy_is_not_changed_under_a_group():
  one = make()
  handle = one.submit(requests(num_samples=2)[0])
  one.advance(1)
  with pytest.raises(UserError, match='2 responses of version 0 are under way.*version 5'):
    one.load(PARAMS, 5)
  done = [r for _, r in one.advance(30) if r.finish]
  assert len(done) == 2 and all(r.version == 0 for r in done) and handle is not None
  other = jax.tree.map(lambda x: x * 1.5, PARAMS)
  one.load(other, 5)
  new = flat(one.run(requests()))
  assert all(r.version == 5 for r in new)
  assert any(r.tokens.tolist() != expected(Sampler())[r.id, r.sample][0].tolist() for r in new)
  one.load(PARAMS, 0)
  assert_equal(flat(one.run(requests())), expected(Sampler()))


def test_nothing_compiles_after_the_engine_is_made(caplog):
  one = make()
  one.run(requests())
  with jax.log_compiles():
    one.run(requests(Sampler(0.7, top_k=5), num_samples=2, stop_strings=('AB',)))
    one.run([Request((1,), 99, 1)])
  assert [r.message for r in caplog.records if 'Compiling' in r.message] == []
  one.load({**PARAMS, 'embed': PARAMS['embed'].astype(jnp.bfloat16)}, 1)
  with pytest.raises(RuntimeError, match='compiled again'):
    one.advance(0)
  make.cache_clear()


@pytest.mark.parametrize('fields, message', [
    ({'prompt': ()}, 'the prompt is empty'),
    ({'prompt': (1,) * 9}, 'has 9 tokens and the cache takes 8'),
    ({'prompt': (1, VOCAB)}, 'token 19, outside the vocabulary'),
    ({'stop': (-3,)}, 'stop holds token -3'),
    ({'max_tokens': 25}, 'write 1 to 24'),
    ({'max_tokens': 0}, 'write 1 to 24'),
    ({'num_samples': 17}, 'write 1 to 16'),
    ({'stop_strings': ('',)}, 'stop string .*1 to 32 bytes'),
    ({'stop_strings': ('a',) * 9}, '9 entries in stop_strings; at most 8'),
    ({'max_thought': 3}, 'no marker that ends thinking'),
    ({'max_thought': 3, 'begins_thinking': False}, 'no marker that ends thinking'),
    ({'max_answer': -1}, 'max_answer = -1'),
])
def test_a_wrong_request_is_refused_alone(fields, message):
  one = make()
  good = requests(num_samples=1)[:2]
  handles = [one.submit(r) for r in good]
  with pytest.raises(UserError, match=message):
    one.submit(dataclasses.replace(Request((1, 2), 40, 5), **fields))
  done = [r for h, r in one.advance(60) if r.finish and h in handles]
  assert_equal(done, expected(Sampler()))
  assert len(done) == 2


def test_a_full_queue_says_so_and_takes_requests_again():
  one = make()
  for request in requests():
    one.submit(request)  # 15 of 16 rows
  with pytest.raises(BlockingIOError, match='room for 1'):
    one.submit(Request((1,), 5, 3, 2))
  responses = [r for _, r in one.advance(200) if r.finish]
  assert_equal(responses, expected(Sampler()))
  assert one.room() == 16


@pytest.mark.parametrize('activations', ['int8', 'int4'])
def test_products_of_ternary_weights_do_not_depend_on_the_batch(activations):
  """A row alone and among 63 others: bit-equal, whatever the order of summation."""
  x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((64, 192), (192, 160))))
  codes, scale = quant.activations(x, activations)
  w_codes, w_scale = quant.ternary(w)
  run = jax.jit(lambda codes, scale: ops.product(codes, scale, w_codes, w_scale, activations,
                                                 ('embed', 'heads'), jnp.float32))
  together = np.asarray(run(codes, scale))
  for i in (0, 17, 63):
    np.testing.assert_array_equal(together[i], np.asarray(run(codes[i:i + 1], scale[i:i + 1]))[0])
  # absmax is exact too; the mean of int4's absmean is a sum of floats.
  if activations == 'int8':
    alone = quant.activations(x[17:18], activations)
    np.testing.assert_array_equal(alone[0][0], codes[17])
    np.testing.assert_array_equal(alone[1][0], scale[17])
