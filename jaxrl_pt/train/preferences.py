"""Losses over pairs of a chosen and a rejected completion: DPO and its relatives, Bradley–Terry.

Rows hold whole pairs: segment 2p + 1 of a row is the chosen completion of its pair p behind the
prompt, segment 2p + 2 the rejected one behind the same prompt. Axes: B rows, T tokens, S segments
of a row, P = S / 2 pairs of a row.

Each loss is a sum over the pairs of its batch, which the step divides by the number of pairs of
the whole batch, whatever the number of micro-batches and of devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.train import scores
from jaxrl_pt.types import Array, Batch, Params, Weighted

Metrics = dict[str, Weighted]


class Pairs(NamedTuple):
  """Rows of pairs with what the reference policy says of them."""

  examples: Batch
  reference: Array  # f32[B, S] log-probability of each segment's completion, nats


# loss(parameters, pairs) → (the sum over the pairs, metrics)
PairLoss = Callable[[Any, Pairs], tuple[Array, Metrics]]


# --- Segments ---------------------------------------------------------------------


def of_segments(values_BT: Array, segments_BT: Array, num_segments: int) -> Array:
  """f32[B, S]: the sum of the values over the tokens of each segment."""
  numbers_S = jnp.arange(1, num_segments + 1)
  return jnp.where(segments_BT[..., None] == numbers_S, values_BT[..., None], 0.0).sum(1)


def is_last(segments_BT: Array) -> Array:
  """bool[B, T]: whether a token is the last of its segment."""
  following_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
  return (segments_BT > 0) & (segments_BT != following_BT)


def num_pairs(pairs: Pairs, num_segments: int) -> Array:
  """f32[]: the pairs of a batch, by which the step divides."""
  return are_pairs(pairs.examples.segments, num_segments).sum()


def are_pairs(segments_BT: Array, num_segments: int) -> Array:
  """f32[B, P]: 1 where a row has a pair of that number."""
  rejected_P = 2 * jnp.arange(1, num_segments // 2 + 1)
  return (segments_BT[..., None] == rejected_P).any(1).astype(jnp.float32)


def completions(model: Model, loss_chunk: int, num_segments: int
                ) -> Callable[[Params, Batch], tuple[Array, Array]]:
  """(params, batch) → log-probability f32[B, S] and number f32[B, S] of each segment's targets.

  Only targets that have a weight are counted: those of the completion, its end included.

  Args:
    model: the policy.
    loss_chunk: as for `losses.next_token`.
    num_segments: S.
  """
  def compute(params: Params, batch: Batch) -> tuple[Array, Array]:
    hidden_BTD = model.apply(params, batch.tokens, batch.positions, batch.segments)
    found = token_logprobs(hidden_BTD, model.head(params), batch.targets, loss_chunk)
    counted_BT = (batch.weights > 0).astype(jnp.float32)
    return (of_segments(found.logp * counted_BT, batch.segments, num_segments),
            of_segments(counted_BT, batch.segments, num_segments))

  return compute


# --- DPO --------------------------------------------------------------------------


def preference_loss(method: cfg.DPO, chosen: Array, rejected: Array, num_chosen: Array,
                    num_rejected: Array) -> Array:
  """The loss of each pair, f32[...].

  With Δ = r_chosen − r_rejected and the log-ratios r = log π(y | x) − log π_ref(y | x):

    sigmoid         −log σ(β Δ)                                             DPO, 2305.18290
    robust          (−(1 − ε) log σ(β Δ) + ε log σ(−β Δ)) / (1 − 2 ε)       rDPO, 2403.00409
    ipo             (Δ' − 1 / (2 β))²                                       IPO, 2310.12036
    length_normalised  −log σ(β Δ')

  where Δ' has each log-ratio divided by the number of its completion's tokens, as in TRL, whose
  authors say that IPO's paper did so.

  Args:
    method: loss, β and ε.
    chosen, rejected: f32[...] log-ratios, nats.
    num_chosen, num_rejected: f32[...] tokens of the completions.
  """
  beta, smoothing = method.beta, method.label_smoothing
  if method.loss in ('ipo', 'length_normalised'):
    chosen = chosen / jnp.maximum(num_chosen, 1.0)
    rejected = rejected / jnp.maximum(num_rejected, 1.0)
  delta = chosen - rejected
  match method.loss:
    case 'ipo':
      return jnp.square(delta - 1 / (2 * beta))
    case 'robust':
      right, flipped = -jax.nn.log_sigmoid(beta * delta), -jax.nn.log_sigmoid(-beta * delta)
      return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
    case _:
      return -jax.nn.log_sigmoid(beta * delta)


def dpo(method: cfg.DPO, model: Model, loss_chunk: int, num_segments: int) -> PairLoss:
  """The loss of DPO and its relatives over the pairs of a batch.

  Its metrics are means over pairs: the loss, the rewards β r of both completions, the margin
  between them, how often the chosen one's is higher, and their log-probabilities.

  Args:
    method: the objective.
    model: the policy.
    loss_chunk, num_segments: as for `completions`.
  """
  compute = completions(model, loss_chunk, num_segments)

  def loss(params: Params, pairs: Pairs) -> tuple[Array, Metrics]:
    logp_BS, num_BS = compute(params, pairs.examples)
    ratio_BS = logp_BS - pairs.reference
    chosen_BP, rejected_BP = ratio_BS[:, ::2], ratio_BS[:, 1::2]
    there_BP = are_pairs(pairs.examples.segments, num_segments)
    each_BP = preference_loss(method, chosen_BP, rejected_BP, num_BS[:, ::2], num_BS[:, 1::2])
    mean = lambda x: Weighted.of(jax.lax.stop_gradient(x), there_BP)
    return (each_BP * there_BP).sum(), {
        'loss': mean(each_BP),
        'chosen_reward': mean(method.beta * chosen_BP),
        'rejected_reward': mean(method.beta * rejected_BP),
        'margin': mean(method.beta * (chosen_BP - rejected_BP)),
        'accuracy': mean((chosen_BP > rejected_BP).astype(jnp.float32)),
        'chosen_logp': mean(logp_BS[:, ::2]), 'rejected_logp': mean(logp_BS[:, 1::2])}

  return loss


# --- Reward model -----------------------------------------------------------------


def rewards(model: Model, num_segments: int) -> Callable[[tuple[Params, Any], Batch], Array]:
  """((params, head), batch) → f32[B, S], the rewards: w · h + b at each segment's last token."""
  def compute(trained: tuple[Params, Any], batch: Batch) -> Array:
    params, head = trained
    hidden_BTD = model.apply(params, batch.tokens, batch.positions, batch.segments)
    values_BT = scores.values(head, hidden_BTD)
    return of_segments(jnp.where(is_last(batch.segments), values_BT, 0.0), batch.segments,
                       num_segments)

  return compute


def bradley_terry(method: cfg.RewardModel, model: Model, num_segments: int) -> PairLoss:
  """The loss of a reward model, −log σ(r_chosen − r_rejected) + c · (r_chosen + r_rejected)².

  The second term, whose coefficient c is `RewardModel.center`, keeps rewards near zero
  (2312.09244). Its metrics are means over pairs: the loss, both rewards, their margin, and how
  often the chosen one's is higher.

  Args:
    method: the objective.
    model: the reward model without its head; the loss's parameters are a pair of both.
    num_segments: S.
  """
  compute = rewards(model, num_segments)

  def loss(trained: tuple[Params, Any], pairs: Pairs) -> tuple[Array, Metrics]:
    reward_BS = compute(trained, pairs.examples)
    chosen_BP, rejected_BP = reward_BS[:, ::2], reward_BS[:, 1::2]
    there_BP = are_pairs(pairs.examples.segments, num_segments)
    each_BP = (-jax.nn.log_sigmoid(chosen_BP - rejected_BP)
               + method.center * jnp.square(chosen_BP + rejected_BP))
    mean = lambda x: Weighted.of(jax.lax.stop_gradient(x), there_BP)
    return (each_BP * there_BP).sum(), {
        'loss': mean(each_BP),
        'chosen_reward': mean(chosen_BP), 'rejected_reward': mean(rejected_BP),
        'margin': mean(chosen_BP - rejected_BP),
        'accuracy': mean((chosen_BP > rejected_BP).astype(jnp.float32))}

  return loss
