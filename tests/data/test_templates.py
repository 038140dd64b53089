"""Templates: what they ask, and that contexts keep their tokens inside them."""

import numpy as np
import pytest

from jaxrl_pt.data import templates, tokenizer
from jaxrl_pt.types import Prompts
from jaxrl_pt.verifiers import next_token as verifier


def prompts():
  tokens = np.array([[5, 6, 7, 0], [8, 9, 9, 9]], np.int32)
  lengths = np.array([3, 1], np.int32)
  return Prompts(tokens, lengths, np.array([4, 5], np.int32), extras={
      'continuation': np.array([[1], [2]], np.int32)})


def test_contexts_stand_between_before_and_after():
  framed = templates.apply(templates.TokenTemplate((1, 2), (3,)), prompts())
  np.testing.assert_array_equal(framed.tokens, [[1, 2, 5, 6, 7, 3, 0], [1, 2, 8, 3, 0, 0, 0]])
  np.testing.assert_array_equal(framed.lengths, [6, 4])
  np.testing.assert_array_equal(framed.extras['continuation'], prompts().extras['continuation'])
  np.testing.assert_array_equal(framed.ids, prompts().ids)


def test_the_empty_template_changes_nothing_that_counts():
  framed = templates.apply(templates.TokenTemplate(), prompts())
  np.testing.assert_array_equal(framed.tokens, [[5, 6, 7, 0], [8, 0, 0, 0]])
  np.testing.assert_array_equal(framed.lengths, prompts().lengths)


@pytest.mark.parametrize('variant', templates.TEMPLATES)
def test_every_variant_asks_for_a_box_and_keeps_the_context(variant):
  template, tok = templates.TEMPLATES[variant], tokenizer.ByteTokenizer()
  context = ' Was ist  1 + 1 ='
  text = template.render(context)
  assert text.count(context) == 1
  assert '\\boxed{}' in text
  ids = np.array([tok.encode(context)], np.int32)
  one = Prompts(ids, np.array([ids.shape[1]]), np.zeros(1, np.int32))
  framed = templates.apply(templates.encode(template, tok, (256,), (256, 256)), one)
  got = framed.tokens[0, :framed.lengths[0]]
  assert got[0] == 256 and got[-2:].tolist() == [256, 256]
  assert tok.decode(got) == text
  # The question itself is no answer: a policy that repeats it has predicted nothing.
  assert verifier.extract_prediction(verifier.THINK_END + template.before) != context


def test_variants_differ_as_the_paper_says():
  text = {name: t.before + t.after for name, t in templates.TEMPLATES.items()}
  assert len(set(text.values())) == 7
  assert {n for n, t in text.items() if '```' in t} == {'v1', 'v2', 'v3', 'v5', 'v6'}
  assert {n for n, t in text.items() if 'several' in t} == {'v5', 'v6'}
  assert text['v4'].count('Answer:') == 3
