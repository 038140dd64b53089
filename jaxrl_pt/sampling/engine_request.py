"""One request to the engine, and what it must satisfy."""

from dataclasses import dataclass, field
from typing import NoReturn

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.requests import Shape


@dataclass(frozen=True)
class Request:
  """One prompt and how to answer it; its `num_samples` responses share one prefill.

  prompt: token ids.
  id: addresses the randomness: requests with equal ids draw equal responses.
  max_tokens: the largest number of tokens of a response, forced tokens included.
  sampler: temperature and filters.
  stop: tokens that end a response and belong to it.
  stop_strings: texts that end a response as soon as they are complete.
  forced: tokens that every response starts with.
  max_thought: drawn tokens after which the end of thinking is forced; None for responses without
    thinking.
  max_answer: the largest number of tokens after the end of thinking; None for no limit but
    `max_tokens`. It is read only where `max_thought` is set.
  """

  prompt: tuple[int, ...]
  id: int
  max_tokens: int
  num_samples: int = 1
  sampler: cfg.Sampler = field(default_factory=cfg.Sampler)
  stop: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  forced: tuple[int, ...] = ()
  max_thought: int | None = None
  max_answer: int | None = None


def check(request: Request, shape: Shape, think_end: tuple[int, ...]) -> None:
  def refuse(what: str) -> NoReturn:
    raise UserError(f'This cannot be answered: {what}.')

  if not request.prompt:
    refuse('the prompt is empty; start it with the token that begins a text')
  if len(request.prompt) > shape.document_len:
    refuse(f'the prompt has {len(request.prompt)} tokens and the cache takes {shape.document_len}; '
           'shorten it or raise Engine.prompt_len')
  if not 1 <= request.max_tokens <= shape.response_len:
    refuse(f'max_tokens = {request.max_tokens}; write 1 to {shape.response_len}, or raise '
           'Engine.response_len')
  if not 1 <= request.num_samples <= shape.queue:
    refuse(f'num_samples = {request.num_samples}; write 1 to {shape.queue}')
  for name, ids in (('prompt', request.prompt), ('forced', request.forced),
                    ('stop', request.stop), ('banned', request.sampler.banned)):
    for token in ids:
      if not 0 <= token < shape.vocab_size:
        refuse(f'{name} holds token {token}, outside the vocabulary of {shape.vocab_size}')
  for name, values, most in (
      ('stop', request.stop, shape.num_stop), ('forced', request.forced, shape.num_forced),
      ('stop_strings', request.stop_strings, shape.num_strings),
      ('banned', request.sampler.banned, shape.num_banned)):
    if len(values) > most:
      refuse(f'{len(values)} entries in {name}; at most {most} are taken')
  for text in request.stop_strings:
    if not 1 <= len(text.encode()) <= shape.string_len or '\0' in text:
      refuse(f'stop string {text!r}; write 1 to {shape.string_len} bytes without NUL')
  for name, budget in (('max_thought', request.max_thought), ('max_answer', request.max_answer)):
    if budget is not None and budget < 0:
      refuse(f'{name} = {budget}; write 0 or more')
  if request.max_thought is not None and not think_end:
    refuse('max_thought is set, but this model has no marker that ends thinking')
