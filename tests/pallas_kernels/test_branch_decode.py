"""Branch decoding: every branch's attention, alone, is what the kernel and its reference give."""

import functools
import logging

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import branch_decode as op
from pallas_kernels import dispatch, testing
from pallas_kernels import tuning as kernel_tuning
from pallas_kernels.branch_decode import arg_specs, kernel_tpu, reference, tuning

LARGE = 1e4  # what lies beyond a length: any weight on it shows


def plain(q, k_prefix, v_prefix, prefix_lengths, k_suffix, v_suffix, suffix_lengths):
  """One branch and one head at a time, in float64."""
  N, H, R, E = q.shape
  per_group = H // k_prefix.shape[1]
  out, lse = np.zeros(q.shape), np.zeros((N, H, R))
  for n, h, r in np.ndindex(N, H, R):
    k, t, s = h // per_group, prefix_lengths[n, r], suffix_lengths[n, r]
    keys = np.concatenate([k_prefix[n, k, :t], k_suffix[n, k, r, :s]]).astype(np.float64)
    values = np.concatenate([v_prefix[n, k, :t], v_suffix[n, k, r, :s]]).astype(np.float64)
    scores = keys @ q[n, h, r].astype(np.float64) / np.sqrt(E)
    lse[n, h, r] = np.logaddexp.reduce(scores)
    out[n, h, r] = np.exp(scores - lse[n, h, r]) @ values
  return out, lse


def arguments(seed, shape, num_documents=1, num_groups=2, lengths=None, spread=1.0):
  """Random arguments; slots that no branch may see hold large numbers."""
  G, E, R, T, S, dtype = shape
  N, K = num_documents, num_groups
  rng = np.random.default_rng(seed)
  def draw(*dims):
    return rng.standard_normal(dims).astype(np.float32)
  prefix_lengths, suffix_lengths = lengths or (rng.integers(1, T + 1, (N, R)),
                                               rng.integers(0, S + 1, (N, R)))
  k_prefix, v_prefix = spread * draw(N, K, T, E), draw(N, K, T, E)
  k_suffix, v_suffix = spread * draw(N, K, R, S, E), draw(N, K, R, S, E)
  beyond = np.arange(T) >= prefix_lengths.max(-1, keepdims=True)
  k_prefix[:], v_prefix[:] = (np.where(beyond[:, None, :, None], LARGE, x)
                              for x in (k_prefix, v_prefix))
  beyond = np.arange(S) >= suffix_lengths[..., None]
  k_suffix[:], v_suffix[:] = (np.where(beyond[:, None, :, :, None], LARGE, x)
                              for x in (k_suffix, v_suffix))
  args = (draw(N, K * G, R, E), k_prefix, v_prefix, prefix_lengths, k_suffix, v_suffix,
          suffix_lengths)
  return tuple(jnp.asarray(x, jnp.int32 if x.dtype.kind == 'i' else dtype) for x in args)


def check(result, args, rtol):
  """Against `plain`: `rtol` of the largest value that a mean of values can have here."""
  out, lse = plain(*(np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype)
                     for x in args))
  scale = max(1.0, np.abs(out).max())
  np.testing.assert_allclose(np.asarray(result[0], np.float32), out, rtol=rtol,
                             atol=rtol * scale)
  np.testing.assert_allclose(result[1], lse, rtol=1e-5, atol=1e-5)


def shape_of(G=2, E=64, R=16, T=256, S=32, dtype='float32'):
  return tuning.Shape(G, E, R, T, S, dtype)


# Several steps, query blocks, chunks and suffix tiles; more tiles than key blocks and fewer;
# slots that share lanes (32, 64) and blocks of slots of one branch (2 x 128).
SHAPES = {
    'one block': (shape_of(), None),
    'blocks of everything': (shape_of(R=64, T=256, S=256, G=1),
                             tuning.Blocks(32, 16, 128, 16, 128)),
    'few suffixes': (shape_of(G=4, R=32, T=512, S=64, E=128), tuning.Blocks(32, 16, 128, 32, 64)),
}


@functools.cache
def compiled(name):
  shape, blocks = SHAPES[name]
  return jax.jit(functools.partial(kernel_tpu.branch_decode, blocks=blocks or tuning.default(shape),
                                   interpret=testing.tpu_interpreter()))


@pytest.mark.parametrize('name', SHAPES)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_equals_each_branch_alone(name, data):
  """Lengths are drawn with their edges: prefixes of 1 and T keys, suffixes of none and S.
  The TPU interpreter fills memory with NaN and looks for races."""
  shape, _ = SHAPES[name]
  def lengths(least, most):
    edge = st.sampled_from([least, most])
    row = st.lists(edge | st.integers(least, most), min_size=shape.num_branches,
                   max_size=shape.num_branches)
    return np.array([data.draw(row) for _ in range(num_documents)])
  num_documents = 2 if name == 'one block' else 1
  drawn = lengths(1, shape.num_prefix), lengths(0, shape.num_slots)
  args = arguments(data.draw(st.integers(0, 99)), shape, num_documents, lengths=drawn)
  check(compiled(name)(*args), args, 1e-5)
  assert not testing.races_found()


def test_blocks_beyond_every_branch_are_not_read():
  """All prefixes end in the first key block; what lies behind it is NaN, never touched."""
  shape, blocks = SHAPES['few suffixes']
  R, S = shape.num_branches, shape.num_slots
  args = list(arguments(5, shape, lengths=(np.full((1, R), 100), np.full((1, R), S))))
  expected = reference.branch_decode(*args)
  for i in (1, 2):
    args[i] = args[i].at[:, :, blocks.keys:].set(jnp.nan)
  out, lse = compiled('few suffixes')(*args)
  np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow():
  shape, _ = SHAPES['one block']
  args = arguments(7, shape, spread=300.0)
  assert float(jnp.abs(plain(*map(np.asarray, args))[1]).max()) > 200
  check(compiled('one block')(*args), args, 1e-4)  # float32 scores of 1e3: 6e-5 apart


@pytest.mark.parametrize('implementation', ['kernel', 'reference'])
def test_bfloat16(implementation):
  """Weights are rounded to bfloat16 before the values: 2^-9 each, averaged; then the output."""
  args = arguments(11, shape_of(G=4, E=128, R=16, T=256, S=128, dtype='bfloat16'))
  generation = 'v5e' if implementation == 'kernel' else None
  result = op.branch_decode(*args, generation=generation, interpret=testing.tpu_interpreter())
  assert result[0].dtype == jnp.bfloat16 and result[1].dtype == jnp.float32
  check(result, args, 2**-7)


def test_reference_equals_each_branch_alone():
  args = arguments(13, shape_of(G=5, R=3, T=7, S=2), num_documents=2, num_groups=3)
  check(op.branch_decode(*args, generation=None), args, 1e-5)


def test_merge_of_two_sets_of_keys():
  """Prefix and suffix attended to apart and merged; an empty suffix changes nothing."""
  shape = shape_of(R=4, T=16, S=8)
  args = arguments(17, shape, lengths=(np.array([[1, 16, 5, 9]]), np.array([[0, 8, 0, 3]])))
  q, k, v, prefix_lengths, k_suffix, v_suffix, suffix_lengths = args
  prefix = reference.branch_decode(q, k, v, prefix_lengths, k_suffix, v_suffix,
                                   jnp.zeros_like(suffix_lengths))
  scores = jnp.einsum('nkgre,nkrse->nkgrs', q.reshape(1, 2, 2, 4, 64), k_suffix) / 8
  seen = jnp.arange(8) < suffix_lengths[:, None, None, :, None]
  scores = jnp.where(seen, scores, -jnp.inf)
  suffix = (jnp.einsum('nkgrs,nkrse->nkgre', jax.nn.softmax(scores), v_suffix).reshape(q.shape),
            jax.nn.logsumexp(scores, axis=-1).reshape(q.shape[:3]))
  assert jnp.isnan(suffix[0]).any()  # softmax over nothing
  for parts in ((*prefix, *suffix), (*suffix, *prefix)):
    check(op.merge(*parts), args, 1e-5)


@pytest.mark.parametrize('change, message', [
    (dict(R=15), '15 branches are no multiple of 16'),
    (dict(S=0), 'at least one branch, prefix slot and suffix slot'),
    (dict(T=100), 'prefix slots in multiples of 128'),
    (dict(E=48), 'heads of 64, 128 or 256'),
])
def test_unsupported_falls_to_the_definition(change, message, caplog):
  """One line says why, and the answer is the definition's."""
  args = arguments(19, shape_of(**change))
  with caplog.at_level(logging.INFO, logger='pallas_kernels'):
    result = op.branch_decode(*args, generation='v5e')
  assert message in caplog.text
  check(result, args, 1e-5)


@pytest.mark.parametrize('index, change, message', [
    (0, lambda q: q[0], 'q must be'),
    (0, lambda q: q[:, :3], 'do not share'),
    (2, lambda v: v[:, :, :-1], 'v_prefix must be'),
    (3, lambda x: x.astype(jnp.float32), 'prefix_lengths must be integers'),
    (4, lambda k: k.astype(jnp.bfloat16), 'k_suffix must be float32'),
    (6, lambda x: x[:, :-1], 'suffix_lengths must be'),
])
def test_wrong_arguments(index, change, message):
  args = list(arguments(23, shape_of()))
  args[index] = change(args[index])
  with pytest.raises(ValueError, match=message):
    op.branch_decode(*args, generation=None)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@given(G=st.integers(1, 16), E=st.sampled_from([64, 128, 256]), R=st.integers(1, 70),
       T=st.integers(1, 70), S=st.integers(1, 40))
def test_default_blocks_divide_every_shape(dtype, G, E, R, T, S):
  shape = tuning.Shape(G, E, R * 16, T * 128, S * 16, dtype)
  kernel_tpu.check(shape)
  blocks = tuning.default(shape)
  assert not any((shape.num_branches % blocks.branches, blocks.branches % blocks.chunk,
                  shape.num_prefix % blocks.keys, blocks.branches % blocks.suffix_branches,
                  shape.num_slots % blocks.slots, max(blocks.slots, 128) % min(blocks.slots, 128)))


def test_cases_state_their_bytes():
  """One block of queries: each byte moves once. Two: the prefix keys move twice."""
  case = arg_specs.cases('v5e')[0]
  assert case.minimum_bytes == sum(kernel_tuning.num_bytes(x) for x in case.call.args) + \
      kernel_tuning.num_bytes(case.call.args[0]) + 20 * 256 * 4
  assert case.call.cost.hbm_bytes >= case.minimum_bytes
  assert set(case.alternatives) == {'separate_prefixes', 'xla'}
  for generation in dispatch.GENERATIONS:
    for choices in arg_specs.candidates(generation).values():
      assert 1 < len(choices) <= 6
