"""The update: verified rollouts → advantages → one or several optimiser steps, as a pure function.

    (prompts, RolloutBatch, Verdict, reference log-probabilities) → TrainBatch → loss → gradient

Each prompt is computed once, its responses beside it in one packed row, and no logits of
prompt positions are taken. What the sampler knows is not computed again: with one update a
batch the old policy is the one being updated, so its log-probabilities are the policy's own
without gradient; with several, and no correction, they are the sampler's.

A step that is one program hands on the sampler's forward pass over the documents (`Shared`):
the update then computes responses only, and sends their gradients back through it.

What a step keeps besides parameters (a gate, a value head) is in `TrainState.method`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import TokenScores, token_logprobs
from jaxrl_pt.rl import kl, objectives, ratios, tables, token_advantages
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.sampling import branch, decode, policies
from jaxrl_pt.train import accumulate, optim
from jaxrl_pt.train.state import ValueHead, value_optimizer
from jaxrl_pt.types import (
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
# The one metric that is no number: f32[N, G, S] log-probabilities of the trainer, for rows whose
# count is not 0. Whoever asked for it takes it out before the others go on.
BY_TOKEN = 'trainer_logp'


class Shared(NamedTuple):
  """The documents' forward pass by the state's parameters, and the way back through it."""

  prefilled: decode.Prefilled
  pull_back: Callable[[decode.Prefilled], tuple[Params]]  # of jax.vjp


class Learn(Protocol):
  """See `make_learner`."""

  def __call__(self, state: TrainState, prompts: Prompts, drawn: RolloutBatch, verdict: Verdict,
               reference_logp: Array, shared: Shared | None = None
               ) -> tuple[TrainState, Metrics]: ...


def needs_old_policy(config: cfg.Algorithm) -> bool:
  """Whether a forward pass comes before the first update: for an advantage that reads scores of
  the policy, or a correction of what the sampler drew before several updates."""
  corrected = config.updates > 1 and config.correction != cfg.NoCorrection()
  return corrected or tables.ADVANTAGES[type(config.advantage)].needs_policy


def shares(accumulation: int, method: cfg.Algorithm) -> bool:
  """Whether the update can go on from the sampler's forward pass: there is one update, of the
  whole batch at once, and no forward pass before it."""
  return method.updates == 1 and accumulation == 1 and not needs_old_policy(method)


def make_learner(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                 rollouts: cfg.Rollouts, method: cfg.Algorithm, *, by_token: bool = False) -> Learn:
  """learn(state, prompts, drawn, verdict, reference_logp, shared) → (state, metrics).

  Jit it with the state donated. reference_logp is f32[N, G, S] under the reference policy, zeros
  where no KL is asked for. A loss or gradient that is not finite leaves the state as it was, its
  step included, and sets metrics['nonfinite']. With `shared`, which only a method that `shares`
  takes, value and gradient are equal up to the order of sums.

  Args:
    model, optimizer: of the state; the optimizer makes `method.updates` steps a call.
    run: its compute, schedule and accumulation are read.
    rollouts: how the batch was drawn.
    method: what is learned from it.
    by_token: whether `BY_TOKEN`, of the first update, is among the metrics.
  """
  schedule = optim.learning_rate(run.optimizer.schedule, run.train.num_steps * method.updates)
  update = _make_update(model, optimizer, run, rollouts.sampler, method)
  shape_reward = tables.SHAPINGS[type(method.shaping)].compute

  def learn(state: TrainState, prompts: Prompts, drawn: RolloutBatch, verdict: Verdict,
            reference_logp: Array, shared: Shared | None = None) -> tuple[TrainState, Metrics]:
    assert shared is None or shares(run.train.accumulation, method)
    bonus, gate, shaping_metrics = shape_reward(
        method.shaping, verdict, drawn.lengths() * verdict.valid, state.method.gate)
    reward = verdict.reward if bonus is None else verdict.reward + bonus
    batch = _train_batch(model, state, prompts, drawn, verdict, reward, reference_logp, run,
                         rollouts.sampler, method)
    silent = objectives.zero_advantage_groups(
        jnp.abs(batch.advantage * batch.loss_mask).sum(-1), verdict.valid)
    if by_token:
      num_rows = drawn.tokens.shape[0]
      batch = dataclasses.replace(batch, rows=jnp.arange(num_rows), num_rows=num_rows)
    new, values, first = _updates(update, state, batch, method, shared)
    finite = values['nonfinite'].sum == 0
    new = dataclasses.replace(new, step=state.step + 1,
                              method=dataclasses.replace(new.method, gate=gate))
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    # Of the first update: the later ones move away from the sampler on purpose. A policy that
    # is a step older than the trainer's is stale, which is no fault of the arithmetic.
    name = 'mismatch' if rollouts.mode == cfg.OnPolicy() else 'staleness'
    return new, {**values, name: first.pop('mismatch'), **first,
                 'learning_rate': Weighted.single(schedule(state.step * method.updates)),
                 **_rollout_metrics(drawn, verdict, reward), 'zero_advantage_groups': silent,
                 **shaping_metrics}

  return learn


# --- The batch of an update -------------------------------------------------------


def _train_batch(model: Model, state: TrainState, prompts: Prompts, drawn: RolloutBatch,
                 verdict: Verdict, reward: Array, reference_logp: Array, run: cfg.Run,
                 sampler: cfg.Sampler, method: cfg.Algorithm) -> TrainBatch:
  """Advantages and all else that is fixed before the first update."""
  mask = drawn.sampled * verdict.valid[..., None]
  zeros = jnp.zeros_like(mask)
  old, values = TokenScores(drawn.logp, zeros, zeros, zeros), zeros
  if needs_old_policy(method):
    hidden = branch.response_hidden(model, state.params, prompts, drawn.tokens)
    old = _scores(model, state.params, hidden, drawn.tokens, sampler, run.compute.loss_chunk)
    values = _values(state.method.value.params, hidden)
  token_rewards = token_advantages.terminal_rewards(reward, mask)
  match method.kl:
    case cfg.KLInReward(coef=coef, estimator=estimator):
      # Beyond a response's end the reference policy's is garbage.
      there = jnp.where(mask > 0, reference_logp, drawn.logp)
      token_rewards -= coef * kl.ESTIMATORS[estimator](drawn.logp, there) * mask
      reward = token_rewards.sum(-1)
  advantage, returns = tables.ADVANTAGES[type(method.advantage)].compute(
      method.advantage, Scored(reward, drawn.lengths() * verdict.valid, verdict.valid,
                               token_rewards, mask, old.logp, old.collision, values))
  return TrainBatch(prompts, drawn.tokens, mask, drawn.logp, old.logp, reference_logp, advantage,
                    returns, zeros)


def _rollout_metrics(drawn: RolloutBatch, verdict: Verdict, reward: Array) -> Metrics:
  return {
      'reward': Weighted.of(verdict.reward, verdict.valid),
      'shaped_reward': Weighted.of(reward, verdict.valid),
      'accuracy': Weighted.of(verdict.correct, verdict.valid),
      'verified': Weighted.of(verdict.valid, jnp.ones_like(verdict.valid)),
      'response_length': Weighted.of(drawn.lengths(), verdict.valid),
      **{f'reward/{name}': Weighted.of(part, verdict.valid)
         for name, part in verdict.parts.items()},
  }


# --- Updates --------------------------------------------------------------------


def _split(batch: TrainBatch, parts: int) -> Any:
  """[N, …] → [parts, N / parts, …], the prompts of a document staying together."""
  return accumulate.split(batch, parts, groups=batch.prompts.tokens.shape[0])


def _updates(update: Callable[..., tuple[TrainState, Metrics]], state: TrainState,
             batch: TrainBatch, method: cfg.Algorithm, shared: Shared | None
             ) -> tuple[TrainState, Metrics, Metrics]:
  """All updates of a batch, their metrics added up, and the first one's distance to the sampler."""
  names = ('mismatch', BY_TOKEN) if batch.num_rows else ('mismatch',)
  if method.updates == 1:
    state, values = update(state, batch, shared)
    return state, values, {name: values.pop(name) for name in names}
  passes = [_split(batch, method.minibatches)] * method.epochs
  parts = jax.tree.map(lambda *x: jnp.concatenate(x), *passes)
  state, every = jax.lax.scan(update, state, parts)
  first = jax.tree.map(lambda x: x[0], {name: every.pop(name) for name in names})
  return state, jax.tree.map(lambda x: x.sum(0), every), first


def _make_update(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                 sampler: cfg.Sampler, method: cfg.Algorithm
                 ) -> Callable[..., tuple[TrainState, Metrics]]:
  loss = make_loss(model, sampler, method, run.compute.loss_chunk)
  head_optimizer = value_optimizer(method.advantage)

  def update(state: TrainState, batch: TrainBatch, shared: Shared | None = None
             ) -> tuple[TrainState, Metrics]:
    batch = dataclasses.replace(
        batch, weights=token_weights(method.aggregation, batch.loss_mask))
    trained = state.params, state.method.value.params
    if shared is None:
      (value, metrics), grads = accumulate.gradient(
          jax.value_and_grad(loss, has_aux=True), trained, batch, run.train.accumulation, _split)
    else:
      (value, metrics), grads = _through(loss, trained, batch, shared)
    grad_norm = optim.global_norm(grads[0])
    updates, opt_state = optimizer.update(grads[0], state.opt_state, state.params)
    head, head_state = head_optimizer.update(grads[1], state.method.value.opt_state)
    new_head = ValueHead(optax.apply_updates(state.method.value.params, head), head_state)
    state = dataclasses.replace(
        state, opt_state=opt_state, params=optax.apply_updates(state.params, updates),
        method=dataclasses.replace(state.method, value=new_head))
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    return state, {'loss': Weighted.single(value), 'grad_norm': Weighted.single(grad_norm),
                   'nonfinite': Weighted.single(~finite), **metrics}

  return update


def token_weights(config: cfg.Aggregation, mask: Array) -> Array:
  """f32[N, G, S]: what each token's term counts in the loss Σ weights · terms.

  An aggregate is linear in its values, so its weights are its gradient. With them, any slice of
  the rows adds its part to the loss of the whole.
  """
  aggregate = tables.AGGREGATIONS[type(config)].compute(config, mask.shape[0] * mask.shape[1])
  return jax.grad(aggregate)(jnp.zeros_like(mask), mask)


def _through(loss: Callable[..., tuple[Array, Metrics]], trained: Any, batch: TrainBatch,
             shared: Shared) -> tuple[tuple[Array, Metrics], Any]:
  """Value, metrics and gradient of a loss that goes on from the shared forward pass:
  what the policy adds directly, and through its documents' hidden states, keys and values."""
  of_both = jax.value_and_grad(lambda trained, prefilled: loss(trained, batch, prefilled),
                               argnums=(0, 1), has_aux=True)
  result, ((policy, head), documents) = of_both(trained, shared.prefilled)
  through, = shared.pull_back(documents)
  return result, (jax.tree.map(jnp.add, policy, through), head)


# --- The loss -------------------------------------------------------------------


def make_loss(model: Model, sampler: cfg.Sampler, method: cfg.Algorithm, loss_chunk: int = 0
              ) -> Callable[..., tuple[Array, Metrics]]:
  """loss((policy, value head), batch, prefilled) → (Σ weights · terms, metrics), a sum over
  rows; `prefilled` is the documents' forward pass where there is one to go on from."""
  strict = method.updates == 1
  surrogate_of = tables.SURROGATES[type(method.surrogate)].compute
  correct = tables.CORRECTIONS[type(method.correction)].compute

  def loss(trained: tuple[Params, Any], batch: TrainBatch,
           prefilled: decode.Prefilled | None = None) -> tuple[Array, Metrics]:
    params, head = trained
    mask, there = batch.loss_mask, lambda x: jnp.where(batch.loss_mask > 0, x, 0.0)
    hidden = branch.response_hidden(model, params, batch.prompts, batch.tokens, prefilled)
    scores = _scores(model, params, hidden, batch.tokens, sampler, loss_chunk)
    logp = there(scores.logp)  # Beyond a response's end is garbage, whose exp might overflow.
    old_logp = jax.lax.stop_gradient(logp) if strict else there(batch.old_logp)
    correction = correct(method.correction, old_logp, batch.sampler_logp, mask)
    surrogate = surrogate_of(method.surrogate, logp, old_logp, batch.advantage, mask)
    reference_logp = there(batch.reference_logp)
    terms = surrogate.terms * correction
    terms += _kl_terms(method.kl, logp, reference_logp)
    if method.entropy_coef:
      terms -= method.entropy_coef * scores.entropy
    total = (batch.weights * terms).sum()
    measured: Metrics = {}
    if batch.num_rows:
      of_batch = functools.partial(_of_batch, batch)
      measured[BY_TOKEN] = Weighted(of_batch(jax.lax.stop_gradient(logp)), of_batch(mask))
    if isinstance(method.advantage, cfg.GAE):
      # Under its own optimizer, whose step does not depend on the scale of the gradient.
      error = 0.5 * jnp.square(_values(head, jax.lax.stop_gradient(hidden)) - batch.returns)
      total += (batch.weights * error).sum()
      measured['value_loss'] = Weighted.of(error, mask)
    return total, {
        **measured,
        'mismatch': objectives.sampler_trainer_mismatch(logp, batch.sampler_logp, mask),
        'entropy': Weighted.of(scores.entropy, mask),
        'correction': Weighted.of(correction, mask),
        'clip_fraction': Weighted.of(surrogate.clipped, mask),
        'bounded_ratios': Weighted.of(_beyond(
            method, surrogate, logp, old_logp, batch.sampler_logp, reference_logp), mask),
        'gradient_variance': objectives.gradient_variance(
            batch.advantage,
            token_advantages.score_norm(logp, scores.collision), mask),
    }

  return loss


def _kl_terms(config: cfg.KL, logp: Array, reference_logp: Array) -> Array:
  """f32[N, G, S]: coef · KL of each token where it is in the loss, else 0."""
  match config:
    case cfg.KLInLoss(coef=coef, estimator=estimator):
      return coef * kl.ESTIMATORS[estimator](logp, reference_logp)
    case _:
      return jnp.zeros_like(logp)


def _beyond(config: cfg.Algorithm, surrogate: objectives.Surrogate, logp: Array, old_logp: Array,
            sampler_logp: Array, reference_logp: Array) -> Array:
  """f32[N, G, S]: 1 on tokens some ratio of which `rl.ratios` had to bound: the surrogate's, the
  correction's or, with k3, that of the reference policy."""
  found = surrogate.beyond
  if config.correction != cfg.NoCorrection():
    found = jnp.maximum(found, ratios.beyond(old_logp - sampler_logp))
  match config.kl:
    case cfg.KLInLoss(estimator='k3') | cfg.KLInReward(estimator='k3'):
      found = jnp.maximum(found, ratios.beyond(jnp.maximum(reference_logp - logp, 0.0)))
  return found


def _of_batch(batch: TrainBatch, of_slice: Array) -> Array:
  """f[num_rows, …]: the rows of a slice at their places in the batch, so that slices add up."""
  if of_slice.shape[0] == batch.num_rows:
    return of_slice
  return jnp.zeros((batch.num_rows, *of_slice.shape[1:])).at[batch.rows].set(of_slice)


def response_scores(model: Model, params: Params, prompts: Prompts, tokens_NGS: Array,
                    sampler: cfg.Sampler, loss_chunk: int = 0) -> TokenScores:
  """Scores of response tokens under the distribution the sampler draws from.

  Equal, in value and gradient, to `apply` on the N · G whole sequences.

  Returns:
    TokenScores of f32[N, G, S] arrays; garbage where the response has ended.
  """
  hidden = branch.response_hidden(model, params, prompts, tokens_NGS)
  return _scores(model, params, hidden, tokens_NGS, sampler, loss_chunk)


def _scores(model: Model, params: Params, hidden: Array, tokens_NGS: Array, sampler: cfg.Sampler,
            loss_chunk: int) -> TokenScores:
  return token_logprobs(
      hidden, model.head(params), tokens_NGS, loss_chunk,
      lambda logits, tokens: policies.learner_logits(logits, tokens, sampler))


def _values(head: Any, hidden_NGSD: Array) -> Array:
  """f32[N, G, S]: the value head, linear in the hidden state; 0 without a head."""
  if not head:
    return jnp.zeros(hidden_NGSD.shape[:-1])
  return hidden_NGSD.astype(jnp.float32) @ head['weight'] + head['bias']
