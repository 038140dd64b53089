"""The arrays that flow between the stages of a step, as frozen pytrees.

    Batch → update → TrainState                                           pretraining
    Prompts → RolloutBatch → Verdict → TrainBatch → update → TrainState   reinforcement learning
    Clips → update → TrainState                                           models of games
    GameRollouts → TrainBatch → update → TrainState                       policies of games

Axes: B rows, D documents, N prompts, G samples per prompt, T prompt or sequence tokens,
M suffix tokens, S response tokens, W tokens or bytes of a continuation or answer. In clips of
games: N clips, K frames, H × W pixels, M counters, h × w cells.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # nested dict of arrays, shaped like the model's tree of ParamSpec

# Modes of responses: it thinks first, it answers at once, or its first token says neither.
THINK, NO_THINK, NO_MODE = 0, 1, -1


@struct.dataclass
class Batch:
  """Packed training examples. Segment 0 is padding; positions restart in each segment."""

  tokens: Array  # i32[B, T] inputs
  targets: Array  # i32[B, T] the next token, tokens[t + 1], where that is in the same segment
  positions: Array  # i32[B, T] each token's number in its segment, from 0
  segments: Array  # i32[B, T] 1, 2, … in each row; 0 = padding
  weights: Array  # f32[B, T] 1 on targets that the loss counts, else 0
  ids: Array  # i32[B] the number of each row's example in the data set


@struct.dataclass
class Clips:
  """N clips of each of B episodes of a game, for a model of the game to learn from.

  A clip is K frames that the model sees and the frame that it is to draw, of which all else is. For
  a model that sees no frames but has a hidden state, clips are the frames of an episode, in order.
  """

  frames: Array  # u8[B, N, K + 1, H, W, 3]
  action: Array  # i32[B, N] the action that led to it
  counters: Array  # i32[B, N, M] the numbers that it shows
  crop: Array  # i32[B, N, h, w] what the map says of the cells in view, −1 where it says nothing
  event: Array  # i32[B, N] what happened in the step that led to it
  event_weight: Array  # f32[B, N] how much the event counts among the others
  keys: Array  # key[B, N] of the clip's noise


@struct.dataclass
class Stills:
  """N frames of each of B episodes, for an autoencoder of frames to learn from."""

  frames: Array  # u8[B, N, H, W, 3]
  keys: Array  # key[B, N] of the noise of each frame's latents


@struct.dataclass
class GameRollouts:
  """S actions of a policy in each of N · G games, G of them in the same world, and what they earn.

  What a frame shows is what the game's reader has read in it (`game.reading`).
  """

  frames: Array  # f32[N, G, S + 1, H, W, 3] from 0 to 1; the last S follow the actions
  actions: Array  # i32[N, G, S]
  logp: Array  # f32[N, G, S] log-probability of the action when it was drawn, nats
  counts: Array  # f32[N, G, S] 1 on actions before the end of the game
  rewards: Array  # f32[N, G, S] by what the frame after the action shows
  true_rewards: Array  # f32[N, G, S] of the true game in the same world with the same actions
  readable: Array  # f32[N, G, S] 1 where that frame can be read
  changed: Array  # f32[N, G, S] 1 where it shows other numbers than the last readable one
  false: Array  # f32[N, G, S] 1 where it shows other numbers than the game's history demands


@struct.dataclass
class Prompts:
  """The prompts to which responses are drawn, as right-padded documents.

  Several prompts may share a document: D divides N, and prompt n is the first lengths[n] tokens
  of document n // (N / D), followed by the document's suffix.

  `extras` holds, by name, arrays that a single environment needs, with one row for every prompt.
  RPT has 'continuation' (i32[N, W], the true next tokens), 'continuation_lengths' (i32[N]) and
  'entropy' (f32[N], the entropy of the proxy's prediction at the prompt's position, nats). Problems
  that are verified on the device have the reference answer in 'answer' (i32[N, W], bytes) and
  'answer_lengths' (i32[N]).
  """

  tokens: Array  # i32[D, T]
  lengths: Array  # i32[N] tokens of the document that belong to a prompt, 1 ≤ length ≤ T
  ids: Array  # i32[N] names of the prompts, by which the sampler's noise is addressed
  suffix: Any = ()  # i32[D, M] tokens that follow each prompt's part of a document; () for none
  extras: dict[str, Array] = struct.field(default_factory=dict)

  @property
  def num_suffix(self) -> int:
    """M, the number of tokens in a suffix."""
    return 0 if isinstance(self.suffix, tuple) else self.suffix.shape[1]


@struct.dataclass
class SelectedBlocks:
  """What rectified sparse attention read of its context, so that a learner can read the same.

  Positions of a row (prompt, then response) are cut into blocks. Entry s belongs to the step whose
  hidden state response token s was drawn from. The first token comes from a dense forward pass,
  and its entry is 0. After every `window` tokens that a step has taken in, their keys and values
  become those of a dense forward pass.
  """

  bits: Array  # u32[N, G, S, L, K, W] bit i % 32 of word i // 32 says whether block i was read
  block: int = struct.field(pytree_node=False)  # tokens of a block
  window: int = struct.field(pytree_node=False)  # tokens between rectifications; 0 for none


@struct.dataclass
class RolloutBatch:
  """Responses with what the sampler knew when it drew them.

  A token may belong to a response without having been drawn: a forced tag, a tool's result, an
  observation. The length of a response counts `in_response`. A loss is taken over `sampled`,
  because only tokens that were drawn have a log-probability.
  """

  tokens: Array  # i32[N, G, S]
  in_response: Array  # f32[N, G, S] 1 on tokens of the response, the one that ends it included
  sampled: Array  # f32[N, G, S] 1 on tokens of the response that the policy drew
  logp: Array  # f32[N, G, S] log-probability under the behaviour policy, nats; 0 if not sampled
  version: Array  # i32[N, G, S] steps that the parameters had taken when they drew the token
  turn: Array  # i32[N, G, S] number of the turn, that is of the call of the policy, from 0
  mode: Any = ()  # i32[N, G] THINK, NO_THINK or NO_MODE; () in a run without modes
  selected: Any = ()  # SelectedBlocks if a learner is to replay sparse reading, else ()

  @classmethod
  def of_one_turn(cls, tokens: Array, in_response: Array, logp: Array, version: Array | int
                  ) -> 'RolloutBatch':
    """Responses whose tokens were all drawn in one turn by one version of the policy.

    Args:
      tokens: i32[N, G, S].
      in_response: f32[N, G, S].
      logp: f32[N, G, S], nats.
      version: i32[], or an array that broadcasts to [N, G, S].
    """
    version = jnp.broadcast_to(jnp.asarray(version, jnp.int32), tokens.shape)
    return cls(tokens, in_response, in_response, logp, version, jnp.zeros_like(tokens))

  def lengths(self) -> Array:
    """f32[N, G]: the number of tokens of each response."""
    return self.in_response.sum(-1)


@struct.dataclass
class Verdict:
  """What a verifier says of a batch of responses."""

  reward: Array  # f32[N, G]
  valid: Array  # f32[N, G] 1 on responses that were verified, 0 on others (timeout, crash)
  correct: Array  # f32[N, G] 1 where the answer is right, whatever its reward
  # Parts of the reward by name, f32[N, G] each, which are logged as reward/NAME.
  parts: dict[str, Array] = struct.field(default_factory=dict)
  # Numbers by name, f32[N, G] each, which are logged as NAME, of responses that were not verified
  # too: what became of an episode.
  measures: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class TrainBatch:
  """What an update reads of the responses, besides the policy's own forward pass over them.

  Every array is a constant of the gradient. old_logp is read only when a batch gets more than one
  update, reference_logp only if the algorithm has a KL, and returns only if there is a value head.
  """

  prompts: Any  # Prompts; of a policy of a game the frames f32[N, G, S + 1, H, W, 3] that it saw
  tokens: Array  # i32[N, G, S], or actions
  loss_mask: Array  # f32[N, G, S] 1 on tokens that are learned from: sampled, of a valid response
  sampler_logp: Array  # f32[N, G, S] log-probability under the behaviour policy
  old_logp: Array  # f32[N, G, S] log-probability under the policy before the first update
  reference_logp: Array  # f32[N, G, S] log-probability under the reference policy
  advantage: Array  # f32[N, G, S]
  returns: Array  # f32[N, G, S] targets of the value head
  weights: Array  # f32[N, G, S] weights of the aggregation: the loss is Σ weights · terms
  selected: Any = ()  # SelectedBlocks that the policy's forward pass is to read, or ()
  # i32[N], each row's place in the whole batch, if the trainer's log-probability of every token is
  # to be among the metrics, else ().
  rows: Any = ()
  # The number of rows of the whole batch if `rows` is given, else 0.
  num_rows: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Weighted:
  """A metric as a sum and a count, divided once all parts of a batch have been added up."""

  sum: Array  # f32[]
  count: Array  # f32[]

  @classmethod
  def of(cls, values: Array, mask: Array) -> 'Weighted':
    """The sum of `values` where `mask` is 1, and the number of such values."""
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
  """The state of training: the tree that a checkpoint keeps."""

  step: Array  # i32[] steps taken by the loop; in RL one may hold several optimiser steps
  params: Params
  opt_state: Any
  method: Any  # what a method keeps besides (`train.state.MethodState`), or {}
