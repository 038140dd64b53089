"""Losses: functions of (params, batch) that return sums with their counts."""

from collections.abc import Callable

from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.types import Array, Batch, Params, Weighted

# loss(params, batch) → sum over the batch's tokens, in nats
SumLoss = Callable[[Params, Batch], Array]


def next_token(model: Model, loss_chunk: int) -> SumLoss:
  """Σ −log p(target) over the targets that count, in nats.

  The caller divides by the number of targets of the *whole* step, so that gradient
  accumulation and sharding normalise exactly like one big batch.
  """
  def loss(params: Params, batch: Batch) -> Array:
    hidden_BTD = model.apply(params, batch.tokens, batch.positions, batch.segments)
    scores = token_logprobs(hidden_BTD, model.head(params), batch.targets, loss_chunk)
    return -(scores.logp * batch.weights).sum()

  return loss


def evaluation(model: Model, loss_chunk: int) -> Callable[[Params, Batch], dict[str, Weighted]]:
  """Metrics of one batch: 'loss' in nats per target and 'accuracy' of the argmax."""
  def evaluate(params: Params, batch: Batch) -> dict[str, Weighted]:
    hidden_BTD = model.apply(params, batch.tokens, batch.positions, batch.segments)
    scores = token_logprobs(hidden_BTD, model.head(params), batch.targets, loss_chunk)
    return {'loss': Weighted.of(-scores.logp, batch.weights),
            'accuracy': Weighted.of(scores.correct, batch.weights)}

  return evaluate
