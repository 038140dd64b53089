"""A whole step as one program: generate → verify → advantage → update, all on the device.

For verifiers that are functions of arrays. There is no trip to the host, the update goes on from
the sampler's forward pass over the prompts where the method lets it (`update.shares`), and the
rewards are those of the same stages dispatched one by one (`rollouts.stages`).

Departs from RPT's paper (2506.08007) in what it leaves open: the loss is the sum over response
tokens divided by the number of responses, and exactly one update is made per batch, where PPO's
ratio is 1 and its clip inert.
"""

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import decode
from jaxrl_pt.sampling.rollouts import make_sampler
from jaxrl_pt.train import update
from jaxrl_pt.types import (
  Array,
  Params,
  Prompts,
  RolloutBatch,
  TrainState,
  Verdict,
  Weighted,
)
from jaxrl_pt.verifiers.base import Verify

Metrics = dict[str, Weighted]
FusedStep = Callable[[TrainState, Params, Prompts],
                     tuple[TrainState, Metrics, RolloutBatch, Verdict]]


@dataclass(frozen=True)
class PolicyVerifier:
  """A verdict that reads the policy itself, and so can be had inside its step alone.

  verify: (model, state, the prompts' documents where they have gone through the policy already,
    prompts, rollouts) → Verdict.
  after: (state before, state after the update) → the latter with what the verifier keeps.
  stop_id: the token that ends a response.
  """

  verify: Callable[[Model, TrainState, decode.Prefilled | None, Prompts, RolloutBatch], Verdict]
  after: Callable[[TrainState, TrainState], TrainState]
  stop_id: int

  def submit(self, prompts: Any, rollouts: Any, references: Any) -> Any:
    """Raises TypeError: there is no verdict outside the step."""
    raise TypeError('a PolicyVerifier has no verdict outside its step')


def reference_logp(model: Model, params: Params, prompts: Prompts, rollouts: RolloutBatch,
                   sampler: cfg.Sampler, loss_chunk: int) -> Array:
  """f32[N, G, S]: what another policy, sampled in the same way, thinks of the tokens."""
  return update.response_scores(model, params, prompts, rollouts.tokens, sampler, loss_chunk).logp


def reads_reference(algorithm: cfg.Algorithm) -> bool:
  """Whether the update reads the reference policy's log-probabilities."""
  return not isinstance(algorithm.kl, cfg.NoKL)


def make_fused_step(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                    method: cfg.Reinforced, verifier: Verify | PolicyVerifier,
                    stop_id: int = decode.NO_STOP, *, by_token: bool = False) -> FusedStep:
  """step(state, reference policy, prompts) → (state, metrics, rollouts, verdict).

  To be jitted with the state donated. A loss or gradient that is not finite leaves the state as
  it was, its step included, and sets metrics['nonfinite'].

  Args:
    model, optimizer: of the state.
    run: its seed, compute, schedule and accumulation are read.
    method: the run's objective, on-policy.
    verifier: verifies on the device.
    stop_id: the token that ends a response, where the verifier does not name its own.
    by_token: as in `update.make_learner`.
  """
  own = verifier if isinstance(verifier, PolicyVerifier) else None
  sample = make_sampler(model, run.seed, method.rollouts, own.stop_id if own else stop_id)
  learn = update.make_learner(model, optimizer, run, method.rollouts, method.algorithm,
                              by_token=by_token)

  def step(state: TrainState, start: Params, prompts: Prompts
           ) -> tuple[TrainState, Metrics, RolloutBatch, Verdict]:
    shared = _share(model, state.params, prompts, run.train.accumulation, method.algorithm)
    prefilled = None if shared is None else shared.prefilled
    rollouts = sample(state.params, prompts, state.step, state.step, prefilled)
    if isinstance(verifier, PolicyVerifier):
      verdict = verifier.verify(model, state, prefilled, prompts, rollouts)
    else:
      verdict = verifier(prompts, rollouts)
    reference = jnp.zeros_like(rollouts.logp)
    if reads_reference(method.algorithm):
      reference = reference_logp(model, start, prompts, rollouts, method.rollouts.sampler,
                                 run.compute.loss_chunk)
    new, metrics = learn(state, prompts, rollouts, verdict, reference, shared)
    if own:
      finite = metrics['nonfinite'].sum == 0
      kept = own.after(state, new).method
      new = dataclasses.replace(new, method=jax.tree.map(
          lambda a, b: jnp.where(finite, a, b), kept, new.method))
    return new, metrics, rollouts, verdict

  return step


def _share(model: Model, params: Params, prompts: Prompts, accumulation: int,
           algorithm: cfg.Algorithm) -> update.Shared | None:
  """The forward pass over the prompts that sampler and update share, if the method lets them."""
  if not update.shares(accumulation, algorithm):
    return None
  return update.Shared(*jax.vjp(lambda p: decode.prefill(model, p, prompts.tokens), params))
