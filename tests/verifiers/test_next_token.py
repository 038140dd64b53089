"""RPT's reward: the definition by cases, the device version equal to it."""


from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.token_bytes import TokenBytes, token_table
from jaxrl_pt.types import Prompts, RolloutBatch
from jaxrl_pt.verifiers import next_token as v
from jaxrl_pt.verifiers.base import verdict
from jaxrl_pt.verifiers.response_verdict import Outcome, answer

EURO = '€'.encode()  # Three bytes.


@pytest.mark.parametrize('prediction, truth, reward', [
    (b' cat', [b' cat', b' sat'], 1),  # exact token
    (b' cat sat', [b' cat', b' sat', b'.'], 1),  # two tokens
    (b' c', [b' cat', b' sat'], 0),  # partial token
    (b' cat s', [b' cat', b' sat'], 0),  # right bytes, off the boundary
    (b'cat', [b' cat', b' sat'], 0),  # leading space dropped
    (b'', [b' cat'], 0),  # empty
    (EURO, [EURO[:1], EURO[1:], b'5'], 1),  # a character of two tokens
    (EURO[:1], [EURO[:1], EURO[1:]], 1),  # a boundary inside a character
    (EURO[:2], [EURO[:1], EURO[1:]], 0),
    (b'ab', [b'a', b'b'], 1),  # the continuation ends with the prediction
    (b'abc', [b'a', b'b'], 0),  # the continuation ends before it
    (b'cat ', [b'cat', b'\n'], 0),  # trailing whitespace counts
    (b'', [b'', b'a'], 0),  # a special token does not make 0 a boundary
    (b'a', [b'', b'a'], 1),
    (b'a', [], 0),
])
def test_definition(prediction, truth, reward):
  assert v.prefix_match(prediction, truth) == reward


@pytest.mark.parametrize('prediction, truth, reward', [
    ([b' cat'], [b' cat', b' sat'], 1),
    ([b' cat', b' mat'], [b' cat', b' sat'], 1),  # what follows does not matter
    ([b' c', b'at'], [b' cat'], 0),  # the same bytes, another token
    ([b'', b' cat'], [b'', b' cat'], 1),  # special tokens are passed over
    ([b''], [b' cat'], 0),
    ([], [b' cat'], 0),
    ([b' cat'], [], 0),
    ([], [], 0),
])
def test_definition_of_the_first_token(prediction, truth, reward):
  assert v.first_token_match(prediction, truth) == reward


def test_definition_of_dense_rewards():
  truth = [b' cat', b' sat']
  assert v.dense_match(b' cat', truth, 0.25) == 1
  assert v.dense_match(b' dog', truth, 0.25) == 0.25
  assert v.dense_match(b'', truth, 1.0) == 0
  assert v.gated_dense([0.25, 1.0, 0.5], [0, 1, 0], 0.1) == [0.25, 1.0, 0.5]
  assert v.gated_dense([0.25, 0.125], [0, 0], 0.0) == [0, 0]
  assert v.gated_dense([0.25, 0.125], [0, 0], 0.1) == [-0.1, -0.1]


def test_definition_of_what_follows_the_marker():
  assert v.prediction_tokens([5, 9, 7, 8], 9) == [7, 8]
  assert v.prediction_tokens([9, 7, 9, 8], 9) == [8]
  assert v.prediction_tokens([7, 9], 9) == []
  assert v.prediction_tokens([7, 8], 9) == []
  assert v.prediction_tokens([], 9) == []


def test_host_outcomes():
  outcomes = [[Outcome.CORRECT, Outcome.WRONG], [Outcome.TIMEOUT, Outcome.CRASH],
              [Outcome.UNPARSED, Outcome.CORRECT]]
  verified = verdict([[answer(outcome) for outcome in group] for group in outcomes])
  np.testing.assert_array_equal(verified.reward, [[1, 0], [0, 0], [0, 1]])
  np.testing.assert_array_equal(verified.valid, [[1, 1], [0, 0], [1, 1]])


def test_table_refuses_too_many_tokens_and_fills_up_the_vocabulary():
  with pytest.raises(ValueError, match='3 tokens do not fit a vocabulary of 2'):
    token_table([b'a', b'b', b'c'], 2)
  table = token_table([b'ab', b''], 4)
  np.testing.assert_array_equal(table.lengths, [2, 0, 0, 0])
  np.testing.assert_array_equal(table.bytes[0], [97, 98])


# --- Device against definition --------------------------------------------------

VOCAB, N, G, S, W, LONGEST = 12, 3, 4, 3, 5, 5
_device = jax.jit(v.prefix_match_arrays)
# Few letters, so that different tokenisations of the same bytes are common; with the
# bytes of a multi-byte character, whole and in parts, and a zero byte.
_token = st.sampled_from([b'', b'a', b'b', b'aa', b'ab', b'ba', b'aab', b' a', b' ', b'\x00', EURO,
                          EURO[:1], EURO[1:], EURO[1:2], b'a' + EURO, b'aabab'])


@st.composite
def cases(draw):
  vocabulary = draw(st.lists(_token, min_size=VOCAB, max_size=VOCAB))
  ids = st.integers(0, VOCAB - 1)
  truth = [draw(st.lists(ids, max_size=W)) for _ in range(N)]
  responses = []
  for n in range(N):
    # Half of the predictions copy the truth's first tokens, so that matches are common.
    fresh = st.lists(ids, max_size=S)
    copied = st.integers(0, S).map(lambda k, n=n: truth[n][:k])
    responses.append([draw(fresh | copied) for _ in range(G)])
  return vocabulary, truth, responses


def device_rewards(vocabulary, truth, responses, filler):
  width = max(1, LONGEST)
  table = token_table(vocabulary, VOCAB)
  padding = ((0, 0), (0, width - table.bytes.shape[1]))
  table = TokenBytes(jnp.pad(table.bytes, padding), table.lengths)
  tokens = np.full((N, G, S), filler, np.int32)
  mask = np.zeros((N, G, S), np.float32)
  continuation = np.full((N, W), filler, np.int32)
  for n in range(N):
    continuation[n, :len(truth[n])] = truth[n]
    for g, response in enumerate(responses[n]):
      tokens[n, g, :len(response)] = response
      mask[n, g, :len(response)] = 1
  lengths = np.array([len(t) for t in truth], np.int32)
  return np.asarray(_device(table, tokens, mask, continuation, lengths))


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(0, VOCAB - 1))
def test_device_equals_definition(case, filler):
  vocabulary, truth, responses = case
  expected = [[v.prefix_match(b''.join(vocabulary[i] for i in response),
                              [vocabulary[i] for i in truth[n]])
               for response in responses[n]] for n in range(N)]
  np.testing.assert_array_equal(device_rewards(vocabulary, truth, responses, filler), expected)


def test_device_on_the_cases_of_the_definition():
  vocabulary = [b' cat', b' sat', b'.', b' c', b'at', b'cat', b'', EURO[:1], EURO[1:], EURO, b' s',
                b' cat sat'[:5]]
  truth = [[0, 1, 2], [7, 8, 0], [6, 0]]
  responses = [[[0], [0, 1], [3], [3, 4]],  # ' c' + 'at' spells ' cat': correct
               [[7], [9], [7, 8, 0], [8]],
               [[], [6], [0, 6], [0, 1]]]
  expected = [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0]]
  np.testing.assert_array_equal(device_rewards(vocabulary, truth, responses, 2), expected)
  assert device_rewards(vocabulary, truth, [[[0, 10]] * G] * N, 0)[0, 0] == 0  # off boundary
  assert device_rewards(vocabulary, truth, [[[5]] * G] * N, 0)[0, 0] == 0  # space dropped


# --- The variants on the device --------------------------------------------------

MARKER, PENALTY = 3, 0.25


def host_rewards(case, logp, reward):
  """The definitions applied to one group after another, on bytes."""
  vocabulary, truth, responses = case
  results = []
  for n in range(N):
    true_tokens = [vocabulary[i] for i in truth[n]]
    dense, correct, first = [], [], []
    for g, response in enumerate(responses[n]):
      drawn = v.prediction_tokens(response, MARKER)
      places = range(len(response) - len(drawn), len(response))
      tokens = [vocabulary[i] for i in drawn]
      probability = np.exp(sum(float(logp[n, g, s]) for s in places if vocabulary[response[s]]))
      correct.append(v.prefix_match(b''.join(tokens), true_tokens))
      dense.append(v.dense_match(b''.join(tokens), true_tokens, probability))
      first.append(v.first_token_match(tokens, true_tokens))
    results.append({
        cfg.PrefixMatch(): correct, cfg.FirstTokenMatch(): first, cfg.DenseMatch(): dense,
        cfg.GatedDenseMatch(PENALTY): v.gated_dense(dense, correct, PENALTY)}[reward])
  return results


def _variant(reward):
  def verify(table, tokens, mask, logp, continuation, lengths):
    prompts = Prompts(continuation, lengths, lengths, extras={
        'continuation': continuation, 'continuation_lengths': lengths})
    verdict = v.device_verifier(table, reward, MARKER)(
        prompts, RolloutBatch.of_one_turn(tokens, mask, logp, 0))
    return verdict.reward, verdict.correct
  return jax.jit(verify)


_VARIANTS = {r: _variant(r) for r in (cfg.PrefixMatch(), cfg.FirstTokenMatch(), cfg.DenseMatch(),
                                      cfg.GatedDenseMatch(PENALTY))}


@pytest.mark.parametrize('reward', _VARIANTS, ids=lambda r: type(r).__name__)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 2**16))
def test_variants_equal_their_definitions(reward, case, seed):
  vocabulary, truth, responses = case
  # A marker before some responses, so that many have a prediction.
  responses = [[[MARKER, *r] if (n + g) % 2 else r for g, r in enumerate(group)]
               for n, group in enumerate(responses)]
  width = S + 1
  table = token_table(vocabulary, VOCAB)
  table = TokenBytes(jnp.pad(table.bytes, ((0, 0), (0, LONGEST - table.bytes.shape[1]))),
                       table.lengths)
  tokens, mask = np.full((N, G, width), MARKER, np.int32), np.zeros((N, G, width), np.float32)
  for n in range(N):
    for g, response in enumerate(responses[n]):
      tokens[n, g, :len(response)] = response
      mask[n, g, :len(response)] = 1
  continuation = np.zeros((N, W), np.int32)
  for n in range(N):
    continuation[n, :len(truth[n])] = truth[n]
  logp = np.random.default_rng(seed).uniform(-3, 0, tokens.shape).astype(np.float32)
  lengths = np.array([len(t) for t in truth], np.int32)
  got, correct = _VARIANTS[reward](table, tokens, mask, logp, continuation, lengths)
  case = vocabulary, truth, responses
  np.testing.assert_allclose(got, host_rewards(case, logp, reward), atol=1e-6)
  np.testing.assert_array_equal(correct, host_rewards(case, logp, cfg.PrefixMatch()))


def test_without_a_marker_the_whole_response_is_the_prediction():
  mask = jnp.array([[[1.0, 1.0, 0.0]]])
  np.testing.assert_array_equal(
      v.prediction_mask(jnp.array([[[1, 2, 3]]]), mask, v.NO_MARKER), mask)
  # A marker beyond the response's end is none.
  np.testing.assert_array_equal(v.prediction_mask(jnp.array([[[1, 2, 3]]]), mask, 3), 0 * mask)


def test_a_reward_that_reads_the_policy_is_no_function_of_tokens():
  with pytest.raises(TypeError, match='InformationGain .* environments.rlp'):
    v.device_verifier(token_table([b'a'], 1), cfg.InformationGain())
