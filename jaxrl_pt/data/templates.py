"""Tokens that stand round a context when a policy is asked for its next token.

The context keeps the tokens that the corpus gave it; what stands round it is encoded apart.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_pt.types import Prompts


@dataclass(frozen=True)
class TokenTemplate:
  """Token ids before and after the context."""

  before: tuple[int, ...] = ()
  after: tuple[int, ...] = ()


def apply(template: TokenTemplate, prompts: Prompts) -> Prompts:
  """Puts the template round the contexts of a batch.

  Args:
    template: M₁ tokens before, M₂ after.
    prompts: tokens i32[N, T] of plain contexts, on the host.

  Returns:
    Prompts with tokens i32[N, M₁ + T + M₂] and longer lengths; all else is as it was.
  """
  tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
  num_before, num_after = len(template.before), len(template.after)
  num_rows, width = tokens.shape
  whole = np.zeros((num_rows, num_before + width + num_after), np.int32)
  whole[:, :num_before] = template.before
  is_token = np.arange(width) < lengths[:, None]
  whole[:, num_before:num_before + width] = np.where(is_token, tokens, 0)
  place = num_before + lengths[:, None] + np.arange(num_after)
  whole[np.arange(num_rows)[:, None], place] = template.after
  longer: Any = (lengths + num_before + num_after).astype(np.int32)
  framed: Any = whole
  return dataclasses.replace(prompts, tokens=framed, lengths=longer)
