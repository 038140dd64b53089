"""The loss of next-token prediction, and the metrics that evaluation takes from it."""

from collections.abc import Callable

from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.types import Array, Batch, Params, Weighted

# loss(params, batch) → f32[], the sum over the batch's targets, in nats.
SumLoss = Callable[[Params, Batch], Array]


def next_token(model: Model, loss_chunk: int) -> SumLoss:
  """loss(params, batch) = Σ −weight · log p(target) over the targets, in nats.

  The caller divides by the number of targets of the *whole* step, so that gradient
  accumulation and sharding normalise exactly like one big batch.

  Args:
    model: the policy.
    loss_chunk: tokens whose logits exist at a time (`logprobs.token_logprobs`); 0 takes all.
  """
  def loss(params: Params, batch: Batch) -> Array:
    hidden_BTD = model.apply(params, batch.tokens, batch.positions, batch.segments)
    scores = token_logprobs(hidden_BTD, model.head(params), batch.targets, loss_chunk)
    return -(scores.logp * batch.weights).sum()

  return loss


def evaluation(model: Model, loss_chunk: int) -> Callable[[Params, Batch], dict[str, Weighted]]:
  """evaluate(params, batch) → 'loss' in nats per target, and 'accuracy' of the argmax.

  Every target that has a weight counts once, whatever its weight.

  Arguments as in `next_token`.
  """
  def evaluate(params: Params, batch: Batch) -> dict[str, Weighted]:
    hidden_BTD = model.apply(params, batch.tokens, batch.positions, batch.segments)
    scores = token_logprobs(hidden_BTD, model.head(params), batch.targets, loss_chunk)
    counted = batch.weights > 0
    return {'loss': Weighted.of(-scores.logp, counted),
            'accuracy': Weighted.of(scores.correct, counted)}

  return evaluate
