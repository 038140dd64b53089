"""RPT's held-out accuracy against plain decoding; RPT that reasons in tokens, its template."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import templates, tokenizer
from jaxrl_pt.environments import next_token as environment
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.types import Prompts
from jaxrl_pt.verifiers import next_token as verifier

VOCAB, END, THINK, ANSWER = 12, 0, 10, 11
MODEL = transformer.build(cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1,
                                    head_dim=8, vocab_size=VOCAB, tied_head=False))
PARAMS = P.init(MODEL.specs, jax.random.key(0))
# So that some thoughts end.
PARAMS = {**PARAMS, 'head': PARAMS['head'].at[:, ANSWER].multiply(2)}
SPELLED = [b'', *(bytes([96 + i]) for i in range(1, 10)), b'', b'']
CONTEXTS = [[3, 1, 4], [5, 2], [6, 5, 3, 8], [7], [1, 1], [9, 4, 2]]
NUM_TOKENS = 6


def greedy(sequence, num_tokens):
  """The likeliest tokens after a sequence, each from a whole forward pass; stops after END."""
  response = []
  while len(response) < num_tokens and (not response or response[-1] != END):
    tokens = jnp.asarray([[*sequence, *response, *[0] * (12 - len(sequence) - len(response))]])
    positions = jnp.arange(12)[None]
    hidden = _apply(PARAMS, tokens, positions, jnp.ones_like(positions))
    last = hidden[0, len(sequence) + len(response) - 1]
    response.append(int((last @ MODEL.head(PARAMS)).argmax()))
  return response


_apply = jax.jit(MODEL.apply)


def test_accuracy_of_thoughts_and_of_plain_prediction():
  thoughts = [greedy([*c, THINK], NUM_TOKENS) for c in CONTEXTS]
  direct = [greedy(c, 1) for c in CONTEXTS]
  predictions = [verifier.prediction_tokens(t, ANSWER) for t in thoughts]
  assert any(predictions)
  # The truth is what the thought predicts where it predicts, else the direct prediction.
  truth = [p or d for p, d in zip(predictions, direct)]
  spelled = lambda ids: [SPELLED[i] for i in ids]
  want_argmax = [verifier.prefix_match(b''.join(spelled(p)), spelled(t))
                 for p, t in zip(predictions, truth)]
  want_direct = [verifier.prefix_match(b''.join(spelled(d)), spelled(t))
                 for d, t in zip(direct, truth)]
  tokens = np.zeros((6, 5), np.int32)
  for n, context in enumerate(CONTEXTS):
    tokens[n, :len(context)] = context
  lengths = np.array([len(c) for c in CONTEXTS], np.int32)
  continuation = np.zeros((6, NUM_TOKENS), np.int32)
  for n, true in enumerate(truth):
    continuation[n, :len(true)] = true
  prompts = Prompts(tokens, lengths, np.arange(6, dtype=np.int32), extras={
      'continuation': continuation,
      'continuation_lengths': np.array([len(t) for t in truth], np.int32),
      'entropy': np.full(6, 2.0, np.float32)})
  template = environment.PromptTemplate(templates.TokenTemplate(after=(THINK,)), ANSWER)
  method = cfg.RPT('unused', rollouts=cfg.Rollouts(response_tokens=NUM_TOKENS))
  got = jax.jit(lambda params, prompts: environment.next_token_accuracy(
      MODEL, params, prompts, jax.random.key(0), token_table(SPELLED, VOCAB),
      method=method, num_samples=2, stop_ids=(END,), template=template))(
          PARAMS, templates.apply(template.tokens, prompts))
  assert float(got['hard_argmax'].sum) == sum(want_argmax)
  assert float(got['hard_direct'].sum) == sum(want_direct)
  assert got['hard_sampled'].count == 12
  assert 0 < sum(want_argmax) != sum(want_direct) > 0


def test_accuracy_by_difficulty():
  """Of a policy that predicts at once; a position whose entropy is the threshold is not above."""
  vocab = 13
  model = transformer.build(cfg.Model(
      num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=vocab,
      activation='relu2', sub_norm=True))
  params = P.init(model.specs, jax.random.key(0))
  params = {**params, 'embed': params['embed'] * 20}
  spelled = [b'', *(bytes([96 + i]) for i in range(1, vocab - 1)), b'ab']
  table = token_table(spelled, vocab)
  lengths = jnp.asarray([4, 2, 5, 1], jnp.int32)
  tokens = jnp.asarray([[3, 1, 4, 1, 0, 0], [9, 2, 0, 0, 0, 0], [6, 5, 3, 5, 8, 0],
                        [11, 0, 0, 0, 0, 0]], jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(6), (4, 6))
  hidden = jax.jit(model.apply)(params, tokens, positions, jnp.ones_like(positions))
  logits = hidden[jnp.arange(4), lengths - 1] @ model.head(params)
  best, p = np.asarray(logits.argmax(-1)), np.asarray(jax.nn.softmax(logits))
  # The truth is what the model believes at rows 0 and 2, and something else at 1 and 3.
  truth = [int(b) if n % 2 == 0 else int(b) % 3 + 1 + (int(b) < 4) for n, b in enumerate(best)]
  truth = [t if spelled[t] else 1 for t in truth]
  prompts = Prompts(tokens, lengths, jnp.arange(4, dtype=jnp.int32), extras={
      'continuation': jnp.asarray([[t, 0, 0, 0] for t in truth], jnp.int32),
      'continuation_lengths': jnp.ones(4, jnp.int32),
      'entropy': jnp.asarray([0.6, 1.2, 1.7, 0.5], jnp.float32)})
  expected = [verifier.prefix_match(spelled[b], [spelled[t]]) for b, t in zip(best, truth)]
  samples = 4000
  evaluate = jax.jit(functools.partial(
      environment.next_token_accuracy, model, num_samples=samples,
      method=cfg.RPT(start_from='unused', difficulty=(0.5, 1.0, 1.5))))
  got = evaluate(params, prompts, jax.random.key(3), table)
  chance = [p[n, t] for n, t in enumerate(truth)]
  for split, rows in (('easy', [0, 1, 2]), ('medium', [1, 2]), ('hard', [2])):
    argmax, sampled = got[f'{split}_argmax'], got[f'{split}_sampled']
    assert (float(argmax.sum), float(argmax.count)) == (sum(expected[r] for r in rows), len(rows))
    assert sampled.count == samples * len(rows)
    # Five standard errors of a mean of at least 4000 draws are below 0.04.
    np.testing.assert_allclose(sampled.mean(), np.mean([chance[r] for r in rows]), atol=0.04)
  counts = prompts.extras['continuation_lengths'].at[2].set(0)
  without = prompts.replace(extras={**prompts.extras, 'continuation_lengths': counts})
  uncounted = evaluate(params, without, jax.random.key(3), table)
  assert uncounted['hard_argmax'].count == 0
  assert uncounted['easy_argmax'].count == 2


def test_template_of_markers():
  bytes_only = tokenizer.ByteTokenizer()
  template = environment.prompt_template(cfg.Reason('\x01', '\x02'), bytes_only)
  assert (template.tokens.after, template.marker, template.num_after) == ((1,), 2, 1)
  assert environment.prompt_template(cfg.Direct(), bytes_only) == environment.PromptTemplate()
  with pytest.raises(UserError, match=r"Reason.think = '<think>' is 7 tokens"):
    environment.prompt_template(cfg.Reason(), bytes_only)
  with pytest.raises(UserError, match=r'Reason.answer'):
    cfg.Reason('#', '#')
