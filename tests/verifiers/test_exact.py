"""The device's exact answer match equals its definition on lists."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Prompts, Rollout
from jaxrl_pt.verifiers import exact
from jaxrl_pt.verifiers.judgement import Outcome

MARKER, STOP, N, G, S, W = 5, 6, 3, 4, 6, 3
_device = jax.jit(exact.answer_match)


def test_definition_by_hand():
  judge = lambda tokens, answer: exact.judge_tokens(tokens, answer, MARKER, STOP)
  assert judge([1, 2, MARKER, 3, 4, STOP], [3, 4]) is Outcome.CORRECT
  assert judge([MARKER, 1, MARKER, 3, STOP], [3]) is Outcome.CORRECT  # the last marker
  assert judge([MARKER, 3, 4, STOP], [3]) is Outcome.WRONG
  assert judge([MARKER, 3, STOP], [3, 4]) is Outcome.WRONG
  assert judge([MARKER, STOP], [3]) is Outcome.WRONG
  assert judge([MARKER, 3], [3]) is Outcome.UNPARSED  # did not end
  assert judge([3, STOP], [3]) is Outcome.UNPARSED
  assert judge([], [3]) is Outcome.UNPARSED


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_device_equals_definition(data):
  tokens = np.array(data.draw(st.lists(st.integers(3, 6), min_size=N * G * S,
                                       max_size=N * G * S)), np.int32).reshape(N, G, S)
  lengths = np.array(data.draw(st.lists(st.integers(0, S), min_size=N * G, max_size=N * G)))
  answer_lengths = np.array(data.draw(st.lists(st.integers(0, W), min_size=N, max_size=N)))
  answers = np.array(data.draw(st.lists(st.integers(3, 4), min_size=N * W, max_size=N * W)),
                     np.int32).reshape(N, W)
  # Half of the responses are made right, but for what their end then looks like.
  for n, g in np.ndindex(N, G):
    length, wanted = lengths.reshape(N, G)[n, g], answer_lengths[n]
    if g % 2 and length >= wanted + 2:
      tail = [MARKER, *answers[n, :wanted], STOP]
      tokens[n, g, length - len(tail):length] = tail
  mask = (np.arange(S) < lengths.reshape(N, G)[..., None]).astype(np.float32)
  found = _device(tokens, mask, answers, answer_lengths, MARKER, STOP)
  expected = [[exact.judge_tokens(tokens[n, g][mask[n, g] > 0].tolist(),
                                  answers[n, :answer_lengths[n]].tolist(), MARKER, STOP)
               is Outcome.CORRECT for g in range(G)] for n in range(N)]
  np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_verifier_reads_the_answer_in_the_prompt():
  prompts = Prompts(jnp.ones((1, 2), jnp.int32), jnp.array([2]), jnp.array([0]),
                    jnp.array([[3, 4, 0]]), jnp.array([2]), jnp.zeros(1))
  tokens = jnp.array([[[MARKER, 3, 4, STOP], [MARKER, 3, 3, STOP]]])
  rollout = Rollout(tokens, jnp.ones(tokens.shape), jnp.zeros(tokens.shape), jnp.int32(0))
  verdict = jax.jit(exact.device_verifier(MARKER, STOP))(prompts, rollout)
  for array in (verdict.reward, verdict.correct, verdict.parts['answer']):
    np.testing.assert_array_equal(array, [[1, 0]])
  np.testing.assert_array_equal(verdict.valid, [[1, 1]])
