"""Products are counted with the turns of the loops around them."""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import groups
from jaxrl_pt.tpu import hlo, roofline
from jaxrl_pt.types import Prompts


@pytest.mark.parametrize('num_samples, slots', [(1, 0), (3, 0), (3, 2)])
def test_every_turn_of_the_decode_loop_counts(num_samples, slots):
  """Its last turn is the most that may run, whether all responses have slots or wait for them."""
  model = transformer.build(cfg.Model(2, 32, 64, 2, 1, 16, 96))
  params, num_prompts, prompt_len, num_tokens = P.abstract(model.specs), 2, 8, 300
  ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  prompts = Prompts(ints((num_prompts, prompt_len)), ints((num_prompts,)), ints((num_prompts,)))
  trace = jax.jit(functools.partial(
      groups.generate, model, sampler=cfg.Sampler(), num_samples=num_samples,
      num_tokens=num_tokens, slots=cfg.Slots(slots=slots))).trace(
          params, prompts, jax.eval_shape(lambda: jax.random.key(0)))
  (count,) = roofline.multiply_adds(trace.jaxpr).values()
  module = hlo.parse(trace.lower().compile().as_text())
  rows = num_prompts * num_samples
  steps = num_tokens if not slots else num_tokens * rows // slots
  assert steps * 2 in {run.times for run in hlo.runs(module)}  # The layers of all steps.
  weights = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64)
  projections = (num_prompts * prompt_len + rows * num_tokens) * weights
  head = rows * num_tokens * 32 * 96
  # Attention: of a turn, at most everything there is room for in both layers.
  attention = 2 * 2 * 32 * (num_prompts * prompt_len**2
                            + (rows + slots) * (num_tokens + 1) * (prompt_len + num_tokens + 64))
  assert projections + head < count < projections + head + attention


@pytest.mark.parametrize('name', [None, 'product'])
def test_a_kernels_products_count_once_a_grid_step(name):
  def kernel(x, y, out):
    out[...] = x[...] @ y[...]

  call = pl.pallas_call(
      kernel, grid=(4,), name=name, out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
      in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))],
      out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)))
  traced = jax.jit(call).trace(jnp.zeros((32, 16)), jnp.zeros((16, 16)))
  assert roofline.multiply_adds(traced.jaxpr.jaxpr).total() == 32 * 16 * 16
