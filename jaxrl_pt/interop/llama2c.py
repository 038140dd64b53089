"""Reads checkpoints and tokenizers in the layout of llama2.c.

A checkpoint begins with seven int32: dim, hidden, layers, heads, kv heads, vocab, sequence; a
negative vocab says that a head follows. Then come float32 arrays: embedding, attention norms,
wq, wk, wv, wo, ffn norms, w1, w2, w3, final norm, two unused RoPE tables of
sequence × head_dim / 2, and the head if it is not tied. llama2.c's matrices are [out, in] and its
RoPE turns adjacent pairs; our matrices are [in, out] and our RoPE turns the pairs (i, i + E/2).
"""

from dataclasses import dataclass
import heapq
from pathlib import Path
import struct

import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Params

BOS = 1
_FIRST_BYTE = 3
_HEADER = struct.Struct('<7i')


def split_halves(w_LDHE: np.ndarray) -> np.ndarray:
  """Reorders the last axis from adjacent RoPE pairs (2i, 2i + 1) to halves (i, i + E/2)."""
  return np.concatenate([w_LDHE[..., 0::2], w_LDHE[..., 1::2]], -1)


def load_model(path: str | Path) -> tuple[cfg.Model, Params]:
  """Reads a llama2.c checkpoint.

  Args:
    path: a `.bin` file, version 0 (float32).

  Returns:
    The configuration and a tree of f32 parameters in the layout of `models.transformer`.

  Raises:
    UserError: the file cannot be read, its header is impossible, or its size contradicts the
      header.
  """
  data = _read(path)
  if len(data) < _HEADER.size:
    raise UserError(f'{path} is {len(data)} bytes, too short for a llama2.c checkpoint: give '
                    'the .bin file of an untruncated download.')
  width, ff, layers, heads, kv_heads, vocab, length = _HEADER.unpack_from(data)
  plausible = (min(width, ff, layers, heads, kv_heads, length) > 0 and vocab != 0
               and width % heads == 0 and heads % kv_heads == 0 and width // heads % 2 == 0)
  if not plausible:
    raise UserError(f'{path} does not begin with the header of a llama2.c checkpoint (read '
                    f'{_HEADER.unpack_from(data)}): give a version 0 (float32) .bin file.')
  head_dim = width // heads
  keys = kv_heads * head_dim
  shapes = {
      'embed': (abs(vocab), width), 'attn_norm': (layers, width),
      'wq': (layers, width, width), 'wk': (layers, keys, width), 'wv': (layers, keys, width),
      'wo': (layers, width, width), 'ffn_norm': (layers, width),
      'w_gate': (layers, ff, width), 'w_down': (layers, width, ff), 'w_up': (layers, ff, width),
      'final_norm': (width,), 'rope': (2, length, head_dim // 2),
      **({'head': (vocab_rows, width)} if (vocab_rows := max(0, -vocab)) else {}),
  }
  expected = _HEADER.size + 4 * sum(int(np.prod(s, dtype=object)) for s in shapes.values())
  if expected != len(data):
    raise UserError(f'{path} is {len(data)} bytes but its header describes {expected}: the file '
                    'is truncated or of another version; download it again.')
  config = cfg.Model(
      num_layers=layers, d_model=width, d_ff=ff, num_heads=heads, num_kv_heads=kv_heads,
      head_dim=head_dim, vocab_size=abs(vocab), tied_head=vocab > 0)
  return config, _to_tree(_slices(data, shapes), config)


def _slices(data: bytes, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  values = np.frombuffer(data, '<f4', offset=_HEADER.size)
  arrays, start = {}, 0
  for name, shape in shapes.items():
    size = int(np.prod(shape))
    arrays[name] = values[start:start + size].reshape(shape)
    start += size
  return arrays


def _to_tree(arrays: dict[str, np.ndarray], config: cfg.Model) -> Params:
  layers = {n: arrays[n] for n in ('attn_norm', 'ffn_norm')}
  for name in ('wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'):
    layers[name] = arrays[name].swapaxes(1, 2)
  for name in ('wq', 'wk'):
    w = layers[name]
    per_head = w.reshape(*w.shape[:2], -1, config.head_dim)
    layers[name] = split_halves(per_head).reshape(w.shape)
  tree = {'embed': arrays['embed'], 'layers': {n: jnp.asarray(w) for n, w in layers.items()},
          'final_norm': arrays['final_norm']}
  if not config.tied_head:
    tree['head'] = arrays['head'].T
  return {n: x if n == 'layers' else jnp.asarray(x) for n, x in tree.items()}


# --- Tokenizer ------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
  """SentencePiece-like BPE: pieces with merge scores, one byte piece for each byte."""

  pieces: tuple[bytes, ...]
  scores: tuple[float, ...]
  ids: dict[bytes, int]

  def encode(self, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of `text` after a leading space.

    The text begins as characters, or as bytes where a character is no piece. Pairs of neighbours
    are then merged one by one, always the pair with the best score, and of equal ones the leftmost.
    """
    tokens = [] if not text else self._characters(' ' + text)
    return ([BOS] if bos else []) + self._merge(tokens)

  def _characters(self, text: str) -> list[int]:
    tokens: list[int] = []
    for character in text:
      raw = character.encode('utf-8')
      tokens.extend([self.ids[raw]] if raw in self.ids else [b + _FIRST_BYTE for b in raw])
    return tokens

  def _merge(self, tokens: list[int]) -> list[int]:
    alive = list(tokens)  # −1 where a token has been merged into the piece on its left
    before, after = list(range(-1, len(tokens) - 1)), list(range(1, len(tokens) + 1))
    heap: list[tuple[float, int, int, int]] = []

    def push(left: int) -> None:
      if left < 0 or after[left] >= len(alive):
        return
      a, b = alive[left], alive[after[left]]
      merged = self.ids.get(self.pieces[a] + self.pieces[b])
      if merged is not None:
        heapq.heappush(heap, (-self.scores[merged], left, a, b))

    for i in range(len(tokens)):
      push(i)
    while heap:
      _, left, a, b = heapq.heappop(heap)
      right = after[left]
      if alive[left] != a or right >= len(alive) or alive[right] != b:
        continue  # One of the two tokens has been merged with another since.
      alive[left], alive[right] = self.ids[self.pieces[a] + self.pieces[b]], -1
      after[left] = after[right]
      if after[left] < len(alive):
        before[after[left]] = left
      push(before[left])
      push(left)
    return [t for t in alive if t >= 0]

  def decode(self, tokens: list[int]) -> str:
    """The text of the tokens, without BOS and the leading space that `encode` adds."""
    raw = b''.join(
        bytes([t - _FIRST_BYTE]) if _FIRST_BYTE <= t < _FIRST_BYTE + 256 else self.pieces[t]
        for t in tokens if t != BOS)
    return raw.removeprefix(b' ').decode('utf-8', errors='replace')


def load_tokenizer(path: str | Path, vocab_size: int = 512) -> Tokenizer:
  """Reads a llama2.c tokenizer.

  The file is an int32, the length of the longest piece, and then for each piece its float32 score,
  its int32 length and its bytes.

  Raises:
    UserError: the file cannot be read, is truncated, or does not have `vocab_size` pieces.
  """
  data = _read(path)
  pieces, scores, offset = [], [], 4
  try:
    while offset < len(data):
      score, length = struct.unpack_from('<fi', data, offset)
      offset += 8
      if length < 0 or offset + length > len(data):
        raise struct.error
      pieces.append(data[offset:offset + length])
      scores.append(score)
      offset += length
  except struct.error as e:
    raise UserError(f'{path} ends inside piece {len(pieces)}: the file is truncated or no '
                    'llama2.c tokenizer; download it again.') from e
  if len(pieces) != vocab_size or vocab_size < _FIRST_BYTE + 256:
    raise UserError(f'{path} holds {len(pieces)} pieces but {vocab_size} are expected (at least '
                    f'{_FIRST_BYTE + 256}): give the tokenizer of this checkpoint.')
  # Of equal pieces the first one counts, as it does in llama2.c.
  ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
  return Tokenizer(tuple(pieces), tuple(scores), ids)


def _read(path: str | Path) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as e:
    raise UserError(f'{path} cannot be read ({e.strerror}): give the path of a llama2.c '
                    'file.') from e
