r"""RPT's prefix-matching reward: its definition on bytes, and the same on the device.

With X the bytes of the true continuation, Y the bytes of the prediction, ℓ = |Y| and L_gt
the cumulative byte lengths of the true tokens:

    r = 1 if ℓ > 0, Y = X[:ℓ] and ℓ ∈ L_gt, else 0

Nothing is stripped: whitespace counts. Predictions are compared as bytes and never
decoded, so a boundary inside a UTF-8 character can be hit. Tokens without bytes (end of
text and other special tokens) add nothing on either side.

Departs from the paper in saying that an empty prediction is wrong (2506.08007).
"""

from collections.abc import Sequence
import itertools

from flax import struct
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array, Prompts, Rollout, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier, Outcome

THINK_END = '</think>'
BOX = '\\boxed{'


# --- The definition -------------------------------------------------------------


def prefix_match(prediction: bytes, continuation_tokens: Sequence[bytes]) -> float:
  """The reward of one prediction; `continuation_tokens` are the true tokens' bytes."""
  truth = b''.join(continuation_tokens)
  boundaries = set(itertools.accumulate(len(token) for token in continuation_tokens))
  matches = truth.startswith(prediction) and len(prediction) in boundaries
  return float(matches and len(prediction) > 0)


def extract_prediction(response: str) -> str | None:
  r"""Text of the last balanced `\boxed{…}` after the last `</think>`, unstripped, or None."""
  _, found, answer = response.rpartition(THINK_END)
  start = answer.rfind(BOX) if found else -1
  while start >= 0:
    begin, depth = start + len(BOX), 1
    for end in range(begin, len(answer)):
      depth += {'{': 1, '}': -1}.get(answer[end], 0)
      if depth == 0:
        return answer[begin:end]
    start = answer.rfind(BOX, 0, start)
  return None


def judge_text(response: str, continuation_tokens: Sequence[bytes]) -> Outcome:
  """The host verifier of a response that reasons in text before it predicts."""
  prediction = extract_prediction(response)
  if prediction is None:
    return Outcome.UNPARSED
  correct = prefix_match(prediction.encode(), continuation_tokens) == 1
  return Outcome.CORRECT if correct else Outcome.WRONG


# --- On the device --------------------------------------------------------------


@struct.dataclass
class TokenBytes:
  """The bytes of every token of the vocabulary, right-padded."""

  bytes: Array  # u8[V, M]
  lengths: Array  # i32[V]; 0 for special tokens


def token_table(token_bytes: Sequence[bytes], vocab_size: int) -> TokenBytes:
  """The table of a tokenizer's `token_bytes()`; ids beyond it have no bytes.

  Raises:
    ValueError: the tokenizer has more tokens than the model's `vocab_size`.
  """
  if len(token_bytes) > vocab_size:
    raise ValueError(f'{len(token_bytes)} tokens do not fit a vocabulary of {vocab_size}')
  longest = max(1, max(map(len, token_bytes), default=1))
  table = np.zeros((vocab_size, longest), np.uint8)
  lengths = np.zeros(vocab_size, np.int32)
  for i, value in enumerate(token_bytes):
    table[i, :len(value)] = np.frombuffer(value, np.uint8)
    lengths[i] = len(value)
  return TokenBytes(jnp.asarray(table), jnp.asarray(lengths))


def prefix_match_arrays(table: TokenBytes, tokens: Array, mask: Array, continuation: Array,
                        continuation_lengths: Array) -> Array:
  """`prefix_match` of whole batches.

  Args:
    table: bytes of the vocabulary.
    tokens: i32[N, G, S] predicted tokens.
    mask: f32[N, G, S] 1 on tokens of the prediction.
    continuation: i32[N, W] true tokens.
    continuation_lengths: i32[N] how many of them are valid.

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
  """Each true continuation as u8[N, W · M] bytes, its i32[N, W] boundaries, i32[N] total."""
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


def device_verifier(table: TokenBytes) -> DeviceVerifier:
  """RPT's reward as a verifier inside the jitted step; every row is valid."""
  def verify(prompts: Prompts, rollout: Rollout) -> Verdict:
    reward = prefix_match_arrays(table, rollout.tokens, rollout.mask, prompts.continuation,
                                 prompts.continuation_lengths)
    return Verdict(reward, jnp.ones_like(reward), reward)

  return verify
