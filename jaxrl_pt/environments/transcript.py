"""Episodes as tokens: the prompt they begin with, and what stands between two texts of the policy.

    opening | text of turn 0 | ending, observation, opening | text of turn 1 | …

The template is a few texts (`cfg.ChatTemplate`). Tokens that have been drawn stay as they are; what
is put after them is encoded once, apart from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxrl_pt import config as cfg
from jaxrl_pt.data import template_text, token_table
from jaxrl_pt.data.template_text import Span
from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.environments.interactive import Message
from jaxrl_pt.errors import UserError

_CONTENT = '{content}'
_ROLES = ('system', 'user', 'assistant')
CUT = ' [cut]'  # ends an observation of which the policy reads only the beginning


class Seen(NamedTuple):
  """What follows a text of the policy, up to where the next one begins."""

  tokens: list[int]
  is_cut: bool  # whether a part of the observation is left out


@dataclass(frozen=True)
class Transcript:
  """How the episodes of one environment are written in one tokenizer.

  stop: tokens that end a text of the policy; the first is end of text.
  stop_strings: texts that end it.
  observation_tokens: the largest number of tokens of an observation.
  """

  tokenizer: Tokenizer
  template: cfg.ChatTemplate
  stop: tuple[int, ...]
  stop_strings: tuple[str, ...]
  observation_tokens: int

  def opening(self, messages: Sequence[Message]) -> list[int]:
    """The tokens of the first messages, up to where the policy's first text begins.

    Raises:
      ValueError: a message has a role that the template does not know.
    """
    for message in messages:
      if message.role not in _ROLES:
        raise ValueError(f'the role {message.role!r} is none of {", ".join(_ROLES)}')
    return begun(self.tokenizer, template_text.encode(self.tokenizer, self._spans(messages)))

  def _spans(self, messages: Sequence[Message]) -> list[Span]:
    """The texts of messages, up to where the policy's next text begins."""
    chosen = self.template
    turns = {'system': chosen.system, 'user': chosen.user,
             'assistant': f'{chosen.opening}{_CONTENT}{chosen.ending}'}
    spans = []
    for message in messages:
      first, *others = turns[message.role].split(_CONTENT)
      spans.append(Span(first, True))
      for text in others:
        spans += [Span(message.content, False), Span(text, True)]
    return [*spans, Span(chosen.opening, True)]

  def said(self, tokens: Sequence[int], finish: str) -> str:
    """The text of a turn, without what ended it.

    Args:
      tokens: all tokens that were drawn in the turn.
      finish: why it ended, as in `engine.Response`.
    """
    text = self.tokenizer.decode(list(tokens[:-1] if finish == 'stop' else tokens))
    places = [text.find(s) for s in self.stop_strings if s in text]
    return text[:min(places)] if finish == 'stop_string' and places else text

  def answer(self, tokens: Sequence[int], finish: str, observation: str) -> Seen:
    """What follows the tokens of a turn, whose text has been answered with an observation."""
    shown, is_cut = self._shown(observation)
    spans = [Span(self.template.ending, True), *self._spans([Message('user', shown)])]
    spans = _without(spans, self._num_drawn(tokens, finish))
    return Seen(template_text.encode(self.tokenizer, spans), is_cut)

  def _shown(self, observation: str) -> tuple[str, bool]:
    ids = self.tokenizer.encode(observation)
    if len(ids) <= self.observation_tokens:
      return observation, False
    # The last token may hold the beginning of a character only.
    kept = self.tokenizer.decode(ids[:self.observation_tokens]).rstrip('\ufffd')
    return kept + CUT, True

  def _num_drawn(self, tokens: Sequence[int], finish: str) -> int:
    """How many characters of what precedes an observation the policy has drawn itself."""
    special = self.tokenizer.special_tokens
    lead = self.template.ending + self.template.user.partition(_CONTENT)[0]
    if finish == 'stop':
      texts = [text for text, token in special.items() if token == tokens[-1]]
      return max((len(text) for text in texts if lead.startswith(text)), default=0)
    first_special = min((a for a, _ in token_table.find_special(special, lead)), default=len(lead))
    text = self.tokenizer.decode(list(tokens))
    return max(k for k in range(first_special + 1) if text.endswith(lead[:k]))


def make_transcript(settings: cfg.Interactive, tokenizer: Tokenizer) -> Transcript:
  """How the episodes of `settings` are written.

  Raises:
    UserError: a stop text holds a special token beside other text.
  """
  template, special = settings.template, tokenizer.special_tokens
  strings = tuple(text for text in template.stop if text not in special)
  for text in strings:
    if token_table.find_special(special, text):
      raise UserError(f'ChatTemplate.stop = {text!r} holds a special token beside other text, '
                      'which no answer can spell: write the token alone.')
  stop = dict.fromkeys((*tokenizer.stop_ids, *(special[t] for t in template.stop if t in special)))
  return Transcript(tokenizer, template, tuple(stop), strings, settings.observation_tokens)


def _without(spans: Sequence[Span], num_chars: int) -> list[Span]:
  """The spans without the first characters of their joined text."""
  left = []
  for span in spans:
    taken = min(num_chars, len(span.text))
    num_chars -= taken
    left.append(Span(span.text[taken:], span.is_template))
  return left
