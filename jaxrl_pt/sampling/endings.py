"""Stop strings: the newest bytes of each response, and whether one of its strings ends there."""

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array


def shift_in(window_BW: Array, bytes_BX: Array, num_bytes_B: Array) -> Array:
  """The newest bytes of each slot after those of one more token.

  Args:
    window_BW: u8[B, W] the newest bytes before it.
    bytes_BX: u8[B, X] the bytes of the new tokens, left-aligned.
    num_bytes_B: i32[B] how many bytes each new token has.
  """
  width = window_BW.shape[1]
  both = jnp.concatenate([window_BW, bytes_BX], 1)
  return jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, width))(both, num_bytes_B)


def ends_in(window_BW: Array, strings: Array, lengths: Array, num_bytes_B: Array) -> Array:
  """bool[B]: whether a stop string ends inside the newest token's bytes.

  Args:
    window_BW: u8[B, W + longest token] the newest bytes.
    strings: u8[B, X, W] the stop strings, right-aligned.
    lengths: i32[B, X] their bytes; 0 for no string.
    num_bytes_B: i32[B] bytes of the newest token.
  """
  string_len, width = strings.shape[-1], window_BW.shape[1]
  needed = jnp.arange(string_len) >= string_len - lengths[..., None]  # bool[B, X, W]
  matched = jnp.zeros(window_BW.shape[0], bool)
  for back in range(width - string_len):  # The string ends `back` bytes before the window's end.
    text = window_BW[:, width - back - string_len:width - back]
    same = ((text[:, None] == strings) | ~needed).all(-1) & (lengths > 0)
    matched |= same.any(-1) & (back < num_bytes_B)
  return matched
