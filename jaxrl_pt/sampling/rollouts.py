"""The sampler of a run: groups of responses whose noise is addressed by the run and its batch."""

from typing import Protocol

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import decode
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch


class Sample(Protocol):
  """See `make_sampler`."""

  def __call__(self, params: Params, prompts: Prompts, batch: Array, version: Array,
               prefilled: decode.Prefilled | None = None) -> RolloutBatch: ...


def make_sampler(model: Model, seed: int, rollouts: cfg.Rollouts, stop_id: int) -> Sample:
  """sample(params, prompts, batch, version, prefilled) → RolloutBatch.

  The noise is addressed by (seed, batch, prompt id, sample, position): the batch's number is in
  it so that a prompt met again in a later epoch draws anew. A prompt that stands in a batch
  more than once goes on with further samples: its k-th occurrence (from 0) has samples
  k · G … (k + 1) · G − 1.

  Args:
    model: of the sampler.
    seed: of the run.
    rollouts: how many responses, of which length, by which sampler.
    stop_id: the token that ends a response.

  `prefilled` are the prompts' documents, where they have gone through the model already.
  """
  def sample(params: Params, prompts: Prompts, batch: Array, version: Array,
             prefilled: decode.Prefilled | None = None) -> RolloutBatch:
    key = jax.random.fold_in(jax.random.key(seed), batch)
    return decode.generate(
        model, params, prompts, key, sampler=rollouts.sampler, num_samples=rollouts.group_size,
        num_tokens=rollouts.response_tokens, stop_id=stop_id, version=version,
        prefilled=prefilled,
        first_samples=decode.occurrences(prompts.ids) * rollouts.group_size)

  return sample
