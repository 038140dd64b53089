"""The learner: judged rollouts → advantages → one or several updates, as a pure function.

Each prompt is computed once, its responses beside it in one packed row, and no logits of
prompt positions are taken. What the sampler knows is not computed again: with one update a
batch the old policy is the one being updated, so its log-probabilities are the policy's own
without gradient; with several, and no correction, they are the sampler's.

A step that is one program hands on the sampler's forward pass over the documents (`Shared`):
the learner then computes responses only, and sends their gradients back through it.

What a step keeps besides parameters (a gate, a value head) is in `TrainState.method`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

from flax import struct
import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import TokenScores, token_logprobs
from jaxrl_pt.rl import objectives, token_advantages
from jaxrl_pt.sampling import branch, decode, policies
from jaxrl_pt.train import algorithm, optim
from jaxrl_pt.train.state import ValueHead, value_optimizer
from jaxrl_pt.types import Array, Params, Prompts, Rollout, TrainState, Verdict, Weighted

Metrics = dict[str, Weighted]
# The one metric that is no number: f32[N, G, S] log-probabilities of the trainer, for rows whose
# count is not 0. Whoever asked for it takes it out before the others go on.
BY_TOKEN = 'trainer_logp'


@struct.dataclass
class Experience:
  """A judged batch of rollouts."""

  prompts: Prompts
  rollout: Rollout
  verdict: Verdict
  reference_logp: Array  # f32[N, G, S] under the start policy; zeros where no KL is asked for


@struct.dataclass
class Lesson:
  """What an update reads of a batch. All but the prompts are constants of the gradient."""

  prompts: Prompts
  tokens: Array  # i32[N, G, S]
  mask: Array  # f32[N, G, S]
  sampler_logp: Array  # f32[N, G, S]
  old_logp: Array  # f32[N, G, S] of the policy before the first update; not read if it is the only
  reference_logp: Array  # f32[N, G, S]
  advantage: Array  # f32[N, G, S]
  returns: Array  # f32[N, G, S] targets of the value head; not read without one
  weights: Array  # f32[N, G, S] of the aggregation: the loss is Σ weights · terms
  rows: Any = ()  # i32[N] their places in the batch if `BY_TOKEN` is to be measured, else ()
  num_rows: int = struct.field(pytree_node=False, default=0)  # of the whole batch; read with rows


class Shared(NamedTuple):
  """The documents' forward pass by the state's parameters, and the way back through it."""

  prefilled: decode.Prefilled
  pull_back: Callable[[decode.Prefilled], tuple[Params]]  # of jax.vjp


class Learn(Protocol):
  """See `make_learner`."""

  def __call__(self, state: TrainState, experience: Experience, shared: Shared | None = None
               ) -> tuple[TrainState, Metrics]: ...


def shares(accumulation: int, method: cfg.Algorithm) -> bool:
  """Whether the learner can go on from the sampler's forward pass: it makes one update, of the
  whole batch at once, and no forward pass before it."""
  return (method.updates == 1 and accumulation == 1
          and not algorithm.needs_old_policy(method))


def make_learner(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                 rollouts: cfg.Rollouts, method: cfg.Algorithm, *, by_token: bool = False) -> Learn:
  """learn(state, experience, shared) → (state, metrics). Jit it with the state donated.

  A loss or gradient that is not finite leaves the state as it was, its step included, and
  sets metrics['nonfinite']. With `shared`, which only a method that `shares` takes, value and
  gradient are equal up to the order of sums.

  Args:
    model, optimizer: of the state; the optimizer makes `method.updates` steps a call.
    run: its compute, schedule and accumulation are read.
    rollouts: how the batch was drawn.
    method: what is learned from it.
    by_token: whether `BY_TOKEN`, of the first update, is among the metrics.
  """
  schedule = optim.learning_rate(run.optimizer.schedule, run.train.num_steps * method.updates)
  update = _make_update(model, optimizer, run, rollouts.sampler, method)

  def learn(state: TrainState, experience: Experience, shared: Shared | None = None
            ) -> tuple[TrainState, Metrics]:
    assert shared is None or shares(run.train.accumulation, method)
    verdict = experience.verdict
    mask = experience.rollout.mask * verdict.valid[..., None]
    reward, gate, shaping_metrics = algorithm.shape_reward(method.shaping, verdict, mask.sum(-1),
                                                           state.method.gate)
    num_rows = mask.shape[0] if by_token else 0
    lesson, measures = _prepare(model, state, experience, reward, mask, run, rollouts, method)
    if num_rows:
      lesson = dataclasses.replace(lesson, rows=jnp.arange(num_rows), num_rows=num_rows)
    new, values, first = _updates(update, state, lesson, method, shared)
    finite = values['nonfinite'].sum == 0
    new = dataclasses.replace(new, step=state.step + 1,
                              method=dataclasses.replace(new.method, gate=gate))
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    # Of the first update: the later ones move away from the sampler on purpose. A policy that
    # is a step older than the learner's is stale, which is no fault of the arithmetic.
    name = 'gap' if rollouts.mode == cfg.OnPolicy() else 'staleness'
    return new, {**values, name: first.pop('gap'), **first,
                 'learning_rate': Weighted.single(schedule(state.step * method.updates)),
                 **_rollout_metrics(experience, reward), **measures, **shaping_metrics}

  return learn


def _prepare(model: Model, state: TrainState, experience: Experience, reward: Array, mask: Array,
             run: cfg.Run, rollouts: cfg.Rollouts, method: cfg.Algorithm
             ) -> tuple[Lesson, Metrics]:
  """Advantages and all else that is fixed before the first update."""
  rollout, valid = experience.rollout, experience.verdict.valid
  zeros = jnp.zeros_like(mask)
  old, values = TokenScores(rollout.logp, zeros, zeros, zeros), zeros
  if algorithm.needs_old_policy(method):
    hidden = branch.response_hidden(model, state.params, experience.prompts, rollout.tokens)
    old = _scores(model, state.params, hidden, rollout.tokens, rollouts.sampler,
                  run.compute.loss_chunk)
    values = _values(state.method.value.params, hidden)
  advantage, returns = algorithm.token_advantage(
      method, reward, rollout, mask, valid, experience.reference_logp, old, values)
  lesson = Lesson(experience.prompts, rollout.tokens, mask, rollout.logp, old.logp,
                  experience.reference_logp, advantage, returns, zeros)
  silent = objectives.zero_advantage_groups(jnp.abs(advantage * mask).sum(-1), valid)
  return lesson, {'zero_advantage_groups': silent}


def _rollout_metrics(experience: Experience, reward: Array) -> Metrics:
  verdict, rollout = experience.verdict, experience.rollout
  return {
      'reward': Weighted.of(verdict.reward, verdict.valid),
      'shaped_reward': Weighted.of(reward, verdict.valid),
      'accuracy': Weighted.of(verdict.correct, verdict.valid),
      'judged': Weighted.of(verdict.valid, jnp.ones_like(verdict.valid)),
      'response_length': Weighted.of(rollout.mask.sum(-1), verdict.valid),
      **{f'reward/{name}': Weighted.of(part, verdict.valid)
         for name, part in verdict.parts.items()},
  }


# --- Updates --------------------------------------------------------------------


def _split(lesson: Lesson, parts: int) -> Any:
  """[N, …] → [parts, N / parts, …], the prompts of a document staying together.

  Part m has documents m, m + parts, …: every device keeps its own.
  """
  num_docs = lesson.prompts.tokens.shape[0]

  def split(x: Array) -> Array:
    grouped = x.reshape(num_docs // parts, parts, x.shape[0] // num_docs, *x.shape[1:])
    return jnp.moveaxis(grouped, 1, 0).reshape(parts, x.shape[0] // parts, *x.shape[1:])

  return jax.tree.map(split, lesson)


def _updates(update: Callable[..., tuple[TrainState, Metrics]], state: TrainState,
             lesson: Lesson, method: cfg.Algorithm, shared: Shared | None
             ) -> tuple[TrainState, Metrics, Metrics]:
  """All updates of a batch, their metrics added up, and the first one's distance to the sampler."""
  names = ('gap', BY_TOKEN) if lesson.num_rows else ('gap',)
  if method.updates == 1:
    state, values = update(state, lesson, shared)
    return state, values, {name: values.pop(name) for name in names}
  passes = [_split(lesson, method.minibatches)] * method.epochs
  parts = jax.tree.map(lambda *x: jnp.concatenate(x), *passes)
  state, every = jax.lax.scan(update, state, parts)
  first = jax.tree.map(lambda x: x[0], {name: every.pop(name) for name in names})
  return state, jax.tree.map(lambda x: x.sum(0), every), first


def _make_update(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                 sampler: cfg.Sampler, method: cfg.Algorithm
                 ) -> Callable[..., tuple[TrainState, Metrics]]:
  loss = make_loss(model, sampler, method, run.compute.loss_chunk)
  head_optimizer = value_optimizer(method.advantage)

  def update(state: TrainState, lesson: Lesson, shared: Shared | None = None
             ) -> tuple[TrainState, Metrics]:
    lesson = dataclasses.replace(
        lesson, weights=algorithm.token_weights(method.aggregation, lesson.mask))
    trained = state.params, state.method.value.params
    if shared is None:
      (value, metrics), grads = _accumulate(loss, trained, lesson, run.train.accumulation)
    else:
      (value, metrics), grads = _through(loss, trained, lesson, shared)
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


def _accumulate(loss: Callable[..., tuple[Array, Metrics]], trained: Any, lesson: Lesson,
                num_micro: int) -> tuple[tuple[Array, Metrics], Any]:
  """Value, metrics and gradient of a loss that is a sum over rows, in slices of the rows."""
  of_slice = jax.value_and_grad(loss, has_aux=True)
  if num_micro == 1:
    return of_slice(trained, lesson)
  slices = _split(lesson, num_micro)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
      of_slice, trained, jax.tree.map(lambda x: x[0], slices)))
  add = lambda total, one: (jax.tree.map(jnp.add, total, of_slice(trained, one)), None)
  return jax.lax.scan(add, zeros, slices)[0]


def _through(loss: Callable[..., tuple[Array, Metrics]], trained: Any, lesson: Lesson,
             shared: Shared) -> tuple[tuple[Array, Metrics], Any]:
  """Value, metrics and gradient of a loss that goes on from the shared forward pass:
  what the policy adds directly, and through its documents' hidden states, keys and values."""
  of_both = jax.value_and_grad(lambda trained, prefilled: loss(trained, lesson, prefilled),
                               argnums=(0, 1), has_aux=True)
  result, ((policy, head), documents) = of_both(trained, shared.prefilled)
  through, = shared.pull_back(documents)
  return result, (jax.tree.map(jnp.add, policy, through), head)


# --- The loss -------------------------------------------------------------------


def make_loss(model: Model, sampler: cfg.Sampler, method: cfg.Algorithm, loss_chunk: int = 0
              ) -> Callable[..., tuple[Array, Metrics]]:
  """loss((policy, value head), lesson, prefilled) → (Σ weights · terms, metrics), a sum over
  rows; `prefilled` is the documents' forward pass where there is one to go on from."""
  strict = method.updates == 1

  def loss(trained: tuple[Params, Any], lesson: Lesson,
           prefilled: decode.Prefilled | None = None) -> tuple[Array, Metrics]:
    params, head = trained
    mask, there = lesson.mask, lambda x: jnp.where(lesson.mask > 0, x, 0.0)
    hidden = branch.response_hidden(model, params, lesson.prompts, lesson.tokens, prefilled)
    scores = _scores(model, params, hidden, lesson.tokens, sampler, loss_chunk)
    logp = there(scores.logp)  # Beyond a response's end is garbage, whose exp might overflow.
    old_logp = jax.lax.stop_gradient(logp) if strict else there(lesson.old_logp)
    correction = algorithm.correction(method.correction, old_logp, lesson.sampler_logp, mask)
    surrogate = algorithm.surrogate(method.surrogate, logp, old_logp, lesson.advantage, mask)
    reference_logp = there(lesson.reference_logp)
    terms = surrogate.terms * correction
    terms += algorithm.kl_terms(method.kl, logp, reference_logp)
    if method.entropy_coef:
      terms -= method.entropy_coef * scores.entropy
    total = (lesson.weights * terms).sum()
    measured: Metrics = {}
    if lesson.num_rows:
      of_batch = functools.partial(_of_batch, lesson)
      measured[BY_TOKEN] = Weighted(of_batch(jax.lax.stop_gradient(logp)), of_batch(mask))
    if isinstance(method.advantage, cfg.GAE):
      # Under its own optimizer, whose step does not depend on the scale of the gradient.
      error = 0.5 * jnp.square(_values(head, jax.lax.stop_gradient(hidden)) - lesson.returns)
      total += (lesson.weights * error).sum()
      measured['value_loss'] = Weighted.of(error, mask)
    return total, {
        **measured,
        'gap': objectives.trainer_sampler_gap(logp, lesson.sampler_logp, mask),
        'entropy': Weighted.of(scores.entropy, mask),
        'correction': Weighted.of(correction, mask),
        'clip_fraction': Weighted.of(surrogate.clipped, mask),
        'bounded_ratios': Weighted.of(algorithm.beyond(
            method, surrogate, logp, old_logp, lesson.sampler_logp, reference_logp), mask),
        'gradient_variance': objectives.gradient_variance(
            lesson.advantage,
            token_advantages.score_norm(logp, scores.collision), mask),
    }

  return loss


def _of_batch(lesson: Lesson, of_slice: Array) -> Array:
  """f[num_rows, …]: the rows of a slice at their places in the batch, so that slices add up."""
  if of_slice.shape[0] == lesson.num_rows:
    return of_slice
  return jnp.zeros((lesson.num_rows, *of_slice.shape[1:])).at[lesson.rows].set(of_slice)


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
