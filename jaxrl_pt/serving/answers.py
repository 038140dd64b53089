"""Turns responses of the engine into OpenAI's response bodies and stream chunks.

A thought is given as `reasoning_content`, apart from `content`. The log-probability of a token is
its log-probability under the distribution it was drawn from; a forced token has 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import secrets
import time
from typing import Any, NamedTuple

from jaxrl_pt.sampling.engine import Response
from jaxrl_pt.serving.protocol import Ask, Service
from jaxrl_pt.serving.text import TextStream, ThoughtSplitter

_FINISH = {'stop': 'stop', 'stop_string': 'stop', 'length': 'length', 'cancelled': 'length'}


class Token(NamedTuple):
  """One token of the text, for log-probabilities."""

  bytes: bytes
  logp: float
  offset: int  # number of whole characters of the response before the token


@dataclass(frozen=True)
class Delta:
  """What a choice has gained since the delta before."""

  index: int
  text: str
  thought: str
  tokens: list[Token]
  finish: str | None


class Choice:
  """One response while it grows, which is one entry of OpenAI's `choices`."""

  def __init__(self, service: Service, ask: Ask, number: int, sample: int) -> None:
    request = ask.requests[number]
    self.index = number * request.num_samples + sample
    self.num_tokens = 0
    self._table = service.token_bytes
    self._stream = TextStream(service.tokenizer, self._table, request.stop_strings)
    self._splitter = ThoughtSplitter(service.markers) if ask.is_chat else None

  def update(self, response: Response) -> Delta:
    """Takes the response so far and returns what is new in it."""
    text, given = self._stream.feed(response.tokens[self.num_tokens:].tolist(), response.finish)
    self.num_tokens = len(response.tokens)
    tokens = []
    for i in given:
      token = int(response.tokens[i])
      token_bytes = self._table[token] if token < len(self._table) else b''
      tokens.append(Token(token_bytes, float(response.logp[i]), self._stream.offset(i)))
    thought = ''
    if self._splitter is not None:
      thought, text = self._splitter.feed(text, last=bool(response.finish))
    finish = _FINISH[response.finish] if response.finish else None
    return Delta(self.index, text, thought, tokens, finish)


class Answer:
  """The bodies or chunks that answer one request of a client."""

  def __init__(self, service: Service, ask: Ask) -> None:
    self._service, self._ask = service, ask
    self._choices: dict[tuple[int, int], Choice] = {
        (number, sample): Choice(service, ask, number, sample)
        for number, request in enumerate(ask.requests) for sample in range(request.num_samples)}
    self._unfinished = set(self._choices)
    kind = 'chat.completion' if ask.is_chat else 'text_completion'
    self._head: dict[str, Any] = {
        'id': f'{"chatcmpl" if ask.is_chat else "cmpl"}-{secrets.token_hex(12)}',
        'object': kind + ('.chunk' if ask.is_chat and ask.is_stream else ''),
        'created': int(time.time()), 'model': service.name}

  @property
  def is_done(self) -> bool:
    return not self._unfinished

  def update(self, number: int, response: Response) -> Delta:
    """Takes the response so far to request `number` and returns what is new in it."""
    if response.finish:
      self._unfinished.discard((number, response.sample))
    return self._choices[number, response.sample].update(response)

  def usage(self) -> dict[str, int]:
    """Token counts, in which a prompt counts once for all its samples."""
    prompt = sum(len(r.prompt) for r in self._ask.requests)
    completion = sum(c.num_tokens for c in self._choices.values())
    return {'prompt_tokens': prompt, 'completion_tokens': completion,
            'total_tokens': prompt + completion}

  # --- A stream -------------------------------------------------------------------------

  def opening(self) -> list[dict[str, Any]]:
    """The chunks before any token, which name the role of each choice of a chat."""
    if not self._ask.is_chat:
      return []
    return [self._head | {'choices': [{'index': c.index, 'delta': {
        'role': 'assistant', 'content': ''}, 'finish_reason': None}]}
        for c in self._choices.values()]

  def chunk(self, delta: Delta) -> dict[str, Any] | None:
    """The chunk with what is new; None where nothing is."""
    if not (delta.text or delta.thought or delta.tokens or delta.finish):
      return None
    choice: dict[str, Any] = {'index': delta.index, 'finish_reason': delta.finish,
                              'logprobs': self._logprobs(delta.tokens)}
    if self._ask.is_chat:
      choice['delta'] = ({'content': delta.text} if delta.text else {}) | (
          {'reasoning_content': delta.thought} if delta.thought else {})
    else:
      choice['text'] = delta.text
    return self._head | {'choices': [choice]}

  def closing(self) -> dict[str, Any] | None:
    """The chunk with the usage, which comes last; None where nobody asked for it."""
    return self._head | {'choices': [], 'usage': self.usage()} if self._ask.has_usage else None

  # --- One body -------------------------------------------------------------------------

  def body(self, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The body with the whole answer, from the deltas of all choices."""
    choices = []
    for c in sorted(self._choices.values(), key=lambda c: c.index):
      own = [d for d in deltas if d.index == c.index]
      text = ''.join(d.text for d in own)
      choice: dict[str, Any] = {
          'index': c.index, 'finish_reason': own[-1].finish,
          'logprobs': self._logprobs([t for d in own for t in d.tokens])}
      if self._ask.is_chat:
        thought = ''.join(d.thought for d in own)
        choice['message'] = {'role': 'assistant', 'content': text} | (
            {'reasoning_content': thought} if thought else {})
      else:
        choice['text'] = text
      choices.append(choice)
    return self._head | {'choices': choices, 'usage': self.usage()}

  def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if not self._ask.has_logprobs:
      return None
    texts = [t.bytes.decode('utf-8', 'replace') for t in tokens]
    if self._ask.is_chat:
      return {'refusal': None, 'content': [
          {'token': text, 'logprob': t.logp, 'bytes': list(t.bytes), 'top_logprobs': []}
          for text, t in zip(texts, tokens, strict=True)]}
    return {'tokens': texts, 'token_logprobs': [t.logp for t in tokens], 'top_logprobs': None,
            'text_offset': [t.offset for t in tokens]}
