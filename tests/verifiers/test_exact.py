"""The device's exact answer match equals its definition on lists, whatever the tokenizer."""

import functools
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import generated
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.types import Prompts, RolloutBatch
from jaxrl_pt.verifiers import exact
from jaxrl_pt.verifiers.response_verdict import Outcome

N, G, S, W = 3, 4, 7, 3
STOP = 0
# Tokens that merge markers with their neighbours, one without bytes, and the stop.
SPELLED = [b'', b'#', b'1', b'2', b'#1', b'2#', b'##', b'12', b'']
TABLE = token_table(SPELLED, len(SPELLED))
ARITHMETIC = cfg.Arithmetic(size=100, num_terms=3, noise=0.0)
SHARED = Path(__file__).parents[2] / '../shared/data'


@functools.cache
def _device(marker: bytes):
  return jax.jit(functools.partial(exact.answer_match, TABLE, marker=marker, stop_ids=(STOP,)))


def _outcome(tokens, answer, marker=b'#'):
  return exact.verify_tokens(tokens, answer, marker, (STOP,), SPELLED)


def test_definition_by_hand():
  assert _outcome([2, 3, 1, 2, 3, STOP], b'12') is Outcome.CORRECT
  assert _outcome([2, 3, 4, 3, STOP], b'12') is Outcome.CORRECT  # '#1' is one token
  assert _outcome([1, 2, 5, 7, STOP], b'12') is Outcome.CORRECT  # '2#' is one token
  assert _outcome([1, 2, 1, 3, STOP], b'2') is Outcome.CORRECT  # the last marker
  assert _outcome([1, 2, 3, STOP], b'1') is Outcome.WRONG
  assert _outcome([1, 2, STOP], b'12') is Outcome.WRONG
  assert _outcome([1, STOP], b'1') is Outcome.WRONG
  assert _outcome([1, 2], b'1') is Outcome.UNPARSED  # did not end
  assert _outcome([2, STOP], b'1') is Outcome.UNPARSED
  assert _outcome([], b'1') is Outcome.UNPARSED


def test_any_of_several_stop_tokens_ends_an_answer():
  others = (STOP, SPELLED.index(b'2'))
  responses = [[1, 2, STOP], [1, 2, others[1]], [1, 2, 2]]
  for tokens in responses:
    expected = exact.verify_tokens(tokens, b'1', b'#', others, SPELLED)
    assert (expected is Outcome.CORRECT) == (tokens[-1] in others)
    found = exact.answer_match(TABLE, jnp.asarray([[tokens]]), jnp.ones((1, 1, 3)),
                               jnp.asarray([[ord('1')]]), jnp.asarray([1]), b'#', others)
    assert found.item() == (expected is Outcome.CORRECT)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([b'#', b'##', b'2#1']))
def test_device_equals_definition(data, marker):
  draw = lambda low, high, size: np.array(data.draw(
      st.lists(st.integers(low, high), min_size=size, max_size=size)), np.int32)
  tokens = draw(0, len(SPELLED) - 1, N * G * S).reshape(N, G, S)
  lengths = draw(0, S, N * G).reshape(N, G)
  answer_lengths = draw(1, W, N)
  answers = draw(ord('1'), ord('2'), N * W).reshape(N, W)
  # Half of the responses end with the stop, and with the answer, as often as they have room.
  for n, g in np.ndindex(N, G):
    tail = [*(SPELLED.index(bytes([b])) for b in marker),
            *(SPELLED.index(bytes([b])) for b in answers[n, :answer_lengths[n]]), STOP]
    if g % 2 and lengths[n, g] >= len(tail):
      tokens[n, g, lengths[n, g] - len(tail):lengths[n, g]] = tail
  mask = (np.arange(S) < lengths[..., None]).astype(np.float32)
  found = _device(marker)(tokens, mask, answers, answer_lengths)
  verified = [[exact.verify_tokens(tokens[n, g, :lengths[n, g]].tolist(),
                                bytes(answers[n, :answer_lengths[n]].tolist()), marker, (STOP,),
                                SPELLED) for g in range(G)] for n in range(N)]
  np.testing.assert_array_equal(found, np.array([[j is Outcome.CORRECT for j in row]
                                                 for row in verified], np.float32))
  there = exact.has_marker(exact.marker_reader(TABLE, marker), jnp.asarray(tokens),
                           jnp.asarray(mask))
  spelled = [[b''.join(SPELLED[t] for t in tokens[n, g, :lengths[n, g]]) for g in range(G)]
             for n in range(N)]
  np.testing.assert_array_equal(there, np.array([[marker in text for text in row]
                                                 for row in spelled], np.float32))


def _verify(rollouts, answer):
  """The verdict on the responses to one prompt with this answer."""
  prompts = Prompts(jnp.ones((1, 2), jnp.int32), jnp.array([2]), jnp.array([0]),
                    extras={'answer': jnp.array([[*answer, 0]]),
                            'answer_lengths': jnp.array([len(answer)])})
  return jax.jit(exact.device_verifier(TABLE, b'#', (STOP,)))(prompts, rollouts)


def test_verifier_reads_the_answer_in_the_prompt():
  tokens = jnp.array([[[1, 2, 3, STOP], [1, 2, 2, STOP], [2, 2, 3, STOP]]])
  rollouts = RolloutBatch.of_one_turn(tokens, jnp.ones(tokens.shape), jnp.zeros(tokens.shape), 0)
  verdict = _verify(rollouts, b'12')
  for array in (verdict.reward, verdict.correct, verdict.parts['answer']):
    np.testing.assert_array_equal(array, [[1, 0, 0]])
  np.testing.assert_array_equal(verdict.parts['parsed'], [[1, 1, 0]])
  np.testing.assert_array_equal(verdict.valid, [[1, 1, 1]])


@pytest.mark.parametrize('forced', [2, SPELLED.index(b'12'), STOP])
def test_a_forced_token_belongs_to_the_response(forced):
  """A response of four tokens, the first of which the policy did not draw, and its stop."""
  tokens = jnp.array([[[forced, 1, 3, STOP, 5]]])
  in_response = jnp.array([[[1.0, 1, 1, 1, 0]]])
  sampled = in_response.at[..., 0].set(0)
  rollouts = RolloutBatch(tokens, in_response, sampled, jnp.zeros(tokens.shape),
                          jnp.zeros_like(tokens), jnp.zeros_like(tokens))
  assert rollouts.lengths().tolist() == [[4]]
  verdict = _verify(rollouts, b'2')
  assert verdict.reward.tolist() == verdict.parts['parsed'].tolist() == [[1]]
  # Of the drawn tokens alone the last would not be the stop.
  drawn = RolloutBatch.of_one_turn(tokens, sampled, rollouts.logp, 0)
  assert _verify(drawn, b'2').reward.tolist() == [[0]]


# --- Real tokenizers ----------------------------------------------------------------


@pytest.mark.parametrize('name', [
    'bytes', 'trained', 'gpt2', 'deepseek', 't5',
    pytest.param('mistral', marks=pytest.mark.slow)])  # SentencePiece, as that of t5
def test_correct_demonstrations_are_correct_with_every_tokenizer(name):
  """… and wrong ones wrong, equal to the definition, although tokenizers merge `;#` and `#7`."""
  tokenizer = _tokenizer(name)
  problems = [generated.problem(ARITHMETIC, i) for i in range(ARITHMETIC.size)]
  responses = [[*tokenizer.encode(p.demonstration), tokenizer.eos_id] for p in problems]
  answers = [p.answer for p in problems[:50]] + [p.answer + '0' for p in problems[50:]]
  table = token_table(tokenizer.token_bytes(), tokenizer.vocab_size)
  most, width = max(map(len, responses)), max(map(len, answers))
  tokens, mask = np.zeros((100, 1, most), np.int32), np.zeros((100, 1, most), np.float32)
  references = np.zeros((100, width), np.int32)
  for n, (response, answer) in enumerate(zip(responses, answers, strict=True)):
    tokens[n, 0, :len(response)], mask[n, 0, :len(response)] = response, 1
    references[n, :len(answer)] = list(answer.encode())
  prompts = Prompts(jnp.ones((100, 1), jnp.int32), jnp.ones(100, jnp.int32), jnp.arange(100),
                    extras={'answer': references,
                            'answer_lengths': np.array([len(a) for a in answers])})
  verify = jax.jit(exact.device_verifier(table, b'#', (tokenizer.eos_id,)))
  verdict = verify(prompts, RolloutBatch.of_one_turn(tokens, mask, jnp.zeros(mask.shape), 0))
  np.testing.assert_array_equal(verdict.reward[:, 0], np.arange(100) < 50)
  np.testing.assert_array_equal(verdict.parts['parsed'], 1)
  spelled = tokenizer.token_bytes()
  expected = [exact.verify_tokens(r, a.encode(), b'#', (tokenizer.eos_id,), spelled)
              is Outcome.CORRECT for r, a in zip(responses, answers, strict=True)]
  assert expected == [True] * 50 + [False] * 50


def _tokenizer(name: str) -> tokenizers.Tokenizer:
  asked = [generated.problem(ARITHMETIC, i) for i in range(100)]
  documents = [p.prompt + p.demonstration for p in asked]
  match name:
    case 'bytes':
      return tokenizers.ByteTokenizer()
    case 'trained':
      return tokenizers.train_or_load(cfg.TrainedBPE(300), documents)
  kind, path, *ends = {
      'gpt2': (cfg.HuggingFaceTokenizer, 'tok-gpt2/gpt2.tokenizer.json.gz', '<|endoftext|>', ''),
      'deepseek': (cfg.HuggingFaceTokenizer, 'tok-deepseek-r1/tokenizer.json.gz',
                   '<｜end▁of▁sentence｜>', ''),
      'mistral': (cfg.SentencePiece, 'tok-mistral/tokenizer.model.v1'),
      't5': (cfg.SentencePiece, 'tok-t5-nanodo/sentencepiece_cc_all.32000.100extra.model')}[name]
  if kind is cfg.SentencePiece:
    pytest.importorskip('sentencepiece', reason='the extra `sentencepiece` is not installed')
  if not (SHARED / path).exists():
    pytest.skip(f'{SHARED / path} is not on this machine')
  return tokenizers.train_or_load(kind(str(SHARED / path), *ends), documents)
