"""RLP's verdict: what each thought adds to the true next token, under the policy itself.

    thoughts → r(c) = log p_θ(x_t | x_<t, c) − log p̄_φ(x_t | x_<t) → A = G/(G−1) · (r − mean r)
    → clipped surrogate on the thoughts → φ ← τ φ + (1 − τ) θ

The corpus is the judge, and the policy reads it: the verdict is made inside the step. What a step
keeps besides the policy is the average φ, in `TrainState.method`. The prompts end with a think
marker; a thought ends with the answer marker, whose choice is part of it, or is cut off at the
token budget, after which the marker is put there for it.

Source: RLP 2510.01265. Departs from the paper in that the baseline may read
a template's text before the context too.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.rl import rlp
from jaxrl_pt.sampling import branch, decode
from jaxrl_pt.train.fused import PolicyVerifier
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, TrainState, Verdict


@dataclass(frozen=True)
class Markers:
  """What the template appends to a context, and the token that ends a thought.

  num_after: tokens at the end of each prompt that the baseline does not read.
  answer: the token between thought and prediction.
  """

  num_after: int
  answer: int


def thought_verdict(model: Model, params: Params, average: Params, prompts: Prompts,
                    thoughts: RolloutBatch, markers: Markers,
                    prefilled: decode.Prefilled | None = None) -> Verdict:
  """The information gain of each thought as its reward, nats; correct where it is above 0.

  Args:
    params: θ, which drew the thoughts.
    average: φ.
    prompts: contexts with the template's tokens; of the continuation the first token is read.
    thoughts: a response is a thought with the answer marker that ended it, if one did.
    markers: of the template.
    prefilled: the prompts' documents, where they have gone through θ already.

  Returns:
    Its parts are the two log-probabilities of the true token, 'logp' after the thought and
    'baseline' without one.
  """
  truth_N = prompts.extras['continuation'][:, 0]
  logp = logp_after_thought(model, params, prompts, thoughts, markers.answer, prefilled)
  positions = jnp.broadcast_to(jnp.arange(prompts.tokens.shape[1]), prompts.tokens.shape)
  hidden_NTD = model.apply(average, prompts.tokens, positions, jnp.ones_like(positions))
  last = (prompts.lengths - 1 - markers.num_after)[:, None, None]
  hidden_ND = jnp.take_along_axis(hidden_NTD, last, 1)[:, 0]
  baseline_N = token_logprobs(hidden_ND, model.head(average), truth_N).logp
  gain = rlp.information_gain(logp, baseline_N)
  parts = {'logp': logp, 'baseline': jnp.broadcast_to(baseline_N[:, None], logp.shape)}
  return Verdict(gain, jnp.ones_like(gain), (gain > 0).astype(jnp.float32), parts)


def logp_after_thought(model: Model, params: Params, prompts: Prompts, thoughts: RolloutBatch,
                       answer: int, prefilled: decode.Prefilled | None = None) -> Array:
  """f32[N, G]: log p_θ of the true token after the thought and exactly one answer marker.

  Its exponential is the chance of a right prediction where a thought that did not end in time
  is ended for the policy. Arguments as in `thought_verdict`.
  """
  place = jnp.arange(thoughts.tokens.shape[-1])
  ended = ((thoughts.tokens == answer) & (thoughts.in_response > 0)).any(-1)
  length_NG = thoughts.in_response.sum(-1).astype(jnp.int32) - ended  # without its marker
  within = place < length_NG[..., None]
  # Everything from the marker on is the marker; two slots more, for it and for the truth.
  own_NGS = jnp.where(within, thoughts.tokens, answer)
  own_NGS = jnp.pad(own_NGS, ((0, 0), (0, 0), (0, 2)), constant_values=answer)
  hidden = branch.response_hidden(model, params, prompts, own_NGS, prefilled)
  before_truth = jnp.take_along_axis(hidden, (length_NG + 1)[..., None, None], 2)[:, :, 0]
  truth_NG = jnp.broadcast_to(prompts.extras['continuation'][:, :1], length_NG.shape)
  return token_logprobs(before_truth, model.head(params), truth_NG).logp


def policy_verifier(markers: Markers, decay: float) -> PolicyVerifier:
  """RLP's verdict inside the step, which ends with φ ← τ φ + (1 − τ) θ.

  Args:
    markers: of the template.
    decay: τ.
  """
  def verify(model: Model, state: TrainState, prefilled: decode.Prefilled | None,
             prompts: Prompts, thoughts: RolloutBatch) -> Verdict:
    return thought_verdict(model, state.params, state.method.average, prompts, thoughts, markers,
                           prefilled)

  def after(state: TrainState, new: TrainState) -> TrainState:
    average = rlp.average(state.method.average, new.params, decay)
    return dataclasses.replace(new, method=dataclasses.replace(new.method, average=average))

  return PolicyVerifier(verify, after, markers.answer)
