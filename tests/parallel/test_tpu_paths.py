"""What only a TPU's mesh dispatches, in the plain interpreter on one device: values and gradients
against the definitions.

What cannot run here: what Mosaic makes of the kernels (layouts, VMEM, the order of copies; the
TPU interpreter of `tests/pallas_kernels` looks for races, the compiler is asked in `tests/tpu`),
4-bit operands in that interpreter, XLA's own 2-bit arrays on a chip, sparse decoding inside a
whole model (its kernel alone runs in `tests/pallas_kernels`), and collectives between
chips: `test_kernels.py` has them between eight CPU devices, `tests/e2e/test_two_hosts.py`
between processes.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import ops, quant
from jaxrl_pt.nn.attention import attention, packed_mask
from jaxrl_pt.nn.linear import normed_linear
from jaxrl_pt.nn.page_writes import write_pages
from jaxrl_pt.parallel import kernels, rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling import branch, weight_sync

MESH = make_mesh(cfg.Mesh(), jax.devices()[:1])
KERNELS = kernels.kernel_ops(MESH, rules.TRAIN, 'v5e', interpret=True)
BITNET = cfg.Quant('ternary', 'int8', hadamard=True)


def draw(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def off(found, expected):
  """‖found − expected‖ / ‖expected‖."""
  found, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (found, expected))
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def value_and_gradients(f, arrays, d_out):
  @jax.jit
  def both(arrays, d_out):
    out, pull_back = jax.vjp(f, *arrays)
    return out, *pull_back(d_out)

  return both(arrays, d_out)


# --- Splash attention -------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_splash_attention_with_segments(dtype):
  """Three blocks of queries and keys; segments that end inside blocks, at their edges, and
  padding; two query heads to each of two key/value heads."""
  rows, length, heads, groups, width = 2, 384, 4, 2, 128
  q, k, v, d_out = (draw(rows, length, n, width, seed=i, dtype=dtype)
                    for i, n in enumerate((heads, groups, groups, heads)))
  ends = np.array([[50, 128, 300, 370], [1, 129, 256, 384]])
  segments = jnp.asarray((np.arange(length)[:, None] >= ends[:, None]).sum(-1) + 1)
  segments = jnp.where(segments > 4, 0, segments)
  mask = packed_mask(segments)
  exact = value_and_gradients(lambda *a: attention(*a, mask),
                              [x.astype(jnp.float32) for x in (q, k, v)],
                              d_out.astype(jnp.float32))
  found = value_and_gradients(lambda *a: KERNELS.attention(*a, segments), (q, k, v), d_out)
  for one, right in zip(found, exact, strict=True):
    assert one.dtype == dtype
    # float32: sums of up to 384 terms in another order. bfloat16: inputs are the same, and
    # each of four roundings on the way (scaled queries, weights, output, gradient) is 2⁻⁸ / √3
    # of a value at most; the softmax's gradient is a difference, so twice that.
    assert off(one, right) < (1e-5 if dtype == jnp.float32 else 2 * 2 * 2**-8 / 3**0.5)


def test_what_splash_attention_does_not_take_lands_on_the_definition():
  for length, width in ((100, 128), (128, 64)):
    q, k, v = (draw(1, length, 1, width, seed=i) for i in range(3))
    segments = jnp.ones((1, length), jnp.int32)
    np.testing.assert_allclose(KERNELS.attention(q, k, v, segments),
                               attention(q, k, v, packed_mask(segments)), atol=2e-5)


# --- The rotated input --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_the_kernels_codes_are_the_definitions(dtype, kind):
  """They differ only where the row's two bfloat16 terms leave a value on the other side of a
  rounding boundary: 2⁻¹⁴ of the largest code, on both sides, of a step of 1."""
  x, gain = draw(4, 64, 256, dtype=dtype), 1 + 0.1 * draw(256, seed=1)
  _, found, found_scale = KERNELS.rotated(x, gain, 1e-5, kind)
  _, codes, scale = ops.rotated(x, gain, 1e-5, kind)
  np.testing.assert_allclose(found_scale, scale, rtol=2.0**-13)
  wrong = np.abs(np.asarray(found.astype(jnp.int32)) - np.asarray(codes.astype(jnp.int32)))
  assert wrong.max() <= 1
  assert wrong.mean() <= 2 * 2.0**-14 * (127 if kind == 'int8' else 8)


@pytest.mark.parametrize('gain', [
    pytest.param(None, marks=pytest.mark.slow), 1 + 0.1 * draw(256, seed=1)])
def test_the_gradient_through_the_rotated_input(gain):
  x, w, dy = draw(2, 32, 256, dtype=jnp.bfloat16), draw(256, 128, seed=2), draw(2, 32, 128, seed=3)
  if gain is None:
    layer = lambda o: lambda x, w: normed_linear(x, None, 1e-5, w, BITNET, o, ('ff', 'embed'))
    arrays = x, w
  else:
    layer = lambda o: lambda x, w, g: normed_linear(x, g, 1e-5, w, BITNET, o, ('ff', 'embed'))
    arrays = x, w, gain
  found, right = (value_and_gradients(layer(o), arrays, dy.astype(jnp.bfloat16))
                  for o in (KERNELS, ops.Ops()))
  for one, other in zip(found, right, strict=True):
    assert one.dtype == other.dtype
    # A few codes in 16,384 may differ by one of about 40 in the root of the mean square.
    assert off(one, other) < 2e-3


# --- Packed weights -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_packed_weights_give_the_latent_weights_bits(kind):
  x, w = draw(2, 16, 128, dtype=jnp.bfloat16), draw(128, 256, seed=1)
  codes, scale = quant.activations(x, kind)
  packed = quant.pack({'w': w}, lambda path: True)['w']
  results = [quant.bit_matmul(x, weight, codes, scale, kind, o.product, ('embed', 'ff'))
             for o in (KERNELS, ops.Ops()) for weight in (w, packed)]
  for result in results[1:]:
    np.testing.assert_array_equal(result, results[0])
  gradients = [jax.grad(lambda x, weight=weight, o=o: quant.bit_matmul(
      x, weight, codes, scale, kind, o.product, ('embed', 'ff')).astype(jnp.float32).sum())(x)
      for o in (KERNELS, ops.Ops()) for weight in (w, packed)]
  for gradient in gradients[1:]:
    np.testing.assert_array_equal(gradient, gradients[0])


# --- A model --------------------------------------------------------------------------------


def model_of(o, bits, dtype='float32'):
  config = cfg.Model(num_layers=1, d_model=128, d_ff=128, num_heads=2, num_kv_heads=1,
                     head_dim=128, vocab_size=32, activation='relu2', sub_norm=True, quant=bits)
  return transformer.build(config, cfg.Compute(dtype), ops=o)


def kernels_of(jaxpr):
  """Names of the Pallas kernels in a program."""
  return {name for name in ('splash', 'hadamard_quantize', 'ternary_matmul')
          if name in str(jaxpr)}


@pytest.mark.slow
def test_synced_packed_weights_run_through_the_kernels():
  plain, fast = (model_of(o, BITNET) for o in (ops.Ops(), KERNELS))
  params = jax.jit(lambda key: P.init(plain.specs, key))(jax.random.key(0))
  policy = weight_sync.make_weight_sync(plain, MESH, packed=True)(params, 3)
  assert policy.params['layers']['wq'].codes.dtype == jnp.int2 and policy.version == 3
  tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 32)
  rows = jnp.broadcast_to(jnp.arange(128), tokens.shape), jnp.ones_like(tokens)
  assert kernels_of(jax.make_jaxpr(fast.apply)(policy.params, tokens, *rows)) == {
      'splash', 'hadamard_quantize', 'ternary_matmul'}
  expected, found = (jax.jit(m.apply)(p, tokens, *rows)
                     for m, p in ((plain, params), (fast, policy.params)))
  # Roundings of one layer in another order, and a few codes beside their boundary.
  assert off(found, expected) < 0.01


def test_the_learners_gradient_with_the_mesh_of_a_chip():
  """Documents through splash attention, their branches beside them."""
  plain, fast = (model_of(o, cfg.Quant()) for o in (ops.Ops(), KERNELS))
  params = jax.jit(lambda key: P.init(plain.specs, key))(jax.random.key(0))
  params = {**params, 'embed': 20 * params['embed']}
  tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 32)
  prompts = branch.documents(tokens, jnp.array([[128], [100]]), jnp.arange(2)[:, None])
  drawn = jax.random.randint(jax.random.key(2), (2, 2, 3), 0, 32)
  target = draw(2, 2, 3, 128)

  def gradient(model):
    loss = lambda p: (branch.response_hidden(model, p, prompts, drawn) * target).sum()
    return jax.jit(jax.grad(loss))(params)

  for one, other in zip(jax.tree.leaves(gradient(fast)), jax.tree.leaves(gradient(plain)),
                        strict=True):
    assert off(one, other) < 1e-4


# --- Dispatch ---------------------------------------------------------------------------------


def mesh_of(device_kind):
  """As much of a mesh as dispatch looks at."""
  device = types.SimpleNamespace(device_kind=device_kind)
  return types.SimpleNamespace(devices=np.array([device]), size=1)


def test_a_mesh_of_tpus_gets_kernels_and_any_other_the_definitions():
  assert kernels.make_ops(MESH) == ops.Ops()
  assert kernels.make_ops(mesh_of('NVIDIA H100')) == ops.Ops()
  for kind in ('TPU v4', 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'TPU7x'):
    made = kernels.make_ops(mesh_of(kind))
    assert made.write_pages is write_pages
    for op, definition in zip(made, ops.Ops(), strict=True):
      if op is write_pages:
        continue
      _, implementations = op.args
      assert [i.run for i in implementations][-1] is definition
      assert len(implementations) == 2 and implementations[0].name in ('tpu', 'splash')
