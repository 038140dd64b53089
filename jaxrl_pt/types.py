"""What flows between the stages, as frozen pytrees.

    Batch → update → state                                        pretraining
    Prompts → RolloutBatch → Verdict → TrainBatch → update → state   reinforcement

Axes: B rows, D documents, N prompts, G samples per prompt, T prompt or sequence tokens,
M suffix tokens, S response tokens.
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
  """What responses are drawn to. Right-padded.

  Several prompts may share a document: D divides N, and prompt n is the first lengths[n] tokens
  of document n // (N / D), followed by the document's suffix.

  `extras` holds by name what one environment alone needs, each array with a row for every prompt:
  RPT has 'continuation' (i32[N, W] the true next tokens), 'continuation_lengths' (i32[N]) and
  'entropy' (f32[N] of the proxy at the predicted position, nats); problems that are verified on the
  device have 'answer' (i32[N, W] bytes) and 'answer_lengths' (i32[N]).
  """

  tokens: Array  # i32[D, T]
  lengths: Array  # i32[N] tokens of the document that belong to a prompt, 1 ≤ length ≤ T
  ids: Array  # i32[N] addresses the randomness; equal ids name one prompt
  suffix: Any = ()  # i32[D, M] what follows each prompt's part of a document, or () for nothing
  extras: dict[str, Array] = struct.field(default_factory=dict)

  @property
  def num_suffix(self) -> int:
    """M."""
    return 0 if isinstance(self.suffix, tuple) else self.suffix.shape[1]


@struct.dataclass
class RolloutBatch:
  """Responses with what the sampler knew when it drew them.

  A token may belong to a response without having been drawn: a forced tag, a tool's result, an
  observation. The length of a response counts `in_response`; a loss is taken over `sampled`,
  where alone there is a log-probability.
  """

  tokens: Array  # i32[N, G, S]
  in_response: Array  # f32[N, G, S] 1 on tokens of the response, the one that ends it included
  sampled: Array  # f32[N, G, S] 1 on those of them that the policy drew
  logp: Array  # f32[N, G, S] under the distribution drawn from, nats; 0 where nothing was drawn
  version: Array  # i32[N, G, S] optimiser step of the parameters at hand when the token came
  turn: Array  # i32[N, G, S] number of the call of the policy, from 0
  mode: Any = ()  # i32[N, G] number of the thinking mode, or () in a run without modes

  @classmethod
  def of_one_turn(cls, tokens: Array, in_response: Array, logp: Array, version: Array | int
                  ) -> 'RolloutBatch':
    """Responses of which every token was drawn, in one call of one version of the policy."""
    version = jnp.broadcast_to(jnp.asarray(version, jnp.int32), tokens.shape)
    return cls(tokens, in_response, in_response, logp, version, jnp.zeros_like(tokens))

  def lengths(self) -> Array:
    """f32[N, G]: tokens of each response."""
    return self.in_response.sum(-1)


@struct.dataclass
class Verdict:
  """One verifier's verdict. `valid` 0 masks the row (timeout, crash)."""

  reward: Array  # f32[N, G]
  valid: Array  # f32[N, G]
  correct: Array  # f32[N, G] 1 where the answer is right, whatever it earns
  parts: dict[str, Array] = struct.field(default_factory=dict)  # f32[N, G] each; logged apart


@struct.dataclass
class TrainBatch:
  """What an update reads of responses. All but the policy's own forward pass over them: every
  array is a constant of the gradient.

  old_logp is read only where a batch gets more than one update or a correction; reference_logp
  only where there is a KL term; returns only where there is a value head.
  """

  prompts: Prompts  # what stands before each response
  tokens: Array  # i32[N, G, S]
  loss_mask: Array  # f32[N, G, S] 1 where a token is learned from: sampled, of a valid row
  sampler_logp: Array  # f32[N, G, S] of the behaviour policy, as it drew
  old_logp: Array  # f32[N, G, S] of the policy before the first update
  reference_logp: Array  # f32[N, G, S] of the reference policy
  advantage: Array  # f32[N, G, S]
  returns: Array  # f32[N, G, S] targets of the value head
  weights: Array  # f32[N, G, S] of the aggregation: the loss is Σ weights · terms
  # i32[N] each row's place in the whole batch, where the trainer's log-probabilities of every
  # token are to be among the metrics, else (); and how many rows the whole batch has.
  rows: Any = ()
  num_rows: int = struct.field(pytree_node=False, default=0)


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
