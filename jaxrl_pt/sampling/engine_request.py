"""One request to the engine, and what it must satisfy."""

from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.requests import Shape, Vocabulary


class Constraint(Protocol):
  """Which tokens one response may go on with; the host asks it before each step."""

  @property
  def is_done(self) -> bool:
    """Whether nothing but a stop token may follow."""
    ...

  def mask(self) -> np.ndarray:
    """u32[⌈V / 32⌉]: bit t % 32 of word t // 32 says whether token t may come next."""
    ...

  def accept(self, token: int) -> None:
    """Goes on by the next token of the response, drawn under the mask or forced in a thought."""
    ...

  def copy(self) -> 'Constraint':
    """A constraint in the same state, for another sample."""
    ...


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
  max_thought: drawn tokens of a thought after which its end is forced; None for no such budget.
  max_answer: the largest number of tokens after the end of thinking; None for no limit but
    `max_tokens`. It is read only where `max_thought` is set.
  top_logprobs: for how many of the likeliest tokens log-probabilities are given.
  prompt_logprobs: whether those of the prompt's tokens are given; `max_tokens` may then be 0.
  constraint: what the response has to look like; each sample goes on with a copy of it.
  first_sample: the number of the first response among the samples of `id`, which addresses the
    randomness too.
  begins_thinking: whether the response, or what is forced of it, begins inside a thought; otherwise
    one begins if the response does so with the start marker. It is read only where `max_thought`
    is set.
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
  top_logprobs: int = 0
  prompt_logprobs: bool = False
  constraint: Constraint | None = None
  first_sample: int = 0
  begins_thinking: bool = True


def check(request: Request, shape: Shape, vocabulary: Vocabulary) -> None:
  def refuse(what: str) -> NoReturn:
    raise UserError(f'This cannot be answered: {what}.')

  if not request.prompt:
    refuse('the prompt is empty; start it with the token that begins a text')
  if len(request.prompt) > shape.document_len:
    refuse(f'the prompt has {len(request.prompt)} tokens and the cache takes {shape.document_len}; '
           'shorten it or raise Engine.prompt_len')
  least = 0 if request.prompt_logprobs else 1
  if not least <= request.max_tokens <= shape.response_len:
    refuse(f'max_tokens = {request.max_tokens}; write {least} to {shape.response_len}, or raise '
           'Engine.response_len')
  if not 0 <= request.top_logprobs <= shape.num_top:
    refuse(f'top_logprobs = {request.top_logprobs}; write 0 to {shape.num_top}, or raise '
           'Engine.top_logprobs')
  if request.constraint is not None and request.num_samples > shape.num_masks:
    refuse(f'{request.num_samples} constrained responses at once; at most {shape.num_masks} are '
           'taken, or raise Engine.constrained')
  if not 1 <= request.num_samples <= shape.queue:
    refuse(f'num_samples = {request.num_samples}; write 1 to {shape.queue}')
  if not 0 <= request.first_sample <= 2**31 - 1 - request.num_samples:
    refuse(f'first_sample = {request.first_sample}; write 0 or more')
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
  if request.max_thought is not None and not vocabulary.think_end:
    refuse('max_thought is set, but this model has no marker that ends thinking')
  if request.max_thought is not None and not (request.begins_thinking or vocabulary.think_start):
    refuse('the policy is to choose whether to think, but this model has no marker that starts '
           'thinking')
