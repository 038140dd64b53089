"""The sampler of a run: it draws groups of responses, with noise that depends on run and batch."""

import functools
from typing import Any, Protocol

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import decode, resa
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch


class Sample(Protocol):
  """The function that `make_sampler` returns; its arguments are described there."""

  def __call__(self, params: Params, prompts: Prompts, batch: Array, version: Array,
               prefilled: decode.Prefilled | None = None) -> RolloutBatch: ...


def make_sampler(model: Model, seed: int, rollouts: cfg.Rollouts, stop_id: int) -> Sample:
  """Returns sample(params, prompts, batch, version, prefilled) → RolloutBatch.

  The noise is addressed by (seed, batch, prompt id, sample, position). The batch's number is in
  this address so that a prompt which comes again in a later epoch gets new responses. A prompt
  that stands in one batch several times gets further samples each time: its k-th occurrence (from
  0) has the samples k · G … (k + 1) · G − 1.

  `prefilled` holds the prompts' documents where they have gone through the model already; without
  it the sampler prefills them.

  Args:
    model: the model that draws the responses.
    seed: the run's seed.
    rollouts: the number and length of the responses, and the filters they are drawn with.
    stop_id: the token that ends a response.
  """
  def sample(params: Params, prompts: Prompts, batch: Array, version: Array,
             prefilled: decode.Prefilled | None = None) -> RolloutBatch:
    generate: Any = functools.partial(decode.generate, prefilled=prefilled)
    if isinstance(rollouts.sparse, cfg.ReSA):
      generate = functools.partial(resa.generate, resa=rollouts.sparse)
    drawn: RolloutBatch = generate(
        model, params, prompts, jax.random.fold_in(jax.random.key(seed), batch),
        sampler=rollouts.sampler, num_samples=rollouts.group_size,
        num_tokens=rollouts.response_tokens, stop_id=stop_id, version=version,
        first_samples=decode.occurrences(prompts.ids) * rollouts.group_size)
    return drawn

  return sample
