"""Exact answers, compared by their bytes: the definition on lists, and the same on the device.

The answer of a response is the text between its last marker and the stop token that ends it. It
is right if it equals the reference byte by byte; a response without marker or without its stop
is wrong. Tokens do not matter: most tokenizers merge the marker with its neighbours (`;#`, ` #`,
`#7`), so the same text comes in many ways.

On the device only the end of a response is read: with K bytes of the marker m and A of the
answer a,

    correct = the last token is the stop, and the last K + A bytes before it are m a

which is the definition wherever m does not occur again inside m a (the run checks that).
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


def verify_tokens(response: Sequence[int], answer: bytes, marker: bytes, stop_id: int,
                 token_bytes: Sequence[bytes]) -> Outcome:
  """The definition. `response` holds the tokens drawn, the stop included if it was."""
  tokens = list(response)
  if not tokens or tokens[-1] != stop_id:
    return Outcome.UNPARSED
  _, found, stated = b''.join(token_bytes[t] for t in tokens[:-1]).rpartition(marker)
  if not found:
    return Outcome.UNPARSED
  return Outcome.CORRECT if stated == answer else Outcome.WRONG


# --- On the device --------------------------------------------------------------


def answer_match(table: TokenBytes, tokens: Array, mask: Array, answers: Array,
                 answer_lengths: Array, marker: bytes, stop_id: int) -> Array:
  """`verify_tokens` of whole batches: 1 where it is CORRECT.

  Args:
    table: bytes of the vocabulary.
    tokens: i32[N, G, S].
    mask: f32[N, G, S] 1 on tokens of the response, drawn or forced.
    answers: i32[N, W] bytes of the references.
    answer_lengths: i32[N].
    marker: K bytes.

  Returns:
    f32[N, G] in {0, 1}.
  """
  end_NX, wanted_N = _ends(answers, answer_lengths, marker)
  most = end_NX.shape[1]
  length = mask.sum(-1).astype(jnp.int32)  # i32[N, G]
  place = jnp.arange(tokens.shape[-1])
  last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[..., None], -1)[..., 0]
  ended = (length > 0) & (last == stop_id)
  spells = (place < length[..., None] - 1) & (table.lengths[tokens] > 0)
  # Each token that spells something has a byte at least: the last `most` of them are enough.
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
  """u8[N, X] what right responses end with, from the last byte backwards, and its i32[N] length."""
  num_marker, back = len(marker), jnp.arange(len(marker) + answers.shape[1])
  place = answer_lengths[:, None] - 1 - back  # in the answer; negative in the marker
  in_answer = jnp.take_along_axis(answers, jnp.clip(place, 0, answers.shape[1] - 1), 1)
  in_marker = jnp.asarray(np.frombuffer(marker, np.uint8))[jnp.clip(place, -num_marker, -1)]
  end_NX = jnp.where(place >= 0, in_answer, in_marker).astype(jnp.uint8)
  return end_NX, answer_lengths + num_marker


def has_marker(reader_SV: Array, tokens: Array, mask: Array) -> Array:
  """f32[N, G]: 1 where the bytes of a response hold the marker, in however many tokens.

  Each token maps how much of the marker has been read before it to how much has been after it
  (Knuth, Morris and Pratt's automaton); the maps of a response are composed as a tree.

  Args:
    reader_SV: from `marker_reader`.
    tokens, mask: as in `answer_match`.
  """
  num_states, there = reader_SV.shape[0], (mask > 0)[..., None]
  maps = jnp.where(there, jnp.moveaxis(reader_SV[:, tokens], 0, -1), jnp.arange(num_states))
  then = lambda first, second: jnp.take_along_axis(second, first, -1)
  whole = jax.lax.associative_scan(then, maps, axis=-2)[..., -1, :]
  return (whole[..., 0] == num_states - 1).astype(jnp.float32)


def marker_reader(table: TokenBytes, marker: bytes) -> Array:
  """i32[K + 1, V]: bytes of the marker read after a token, by those read before it."""
  num_states, step = len(marker) + 1, np.zeros((len(marker) + 1, 256), np.int32)
  for state in range(num_states - 1):
    for byte in range(256):
      text = marker[:state] + bytes([byte])
      step[state, byte] = max(k for k in range(len(text) + 1) if text.endswith(marker[:k]))
  step[-1] = num_states - 1  # Found once is found.
  spelled, lengths = np.asarray(table.bytes), np.asarray(table.lengths)
  state_SV = np.repeat(np.arange(num_states, dtype=np.int32)[:, None], len(lengths), 1)
  for i in range(spelled.shape[1]):
    state_SV = np.where(i < lengths, step[state_SV, spelled[:, i]], state_SV)
  return jnp.asarray(state_SV)


def device_verifier(table: TokenBytes, marker: bytes, stop_id: int) -> Verify:
  """Reward 1 for the exact answer, whose bytes are 'answer' in `prompts.extras`; every row is
  valid. The part 'parsed', which earns nothing, is 1 where there is an answer at all."""
  reader_SV = marker_reader(table, marker)

  def verify(prompts: Prompts, rollouts: RolloutBatch) -> Verdict:
    tokens, mask = rollouts.tokens, rollouts.in_response
    reward = answer_match(table, tokens, mask, prompts.extras['answer'],
                          prompts.extras['answer_lengths'], marker, stop_id)
    ended = ((tokens == stop_id) & (mask > 0)).any(-1)
    parsed = ended * has_marker(reader_SV, tokens, mask)
    return Verdict(reward, jnp.ones_like(reward), reward, {'answer': reward, 'parsed': parsed})

  return jax.named_call(verify, name='answer_match')
