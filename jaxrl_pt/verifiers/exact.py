"""Exact answers in tokens: the definition on lists, and the same inside the jitted step.

The answer of a response is what stands between its last marker token and the stop token that
ends it. It is right if it equals the reference token by token; a response without marker or
without its stop is wrong.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array, Prompts, Rollout, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier
from jaxrl_pt.verifiers.judgement import Outcome


def judge_tokens(response: Sequence[int], answer: Sequence[int], marker_id: int, stop_id: int
                 ) -> Outcome:
  """The definition. `response` holds the tokens drawn, the stop included if it was."""
  tokens = list(response)
  if not tokens or tokens[-1] != stop_id or marker_id not in tokens:
    return Outcome.UNPARSED
  start = len(tokens) - tokens[::-1].index(marker_id)
  return Outcome.CORRECT if tokens[start:-1] == list(answer) else Outcome.WRONG


def answer_match(tokens: Array, mask: Array, answers: Array, answer_lengths: Array,
                 marker_id: int, stop_id: int) -> Array:
  """`judge_tokens` of whole batches: 1 where it is CORRECT.

  Args:
    tokens: i32[N, G, S].
    mask: f32[N, G, S] 1 on tokens of the response.
    answers: i32[N, W] reference tokens.
    answer_lengths: i32[N].

  Returns:
    f32[N, G] in {0, 1}.
  """
  width, place = answers.shape[1], jnp.arange(tokens.shape[-1])
  length = mask.sum(-1).astype(jnp.int32)  # i32[N, G]
  inside = place < length[..., None]
  marker = jnp.where(inside & (tokens == marker_id), place, -1).max(-1)
  last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[..., None], -1)[..., 0]
  stated = marker[..., None] + 1 + jnp.arange(width)  # i32[N, G, W]
  drawn = jnp.take_along_axis(tokens, jnp.minimum(stated, tokens.shape[-1] - 1), -1)
  beyond = jnp.arange(width) >= answer_lengths[:, None, None]
  same = ((drawn == answers[:, None]) | beyond).all(-1)
  fits = length - 2 - marker == answer_lengths[:, None]
  ended = (length > 0) & (last == stop_id) & (marker >= 0)
  return (same & fits & ended).astype(jnp.float32)


def device_verifier(marker_id: int, stop_id: int) -> DeviceVerifier:
  """Reward 1 for the exact answer, which stands in `prompts.continuation`; every row is valid."""
  def verify(prompts: Prompts, rollout: Rollout) -> Verdict:
    reward = answer_match(rollout.tokens, rollout.mask, prompts.continuation,
                          prompts.continuation_lengths, marker_id, stop_id)
    return Verdict(reward, jnp.ones_like(reward), reward, {'answer': reward})

  return jax.named_call(verify, name='answer_match')
