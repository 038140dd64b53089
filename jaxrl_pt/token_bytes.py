"""The bytes of every token of a vocabulary, as arrays that programs on the device read."""

from collections.abc import Sequence

from flax import struct
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array


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
