"""A whole step as one program: generate → verify → advantage → update, all on the device.

For verifiers that are functions of arrays. There is no trip to the host, the learner goes on from
the sampler's forward pass over the prompts where the method lets it (`learner.shares`), and the
rewards are those of the same stages dispatched one by one (`train.stages`).

Departs from RPT's paper in what it leaves open (2506.08007, docs/methods/rpt.md): the loss is
the sum over response tokens divided by the number of responses, and exactly one update
is made per batch, where PPO's ratio is 1 and its clip inert.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import decode
from jaxrl_pt.train import learner
from jaxrl_pt.types import Array, Params, Prompts, Rollout, TrainState, Verdict, Weighted
from jaxrl_pt.verifiers.base import DeviceVerifier

Metrics = dict[str, Weighted]
FusedStep = Callable[[TrainState, Params, Prompts], tuple[TrainState, Metrics, Rollout, Verdict]]


class Sample(Protocol):
  """See `make_sampler`."""

  def __call__(self, params: Params, prompts: Prompts, batch: Array, version: Array,
               prefilled: decode.Prefilled | None = None) -> Rollout: ...


def make_sampler(model: Model, seed: int, rollouts: cfg.Rollouts, stop_id: int) -> Sample:
  """sample(params, prompts, batch, version, prefilled) → Rollout.

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
             prefilled: decode.Prefilled | None = None) -> Rollout:
    key = jax.random.fold_in(jax.random.key(seed), batch)
    return decode.generate(
        model, params, prompts, key, sampler=rollouts.sampler, num_samples=rollouts.group_size,
        num_tokens=rollouts.response_tokens, stop_id=stop_id, version=version,
        prefilled=prefilled,
        first_samples=decode.occurrences(prompts.ids) * rollouts.group_size)

  return sample


def reference_logp(model: Model, params: Params, prompts: Prompts, rollout: Rollout,
                   sampler: cfg.Sampler, loss_chunk: int) -> Array:
  """f32[N, G, S]: what another policy, sampled in the same way, thinks of the tokens."""
  return learner.response_scores(model, params, prompts, rollout.tokens, sampler, loss_chunk).logp


def reference_if_read(model: Model, params: Params, prompts: Prompts, rollout: Rollout,
                      method: cfg.RPT | cfg.RL, loss_chunk: int) -> Array:
  """`reference_logp` where the method's algorithm reads it, else zeros."""
  if not reads_reference(method.algorithm):
    return jnp.zeros_like(rollout.logp)
  return reference_logp(model, params, prompts, rollout, method.rollouts.sampler, loss_chunk)


def make_fused_step(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                    verify: DeviceVerifier, stop_id: int = decode.NO_STOP, *,
                    by_token: bool = False) -> FusedStep:
  """step(state, start policy, prompts) → (state, metrics, rollout, verdict); the state donated.

  A loss or gradient that is not finite leaves the state as it was, its step included, and
  sets metrics['nonfinite'].

  Args:
    model, optimizer: of the state.
    run: its objective is one of reinforcement learning, on-policy.
    verify: judges on the device.
    stop_id: the token that ends a response.
    by_token: as in `learner.make_learner`.

  Raises:
    TypeError: `run.objective` is pretraining's.
  """
  method = run.objective
  if isinstance(method, cfg.NextToken):
    raise TypeError('make_fused_step needs an objective of reinforcement learning, not NextToken')
  sample = make_sampler(model, run.seed, method.rollouts, stop_id)
  learn = learner.make_learner(model, optimizer, run, method.rollouts, method.algorithm,
                               by_token=by_token)

  def step(state: TrainState, start: Params, prompts: Prompts
           ) -> tuple[TrainState, Metrics, Rollout, Verdict]:
    shared = share(model, state.params, prompts, run.train.accumulation, method.algorithm)
    prefilled = None if shared is None else shared.prefilled
    rollout = sample(state.params, prompts, state.step, state.step, prefilled)
    verdict = verify(prompts, rollout)
    reference = reference_if_read(model, start, prompts, rollout, method, run.compute.loss_chunk)
    new, metrics = learn(state, learner.Experience(prompts, rollout, verdict, reference), shared)
    return new, metrics, rollout, verdict

  return step


def share(model: Model, params: Params, prompts: Prompts, accumulation: int,
          algorithm: cfg.Algorithm) -> learner.Shared | None:
  """The forward pass over the prompts that sampler and learner share, if the method lets them."""
  if not learner.shares(accumulation, algorithm):
    return None
  return learner.Shared(*jax.vjp(lambda p: decode.prefill(model, p, prompts.tokens), params))


def reads_reference(algorithm: cfg.Algorithm) -> bool:
  """Whether the learner reads the start policy's log-probabilities."""
  return not isinstance(algorithm.kl, cfg.NoKL)
