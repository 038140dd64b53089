r"""RPT's prefix-matching reward: a definition on bytes, and the same on the device.

With X the bytes of the true continuation, Y the bytes of the prediction, ℓ = |Y| and L_gt
the set of cumulative byte lengths of the true tokens:

    r = 1 if ℓ > 0, Y = X[:ℓ] and ℓ ∈ L_gt, else 0

Nothing is stripped, so that whitespace counts. Predictions are compared as bytes and never
decoded, so that they may end inside a UTF-8 character. Tokens without bytes (end of text and other
special tokens) add nothing to X or Y.

The paper's variants, which differ in what a wrong prediction earns:

    first token    r = 1 if the first token of Y is the first true token, else 0
    dense          r = 1 if the prefix matches, else Π p(y) over the tokens of Y
    gated dense    dense where some response of the group matches; −penalty for all elsewhere

The prediction of a response that reasons in tokens follows its last answer marker.

Source: 2506.08007.
Departs from the paper in saying that an empty prediction is wrong.
"""

from collections.abc import Sequence
import itertools

import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.token_bytes import TokenBytes
from jaxrl_pt.types import Array, Prompts, RolloutBatch, Verdict
from jaxrl_pt.verifiers.base import Verify

NO_MARKER = -1


# --- The definitions ------------------------------------------------------------


def prefix_match(prediction: bytes, continuation_tokens: Sequence[bytes]) -> float:
  """The reward of the bytes of one prediction, given the bytes of each true token."""
  truth = b''.join(continuation_tokens)
  boundaries = set(itertools.accumulate(len(token) for token in continuation_tokens))
  matches = truth.startswith(prediction) and len(prediction) in boundaries
  return float(matches and len(prediction) > 0)


def first_token_match(prediction_tokens: Sequence[bytes],
                      continuation_tokens: Sequence[bytes]) -> float:
  """1 if the first token with bytes is the same on both sides, whatever follows, else 0."""
  first, truth = (next(filter(None, tokens), b'')
                  for tokens in (prediction_tokens, continuation_tokens))
  return float(first == truth and len(first) > 0)


def dense_match(prediction: bytes, continuation_tokens: Sequence[bytes],
                probability: float) -> float:
  """1 if the prefix matches, else the policy's own probability of the wrong prediction.

  Args:
    prediction: the prediction's bytes; an empty prediction earns 0.
    continuation_tokens: the bytes of each true token.
    probability: Π p of the prediction's tokens that have bytes.

  Departs from the paper, which speaks of predictions of one token, in taking the product.
  """
  if prefix_match(prediction, continuation_tokens):
    return 1.0
  return probability if prediction else 0.0


def gated_dense(dense: Sequence[float], correct: Sequence[float], penalty: float) -> list[float]:
  """A group's dense rewards if one of its responses matches, else −penalty for each.

  Without the gate, the policy would learn to be sure of the answers of a group that is all wrong.
  """
  return list(dense) if any(correct) else [-penalty] * len(dense)


def prediction_tokens(response: Sequence[int], marker: int) -> list[int]:
  """The tokens after the last answer marker; [] without a marker."""
  places = [i for i, token in enumerate(response) if token == marker]
  return list(response[places[-1] + 1:]) if places else []


# --- On the device --------------------------------------------------------------


def prefix_match_arrays(table: TokenBytes, tokens: Array, mask: Array, continuation: Array,
                        continuation_lengths: Array) -> Array:
  """`prefix_match` of whole batches.

  Args:
    table: the bytes of each token.
    tokens: i32[N, G, S] predicted tokens.
    mask: f32[N, G, S] 1 on tokens of the prediction.
    continuation: i32[N, W] true tokens.
    continuation_lengths: i32[N] how many of the true tokens each row has.

  Returns:
    f32[N, G] in {0, 1}.
  """
  truth_NX, ends_NW, total_N = _truth(table, continuation, continuation_lengths)
  num_bytes = jnp.where(mask > 0, table.lengths[tokens], 0)  # i32[N, G, S]
  ends = jnp.cumsum(num_bytes, -1)
  within = jnp.arange(table.bytes.shape[1])
  places = (ends - num_bytes)[..., None] + within  # i32[N, G, S, M] in the true bytes
  rows = jnp.arange(tokens.shape[0])[:, None, None, None]
  truth = truth_NX.at[rows, places].get(mode='fill', fill_value=0)
  same = (truth == table.bytes[tokens]) | (within >= num_bytes[..., None])
  length = ends[..., -1]  # i32[N, G]
  at_boundary = (ends_NW[:, None] == length[..., None]).any(-1)
  fits = (length > 0) & (length <= total_N[:, None])
  return (same.all((-2, -1)) & at_boundary & fits).astype(jnp.float32)


def _truth(table: TokenBytes, continuation: Array,
           lengths: Array) -> tuple[Array, Array, Array]:
  """u8[N, W · M] bytes of each true continuation, i32[N, W] ends of its tokens, i32[N] length."""
  num_rows, num_tokens = continuation.shape
  longest = table.bytes.shape[1]
  is_token = jnp.arange(num_tokens) < lengths[:, None]
  num_bytes = jnp.where(is_token, table.lengths[continuation], 0)
  ends = jnp.cumsum(num_bytes, -1)
  within = jnp.arange(longest)
  beyond = num_tokens * longest
  places = jnp.where(within < num_bytes[..., None], (ends - num_bytes)[..., None] + within, beyond)
  rows = jnp.arange(num_rows)[:, None, None]
  buffer = jnp.zeros((num_rows, beyond), jnp.uint8)
  return buffer.at[rows, places].set(table.bytes[continuation], mode='drop'), ends, ends[:, -1]


def prediction_mask(tokens: Array, mask: Array, marker: int) -> Array:
  """`prediction_tokens` of whole batches: f32[..., S], 1 on the tokens of the prediction.

  Args:
    tokens: i32[..., S] responses.
    mask: f32[..., S] 1 on tokens of a response.
    marker: the answer marker; with `NO_MARKER` the whole response is the prediction.
  """
  if marker == NO_MARKER:
    return mask
  at_marker = (tokens == marker) & (mask > 0)
  none_ahead = jnp.cumsum(at_marker[..., ::-1], -1)[..., ::-1] == 0
  return mask * none_ahead * at_marker.any(-1, keepdims=True)


def first_token_arrays(table: TokenBytes, tokens: Array, mask: Array, continuation: Array,
                       continuation_lengths: Array) -> Array:
  """`first_token_match` of whole batches, with the arguments of `prefix_match_arrays`."""
  is_token = jnp.arange(continuation.shape[1]) < continuation_lengths[:, None]
  first, length = _first(table, tokens, mask > 0)
  truth, true_length = _first(table, continuation, is_token)
  same = (first == truth[:, None]).all(-1) & (length == true_length[:, None])
  return (same & (length > 0)).astype(jnp.float32)


def _first(table: TokenBytes, tokens: Array, is_token: Array) -> tuple[Array, Array]:
  """u8[..., M] bytes and i32[...] length of the first token with bytes; length 0 if none."""
  has_bytes = is_token & (table.lengths[tokens] > 0)
  token = jnp.take_along_axis(tokens, has_bytes.argmax(-1, keepdims=True), -1)[..., 0]
  return table.bytes[token], jnp.where(has_bytes.any(-1), table.lengths[token], 0)


def dense_arrays(table: TokenBytes, tokens: Array, mask: Array, logp: Array,
                 correct: Array) -> Array:
  """`dense_match` of whole batches, from log-probabilities.

  Args:
    table, tokens, mask: as in `prefix_match_arrays`.
    logp: f32[N, G, S] of the tokens under the behaviour policy.
    correct: f32[N, G] the result of `prefix_match_arrays`.

  Returns:
    f32[N, G] in [0, 1].
  """
  counts = (mask > 0) & (table.lengths[tokens] > 0)
  probability = jnp.exp(jnp.where(counts, logp, 0.0).sum(-1))
  return jnp.where(correct > 0, 1.0, jnp.where(counts.any(-1), probability, 0.0))


def gated_dense_arrays(dense: Array, correct: Array, penalty: float) -> Array:
  """`gated_dense` of whole batches, f32[N, G]."""
  return jnp.where((correct > 0).any(-1, keepdims=True), dense, -penalty)


def device_verifier(table: TokenBytes, reward: cfg.NextTokenReward = cfg.PrefixMatch(),
                    marker: int = NO_MARKER) -> Verify:
  """RPT's reward as a verifier on the device. Every row is valid.

  Args:
    table: the bytes of each token.
    reward: the variant that gives the reward; `correct` is the prefix match under all of them.
    marker: the answer marker; with `NO_MARKER` the whole response is the prediction.

  Raises:
    TypeError: `reward` is InformationGain, which needs the policy (`environments/rlp.py`).
  """
  if isinstance(reward, cfg.InformationGain):
    raise TypeError('InformationGain is not a function of tokens alone: see environments.rlp')

  def verify(prompts: Prompts, rollouts: RolloutBatch) -> Verdict:
    mask = prediction_mask(rollouts.tokens, rollouts.in_response, marker)
    truth = prompts.extras['continuation'], prompts.extras['continuation_lengths']
    correct = prefix_match_arrays(table, rollouts.tokens, mask, *truth)
    dense = dense_arrays(table, rollouts.tokens, mask, rollouts.logp, correct)
    match reward:
      case cfg.PrefixMatch():
        earned = correct
      case cfg.FirstTokenMatch():
        earned = first_token_arrays(table, rollouts.tokens, mask, *truth)
      case cfg.DenseMatch():
        earned = dense
      case cfg.GatedDenseMatch(penalty=penalty):
        earned = gated_dense_arrays(dense, correct, penalty)
    return Verdict(earned, jnp.ones_like(earned), correct)

  return verify
