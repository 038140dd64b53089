"""RPT that reasons in tokens: its frame, and its accuracy against plain decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import templates, tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.train import rpt
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
  prompts = Prompts(tokens, lengths, np.arange(6, dtype=np.int32), continuation,
                    np.array([len(t) for t in truth], np.int32), np.full(6, 2.0, np.float32))
  frame = rpt.Frame(templates.TokenTemplate(after=(THINK,)), ANSWER)
  method = cfg.RPT('unused', rollouts=cfg.Rollouts(response_tokens=NUM_TOKENS))
  got = jax.jit(lambda params, prompts: rpt.next_token_accuracy(
      MODEL, params, prompts, jax.random.key(0), token_table(SPELLED, VOCAB),
      method=method, num_samples=2, stop_id=END, frame=frame))(
          PARAMS, templates.apply(frame.template, prompts))
  assert float(got['hard_argmax'].sum) == sum(want_argmax)
  assert float(got['hard_direct'].sum) == sum(want_direct)
  assert got['hard_sampled'].count == 12
  assert 0 < sum(want_argmax) != sum(want_direct) > 0


def test_frame_of_markers():
  bytes_only = tokenizer.ByteTokenizer()
  frame = rpt.make_frame(cfg.Reason('\x01', '\x02'), bytes_only)
  assert (frame.template.after, frame.marker, frame.num_after) == ((1,), 2, 1)
  assert rpt.make_frame(cfg.Direct(), bytes_only) == rpt.Frame()
  with pytest.raises(UserError, match=r"Reason.think = '<think>' is 7 tokens"):
    rpt.make_frame(cfg.Reason(), bytes_only)
  with pytest.raises(UserError, match=r'Reason.answer'):
    cfg.Reason('#', '#')
