"""The update: verified rollouts → advantages → one or several optimiser steps, as a pure function.

    (prompts, RolloutBatch, Verdict, reference log-probabilities) → TrainBatch → loss → gradient

Each document is computed once, with the responses to its prompts in the same packed row, and no
logits of prompt positions are taken. The old policy's log-probabilities take no forward pass where
that can be avoided. If a batch gets one update, the old policy is the policy being updated, so they
are the policy's own without gradient. If it gets several, and there is no correction, they are the
sampler's.

The fused step (`train.fused`) hands on the sampler's forward pass over the documents as `Shared`.
The update then computes only the responses, and sends their gradients back through that pass.

What a step keeps besides the parameters (Short-RL's gate, a value head) is in `TrainState.method`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import TokenScores
from jaxrl_pt.rl import kl, objectives, tables, token_advantages
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.sampling import branch
from jaxrl_pt.sampling.prefill import Prefilled
from jaxrl_pt.train import (
  accumulate,
  group_parts,
  optim,
  policy_update,
  rollout_metrics,
  scores,
)
from jaxrl_pt.train.policy_update import BY_TOKEN, Metrics, needs_old_policy
from jaxrl_pt.types import (
  NO_MODE,
  Array,
  Params,
  Prompts,
  RolloutBatch,
  TrainBatch,
  TrainState,
  Verdict,
  Weighted,
)


class Shared(NamedTuple):
  """The policy's forward pass over the documents, with its backward pass."""

  prefilled: Prefilled
  # The function from jax.vjp: gradients of `prefilled` → gradients of the trained parameters.
  pull_back: Callable[[Prefilled], tuple[Params]]


class Learn(Protocol):
  """See `make_learner`."""

  def __call__(self, state: TrainState, prompts: Prompts, rollouts: RolloutBatch, verdict: Verdict,
               reference_logp: Array, shared: Shared | None = None
               ) -> tuple[TrainState, Metrics]: ...


def shares(train: cfg.Train, algorithm: cfg.Algorithm) -> bool:
  """Whether the update can go on from the sampler's forward pass over the documents.

  It can if there is one update, of the whole batch at once, and no forward pass before it.
  """
  at_once = train.accumulation == 1 and train.group_parts == 1
  return algorithm.updates == 1 and at_once and not needs_old_policy(algorithm)


def make_learner(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                 rollout_config: cfg.Rollouts, algorithm: cfg.Algorithm, *,
                 by_token: bool = False) -> Learn:
  """learn(state, prompts, rollouts, verdict, reference_logp, shared) → (state, metrics).

  `learn` is to be jitted with the state donated. Its `reference_logp` is f32[N, G, S] under the
  reference policy, and may be zeros where the algorithm has no KL. Its `shared` may be given only
  where `shares` is true, and changes value and gradient by no more than the order of sums does. A
  loss or gradient that is not finite leaves the state as it was, its step included, and sets
  metrics['nonfinite'].

  Args:
    model: the policy's model.
    optimizer: the optimizer whose state is in `state.opt_state`; a call makes
      `algorithm.updates` steps with it.
    run: the settings, of which compute, schedule and accumulation are read.
    rollout_config: the settings that the rollouts were drawn with.
    algorithm: advantage, surrogate and all else that makes the gradient.
    by_token: whether `BY_TOKEN` is among the metrics.
  """
  schedule = optim.learning_rate(run.optimizer.schedule, run.train.num_steps * algorithm.updates)
  updates = policy_update.make_updates(
      model.specs, optimizer, _reading(model, rollout_config.sampler, run.compute.loss_chunk),
      algorithm, run.train.accumulation, _split)
  shape_reward = tables.SHAPINGS[type(algorithm.shaping)].compute

  def learn(state: TrainState, prompts: Prompts, rollouts: RolloutBatch, verdict: Verdict,
            reference_logp: Array, shared: Shared | None = None) -> tuple[TrainState, Metrics]:
    assert shared is None or shares(run.train, algorithm)
    num_docs = prompts.tokens.shape[0]
    bonus, gate, shaping_metrics = shape_reward(
        algorithm.shaping, verdict, rollouts.lengths() * verdict.valid, state.method.gate)
    reward = verdict.reward if bonus is None else verdict.reward + bonus
    batch = _train_batch(model, state, prompts, rollouts, verdict, reward, reference_logp, run,
                         rollout_config.sampler, algorithm)
    zero_advantage = objectives.zero_advantage_groups(
        jnp.abs(batch.advantage * batch.loss_mask).sum(-1), verdict.valid)
    batch = group_parts.split(batch, run.train.group_parts)
    if by_token:
      num_rows = batch.tokens.shape[0]
      batch = dataclasses.replace(batch, rows=jnp.arange(num_rows), num_rows=num_rows)
    new, values, first = updates(state, batch, num_docs, shared)
    if by_token:
      first[BY_TOKEN] = group_parts.join_responses(first[BY_TOKEN], num_docs,
                                                   run.train.group_parts)
    new = dataclasses.replace(new, step=state.step + 1,
                              method=dataclasses.replace(new.method, gate=gate))
    new = policy_update.unless_finite(new, state, values)
    # The mismatch is that of the first update, since later updates move away from the sampler on
    # purpose. Off-policy the same number is called staleness: the sampler's parameters
    # are then older than the trainer's, which is no fault of the arithmetic.
    name = 'mismatch' if rollout_config.mode == cfg.OnPolicy() else 'staleness'
    return new, {**values, name: first.pop('mismatch'), **first,
                 'learning_rate': Weighted.single(schedule(state.step * algorithm.updates)),
                 **rollout_metrics.of(rollouts, verdict, reward),
                 'zero_advantage_groups': zero_advantage, **shaping_metrics}

  return learn


# --- The batch of an update -------------------------------------------------------


def _train_batch(model: Model, state: TrainState, prompts: Prompts, rollouts: RolloutBatch,
                 verdict: Verdict, reward: Array, reference_logp: Array, run: cfg.Run,
                 sampler: cfg.Sampler, algorithm: cfg.Algorithm) -> TrainBatch:
  """Computes advantages, and all else that is fixed before the first update."""
  mask = _learned(rollouts, verdict, algorithm)
  zeros = jnp.zeros_like(mask)
  old, values = TokenScores(rollouts.logp, zeros, zeros, zeros), zeros
  if needs_old_policy(algorithm):
    def read(prompts: Prompts, tokens: Array, selected: Any) -> tuple[TokenScores, Array]:
      hidden = branch.response_hidden(model, state.params, prompts, tokens, selected=selected)
      found = scores.of_hidden(model, state.params, hidden, tokens, sampler,
                               run.compute.loss_chunk)
      return found, scores.values(state.method.value.params, hidden)

    old, values = scores.by_rows(read, run.train, algorithm, prompts, rollouts.tokens,
                          rollouts.selected)
  token_rewards = token_advantages.terminal_rewards(reward, mask)
  match algorithm.kl:
    case cfg.KLInReward(coef=coef, estimator=estimator):
      # Beyond a response's end the reference policy's log-probabilities are garbage.
      on_mask = jnp.where(mask > 0, reference_logp, rollouts.logp)
      token_rewards -= coef * kl.ESTIMATORS[estimator](rollouts.logp, on_mask) * mask
      reward = token_rewards.sum(-1)
  advantage, returns = tables.ADVANTAGES[type(algorithm.advantage)].compute(
      algorithm.advantage, Scored(reward, rollouts.lengths() * verdict.valid, verdict.valid,
                               token_rewards, mask, old.logp, old.collision, values,
                               rollouts.mode))
  return TrainBatch(prompts, rollouts.tokens, mask, rollouts.logp, old.logp, reference_logp,
                    advantage, returns, zeros, rollouts.selected)


def _learned(rollouts: RolloutBatch, verdict: Verdict, algorithm: cfg.Algorithm) -> Array:
  """f32[N, G, S]: 1 on the tokens that are learned from, which the policy drew.

  Where the advantage is also one of the choice of a mode, the token of a mode counts even if it was
  forced.
  """
  tokens = rollouts.sampled
  if tables.ADVANTAGES[type(algorithm.advantage)].learns_modes:
    of_mode = rollouts.in_response[..., 0] * (rollouts.mode != NO_MODE)
    tokens = tokens.at[..., 0].set(jnp.maximum(tokens[..., 0], of_mode))
  return tokens * verdict.valid[..., None]


# --- The policy -------------------------------------------------------------------


def _split(batch: TrainBatch, parts: int) -> Any:
  """[N, …] → [parts, N / parts, …], where the prompts of a row stay together."""
  return accumulate.split(batch, parts, groups=batch.prompts.tokens.shape[0])


def make_loss(model: Model, sampler: cfg.Sampler, algorithm: cfg.Algorithm, loss_chunk: int = 0
              ) -> Callable[..., tuple[Array, Metrics]]:
  """The loss of `policy_update.make_loss` for a language model.

  Its `shared` is the documents' forward pass (`Prefilled`) if that has been computed already, else
  None.
  """
  return policy_update.make_loss(_reading(model, sampler, loss_chunk), algorithm)


def _reading(model: Model, sampler: cfg.Sampler, loss_chunk: int) -> policy_update.ReadPolicy:
  """How a language model scores the responses of a batch."""
  def read(params: Params, batch: TrainBatch, prefilled: Prefilled | None
           ) -> tuple[TokenScores, Array]:
    hidden = branch.response_hidden(model, params, batch.prompts, batch.tokens, prefilled,
                                    batch.selected)
    return scores.of_hidden(model, params, hidden, batch.tokens, sampler, loss_chunk), hidden

  return read
