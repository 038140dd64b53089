"""RLP's verdict: what each thought adds to the true next token, under the policy itself.

    thoughts → r(c) = log p_θ(x_t | x_<t, c) − log p̄_φ(x_t | x_<t) → A = G/(G−1) · (r − mean r)
    → clipped surrogate on the thoughts → φ ← τ φ + (1 − τ) θ

The corpus decides the reward, and the policy reads the corpus, so the verdict is computed inside
the step. What a step keeps besides the policy's parameters θ is their average φ, in
`TrainState.method`. The prompts end with a think marker. A thought ends with the answer marker,
which the policy draws as a part of the thought, or is cut off at `Rollouts.response_tokens`; the
answer marker is then put after it.

Source: RLP 2510.01265. Departs from the paper in that the baseline reads a prompt template's text
before the context too, if there is any.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from jaxrl_pt import params as P
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.rl import rlp
from jaxrl_pt.sampling import branch
from jaxrl_pt.sampling.prefill import Prefilled
from jaxrl_pt.train.fused import PolicyVerifier
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, TrainState, Verdict


@dataclass(frozen=True)
class Markers:
  """The markers of RLP's prompt template.

  num_after: the number of tokens after the context of each prompt, which the baseline skips.
  answer: the answer marker, a token between thought and prediction.
  """

  num_after: int
  answer: int


def thought_verdict(model: Model, params: Params, average: Params, prompts: Prompts,
                    thoughts: RolloutBatch, markers: Markers,
                    prefilled: Prefilled | None = None) -> Verdict:
  """The verdict whose reward is each thought's information gain, in nats.

  Args:
    model: the policy's model.
    params: θ, the parameters that drew the thoughts.
    average: φ, the average policy's parameters.
    prompts: contexts with the prompt template's tokens. The first token of 'continuation' is the
      true next token.
    thoughts: responses, each a thought with the answer marker that ended it, if one did.
    markers: the markers of the prompt template.
    prefilled: the forward pass of θ over the prompts' documents, if that has been computed.

  Returns:
    A verdict that is correct where the gain is above 0. Its parts are two log-probabilities of the
    true next token, f32[N, G]: 'logp' after the thought and 'baseline' without it.
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
                       answer: int, prefilled: Prefilled | None = None) -> Array:
  """f32[N, G]: log p_θ of the true token after the thought and exactly one answer marker.

  Its exponential is the chance of a right prediction, if a thought that did not end in time has the
  marker put after it.

  Args:
    answer: the answer marker.
    model, params, prompts, thoughts, prefilled: as in `thought_verdict`.
  """
  place = jnp.arange(thoughts.tokens.shape[-1])
  ended = ((thoughts.tokens == answer) & (thoughts.in_response > 0)).any(-1)
  length_NG = thoughts.in_response.sum(-1).astype(jnp.int32) - ended  # without the marker
  within = place < length_NG[..., None]
  # The marker fills every place after the thought. Two more places hold the marker of a thought of
  # full length, and the true token, whose place matters and whose value is not read.
  tokens_NGS = jnp.where(within, thoughts.tokens, answer)
  tokens_NGS = jnp.pad(tokens_NGS, ((0, 0), (0, 0), (0, 2)), constant_values=answer)
  hidden = branch.response_hidden(model, params, prompts, tokens_NGS, prefilled)
  before_truth = jnp.take_along_axis(hidden, (length_NG + 1)[..., None, None], 2)[:, :, 0]
  truth_NG = jnp.broadcast_to(prompts.extras['continuation'][:, :1], length_NG.shape)
  return token_logprobs(before_truth, model.head(params), truth_NG).logp


def policy_verifier(markers: Markers, decay: float) -> PolicyVerifier:
  """RLP's verifier for the fused step, after whose update it sets φ ← τ φ + (1 − τ) θ.

  Args:
    markers: the markers of the prompt template.
    decay: τ.
  """
  def verify(model: Model, state: TrainState, prefilled: Prefilled | None,
             prompts: Prompts, thoughts: RolloutBatch) -> Verdict:
    average = P.joined(state.params, state.method.average)
    return thought_verdict(model, state.params, average, prompts, thoughts, markers, prefilled)

  def after(state: TrainState, new: TrainState) -> TrainState:
    average = rlp.average(state.method.average, new.params, decay)
    return dataclasses.replace(new, method=dataclasses.replace(new.method, average=average))

  return PolicyVerifier(verify, after, (markers.answer,))
