"""Answers requests in the calling thread and hands out their text as it is drawn."""

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Request, Response
from jaxrl_pt.serving.text import TextStream


class Draws(Protocol):
  """What `stream` needs of an engine; `sampling.engine.Engine` says what its methods do."""

  config: cfg.Engine

  def check(self, request: Request) -> None:
    ...

  def room(self) -> int:
    ...

  def submit(self, request: Request) -> int:
    ...

  def cancel(self, handle: int) -> None:
    ...

  def advance(self) -> list[tuple[int, Response]]:
    ...


class Piece(NamedTuple):
  """The next piece of a response's text."""

  number: int  # number of the request
  text: str  # what follows the text of the pieces before
  response: Response  # the response so far


def stream(engine: Draws, tokenizer: Tokenizer, requests: Sequence[Request], *,
           starts_text: Sequence[bool] = (), table: Sequence[bytes] = ()) -> Generator[Piece]:
  """Answers requests; closing the iterator cancels what is under way.

  Args:
    engine: an idle engine, which nobody else calls as long as this iterates.
    tokenizer: the model's tokenizer.
    requests: requests that are submitted in this order, as the queue has room.
    starts_text: for each request, whether its responses start a text because its prompt is none;
      by default no request's do.
    table: the bytes of each token where they are not the tokenizer's own.

  Yields:
    Pieces of responses in the order in which they are drawn.

  Raises:
    UserError: a request cannot be answered, and none has been submitted.
  """
  for number, request in enumerate(requests, 1):
    try:
      engine.check(request)
    except UserError as e:
      raise UserError(f'Prompt {number} of {len(requests)}: {e}' if requests[1:] else str(e)) from e
  table = table or tokenizer.token_bytes()
  texts = [[TextStream(tokenizer, table, r.stop_strings,
                       starts_text=bool(starts_text) and starts_text[n])
            for _ in range(r.num_samples)] for n, r in enumerate(requests)]
  seen = [[0] * r.num_samples for r in requests]
  left = {n: r.num_samples for n, r in enumerate(requests)}
  handles: dict[int, int] = {}  # handle → number of the request
  waiting = list(range(len(requests)))[::-1]
  try:
    while left:
      while waiting and requests[waiting[-1]].num_samples <= engine.room():
        number = waiting.pop()
        handles[engine.submit(requests[number])] = number
      for handle, response in engine.advance():
        number, sample = handles[handle], response.sample
        if response.finish:
          left[number] -= 1
          left = {n: k for n, k in left.items() if k}
        new = response.tokens[seen[number][sample]:].tolist()
        seen[number][sample] += len(new)
        text, _ = texts[number][sample].feed(new, response.finish)
        yield Piece(number, text, response)
  except GeneratorExit:
    for handle, number in handles.items():
      if number in left:
        engine.cancel(handle)
    while engine.room() < engine.config.queue:
      engine.advance()
    raise
