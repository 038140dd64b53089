"""Contexts keep their tokens inside a template."""

import numpy as np

from jaxrl_pt.data import templates
from jaxrl_pt.types import Prompts


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
