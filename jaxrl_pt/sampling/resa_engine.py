"""Rectified sparse attention behind the interface of `Engine`, for the command `sample`.

All requests have one sampler and one number of samples. They are drawn in batches of one shape, by
one program that is compiled when the engine is made; a batch's responses come all at once.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import resa as rectified
from jaxrl_pt.sampling import resa_speculate
from jaxrl_pt.sampling.engine import Request, Response
from jaxrl_pt.sampling.resa_speculate import Speculation
from jaxrl_pt.types import Params, Prompts
from pallas_kernels.dispatch import Generation


class Drafts(NamedTuple):
  """The counts of `Speculation` since the engine was made; zeros where nothing is drafted."""

  rounds: int = 0
  drafted: int = 0
  agreed: int = 0


class ResaEngine:
  """Batches over one model. Not thread-safe: one caller at a time."""

  def __init__(self, model: Model, params: Params, config: cfg.Engine, resa: cfg.ReSA, *,
               num_drafts: int, sampler: cfg.Sampler, num_samples: int, stop_id: int, seed: int,
               version: int = 0, generation: Generation | None = None) -> None:
    """Compiles the program.

    Args:
      model: the model that draws the responses.
      params: the policy's parameters.
      config: of these sizes, the lengths and the queue are read.
      resa: the settings of sparse attention.
      num_drafts: the number of tokens that sparse attention drafts before a dense forward pass
        checks them; 0 keeps what sparse attention draws.
      sampler: temperature and filters of all requests, which bans ids that are no tokens.
      num_samples: responses to each prompt.
      stop_id: the token that ends a response.
      seed: addresses all noise, together with a request's id, the sample and the position.
      version: the optimiser step of `params`.
      generation: the generation of the TPU that runs it; None for any other device.
    """
    self.config, self.drafts = config, Drafts()
    self._num_samples, self._stop_id, self._version = num_samples, stop_id, version
    self._num_prompts = max(1, config.queue // num_samples)
    self._waiting: list[tuple[int, Request]] = []
    self._num_handles = 0
    settings: dict[str, Any] = dict(
        sampler=sampler, num_samples=num_samples, num_tokens=config.response_len, stop_id=stop_id,
        generation=generation)
    if num_drafts:
      draw: Callable[..., Any] = functools.partial(
          resa_speculate.generate, model, sparse=resa, num_drafts=num_drafts, **settings)
    else:
      dense = functools.partial(rectified.generate, model, resa=resa, **settings)
      draw = lambda *args: (dense(*args), None)
    self._draw = jax.jit(draw).lower(params, self._batch(), jax.random.key(seed)).compile()
    self._args = params, jax.random.key(seed)

  def room(self) -> int:
    """How many responses can be submitted before some have to be collected."""
    return self.config.queue - len(self._waiting) * self._num_samples

  def check(self, request: Request) -> None:
    """Accepts a request that this engine can answer, and refuses any other.

    Raises:
      UserError: the request cannot be answered; the message says why.
    """
    if not 1 <= len(request.prompt) <= self.config.prompt_len:
      raise UserError(f'This cannot be answered: the prompt has {len(request.prompt)} tokens and '
                      f'the cache takes 1 to {self.config.prompt_len}.')
    if request.stop_strings:
      raise UserError('--resa takes no --stop: leave one of them out.')

  def submit(self, request: Request) -> int:
    """Queues a request and returns the handle that its responses carry."""
    self._waiting.append((self._num_handles, request))
    self._num_handles += 1
    return self._num_handles - 1

  def cancel(self, handle: int) -> None:
    """Drops a request whose responses have not been drawn."""
    self._waiting = [(h, r) for h, r in self._waiting if h != handle]

  def advance(self) -> list[tuple[int, Response]]:
    """Draws the responses of all requests that wait, to their ends."""
    params, key = self._args
    rollouts, speculation = jax.device_get(self._draw(params, self._batch(), key))
    self._count(speculation)
    counts = rollouts.in_response.sum(-1).astype(int)
    done = []
    for row, (handle, request) in enumerate(self._waiting):
      for sample in range(self._num_samples):
        num = min(counts[row, sample], request.max_tokens)
        tokens, logp, sampled = (array[row, sample, :num].copy() for array in (
            rollouts.tokens, rollouts.logp, rollouts.sampled))
        done.append((handle, Response(
            request.id, sample, tokens, logp, sampled,
            'stop' if tokens[-1] == self._stop_id else 'length', self._version)))
    self._waiting = []
    return done

  def _batch(self) -> Prompts:
    """The prompts that wait, and others of one token up to the batch's size."""
    size, length = self._num_prompts, self.config.prompt_len
    tokens = np.full((size, length), self._stop_id, np.int32)
    lengths, ids = np.ones(size, np.int32), np.zeros(size, np.int32)
    for row, (_, request) in enumerate(self._waiting):
      tokens[row, :len(request.prompt)] = request.prompt
      lengths[row], ids[row] = len(request.prompt), request.id
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(ids))

  def _count(self, speculation: Speculation | None) -> None:
    if speculation is not None:
      self.drafts = Drafts(*(int(a + b) for a, b in zip(self.drafts, (
          speculation.rounds, speculation.drafted, speculation.agreed), strict=True)))
