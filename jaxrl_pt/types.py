"""What flows between the stages, as frozen pytrees.

    Batch → step(state, batch) → state                                       pretraining
    Prompts → Rollout → Verdict → learner.Experience → learn(state, …) → state   reinforcement

An `Experience` of train/learner.py joins the three before it with what else an update reads.

Axes: B rows, N prompts, G samples per prompt, T prompt or sequence tokens,
S response tokens, W continuation tokens.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # nested dict of arrays, shaped like the model's tree of ParamSpec


@struct.dataclass
class Batch:
  """Packed training examples. Segment 0 is padding; positions restart in each segment."""

  tokens: Array  # i32[B, T] inputs
  targets: Array  # i32[B, T] tokens[t + 1] inside the segment
  positions: Array  # i32[B, T]
  segments: Array  # i32[B, T] 1, 2, … in each row; 0 = padding
  weights: Array  # f32[B, T] 1 where the target counts, else 0
  ids: Array  # i32[B] which example of the data set each row is


@struct.dataclass
class Prompts:
  """Next-token prompts: a context and its true continuation. Right-padded.

  Several prompts may share a document: D divides N, and prompt n is the first lengths[n] tokens
  of document n // (N / D), followed by the document's suffix.
  """

  tokens: Array  # i32[D, T]
  lengths: Array  # i32[N] context tokens, 1 ≤ length ≤ T
  ids: Array  # i32[N] addresses the randomness; equal ids name one prompt
  continuation: Array  # i32[N, W] true next tokens, or the bytes of a problem's answer
  continuation_lengths: Array  # i32[N] valid tokens of continuation
  entropy: Array  # f32[N] proxy entropy at the predicted position, nats
  suffix: Any = ()  # i32[D, M] what follows each context of a document, or () for nothing

  @property
  def num_suffix(self) -> int:
    """M."""
    return 0 if isinstance(self.suffix, tuple) else self.suffix.shape[1]


@struct.dataclass
class Rollout:
  """Sampled responses with what the sampler knew when it drew them."""

  tokens: Array  # i32[N, G, S]
  mask: Array  # f32[N, G, S] 1 on tokens of the response (its stop token included)
  logp: Array  # f32[N, G, S] log-probability under the distribution drawn from
  version: Array  # i32[] optimiser step of the policy's parameters


@struct.dataclass
class Verdict:
  """One verifier's judgement. `valid` 0 masks the row (timeout, crash)."""

  reward: Array  # f32[N, G]
  valid: Array  # f32[N, G]
  correct: Array  # f32[N, G] 1 where the answer is right, whatever it earns
  parts: dict[str, Array] = struct.field(default_factory=dict)  # f32[N, G] each; logged apart


@struct.dataclass
class Weighted:
  """A metric as sum and count, divided once and globally."""

  sum: Array  # f32[]
  count: Array  # f32[]

  @classmethod
  def of(cls, values: Array, mask: Array) -> 'Weighted':
    """Sum of `values` where `mask` is 1, and how many those are."""
    mask = mask.astype(jnp.float32)
    return cls((values * mask).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32))

  @classmethod
  def single(cls, value: Array | float) -> 'Weighted':
    """One measurement of weight one."""
    return cls(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))

  def mean(self) -> Array:
    """f32[]: sum / count, 0 where nothing was counted."""
    return self.sum / jnp.maximum(self.count, 1e-9)


@struct.dataclass
class TrainState:
  """The whole of training, as one checkpointed tree."""

  step: Array  # i32[] steps of the loop taken; each is one optimiser step unless RL makes more
  params: Params
  opt_state: Any
  method: Any  # state of the method, such as a gate or a value head: {} where it has none
