"""Codes of keys and values: their levels, their bytes, and the token that keeps 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import paged_cache
from jaxrl_pt.nn import absmax, kv_quant

X = jax.random.normal(jax.random.key(0), (2, 9, 3, 16)) * 3
POSITIONS = jnp.array([np.arange(9), np.arange(4, 13)])


@pytest.mark.parametrize('bits', [8, 4, 3])
def test_codes_are_the_nearest_levels_of_the_absmax(bits):
  codes, scale = absmax.quantise(X, bits)
  largest = jnp.abs(X).max(-1, keepdims=True)
  levels = np.arange(-127, 128) / 127 if bits == 8 else np.linspace(-1, 1, 2**bits)
  nearest = np.abs(np.asarray(X / largest)[..., None] - levels).min(-1, keepdims=True)[..., 0]
  back = absmax.levels(codes, bits, jnp.float32) * scale[..., None]
  np.testing.assert_allclose(np.abs(back - X) / largest, nearest, atol=1e-6)
  zero, scale = absmax.quantise(jnp.zeros((2, 4)), bits)
  assert np.abs(absmax.levels(zero, bits, jnp.float32) * scale[..., None]).max() < 1e-11


@pytest.mark.parametrize('bits, num_bytes', [(4, 16), (3, 12)])
def test_codes_fill_their_bytes(bits, num_bytes):
  codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**bits, (5, 7, 32)), jnp.uint8)
  packed = absmax.pack(codes, bits)
  assert packed.shape == (5, 7, num_bytes) and packed.dtype == jnp.uint8
  np.testing.assert_array_equal(absmax.unpack(packed, bits), codes)


def test_packed_bytes_by_hand():
  codes = jnp.array([1, 2, 3, 4, 5, 6, 7, 0], jnp.uint8)
  assert absmax.pack(codes, 4).tolist() == [0x51, 0x62, 0x73, 0x04]
  # Channels 0, 2, 4, 6 of the lower two bits, then 1, 3, 5, 7, then all eight upper bits.
  assert absmax.pack(codes, 3).tolist() == [0b11011101, 0b00100010 | 0, 0b01111000]


@pytest.mark.parametrize('kv', ['int4', 'int3'])
def test_only_the_token_at_position_0_has_8_bits(kv):
  back, of_8 = kv_quant.as_stored(X, POSITIONS, kv), kv_quant.as_stored(X, POSITIONS, 'int8')
  same = np.asarray((back == of_8).all((-2, -1)))
  assert same[0, 0] and same.sum() == 1
  np.testing.assert_array_equal(kv_quant.as_stored(X, POSITIONS, 'model'), X)


def test_a_pool_shrinks_with_its_bits():
  """Of each 128 channels, scale and the 8 bits of each page's first token included."""
  config = cfg.Model(2, 256, 512, 2, 2, 128, 64)
  num_bytes = {kv: sum(x.nbytes for x in jax.tree.leaves(
      paged_cache.init(config, 9, 64, jnp.bfloat16, kv))) for kv in ('model', *kv_quant.BITS)}
  tokens = 2 * 2 * 9 * 2 * 64  # layers · heads · pages · (keys, values) · page
  assert num_bytes == {'model': tokens * 256, 'int8': tokens * (128 + 4),
                       'int4': tokens * (64 + 4 + 2), 'int3': tokens * (48 + 4 + 2)}


def test_channels_that_fill_no_byte_are_refused():
  config = cfg.Model(1, 16, 32, 2, 1, 12, 64)
  with pytest.raises(UserError, match="'int3' packs 8 channels .*head_dim = 12 .*kv = 'int8'"):
    paged_cache.init(config, 3, 4, jnp.float32, 'int3')


@pytest.mark.parametrize('kv', ['int4', 'int3'])
def test_few_bits_draw_another_policy_and_need_a_correction(kv):
  rollouts = cfg.Rollouts(slots=cfg.Slots(kv=kv))
  assert not rollouts.is_gated and cfg.Rollouts(slots=cfg.Slots(kv='int8')).is_gated
  with pytest.raises(UserError, match='another policy: choose an Algorithm.correction'):
    cfg.RPT(start_from='x', rollouts=rollouts)
  cfg.RPT(start_from='x', rollouts=rollouts,
          algorithm=cfg.Algorithm(correction=cfg.TokenTIS()))
