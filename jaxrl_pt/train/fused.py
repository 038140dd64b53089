"""A whole step as one program: generate → verify → advantage → update, all on the device.

The verifier must be a function of arrays. Nothing travels to the host, the update goes on from the
sampler's forward pass over the prompts where the algorithm lets it (`update.shares`), and the
rewards equal those of the same stages dispatched one by one (`rollouts.stages`).

RPT's paper (2506.08007) leaves two things open, which the defaults of `cfg.Algorithm` settle: the
loss is the sum over response tokens divided by the number of responses, and each batch gets exactly
one update, in which PPO's ratio is 1 and its clip does nothing.
"""

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling.groups import NO_MODES, NO_STOP, make_sampler
from jaxrl_pt.sampling.prefill import Prefilled, prefill
from jaxrl_pt.train import scores, update
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
  """A verifier that reads the policy itself, and so works only inside the fused step.

  verify: (model, state, prefilled, prompts, rollouts) → Verdict, where `prefilled` is the policy's
    forward pass over the prompts' documents, or None if it was not kept.
  after: (state before the update, state after it) → the state after it, with `state.method`
    brought up to date.
  stop_ids: the tokens of which any ends a response.
  """

  verify: Callable[[Model, TrainState, Prefilled | None, Prompts, RolloutBatch], Verdict]
  after: Callable[[TrainState, TrainState], TrainState]
  stop_ids: tuple[int, ...]

  def submit(self, prompts: Any, rollouts: Any, references: Any) -> Any:
    """Raises TypeError, since the policy cannot be read outside the step."""
    raise TypeError('a PolicyVerifier has no verdict outside its step')


def response_logp(model: Model, params: Params, prompts: Prompts, rollouts: RolloutBatch,
                  run: cfg.Run, sampler: cfg.Sampler, algorithm: cfg.Algorithm) -> Array:
  """f32[N, G, S]: log-probabilities of drawn tokens under the policy of `params`, such as the
  reference policy, after the sampler's temperature and filters."""
  def logp(prompts: Prompts, tokens: Array, selected: Any) -> Array:
    return scores.response_scores(model, params, prompts, tokens, sampler, run.compute.loss_chunk,
                                  selected).logp

  found: Array = scores.by_rows(logp, run.train, algorithm, prompts, rollouts.tokens,
                                rollouts.selected)
  return found


def reads_reference(algorithm: cfg.Algorithm) -> bool:
  """Whether the update reads the reference policy's log-probabilities."""
  return not isinstance(algorithm.kl, cfg.NoKL)


def make_fused_step(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                    method: cfg.Reinforced, verifier: Verify | PolicyVerifier,
                    stop_ids: tuple[int, ...] = NO_STOP, *,
                    mode_ids: tuple[int, ...] = NO_MODES, by_token: bool = False,
                    held: Callable[[Params], Params] = lambda params: params) -> FusedStep:
  """step(state, reference, prompts) → (state, metrics, rollouts, verdict).

  `reference` are the trained parameters of the reference policy, whose frozen ones are those of the
  policy. The step is to be jitted with the state donated. A loss or gradient that is not finite
  leaves the state as it was, its step included, and sets metrics['nonfinite'].

  Args:
    model: the policy's model.
    optimizer: the optimizer whose state is in `state.opt_state`.
    run: the settings, of which seed, compute, schedule and accumulation are read.
    method: the run's objective, which must be on-policy.
    verifier: a verifier that works on the device.
    stop_ids: the tokens of which any ends a response; a PolicyVerifier names its own instead.
    mode_ids: the tokens of the rollouts' modes, which are () where there are none.
    by_token: whether `policy_update.BY_TOKEN` is among the metrics.
    held: the function from the parameters to what the sampler reads of them.
  """
  policy_verifier = verifier if isinstance(verifier, PolicyVerifier) else None
  if policy_verifier:
    stop_ids = policy_verifier.stop_ids
  sample = make_sampler(model, run.seed, method.rollouts, stop_ids, mode_ids=mode_ids)
  learn = update.make_learner(model, optimizer, run, method.rollouts, method.algorithm,
                              by_token=by_token)

  def step(state: TrainState, reference: Params, prompts: Prompts
           ) -> tuple[TrainState, Metrics, RolloutBatch, Verdict]:
    shared = _share(model, state.params, prompts, run.train, method.algorithm)
    prefilled = None if shared is None else shared.prefilled
    rollouts = sample(held(state.params), prompts, state.step, state.step, prefilled)
    if isinstance(verifier, PolicyVerifier):
      verdict = verifier.verify(model, state, prefilled, prompts, rollouts)
    else:
      verdict = verifier(prompts, rollouts)
    reference_logp = jnp.zeros_like(rollouts.logp)
    if reads_reference(method.algorithm):
      reference_params = P.joined(state.params, reference)
      reference_logp = response_logp(model, reference_params, prompts, rollouts, run,
                                     method.rollouts.sampler, method.algorithm)
    new, metrics = learn(state, prompts, rollouts, verdict, reference_logp, shared)
    if policy_verifier:
      finite = metrics['nonfinite'].sum == 0
      kept = policy_verifier.after(state, new).method
      new = dataclasses.replace(new, method=jax.tree.map(
          lambda a, b: jnp.where(finite, a, b), kept, new.method))
    return new, metrics, rollouts, verdict

  return step


def _share(model: Model, params: Params, prompts: Prompts, train: cfg.Train,
           algorithm: cfg.Algorithm) -> update.Shared | None:
  """The forward pass over the prompts that sampler and update share; None if the algorithm does
  not let them."""
  if not update.shares(train, algorithm):
    return None
  return update.Shared(*jax.vjp(
      lambda trained: prefill(model, P.joined(params, trained), prompts.tokens),
      P.trained(model.specs, params)))
