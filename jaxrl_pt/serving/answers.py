"""Turns responses of the engine into OpenAI's response bodies and stream chunks.

A thought is given as `reasoning_content`, apart from `content`, and so are tool calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
import secrets
import time
from typing import Any

from jaxrl_pt.sampling.engine import Response
from jaxrl_pt.serving.conversation import Call
from jaxrl_pt.serving.logprobs import Speller, Token, tokens_of
from jaxrl_pt.serving.protocol import Ask, Service
from jaxrl_pt.serving.text import TextStream, ThoughtSplitter
from jaxrl_pt.serving.tools import CallSplitter

_FINISH = {'stop': 'stop', 'stop_string': 'stop', 'length': 'length', 'cancelled': 'length'}


@dataclass(frozen=True)
class Delta:
  """What a choice has gained since the delta before."""

  index: int
  text: str
  thought: str
  tokens: list[Token]
  finish: str | None
  calls: dict[int, dict[str, Any]] = field(default_factory=dict)  # number of the call → entry


class Choice:
  """One response while it grows, which is one entry of OpenAI's `choices`."""

  def __init__(self, service: Service, ask: Ask, number: int, sample: int) -> None:
    self._service, self._ask, self._number = service, ask, number
    self._request = ask.requests[number]
    self.index = number * self._request.num_samples + sample
    self.num_tokens = 0
    self.mean_logp = 0.0  # of the drawn tokens of the whole response
    self._stream = TextStream(service.tokenizer, service.token_bytes, self._request.stop_strings)
    self._thoughts = ThoughtSplitter(
        service.markers, is_open=ask.opens_thought) if ask.is_chat else None
    self._calls = CallSplitter(ask.tools) if ask.tools.tools else None
    self._num_calls = 0
    self._echo = ask.echoes[number] if ask.echoes else None  # None once it has been given

  def update(self, response: Response) -> Delta:
    """Takes the response so far and returns what is new in it."""
    text, given = self._stream.feed(response.tokens[self.num_tokens:].tolist(), response.finish)
    self.num_tokens = len(response.tokens)
    if not self._ask.is_chat and response.finish == 'stop':
      given = range(given.start, self.num_tokens)  # The stop token too, which was drawn like all.
    tokens, thought = self._tokens(response, given), ''
    calls: dict[int, dict[str, Any]] = {}
    if self._thoughts is not None:
      thought, text = self._thoughts.feed(text, last=bool(response.finish))
    if self._calls is not None:
      text, found = self._calls.feed(text, last=bool(response.finish))
      calls = {self._num_calls + i: _entry(call) for i, call in enumerate(found)}
      self._num_calls += len(calls)
    if self._echo is not None:
      text, tokens = self._echo + text, [*self._prompt(response), *tokens]
      self._echo = None
    return Delta(self.index, text, thought, tokens, self._finish(response), calls)

  def _tokens(self, response: Response, given: range) -> list[Token]:
    """The tokens of a range of the response, which follow the prompt where that is echoed."""
    part = slice(given.start, given.stop)
    before = len(self._ask.echoes[self._number]) if self._ask.echoes else 0
    pick = lambda array: None if array is None else array[part]
    return tokens_of(response.tokens[part].tolist(), response.logp[part],
                     [before + self._stream.offset(i) for i in given],
                     pick(response.top_tokens), pick(response.top_logp))

  def _prompt(self, response: Response) -> list[Token]:
    """The prompt's tokens, for a client that wants it echoed with its log-probabilities."""
    scored, prompt = response.prompt, self._request.prompt
    if scored is None:
      return []
    stream = TextStream(self._service.tokenizer, self._service.token_bytes, starts_text=True)
    # The text starts after the token that begins it.
    num_begin = int(prompt[0] == self._service.tokenizer.bos_id)
    stream.feed(prompt[num_begin:], 'length')
    offsets = [0] * num_begin + [stream.offset(i) for i in range(len(prompt) - num_begin)]
    top = (scored.top_tokens, scored.top_logp) if self._request.top_logprobs else (None, None)
    first, *others = tokens_of(prompt, scored.logp, offsets, *top)
    return [first._replace(logp=None, top=()), *others]

  def _finish(self, response: Response) -> str | None:
    if not response.finish:
      return None
    drawn = response.sampled.sum()
    self.mean_logp = float((response.logp * response.sampled).sum() / max(drawn, 1))
    if response.finish == 'stop' and not self._is_met(response):
      return 'length'
    finish = _FINISH[response.finish]
    return 'tool_calls' if finish == 'stop' and self._num_calls else finish

  def _is_met(self, response: Response) -> bool:
    """Whether a response that has ended by itself is what its constraint asks for.

    It is not where the constraint has become too costly to be followed further.
    """
    if self._ask.constraint is None:
      return True
    constraint = self._ask.constraint.copy()
    for token in response.tokens.tolist():
      constraint.accept(token)
    return constraint.is_met


def _entry(call: Call) -> dict[str, Any]:
  return {'id': f'call_{secrets.token_hex(12)}', 'type': 'function',
          'function': {'name': call.name, 'arguments': call.arguments}}


class Answer:
  """The bodies or chunks that answer one request of a client."""

  def __init__(self, service: Service, ask: Ask) -> None:
    self._ask = ask
    self._speller = Speller(service.tokenizer, service.token_bytes)
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
    """Token counts, in which a prompt counts once for all its samples, and all samples count."""
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
    if not (delta.text or delta.thought or delta.tokens or delta.finish or delta.calls):
      return None
    choice: dict[str, Any] = {'index': delta.index, 'finish_reason': delta.finish,
                              'logprobs': self._logprobs(delta.tokens)}
    if self._ask.is_chat:
      calls = [{'index': number} | call for number, call in delta.calls.items()]
      choice['delta'] = _without_empty({
          'content': delta.text, 'reasoning_content': delta.thought, 'tool_calls': calls})
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
    for index, chosen in enumerate(self._chosen()):
      own = [d for d in deltas if d.index == chosen.index]
      text = ''.join(d.text for d in own)
      choice: dict[str, Any] = {
          'index': index, 'finish_reason': own[-1].finish,
          'logprobs': self._logprobs([t for d in own for t in d.tokens])}
      if self._ask.is_chat:
        calls = [call for d in own for call in d.calls.values()]
        choice['message'] = {
            'role': 'assistant', 'content': text or (None if calls else '')} | _without_empty({
                'reasoning_content': ''.join(d.thought for d in own), 'tool_calls': calls})
      else:
        choice['text'] = text
      choices.append(choice)
    return self._head | {'choices': choices, 'usage': self.usage()}

  def _chosen(self) -> list[Choice]:
    """The choices to answer with: of each prompt those of the largest mean log-probability."""
    chosen: list[Choice] = []
    for number, request in enumerate(self._ask.requests):
      own = [self._choices[number, sample] for sample in range(request.num_samples)]
      if self._ask.num_choices < len(own):
        own = sorted(own, key=lambda c: -c.mean_logp)[:self._ask.num_choices]
      chosen += own
    return chosen

  def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if not self._ask.has_logprobs:
      return None
    if self._ask.is_chat:
      return self._speller.of_chat(tokens)
    return self._speller.of_completion(tokens, self._ask.requests[0].top_logprobs)


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in fields.items() if value}
