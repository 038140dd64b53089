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
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import TokenScores
from jaxrl_pt.rl import kl, objectives, ratios, tables, token_advantages
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.sampling import branch
from jaxrl_pt.sampling.prefill import Prefilled
from jaxrl_pt.train import accumulate, group_parts, optim, rollout_metrics, scores
from jaxrl_pt.train.state import ValueHead, value_optimizer
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

Metrics = dict[str, Weighted]
# The one metric that holds arrays: its sum is f32[N, G, S], the trainer's log-probability of each
# token, and its count f32[N, G, S] is 0 on tokens that the first update did not read. Who asks for
# it takes it out of the metrics before they are logged.
BY_TOKEN = 'trainer_logp'


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


def needs_old_policy(algorithm: cfg.Algorithm) -> bool:
  """Whether the old policy takes a forward pass of its own before the first update.

  It does if the advantage reads the policy's scores, or if a batch gets several updates and a
  correction compares the old policy with the sampler.
  """
  corrected = algorithm.updates > 1 and algorithm.correction != cfg.NoCorrection()
  return corrected or tables.ADVANTAGES[type(algorithm.advantage)].needs_policy


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
  update = _make_update(model, optimizer, run, rollout_config.sampler, algorithm)
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
    new, values, first = _updates(update, state, batch, algorithm, num_docs, shared)
    if by_token:
      first[BY_TOKEN] = group_parts.join_responses(first[BY_TOKEN], num_docs,
                                                   run.train.group_parts)
    finite = values['nonfinite'].sum == 0
    new = dataclasses.replace(new, step=state.step + 1,
                              method=dataclasses.replace(new.method, gate=gate))
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
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


# --- Updates --------------------------------------------------------------------


def _split(batch: TrainBatch, parts: int) -> Any:
  """[N, …] → [parts, N / parts, …], where the prompts of a row stay together."""
  return accumulate.split(batch, parts, groups=batch.prompts.tokens.shape[0])


def _updates(update: Callable[..., tuple[TrainState, Metrics]], state: TrainState,
             batch: TrainBatch, algorithm: cfg.Algorithm, num_docs: int, shared: Shared | None
             ) -> tuple[TrainState, Metrics, Metrics]:
  """Makes all updates of a batch. All rows of one of its `num_docs` documents are in one of them.

  Returns:
    The new state; the metrics, added up over the updates; and of the first update alone those
    metrics that compare the policy with the sampler.
  """
  names = ('mismatch', BY_TOKEN) if batch.num_rows else ('mismatch',)
  if algorithm.updates == 1:
    state, values = update(state, batch, shared)
    return state, values, {name: values.pop(name) for name in names}
  passes = [accumulate.split(batch, algorithm.minibatches, num_docs)] * algorithm.epochs
  parts = jax.tree.map(lambda *x: jnp.concatenate(x), *passes)

  def next_update(carry: tuple[TrainState, Metrics, Array], part: TrainBatch
                  ) -> tuple[tuple[TrainState, Metrics, Array], Metrics]:
    state, first, is_first = carry
    state, values = update(state, part)
    measured = {name: values.pop(name) for name in names}
    first = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), measured, first)
    return (state, first, jnp.zeros((), bool)), values

  # They are carried and not stacked, since the largest of them is as large as the whole batch.
  one = jax.eval_shape(update, state, jax.tree.map(lambda x: x[0], parts))[1]
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), {name: one[name] for name in names})
  (state, first, _), every = jax.lax.scan(next_update, (state, zeros, jnp.ones((), bool)), parts)
  return state, jax.tree.map(lambda x: x.sum(0), every), first


def _make_update(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                 sampler: cfg.Sampler, algorithm: cfg.Algorithm
                 ) -> Callable[..., tuple[TrainState, Metrics]]:
  """update(state, batch, shared) → (state, metrics): one step of both optimizers."""
  loss = make_loss(model, sampler, algorithm, run.compute.loss_chunk)
  head_optimizer = value_optimizer(algorithm.advantage)

  def update(state: TrainState, batch: TrainBatch, shared: Shared | None = None
             ) -> tuple[TrainState, Metrics]:
    batch = dataclasses.replace(
        batch, weights=token_weights(algorithm.aggregation, batch.loss_mask))
    trained = P.trained(model.specs, state.params), state.method.value.params

    def loss_of(trained: tuple[Params, Any], *inputs: Any) -> tuple[Array, Metrics]:
      params, head = trained
      return loss((P.joined(state.params, params), head), *inputs)

    if shared is None:
      (value, metrics), grads = accumulate.gradient(
          jax.value_and_grad(loss_of, has_aux=True), trained, batch, run.train.accumulation,
          _split)
    else:
      (value, metrics), grads = _through(loss_of, trained, batch, shared)
    grad_norm = optim.global_norm(grads[0])
    updates, opt_state = optimizer.update(grads[0], state.opt_state, trained[0])
    head, head_state = head_optimizer.update(grads[1], state.method.value.opt_state)
    new_head = ValueHead(optax.apply_updates(state.method.value.params, head), head_state)
    state = dataclasses.replace(
        state, opt_state=opt_state,
        params=P.joined(state.params, optax.apply_updates(trained[0], updates)),
        method=dataclasses.replace(state.method, value=new_head))
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    return state, {'loss': Weighted.single(value), 'grad_norm': Weighted.single(grad_norm),
                   'nonfinite': Weighted.single(~finite), **metrics}

  return update


def token_weights(config: cfg.Aggregation, mask: Array) -> Array:
  """f32[N, G, S]: the weight of each token's term in the loss, which is Σ weights · terms.

  An aggregation is linear in its terms, so its weights are its gradient. With weights of the whole
  batch, the losses of any slices of its rows add up to the loss of the batch.

  Args:
    config: the aggregation.
    mask: f32[N, G, S], 1 on tokens that are learned from.
  """
  aggregate = tables.AGGREGATIONS[type(config)].compute(config, mask.shape[0] * mask.shape[1])
  return jax.grad(aggregate)(jnp.zeros_like(mask), mask)


def _through(loss: Callable[..., tuple[Array, Metrics]], trained: Any, batch: TrainBatch,
             shared: Shared) -> tuple[tuple[Array, Metrics], Any]:
  """Value, metrics and gradient of a loss that goes on from the shared forward pass.

  The policy's gradient has two parts: that of the responses' forward pass, and that of the
  documents' hidden states, keys and values, sent back through their forward pass.
  """
  of_both = jax.value_and_grad(lambda trained, prefilled: loss(trained, batch, prefilled),
                               argnums=(0, 1), has_aux=True)
  result, ((policy, head), documents) = of_both(trained, shared.prefilled)
  through, = shared.pull_back(documents)
  return result, (jax.tree.map(jnp.add, policy, through), head)


# --- The loss -------------------------------------------------------------------


def make_loss(model: Model, sampler: cfg.Sampler, algorithm: cfg.Algorithm, loss_chunk: int = 0
              ) -> Callable[..., tuple[Array, Metrics]]:
  """loss((policy, value head), batch, prefilled) → (Σ weights · terms, metrics), sums over rows.

  Its `prefilled` is the documents' forward pass if that has been computed already, else None.
  """
  single_update = algorithm.updates == 1
  surrogate_of = tables.SURROGATES[type(algorithm.surrogate)].compute
  correct = tables.CORRECTIONS[type(algorithm.correction)].compute
  modes_even = tables.ADVANTAGES[type(algorithm.advantage)].modes_even

  def loss(trained: tuple[Params, Any], batch: TrainBatch,
           prefilled: Prefilled | None = None) -> tuple[Array, Metrics]:
    params, head = trained
    mask, on_mask = batch.loss_mask, lambda x: jnp.where(batch.loss_mask > 0, x, 0.0)
    hidden = branch.response_hidden(model, params, batch.prompts, batch.tokens, prefilled,
                                    batch.selected)
    read = scores.of_hidden(model, params, hidden, batch.tokens, sampler, loss_chunk)
    # Beyond a response's end the log-probabilities are garbage, whose exponential might overflow.
    logp = on_mask(read.logp)
    old_logp = jax.lax.stop_gradient(logp) if single_update else on_mask(batch.old_logp)
    if modes_even:
      old_logp = old_logp.at[..., 0].set(-jnp.log(2.0))
    correction = correct(algorithm.correction, old_logp, batch.sampler_logp, mask)
    surrogate = surrogate_of(algorithm.surrogate, logp, old_logp, batch.advantage, mask)
    reference_logp = on_mask(batch.reference_logp)
    terms = surrogate.terms * correction
    terms += _kl_terms(algorithm.kl, logp, reference_logp)
    if algorithm.entropy_coef:
      terms -= algorithm.entropy_coef * read.entropy
    total = (batch.weights * terms).sum()
    measured: Metrics = {}
    if batch.num_rows:
      in_batch = functools.partial(_in_whole_batch, batch)
      measured[BY_TOKEN] = Weighted(in_batch(jax.lax.stop_gradient(logp)), in_batch(mask))
    if isinstance(algorithm.advantage, cfg.GAE):
      # No coefficient: the value head has its own Adam, whose step does not depend on the
      # gradient's scale.
      error = 0.5 * jnp.square(scores.values(head, jax.lax.stop_gradient(hidden)) - batch.returns)
      total += (batch.weights * error).sum()
      measured['value_loss'] = Weighted.of(error, mask)
    return total, {
        **measured,
        'mismatch': objectives.sampler_trainer_mismatch(logp, batch.sampler_logp, mask),
        'entropy': Weighted.of(read.entropy, mask),
        'correction': Weighted.of(correction, mask),
        'clip_fraction': Weighted.of(surrogate.clipped, mask),
        'bounded_ratios': Weighted.of(_beyond(
            algorithm, surrogate, logp, old_logp, batch.sampler_logp, reference_logp), mask),
        'gradient_variance': objectives.gradient_variance(
            batch.advantage,
            token_advantages.score_norm(logp, read.collision), mask),
    }

  return loss


def _kl_terms(config: cfg.KL, logp: Array, reference_logp: Array) -> Array:
  """f32[N, G, S]: coef · KL of each token if the KL is a part of the loss, else 0."""
  match config:
    case cfg.KLInLoss(coef=coef, estimator=estimator):
      return coef * kl.ESTIMATORS[estimator](logp, reference_logp)
    case _:
      return jnp.zeros_like(logp)


def _beyond(algorithm: cfg.Algorithm, surrogate: objectives.Surrogate, logp: Array, old_logp: Array,
            sampler_logp: Array, reference_logp: Array) -> Array:
  """f32[N, G, S]: 1 on tokens of which `rl.ratios` had to bound a ratio.

  The ratio is the surrogate's, the correction's or, with k3, that of the reference policy.
  """
  bounded = surrogate.beyond
  if algorithm.correction != cfg.NoCorrection():
    bounded = jnp.maximum(bounded, ratios.beyond(old_logp - sampler_logp))
  match algorithm.kl:
    case cfg.KLInLoss(estimator='k3') | cfg.KLInReward(estimator='k3'):
      bounded = jnp.maximum(bounded, ratios.beyond(jnp.maximum(reference_logp - logp, 0.0)))
  return bounded


def _in_whole_batch(batch: TrainBatch, values: Array) -> Array:
  """f[num_rows, …]: the rows of a slice at their places in the whole batch, zeros elsewhere.

  Arrays of disjoint slices thus add up to the array of the whole batch.
  """
  if values.shape[0] == batch.num_rows:
    return values
  return jnp.zeros((batch.num_rows, *values.shape[1:])).at[batch.rows].set(values)
