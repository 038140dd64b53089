"""Prompt templates: what stands round a context when a policy is asked for its next token.

There are two kinds: a question in words, for models that reason in text (RPT's variants v0 to v6),
and two marker tokens, for models that only ever saw a corpus. Either way the context keeps the
tokens that the corpus gave it; a template is encoded apart and put round them.
"""

from collections.abc import Sequence
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxrl_pt.data import template_text
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.types import Prompts

Variant = Literal['v0', 'v1', 'v2', 'v3', 'v4', 'v5', 'v6']


@dataclass(frozen=True)
class Template:
  """Text before and after the context."""

  before: str
  after: str

  def render(self, context: str) -> str:
    """The question about one context."""
    return self.before + context + self.after


@dataclass(frozen=True)
class TokenTemplate:
  """Token ids before and after the context."""

  before: tuple[int, ...] = ()
  after: tuple[int, ...] = ()


# --- In words ---------------------------------------------------------------------

_BOX = (r'Put the token that comes next, and nothing else, into \boxed{}. A token may begin with '
        r'a space: keep it. Do not write \text{} inside the box.')
_CANDIDATES = ('List several tokens that could come next, weigh each against the context, and '
               'choose the likeliest.')
_FENCE = '```\n'

_EXAMPLES = (
    r'Context: The capital of France is' '\n'
    r'Reasoning: a city must be named, and a word after "is" begins with a space.' '\n'
    r'Answer: \boxed{ Paris}' '\n\n'
    r'Context: 3 + 4 =' '\n'
    r'Reasoning: the sum is 7, set off by a space like the numbers before it.' '\n'
    r'Answer: \boxed{ 7}' '\n\n'
    r'Context: for i in range(10' '\n'
    r'Reasoning: the call is still open, so its bracket closes at once.' '\n'
    r'Answer: \boxed{)}' '\n\n')

# The paper's main experiments use v0. The others differ from it in the fence, the role, the
# examples, and in whether candidates are asked for. The wording is our own.
TEMPLATES: dict[Variant, Template] = {
    'v0': Template(
        'Continue the text below by one token. Reason step by step before you answer.\n'
        f'{_BOX}\n\n### Context\n', ''),
    'v1': Template(
        'You predict text. Think step by step about which token follows the fenced context.\n'
        f'{_BOX}\n\n{_FENCE}', '\n```\n'),
    'v2': Template(
        'You are an expert reader who can tell how any text goes on. The fenced text breaks off; '
        f'reason step by step about its next token.\n{_BOX}\n\n{_FENCE}', '\n```\n'),
    'v3': Template(
        'You are a language model that thinks before it speaks. Work out the next token of the '
        f'fenced text step by step.\n{_BOX}\n\n{_FENCE}', '\n```\n'),
    'v4': Template(
        'Continue the last context by one token, as the three examples do. Reason step by step '
        f'first.\n{_BOX}\n\n{_EXAMPLES}Context: ', '\nReasoning:'),
    'v5': Template(
        f'You predict text. {_CANDIDATES} The context is fenced.\n{_BOX}\n\n{_FENCE}', '\n```\n'),
    'v6': Template(
        f'Which token follows the fenced context?\n\n{_FENCE}',
        f'\n```\n\n{_CANDIDATES} {_BOX}\n'),
}


def encode(template: Template, tokenizer: Tokenizer, opening: Sequence[int] = (),
           closing: Sequence[int] = ()) -> TokenTemplate:
  """Encodes a template in a chat model's tokens.

  Args:
    template: such as `TEMPLATES['v0']`; special tokens written in it are those tokens.
    tokenizer: of the model; the corpus must be packed with it too.
    opening: special tokens that begin the user's turn.
    closing: special tokens that end it and begin the model's, with its think tag.

  Returns:
    The template's ids. Where template and context meet, the tokens may differ from those of the
    rendered text: the context keeps its own, because the truth continues them.
  """
  encode_text = lambda text: template_text.encode(tokenizer, template_text.template(text))
  return TokenTemplate((*opening, *encode_text(template.before)),
                       (*encode_text(template.after), *closing))


# --- Round the contexts of a batch ---------------------------------------------------


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
