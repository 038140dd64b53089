"""How a model is asked which of two responses to a query is better, and what it says.

    (query, first, second) → prompt → request of the engine → response → verdict
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
import hashlib
import json
import os
from typing import NamedTuple

from jaxrl_pt import config as cfg
from jaxrl_pt.data import chat, chat_files, judge_prompts
from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.sampling.engine import Request, Response
from jaxrl_pt.verifiers.judge import verdict


class Shown(NamedTuple):
  """A comparison as texts."""

  query: str
  first: str
  second: str


@dataclass(frozen=True)
class Speaker:
  """How a model is asked for verdicts.

  prompt: the texts of a prompt, and how a verdict is stated.
  tokenizer: of the model.
  template: the chat template that puts the texts to the model; None where it has no chats.
  sampler: temperature and filters of its responses.
  num_tokens: the most tokens of a response.
  is_direct: whether a response begins with what both verdicts begin with, so that the next token
    names the better response and no reasoning comes before it.
  """

  prompt: cfg.JudgePrompt
  tokenizer: Tokenizer
  template: chat.ChatTemplate | None = None
  sampler: cfg.Sampler = cfg.Sampler()
  num_tokens: int = 2048
  is_direct: bool = False

  def tokens(self, shown: Shown) -> list[int]:
    """The prompt of a comparison."""
    user = judge_prompts.text(self.prompt, *shown)
    if self.template is None:
      whole = judge_prompts.without_chat(self.prompt, user)
      return begun(self.tokenizer, self.tokenizer.encode(whole))
    asked = judge_prompts.messages(judge_prompts.system_text(self.prompt), user)
    return chat.prompt_ids(self.template, self.tokenizer, asked)

  def stop_ids(self) -> tuple[int, ...]:
    """The tokens that end a response."""
    if self.template is None:
      return self.tokenizer.stop_ids
    return chat_files.end_tokens(self.template, self.tokenizer)

  def forced(self) -> tuple[int, ...]:
    """The tokens that both verdicts begin with, for a judge that does not reason."""
    if not self.is_direct:
      return ()
    both = [self.tokenizer.encode(self.prompt.verdict.text(place)) for place in (0, 1)]
    return tuple(os.path.commonprefix(both))

  def request(self, shown: Shown, tokens: Sequence[int], first_sample: int, num_votes: int
              ) -> Request:
    """What is asked of an engine for some verdicts of a comparison.

    The comparison's texts address the noise, so that its verdicts do not depend on what else is
    asked.

    Args:
      shown: the comparison.
      tokens: its prompt.
      first_sample: the number of the first verdict.
      num_votes: how many of them.
    """
    return Request(tuple(tokens), _address(shown), self.num_tokens, num_votes, self.sampler,
                   self.stop_ids(), forced=self.forced(), first_sample=first_sample)

  def said(self, response: Response) -> tuple[str, int]:
    """The text of a response, and its verdict FIRST, SECOND or NONE."""
    text = self.tokenizer.decode(response.tokens.tolist())
    return text, verdict(text, self.prompt.verdict)


def distinct(query: str, texts: Iterable[str]) -> list[str]:
  """The different ones among the texts, in an order that follows from their hashes.

  Tournaments are drawn by number, and of texts in the order in which they came the first ones are
  more often the better ones: of sampled responses the most frequent, of documents what a retriever
  found first. A judge that prefers a place would then seem to know them.
  """
  return sorted(set(texts), key=lambda text: (_address((query, text)), text))


def _address(texts: tuple[str, ...]) -> int:
  """31 bits of a hash of the texts."""
  hashed = hashlib.sha256(json.dumps(texts).encode(errors='backslashreplace')).digest()
  return int.from_bytes(hashed[:4], 'big') >> 1
