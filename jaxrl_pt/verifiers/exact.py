"""The verifier of exact answers, compared by their bytes: a definition on lists, and on the device.

The answer of a response is the text between its last marker and the stop token that ends it, which
is any of several. It is right if it equals the reference answer byte by byte; a response without a
marker or without a stop token is wrong. Tokens are not compared, since most tokenizers merge the
marker with its neighbours (`;#`, ` #`, `#7`) and one text has many tokenizations.

On the device only the end of a response is read. With the marker m of K bytes and the reference
answer a of A bytes,

    correct = the last token is a stop token, and the K + A bytes before it are m a

This equals the definition wherever m does not occur again inside m a, which a run checks before it
starts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.token_bytes import TokenBytes
from jaxrl_pt.types import Array, Prompts, RolloutBatch, Verdict
from jaxrl_pt.verifiers.base import Verify
from jaxrl_pt.verifiers.response_verdict import Outcome

# --- The definition -------------------------------------------------------------


def verify_tokens(response: Sequence[int], answer: bytes, marker: bytes, stop_ids: tuple[int, ...],
                 token_bytes: Sequence[bytes]) -> Outcome:
  """The definition, on the tokens of one response, its stop token included if it has one."""
  tokens = list(response)
  if not tokens or tokens[-1] not in stop_ids:
    return Outcome.UNPARSED
  _, last_marker, stated = b''.join(token_bytes[t] for t in tokens[:-1]).rpartition(marker)
  if not last_marker:
    return Outcome.UNPARSED
  return Outcome.CORRECT if stated == answer else Outcome.WRONG


# --- On the device --------------------------------------------------------------


def answer_match(table: TokenBytes, tokens: Array, mask: Array, answers: Array,
                 answer_lengths: Array, marker: bytes, stop_ids: tuple[int, ...]) -> Array:
  """`verify_tokens` of whole batches: 1 where the outcome is CORRECT.

  Args:
    table: the bytes of each token.
    tokens: i32[N, G, S].
    mask: f32[N, G, S] 1 on tokens of the response, drawn or forced.
    answers: i32[N, W] bytes of the reference answers.
    answer_lengths: i32[N] how many bytes each reference answer has.
    marker: K bytes.
    stop_ids: the tokens of which any ends a response.

  Returns:
    f32[N, G] in {0, 1}.
  """
  end_NX, wanted_N = _ends(answers, answer_lengths, marker)
  most = end_NX.shape[1]
  length = mask.sum(-1).astype(jnp.int32)  # i32[N, G]
  place = jnp.arange(tokens.shape[-1])
  last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[..., None], -1)[..., 0]
  ended = (length > 0) & jnp.isin(last, jnp.asarray(stop_ids))
  spells = (place < length[..., None] - 1) & (table.lengths[tokens] > 0)
  # Each token that spells something has at least one byte, so the last `most` of them are enough.
  behind = jnp.cumsum(spells[..., ::-1], -1)[..., ::-1] - 1
  near = jnp.where(spells & (behind < most), behind, most)
  n, g = jnp.indices(length.shape)
  newest = jnp.full((*length.shape, most), -1).at[n[..., None], g[..., None], near].set(
      tokens, mode='drop')  # i32[N, G, X] from the last one backwards; −1 beyond the first
  num_bytes = jnp.where(newest >= 0, table.lengths[newest], 0)
  after = jnp.cumsum(num_bytes, -1) - num_bytes  # bytes between a token and the end
  within = jnp.arange(table.bytes.shape[1])
  back = after[..., None] + num_bytes[..., None] - 1 - within  # i32[N, G, X, M] from the end
  counts = (within < num_bytes[..., None]) & (back < wanted_N[:, None, None, None])
  row = jnp.arange(tokens.shape[0])[:, None, None, None]
  same = table.bytes[newest] == end_NX[row, jnp.clip(back, 0, most - 1)]
  enough = num_bytes.sum(-1) >= wanted_N[:, None]
  return ((same | ~counts).all((-2, -1)) & enough & ended).astype(jnp.float32)


def _ends(answers: Array, answer_lengths: Array, marker: bytes) -> tuple[Array, Array]:
  """u8[N, X] bytes that right responses end with, from the last one backwards, and their number."""
  num_marker, back = len(marker), jnp.arange(len(marker) + answers.shape[1])
  place = answer_lengths[:, None] - 1 - back  # place in the answer; negative in the marker
  in_answer = jnp.take_along_axis(answers, jnp.clip(place, 0, answers.shape[1] - 1), 1)
  in_marker = jnp.asarray(np.frombuffer(marker, np.uint8))[jnp.clip(place, -num_marker, -1)]
  end_NX = jnp.where(place >= 0, in_answer, in_marker).astype(jnp.uint8)
  return end_NX, answer_lengths + num_marker


def has_marker(reader_SV: Array, tokens: Array, mask: Array) -> Array:
  """f32[N, G]: 1 where the bytes of a response hold the marker, in however many tokens.

  The automaton of Knuth, Morris and Pratt has as its state how many bytes of the marker have been
  read. Each token maps the state before it to the state after it; these maps are composed by an
  associative scan.

  Args:
    reader_SV: i32[K + 1, V] the map of each token, from `marker_reader`.
    tokens: i32[N, G, S].
    mask: f32[N, G, S] 1 on tokens of the response, drawn or forced.
  """
  num_states, in_response = reader_SV.shape[0], (mask > 0)[..., None]
  maps = jnp.where(in_response, jnp.moveaxis(reader_SV[:, tokens], 0, -1), jnp.arange(num_states))
  then = lambda first, second: jnp.take_along_axis(second, first, -1)
  whole = jax.lax.associative_scan(then, maps, axis=-2)[..., -1, :]
  return (whole[..., 0] == num_states - 1).astype(jnp.float32)


def marker_reader(table: TokenBytes, marker: bytes) -> Array:
  """i32[K + 1, V]: bytes of the marker read after each token, by the number read before it."""
  num_states, step = len(marker) + 1, np.zeros((len(marker) + 1, 256), np.int32)
  for state in range(num_states - 1):
    for byte in range(256):
      text = marker[:state] + bytes([byte])
      step[state, byte] = max(k for k in range(len(text) + 1) if text.endswith(marker[:k]))
  step[-1] = num_states - 1  # A marker that has been read stays read.
  spelled, lengths = np.asarray(table.bytes), np.asarray(table.lengths)
  state_SV = np.repeat(np.arange(num_states, dtype=np.int32)[:, None], len(lengths), 1)
  for i in range(spelled.shape[1]):
    state_SV = np.where(i < lengths, step[state_SV, spelled[:, i]], state_SV)
  return jnp.asarray(state_SV)


def device_verifier(table: TokenBytes, marker: bytes, stop_ids: tuple[int, ...],
                    wrong: float = 0.0) -> Verify:
  """The verifier that gives reward 1 for the exact answer and `wrong` for all else.

  Every row is valid.

  The bytes of the reference answer are 'answer' in `prompts.extras`. The part 'parsed', which earns
  nothing, is 1 where a response states any answer.
  """
  reader_SV = marker_reader(table, marker)

  def verify(prompts: Prompts, rollouts: RolloutBatch) -> Verdict:
    tokens, mask = rollouts.tokens, rollouts.in_response
    correct = answer_match(table, tokens, mask, prompts.extras['answer'],
                           prompts.extras['answer_lengths'], marker, stop_ids)
    reward = jnp.where(correct > 0, 1.0, wrong)
    ended = (jnp.isin(tokens, jnp.asarray(stop_ids)) & (mask > 0)).any(-1)
    parsed = ended * has_marker(reader_SV, tokens, mask)
    return Verdict(reward, jnp.ones_like(reward), correct, {'answer': reward, 'parsed': parsed})

  return jax.named_call(verify, name='answer_match')
