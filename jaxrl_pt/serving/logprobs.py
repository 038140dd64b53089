"""Log-probabilities of tokens in the forms of OpenAI's answers.

A drawn token has its log-probability under the distribution it was drawn from, temperature, filters
and constraint included; a forced token has 0. A prompt's token has that under the model's own
distribution, and its first one has none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt.data.tokenizer import Tokenizer

_LEAST = -9999.0  # OpenAI's sign for a token that cannot come; JSON has no infinity.


class Token(NamedTuple):
  """One token of a text with what is known of its place."""

  id: int
  logp: float | None  # None for the first token of a prompt
  offset: int  # number of whole characters of the text before the token
  top: tuple[tuple[int, float], ...]  # the most probable tokens at its place, falling


def tokens_of(ids: Sequence[int], logp: np.ndarray | None, offsets: Sequence[int],
              top_tokens: np.ndarray | None, top_logp: np.ndarray | None) -> list[Token]:
  """The tokens of a piece of a text; the arrays are those of the engine's `Response`."""
  found = []
  for i, token in enumerate(ids):
    top: tuple[tuple[int, float], ...] = ()
    if top_tokens is not None and top_logp is not None:
      top = tuple(zip(top_tokens[i].tolist(), map(_finite, top_logp[i].tolist()), strict=True))
    own = None if logp is None else dict(top).get(token, _finite(float(logp[i])))
    found.append(Token(token, own, offsets[i], top))
  return found


def _finite(logp: float) -> float:
  return max(logp, _LEAST)


class Speller:
  """How tokens are written in answers."""

  def __init__(self, tokenizer: Tokenizer, table: Sequence[bytes]) -> None:
    self._table = table
    self._special = {token: text for text, token in tokenizer.special_tokens.items()}

  def spelled(self, token: int) -> bytes:
    """The bytes that a token adds to the text."""
    return self._table[token] if token < len(self._table) else b''

  def text(self, token: int) -> str:
    r"""A token as text; bytes that are no text are written as OpenAI does: `bytes:\xe2\x82`."""
    spelled = self.spelled(token)
    if not spelled:
      return self._special.get(token, '')
    try:
      return spelled.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in spelled)

  def of_completion(self, tokens: Sequence[Token], num_top: int) -> dict[str, Any]:
    """The `logprobs` of one choice of /v1/completions."""
    return {'tokens': [self.text(t.id) for t in tokens],
            'token_logprobs': [t.logp for t in tokens],
            'top_logprobs': [self._top(t) for t in tokens] if num_top else None,
            'text_offset': [t.offset for t in tokens]}

  def _top(self, token: Token) -> dict[str, float] | None:
    """The most probable tokens, and the token itself where it is none of them."""
    if token.logp is None:
      return None
    top: dict[str, float] = {}
    for other, logp in (*token.top, (token.id, token.logp)):
      top.setdefault(self.text(other), logp)  # Of two tokens of one text, the more probable one.
    return top

  def of_chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
    """The `logprobs` of one choice of /v1/chat/completions."""
    entry = lambda token, logp: {
        'token': self.text(token), 'logprob': logp, 'bytes': list(self.spelled(token))}
    return {'refusal': None, 'content': [
        entry(t.id, t.logp) | {'top_logprobs': [entry(*other) for other in t.top]}
        for t in tokens]}
