"""One on-policy RPT step as a pure function: generate → verify → advantage → update.

Everything is arrays, so that the whole step is one jitted program without a trip to the
host. The learner computes each prompt once, like the sampler.

Departs from the paper in what it leaves open (2506.08007, specs/rpt.md 1.5): the loss is
the sum over response tokens divided by the number of responses, and exactly one update
is made per batch, where PPO's ratio is 1 and its clip inert.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import TokenScores, token_logprobs
from jaxrl_pt.rl import advantages, objectives
from jaxrl_pt.sampling import branch, decode, policies
from jaxrl_pt.train import optim
from jaxrl_pt.types import (
  Array,
  Params,
  Prompts,
  Rollout,
  TrainState,
  Trajectory,
  Verdict,
  Weighted,
)
from jaxrl_pt.verifiers import next_token as verifier

RLStep = Callable[[TrainState, Prompts], tuple[TrainState, dict[str, Weighted]]]


def make_rpt_step(model: Model, optimizer: optax.GradientTransformation, run: cfg.Run,
                  table: verifier.TokenBytes, stop_id: int = decode.NO_STOP) -> RLStep:
  """step(state, prompts) → (state, metrics). Jit it with the state donated.

  The noise is addressed by (run.seed, state.step, prompt id, sample, position): the step
  is in it so that a prompt met again in a later epoch draws anew.

  A loss or gradient that is not finite leaves the state as it was, its step included, and
  sets metrics['nonfinite'].

  Args:
    model, optimizer: of the state.
    run: its objective is an RPT.
    table: bytes of the vocabulary.
    stop_id: the token that ends a prediction.

  Raises:
    TypeError: `run.objective` is another objective.
  """
  method = run.objective
  if not isinstance(method, cfg.RPT):
    raise TypeError(f'make_rpt_step needs an RPT objective, not {type(method).__name__}')
  verify = verifier.device_verifier(table)
  learning_rate = optim.learning_rate(run.optimizer.schedule, run.train.num_steps)

  def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict[str, Weighted]]:
    key = jax.random.fold_in(jax.random.key(run.seed), state.step)
    rollout = decode.generate(
        model, state.params, prompts, key, sampler=method.rollouts.sampler,
        num_samples=method.rollouts.group_size,
        num_tokens=method.rollouts.response_tokens, stop_id=stop_id, version=state.step)
    verdict = verify(prompts, rollout)
    advantage_NG = group_advantage(method.algorithm.advantage, rollout, verdict)
    mask = rollout.mask * verdict.valid[..., None]
    trajectory = Trajectory(prompts, dataclasses.replace(rollout, mask=mask),
                            jnp.broadcast_to(advantage_NG[..., None], mask.shape))

    def loss(params: Params) -> tuple[Array, TokenScores]:
      return rpt_loss(model, params, trajectory, method.rollouts.sampler, run.compute.loss_chunk)

    (value, scores), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    grad_norm = optim.global_norm(grads)
    new_state, finite = _update(optimizer, state, grads, value, grad_norm)
    return new_state, {
        'loss': Weighted.single(value),
        'grad_norm': Weighted.single(grad_norm),
        'learning_rate': Weighted.single(learning_rate(state.step)),
        'nonfinite': Weighted.single(~finite),
        **_rollout_metrics(rollout, verdict, advantage_NG, scores),
    }

  return step


def group_advantage(method: cfg.Advantage, rollout: Rollout, verdict: Verdict) -> Array:
  """f32[N, G]: the advantage that `method` names."""
  match method:
    case cfg.GRPO():
      return advantages.group_normalised(verdict.reward, verdict.valid)
    case cfg.OPO():
      lengths = rollout.mask.sum(-1)
      return advantages.length_weighted(verdict.reward, lengths, verdict.valid)


def _update(optimizer: optax.GradientTransformation, state: TrainState, grads: Params,
            loss: Array, grad_norm: Array) -> tuple[TrainState, Array]:
  """The updated state, or the old one where loss or gradient is not finite; and which."""
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updated = dataclasses.replace(state, step=state.step + 1, opt_state=opt_state,
                                params=optax.apply_updates(state.params, updates))
  return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), finite


def _rollout_metrics(rollout: Rollout, verdict: Verdict, advantage_NG: Array,
                     scores: TokenScores) -> dict[str, Weighted]:
  mask = rollout.mask * verdict.valid[..., None]
  return {
      'reward': Weighted.of(verdict.reward, verdict.valid),
      'accuracy': Weighted.of(verdict.correct, verdict.valid),
      'gap': objectives.trainer_sampler_gap(scores.logp, rollout.logp, mask),
      'entropy': Weighted.of(scores.entropy, mask),
      'zero_advantage_groups': objectives.zero_advantage_groups(advantage_NG, verdict.valid),
      'response_length': Weighted.of(rollout.mask.sum(-1), verdict.valid),
  }


# --- The learner ----------------------------------------------------------------


def rpt_loss(model: Model, params: Params, trajectory: Trajectory, sampler: cfg.Sampler,
             loss_chunk: int = 0) -> tuple[Array, TokenScores]:
  """−(1 / N·G) Σ A_t · log π(y_t) over the response tokens, and their scores."""
  scores = response_scores(model, params, trajectory.prompts, trajectory.rollout.tokens, sampler,
                           loss_chunk)
  num_prompts, num_samples, _ = trajectory.advantage.shape
  loss = objectives.policy_gradient(scores.logp, trajectory.advantage, trajectory.rollout.mask,
                                    objectives.token_sum_over(num_prompts * num_samples))
  return loss, scores


def response_scores(model: Model, params: Params, prompts: Prompts, tokens_NGS: Array,
                    sampler: cfg.Sampler, loss_chunk: int = 0) -> TokenScores:
  """Scores of response tokens under the distribution the sampler draws from.

  Each prompt is computed once, its G responses beside it in the same packed row. Equal, in
  value and gradient, to `apply` on the N · G whole sequences.

  Returns:
    TokenScores of f32[N, G, S] arrays; garbage where the response has ended.
  """
  num_prompts, num_samples, num_tokens = tokens_NGS.shape
  hidden = branch.tree_hidden(model, params, prompts.tokens,
                              jnp.repeat(prompts.lengths[:, None], num_samples, 1), tokens_NGS)
  return token_logprobs(
      hidden, model.head(params), tokens_NGS, loss_chunk,
      lambda logits, tokens: policies.learner_logits(logits, tokens, sampler))


# --- Evaluation -----------------------------------------------------------------


def next_token_accuracy(model: Model, params: Params, prompts: Prompts, key: Array,
                        table: verifier.TokenBytes, *, method: cfg.RPT, num_samples: int,
                        stop_id: int = decode.NO_STOP) -> dict[str, Weighted]:
  """Prefix-match accuracy by difficulty, sampled as in training and by the argmax.

  The splits are nested as the paper writes them: entropy above each of
  `method.difficulty`. To be called under `jit`; sum the results over batches.

  Args:
    prompts: rows without a continuation (`pad_prompts`) are not counted.
    num_samples: responses per prompt when sampling; the argmax draws one.

  Returns:
    {easy,medium,hard}_{sampled,argmax}; the count of an argmax entry is that of positions.
  """
  verify = verifier.device_verifier(table)
  results = {}
  for name, sampler, samples in (('sampled', method.rollouts.sampler, num_samples),
                                 ('argmax', cfg.Sampler(temperature=0.0), 1)):
    rollout = decode.generate(model, params, prompts, key, sampler=sampler, num_samples=samples,
                              num_tokens=method.rollouts.response_tokens, stop_id=stop_id)
    reward = verify(prompts, rollout).reward
    for split, threshold in zip(('easy', 'medium', 'hard'), method.difficulty, strict=True):
      counted = (prompts.entropy > threshold) & (prompts.continuation_lengths > 0)
      mask = jnp.broadcast_to(counted[:, None], reward.shape)
      results[f'{split}_{name}'] = Weighted.of(reward, mask)
  return results
