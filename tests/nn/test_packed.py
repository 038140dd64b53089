"""Weights in bytes multiply as codes do; quantised tables are read as what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn import ops, packed, quant

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize('num_in, num_out, dtype', [
    (8, 5, 'int8'), (10, 300, 'int2'), (7, 3, 'float32')])
def test_bytes_hold_the_codes(num_in, num_out, dtype):
  codes = jnp.asarray(DRAW.integers(-1, 2, (2, num_in, num_out)), dtype)
  held = packed.to_bytes(codes, jnp.ones((2, 1, 1)))
  assert held.bytes.shape == (2, num_out, -(-num_in // 4)) and held.bytes.dtype == jnp.uint8
  np.testing.assert_array_equal(packed.to_codes(held.bytes, num_in), codes)


@pytest.mark.parametrize('rows', [(1, 1), (3,), (2, 2), (40,)])
@pytest.mark.parametrize('num_in, num_out', [(10, 300), (64, 128)])
def test_products_are_those_of_codes(rows, num_in, num_out):
  """One row, some, and as many as are multiplied in floats; sizes that fill no byte or tile."""
  x = jnp.asarray(DRAW.integers(-128, 128, (*rows, num_in)), jnp.float32)
  x_scale = jnp.asarray(DRAW.random((*rows, 1)), jnp.float32)
  codes = jnp.asarray(DRAW.integers(-1, 2, (num_in, num_out)), jnp.float32)
  scale = jnp.full((1, 1), 0.37)
  expected = ops.product(x, x_scale, codes, scale, 'int8', ('embed', 'ff'), jnp.float32)
  got = jax.jit(packed.product, static_argnums=(3, 4))(
      x, x_scale, packed.to_bytes(codes, scale), True, jnp.float32)
  np.testing.assert_array_equal(got, expected)


def test_activations_that_are_no_integers():
  x = jnp.asarray(DRAW.normal(size=(2, 12)), jnp.float32)
  w = packed.to_bytes(jnp.ones((12, 5)), jnp.full((1, 1), 0.5))
  got = quant.bit_matmul(x, w, x, jnp.ones((2, 1)), 'none', ops.product, ('embed', 'ff'))
  np.testing.assert_allclose(got, jnp.broadcast_to(x.sum(-1, keepdims=True) / 2, (2, 5)), rtol=1e-5)


def test_no_gradient_passes_silently():
  w = packed.to_bytes(jnp.ones((8, 5)), jnp.ones((1, 1)))
  loss = lambda x: quant.bit_matmul(x, w, jnp.round(x), jnp.ones((1, 1)), 'int8', ops.product,
                                    ('embed', 'ff')).sum()
  with pytest.raises(NotImplementedError, match='no gradient'):
    jax.grad(loss)(jnp.ones((1, 8)))


# --- Tables -----------------------------------------------------------------------------

TABLE = jnp.asarray(DRAW.normal(size=(37, 16)) * DRAW.random((37, 1)), jnp.float32)


@pytest.mark.parametrize('bits, num_bytes', [(8, 16), (4, 8)])
def test_a_table_is_read_as_what_it_stands_for(bits, num_bytes):
  table = packed.to_table(TABLE, bits)
  assert table.codes.nbytes == 37 * num_bytes and table.scale.shape == (37,)
  whole = packed.dequantised(table, jnp.float32)
  step = jnp.abs(TABLE).max(-1, keepdims=True) * {8: 1 / 127, 4: 2 / 15}[bits]
  assert (jnp.abs(whole - TABLE) <= step / 2 * 1.001).all()  # Each row by its own absmax.
  tokens = jnp.array([[3, 36], [0, 3]])
  np.testing.assert_array_equal(packed.lookup(table, tokens, jnp.float32), whole[tokens])
  hidden = jnp.asarray(DRAW.normal(size=(2, 3, 16)), jnp.float32)
  np.testing.assert_allclose(packed.logits(hidden, table), hidden @ whole.T, rtol=1e-5, atol=1e-5)


def test_channels_that_fill_no_byte_are_refused():
  with pytest.raises(UserError, match='d_model = 15 is odd'):
    packed.to_table(TABLE[:, :15], 4)


def test_settings_that_draw_another_policy_need_a_correction():
  for slots in (cfg.Slots(kv='int4'), cfg.Slots(kv='int3'), cfg.Slots(head='int4')):
    rollouts = cfg.Rollouts(slots=slots)
    assert not rollouts.is_gated
    with pytest.raises(UserError, match='another policy: choose an Algorithm.correction'):
      cfg.RPT(start_from='x', rollouts=rollouts)
    cfg.RPT(start_from='x', rollouts=rollouts,
            algorithm=cfg.Algorithm(correction=cfg.TokenTIS()))
  assert cfg.Rollouts(slots=cfg.Slots(kv='int8', head='int8')).is_gated


def test_a_head_of_4_bits_draws_another_policy_and_needs_a_correction():
  rollouts = cfg.Rollouts(slots=cfg.Slots(head='int4'))
  assert not rollouts.is_gated and cfg.Rollouts(slots=cfg.Slots(head='int8')).is_gated
  with pytest.raises(UserError, match="Slots.head = 'int4'.*choose an Algorithm.correction"):
    cfg.RPT(start_from='x', rollouts=rollouts)
