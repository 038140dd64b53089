"""Updates of a policy by what it has drawn: loss, gradient and optimiser steps, as pure functions.

    L = Σ weights · (surrogate(log π, log π_old, A) · correction + KL − entropy_coef · H)

What the policy is does not matter here. Whoever makes a loss says how to read from the parameters
the scores of the batch's tokens (`ReadPolicy`): a language model reads responses to prompts
(`train.update`), a policy of a game reads the actions that it took (`train.game_policy`). A batch
may be split into minibatches, and gone through several times (`make_updates`).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models.logprobs import TokenScores
from jaxrl_pt.rl import kl, objectives, ratios, tables, token_advantages
from jaxrl_pt.train import accumulate, optim, scores
from jaxrl_pt.train.state import ValueHead, value_optimizer
from jaxrl_pt.types import Array, Params, TrainBatch, TrainState, Weighted

Metrics = dict[str, Weighted]
# read(parameters, batch, shared) → scores f32[N, G, S] of its tokens, and the hidden states
# f[N, G, S, D] that they follow from. `shared` is what of the forward pass there is already, or
# None.
ReadPolicy = Callable[[Params, TrainBatch, Any], tuple[TokenScores, Array]]
# split(batch, number of parts) → the batch with a leading axis of parts.
Split = Callable[[TrainBatch, int], Any]
# The one metric that holds arrays: its sum is f32[N, G, S], the trainer's log-probability of each
# token, and its count f32[N, G, S] is 0 on tokens that the first update did not read. Who asks for
# it takes it out of the metrics before they are logged.
BY_TOKEN = 'trainer_logp'


def needs_old_policy(algorithm: cfg.Algorithm) -> bool:
  """Whether the old policy takes a forward pass of its own before the first update.

  It does if the advantage reads the policy's scores, or if a batch gets several updates and a
  correction compares the old policy with the sampler.
  """
  corrected = algorithm.updates > 1 and algorithm.correction != cfg.NoCorrection()
  return corrected or tables.ADVANTAGES[type(algorithm.advantage)].needs_policy


# --- Updates ----------------------------------------------------------------------


def make_updates(specs: Any, optimizer: optax.GradientTransformation, read: ReadPolicy,
                 algorithm: cfg.Algorithm, accumulation: int, split: Split
                 ) -> Callable[..., tuple[TrainState, Metrics, Metrics]]:
  """updates(state, batch, num_groups, shared) → (state, metrics, metrics of the first update).

  The metrics are added up over the updates; those of the first alone compare the policy with the
  sampler. All rows of one of the batch's `num_groups` groups are in one minibatch. `shared` may be
  given only where there is one update.

  Args:
    specs: the parameters' tree of ParamSpec; those that are not trained stay as they are.
    optimizer: the optimizer whose state is in `state.opt_state`; a call makes
      `algorithm.updates` steps with it.
    read: how the policy scores a batch.
    algorithm: advantage, surrogate and all else that makes the gradient.
    accumulation: the number of micro-batches of an update.
    split: splits the batch of an update into micro-batches.
  """
  update = _make_update(specs, optimizer, make_loss(read, algorithm), algorithm, accumulation,
                        split)

  def updates(state: TrainState, batch: TrainBatch, num_groups: int, shared: Any = None
              ) -> tuple[TrainState, Metrics, Metrics]:
    names = ('mismatch', BY_TOKEN) if batch.num_rows else ('mismatch',)
    if algorithm.updates == 1:
      state, values = update(state, batch, shared)
      return state, values, {name: values.pop(name) for name in names}
    passes = [accumulate.split(batch, algorithm.minibatches, num_groups)] * algorithm.epochs
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
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         {name: one[name] for name in names})
    (state, first, _), every = jax.lax.scan(next_update, (state, zeros, jnp.ones((), bool)), parts)
    return state, jax.tree.map(lambda x: x.sum(0), every), first

  return updates


def _make_update(specs: Any, optimizer: optax.GradientTransformation,
                 loss: Callable[..., tuple[Array, Metrics]], algorithm: cfg.Algorithm,
                 accumulation: int, split: Split) -> Callable[..., tuple[TrainState, Metrics]]:
  """update(state, batch, shared) → (state, metrics): one step of both optimizers."""
  head_optimizer = value_optimizer(algorithm.advantage)

  def update(state: TrainState, batch: TrainBatch, shared: Any = None
             ) -> tuple[TrainState, Metrics]:
    batch = dataclasses.replace(
        batch, weights=token_weights(algorithm.aggregation, batch.loss_mask))
    trained = P.trained(specs, state.params), state.method.value.params

    def loss_of(trained: tuple[Params, Any], *inputs: Any) -> tuple[Array, Metrics]:
      params, head = trained
      return loss((P.joined(state.params, params), head), *inputs)

    if shared is None:
      (value, metrics), grads = accumulate.gradient(
          jax.value_and_grad(loss_of, has_aux=True), trained, batch, accumulation, split)
    else:
      (value, metrics), grads = through(loss_of, trained, batch, shared)
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


def through(loss: Callable[..., tuple[Array, Metrics]], trained: Any, batch: TrainBatch,
            shared: Any) -> tuple[tuple[Array, Metrics], Any]:
  """Value, metrics and gradient of a loss that goes on from a shared forward pass.

  The policy's gradient has two parts: that of the responses' forward pass, and that of the
  documents' hidden states, keys and values, sent back through their forward pass.

  Args:
    loss: (trained parameters, batch, what was computed already) → its value and metrics.
    trained: parameters of the policy and of a value head.
    batch: what is learned from.
    shared: `update.Shared`.
  """
  of_both = jax.value_and_grad(lambda trained, prefilled: loss(trained, batch, prefilled),
                               argnums=(0, 1), has_aux=True)
  result, ((policy, head), documents) = of_both(trained, shared.prefilled)
  back, = shared.pull_back(documents)
  return result, (jax.tree.map(jnp.add, policy, back), head)


def unless_finite(state: TrainState, before: TrainState, values: Metrics) -> TrainState:
  """The state after updates, or the one before them where a loss or gradient was not finite."""
  finite = values['nonfinite'].sum == 0
  kept: TrainState = jax.tree.map(lambda a, b: jnp.where(finite, a, b), state, before)
  return kept


# --- The loss -------------------------------------------------------------------


def make_loss(read: ReadPolicy, algorithm: cfg.Algorithm) -> Callable[..., tuple[Array, Metrics]]:
  """loss((policy, value head), batch, shared) → (Σ weights · terms, metrics), sums over rows."""
  single_update = algorithm.updates == 1
  surrogate_of = tables.SURROGATES[type(algorithm.surrogate)].compute
  correct = tables.CORRECTIONS[type(algorithm.correction)].compute
  modes_even = tables.ADVANTAGES[type(algorithm.advantage)].modes_even

  def loss(trained: tuple[Params, Any], batch: TrainBatch, shared: Any = None
           ) -> tuple[Array, Metrics]:
    params, head = trained
    mask, on_mask = batch.loss_mask, lambda x: jnp.where(batch.loss_mask > 0, x, 0.0)
    seen, hidden = read(params, batch, shared)
    # Beyond a response's end the log-probabilities are garbage, whose exponential might overflow.
    logp = on_mask(seen.logp)
    old_logp = jax.lax.stop_gradient(logp) if single_update else on_mask(batch.old_logp)
    if modes_even:
      old_logp = old_logp.at[..., 0].set(-jnp.log(2.0))
    correction = correct(algorithm.correction, old_logp, batch.sampler_logp, mask)
    surrogate = surrogate_of(algorithm.surrogate, logp, old_logp, batch.advantage, mask)
    reference_logp = on_mask(batch.reference_logp)
    terms = surrogate.terms * correction
    terms += _kl_terms(algorithm.kl, logp, reference_logp)
    if algorithm.entropy_coef:
      terms -= algorithm.entropy_coef * seen.entropy
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
        'entropy': Weighted.of(seen.entropy, mask),
        'correction': Weighted.of(correction, mask),
        'clip_fraction': Weighted.of(surrogate.clipped, mask),
        'bounded_ratios': Weighted.of(_beyond(
            algorithm, surrogate, logp, old_logp, batch.sampler_logp, reference_logp), mask),
        'gradient_variance': objectives.gradient_variance(
            batch.advantage,
            token_advantages.score_norm(logp, seen.collision), mask),
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
