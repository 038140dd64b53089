"""The update of a policy of a game: rollouts → advantages → optimiser steps, as a pure function.

    (GameRollouts of N worlds × G games × S actions) → TrainBatch → loss → gradient

An action stands where a language model has a token, and the games in one world where it has the
responses to one prompt: advantages, surrogates, aggregations and updates are those of `rl` and
`policy_update`. Each action has a reward of its own, of which an advantage of responses reads the
sum and one of tokens what comes after the action.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models.game_policy import Policy, windows
from jaxrl_pt.models.logprobs import TokenScores, token_logprobs
from jaxrl_pt.rl import objectives, tables
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.train import accumulate, optim, policy_update, scores
from jaxrl_pt.train.policy_update import Metrics
from jaxrl_pt.types import Array, GameRollouts, Params, TrainBatch, TrainState, Weighted

Learn = Callable[[TrainState, GameRollouts], tuple[TrainState, Metrics]]


def read(policy: Policy, params: Params, frames: Array, actions: Array
         ) -> tuple[TokenScores, Array]:
  """Scores of actions, and the hidden states that they follow from.

  Args:
    policy, params: the policy.
    frames: f32[N, G, S + 1, H, W, 3].
    actions: i32[N, G, S].

  Returns:
    TokenScores of f32[N, G, S] arrays, f32[N, G, S, D].
  """
  games = frames.reshape(-1, *frames.shape[2:])[:, :-1]
  seen = windows(games, policy.config.num_frames)
  hidden = policy.hidden(params, seen.reshape(-1, *seen.shape[2:]))
  hidden = hidden.reshape(*actions.shape, -1)
  return token_logprobs(hidden, policy.head(params), actions), hidden


def make_learner(policy: Policy, optimizer: optax.GradientTransformation, run: cfg.Run,
                 algorithm: cfg.Algorithm) -> Learn:
  """learn(state, rollouts) → (state, metrics), to be jitted with the state donated.

  A loss or gradient that is not finite leaves the state as it was, its step included, and sets
  metrics['nonfinite'].

  Args:
    policy: the policy.
    optimizer: the optimizer whose state is in `state.opt_state`.
    run: the settings, of which schedule and accumulation are read.
    algorithm: advantage, surrogate and all else that makes the gradient.
  """
  schedule = optim.learning_rate(run.optimizer.schedule, run.train.num_steps * algorithm.updates)

  def read_batch(params: Params, batch: TrainBatch, shared: None) -> tuple[TokenScores, Array]:
    del shared
    return read(policy, params, batch.prompts, batch.tokens)

  updates = policy_update.make_updates(policy.specs, optimizer, read_batch, algorithm,
                                       run.train.accumulation, accumulate.split)

  def learn(state: TrainState, rollouts: GameRollouts) -> tuple[TrainState, Metrics]:
    batch = train_batch(policy, state, rollouts, algorithm)
    num_worlds, group_size = rollouts.actions.shape[:2]
    silent = objectives.zero_advantage_groups(
        jnp.abs(batch.advantage * batch.loss_mask).sum(-1), jnp.ones((num_worlds, group_size)))
    new, values, first = updates(state, batch, num_worlds)
    new = dataclasses.replace(new, step=state.step + 1)
    return policy_update.unless_finite(new, state, values), {
        **values, **first, **measures(rollouts), 'zero_advantage_groups': silent,
        'learning_rate': Weighted.single(schedule(state.step * algorithm.updates))}

  return learn


def train_batch(policy: Policy, state: TrainState, rollouts: GameRollouts,
                algorithm: cfg.Algorithm) -> TrainBatch:
  """Computes advantages, and all else that is fixed before the first update."""
  mask = rollouts.counts
  zeros = jnp.zeros_like(mask)
  old, values = TokenScores(rollouts.logp, zeros, zeros, zeros), zeros
  if policy_update.needs_old_policy(algorithm):
    old, hidden = read(policy, state.params, rollouts.frames, rollouts.actions)
    values = scores.values(state.method.value.params, hidden)
  rewards = rollouts.rewards * mask
  scored = Scored(rewards.sum(-1), mask.sum(-1), jnp.ones_like(mask[..., 0]), rewards, mask,
                  old.logp, old.collision, values)
  advantage, returns = tables.ADVANTAGES[type(algorithm.advantage)].compute(
      algorithm.advantage, scored)
  batch = TrainBatch(rollouts.frames, rollouts.actions, mask, rollouts.logp, old.logp, zeros,
                     advantage, returns, zeros)
  constants: TrainBatch = jax.lax.stop_gradient(batch)
  return constants


def measures(rollouts: GameRollouts) -> Metrics:
  """What a batch of games says of the policy and of where it plays.

  reward, true_reward: mean return of a game, as paid and as the true game would have paid.
  unreadable: the share of the frames that cannot be read.
  false_events: the share of wrong changes among the changes that the display shows.
  missed: the share of wrong numbers among the readable frames whose display does not change.
  """
  counts, changed = rollouts.counts, rollouts.changed
  games = jnp.ones_like(counts[..., 0])
  still = rollouts.readable * (1 - changed)
  return {'reward': Weighted.of((rollouts.rewards * counts).sum(-1), games),
          'true_reward': Weighted.of(rollouts.true_rewards.sum(-1), games),
          'unreadable': Weighted.of(1 - rollouts.readable, counts),
          'false_events': Weighted.of(rollouts.false, changed),
          'missed': Weighted.of(rollouts.false, still)}
