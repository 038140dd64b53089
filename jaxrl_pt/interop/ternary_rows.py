"""Packed ternary matrices as transformers stores them, and latent weights that quantise to them."""

import numpy as np


def pack(codes: np.ndarray) -> np.ndarray:
  """Packs i8[out, in] of {−1, 0, 1} into u8[⌈out / 4⌉, in].

  Byte [r, c] holds rows r, r + R, r + 2R, r + 3R of column c, plus 1, in bits 0–1 … 6–7;
  R = ⌈out / 4⌉, and rows beyond the matrix are 0 bits.
  """
  num_rows = -(-codes.shape[0] // 4)
  planes = np.zeros((4 * num_rows, *codes.shape[1:]), np.uint8)
  planes[:codes.shape[0]] = (codes + 1).astype(np.uint8)
  planes = planes.reshape(4, num_rows, *codes.shape[1:])
  return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def unpack(packed: np.ndarray, num_out: int) -> np.ndarray:
  """The inverse of `pack`: u8[⌈out / 4⌉, in] → i8[out, in] in {−1, 0, 1}."""
  planes = [(packed >> 2 * i & 3).astype(np.int8) - 1 for i in range(4)]
  return np.concatenate(planes)[:num_out]


def latent(codes: np.ndarray, scale: float) -> np.ndarray:
  """f32 weights whose absmean quantisation is (codes, scale): codes · scale / f.

  Quantising them gives the codes exactly, and the scale to within 2⁻¹⁶ of itself: it is a float32
  mean, whose rounding depends on the number of weights and the order in which they are added.
  """
  share = np.count_nonzero(codes) / codes.size
  return codes.astype(np.float32) * np.float32(scale / share if share else 0.0)
