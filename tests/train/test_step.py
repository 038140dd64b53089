"""The train step: exact accumulation, and a gradient that is that of the mean loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch

MODEL = cfg.Model(num_layers=2, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=50)
OPTIMIZER = cfg.AdamW(cfg.ConstantRate(1e-2))


def make_batch(seed: int = 0, rows: int = 8, length: int = 16) -> Batch:
  """Rows with different numbers of counted targets, so that a mean of means is wrong."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 50, (rows, length + 1)).astype(np.int32)
  weights = (np.arange(length)[None] < rng.integers(1, length + 1, (rows, 1))).astype(np.float32)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], positions,
                                  np.ones((rows, length), np.int32), weights,
                                  np.arange(rows, dtype=np.int32))))


def make(accumulation: int, reduction='mean'):
  model = transformer.build(MODEL)
  optimizer = optim.make_optimizer(OPTIMIZER, 100, model.specs)
  mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
  state = states.init_state(model, optimizer, mesh, 0)
  step = make_train_step(model.specs, losses.next_token(model, 0), optimizer,
                         optim.learning_rate(OPTIMIZER.schedule, 100), accumulation, reduction)
  return model, state, jax.jit(step)


@pytest.mark.parametrize('accumulation', [
    2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_accumulation_equals_one_batch_with_uneven_rows(accumulation: int):
  batch = make_batch()
  _, state, whole = make(1)
  _, _, parts = make(accumulation)
  (first, m1), (second, m2) = whole(state, batch), parts(state, batch)
  assert float(m1['loss'].mean()) == pytest.approx(float(m2['loss'].mean()), rel=1e-6)
  assert float(m1['grad_norm'].mean()) == pytest.approx(float(m2['grad_norm'].mean()), rel=1e-5)
  # Adam divides by the gradient's own size: compare its first moment, which is linear in it.
  for a, b in zip(jax.tree.leaves(first.opt_state), jax.tree.leaves(second.opt_state),
                  strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_loss_is_the_mean_over_counted_targets():
  batch = make_batch(1)
  model, state, step = make(1)
  _, metrics = step(state, batch)
  hidden = model.apply(state.params, batch.tokens, batch.positions, batch.segments)
  logp = jax.nn.log_softmax(hidden @ model.head(state.params))
  picked = np.take_along_axis(np.asarray(logp), np.asarray(batch.targets)[..., None], -1)[..., 0]
  expected = -(picked * np.asarray(batch.weights)).sum() / np.asarray(batch.weights).sum()
  assert float(metrics['loss'].mean()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_weights_multiply_and_are_not_divided_by(reduction: str):
  """L = Σ w · −log p / n: n counts targets for 'mean' and is 1 for 'sum', by hand in numpy."""
  batch = make_batch(1)
  rows = np.asarray([1.0, 0.5, 2.0, 1.0, 3.0, 1.0, 0.25, 1.0], np.float32)[:, None]
  batch = batch.replace(weights=batch.weights * rows)
  model, state, step = make(1, reduction)
  hidden = model.apply(state.params, batch.tokens, batch.positions, batch.segments)
  logits = np.asarray(hidden @ model.head(state.params), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(logp, np.asarray(batch.targets)[..., None], -1)[..., 0]
  weights = np.asarray(batch.weights)
  count, total = np.count_nonzero(weights), -(picked * weights).sum()
  after, metrics = step(state, batch)
  assert float(metrics['loss'].sum) == pytest.approx(total, rel=1e-5)
  assert float(metrics['loss'].count) == count and weights.sum() != count

  def loss(params):
    logp = jax.nn.log_softmax(
        model.apply(params, batch.tokens, batch.positions, batch.segments) @ model.head(params))
    picked = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    return -(picked * batch.weights).sum() / (count if reduction == 'mean' else 1)

  norm = float(optim.global_norm(jax.grad(loss)(state.params)))
  assert float(metrics['grad_norm'].mean()) == pytest.approx(norm, rel=1e-5)
  _, parts = make(4, reduction)[2](state, batch)
  for name in ('loss', 'grad_norm'):
    assert float(parts[name].mean()) == pytest.approx(float(metrics[name].mean()), rel=1e-5)
  del after


def test_training_lowers_the_loss():
  batch = make_batch(2)
  _, state, step = make(1)
  seen = []
  for _ in range(20):
    state, metrics = step(state, batch)
    seen.append(float(metrics['loss'].mean()))
  assert seen[-1] < seen[0] - 0.5
  assert int(state.step) == 20
