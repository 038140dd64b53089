"""Schedules against their definitions, and the optimiser against a plain AdamW."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.train import optim


def at(schedule: cfg.Schedule, num_steps: int, step: int) -> float:
  return float(optim.learning_rate(schedule, num_steps)(jnp.asarray(step)))


def test_warm_up_reaches_the_peak_at_its_last_step():
  schedule = cfg.ConstantRate(0.1, warmup_steps=4)
  assert [at(schedule, 10, s) for s in range(6)] == pytest.approx(
      [0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_cosine_is_half_way_at_half_time():
  schedule = cfg.Cosine(peak_rate=1.0, end_rate=0.2)
  assert at(schedule, 100, 0) == pytest.approx(1.0)
  assert at(schedule, 100, 50) == pytest.approx(0.6)
  assert at(schedule, 100, 100) == pytest.approx(0.2)


def test_wsd_is_flat_then_linear():
  schedule = cfg.WSD(peak_rate=1.0, warmup_steps=10, decay_fraction=0.2)
  assert at(schedule, 100, 10) == at(schedule, 100, 79) == pytest.approx(1.0)
  assert at(schedule, 100, 90) == pytest.approx(0.5)
  assert at(schedule, 100, 100) == pytest.approx(0.0)


@pytest.mark.parametrize('schedule, num_steps, message', [
    (cfg.WSD(1e-3, warmup_steps=900), 1000, 'WSD.warmup_steps = 900 goes on beyond step 800'),
    (cfg.WSD(1e-3, warmup_steps=801), 1000, 'beyond step 800 of 1000'),
    (cfg.WSD(1e-3, warmup_steps=1, decay_fraction=1.0), 50, 'beyond step 0'),
    (cfg.WSD(1e-3, warmup_steps=50, decay_fraction=0.0), 50, 'beyond step 49'),
    (cfg.Cosine(1e-3, warmup_steps=50), 50, 'beyond step 49 of 50'),
    (cfg.TwoStage(1e-3, 5e-4, warmup_steps=51), 100, 'beyond step 50'),
    (cfg.ConstantRate(1e-3, warmup_steps=11), 10, 'beyond step 10')])
def test_a_warm_up_that_runs_into_what_follows_is_refused(schedule, num_steps, message):
  with pytest.raises(UserError, match=message):
    optim.learning_rate(schedule, num_steps)
  # One step before, the rate rises to its peak and nowhere drops by more than its own schedule.
  at_the_edge = dataclasses.replace(
      schedule, warmup_steps=int(message.rpartition('step ')[2].split()[0]))
  rate = optim.learning_rate(at_the_edge, num_steps)
  if at_the_edge.warmup_steps:
    assert float(rate(at_the_edge.warmup_steps - 1)) == pytest.approx(1e-3)


def test_two_stage_jumps_between_two_full_length_decays():
  """The schedule 1.5e-3 → 1e-3 over 100K steps, with end 3e-5 and 375 steps of warm-up, goes from
  7.67e-4 just before step 50,000 to 5.16e-4 just after (docs/methods/bitnet.md)."""
  schedule = cfg.TwoStage(1.5e-3, 1e-3, end_rate=3e-5, warmup_steps=375)
  assert at(schedule, 100_000, 49_999) == pytest.approx(7.67e-4, rel=3e-3)
  assert at(schedule, 100_000, 50_000) == pytest.approx(5.16e-4, rel=3e-3)
  assert at(schedule, 100_000, 100_000) == pytest.approx(3e-5)


def test_two_stage_weight_decay_is_a_step_to_exactly_zero():
  config = cfg.AdamW(cfg.TwoStage(1e-3, 5e-4), weight_decay=0.1)
  decay = optim.weight_decay(config, 100)
  assert float(decay(49)) == pytest.approx(0.1)
  assert float(decay(50)) == 0.0


def test_cosine_weight_decay_reaches_its_peak_at_the_switch():
  config = cfg.AdamW(cfg.TwoStage(1e-3, 5e-4, shape='cosine'), weight_decay=0.1,
                     weight_decay_shape='cosine')
  decay = optim.weight_decay(config, 1000)
  assert float(decay(0)) == 0.0
  assert float(decay(250)) == pytest.approx(0.05)
  assert float(decay(499)) == pytest.approx(0.1, rel=1e-4)
  assert float(decay(500)) == 0.0


def test_optimizer_equals_adamw_written_out():
  """Clip, moments with bias correction, decoupled decay on projections only."""
  config = cfg.AdamW(cfg.ConstantRate(0.01), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
                     clip_norm=1.0)
  params = {'embed': np.full((2, 2), 0.5), 'layers': {'wq': np.full((2, 2), 0.5),
                                                      'attn_norm': np.full(2, 0.5)}}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  spec = functools.partial(P.ParamSpec, (2, 2), jnp.float32, ('a', 'b'), P.ones)
  specs = {'embed': spec('table'), 'layers': {'wq': spec('projection'), 'attn_norm': spec('gain')}}
  optimizer = optim.make_optimizer(config, 10, specs)
  state = optimizer.init(params)
  expected = jax.tree.map(np.asarray, params)
  first = jax.tree.map(np.zeros_like, expected)
  second = jax.tree.map(np.zeros_like, expected)
  rng = np.random.default_rng(0)
  for step in range(1, 4):
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)

    norm = np.sqrt(sum(float((g ** 2).sum()) for g in jax.tree.leaves(grads)))
    scale = min(1.0, 1.0 / norm)
    clipped = jax.tree.map(lambda g, scale=scale: np.asarray(g) * scale, grads)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, clipped)
    second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, clipped)
    decayed = {'embed': 0.0, 'layers': {'wq': 0.1, 'attn_norm': 0.0}}
    expected = jax.tree.map(
        lambda p, m, v, d, step=step: p - 0.01 * (
            m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8) + d * p),
        expected, first, second, decayed)
  for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


@pytest.mark.parametrize('tied_head, sub_norm', [(False, True), (True, False)])
def test_weight_decay_acts_on_projections_and_head_alone(tied_head, sub_norm):
  """Neither the embeddings, whose head may be tied to them, nor the gains of norms decay."""
  specs = transformer.build(cfg.Model(
      num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=11,
      tied_head=tied_head, sub_norm=sub_norm)).specs
  params = jax.tree.map(jnp.ones_like, P.init(specs, jax.random.key(0)))
  config = cfg.AdamW(cfg.ConstantRate(0.5), weight_decay=0.1)
  optimizer = optim.make_optimizer(config, 10, specs)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params),
                                params)
  decayed = set()
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    np.testing.assert_allclose(update, -0.05 if (update != 0).any() else 0.0)
    if (update != 0).any():
      decayed.add(path[-1].key)
  names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  assert decayed == {name for name in names if name.startswith('w') or name == 'head'}
  assert len(decayed) >= 6 and 'embed' not in decayed and ('head' in decayed) != tied_head
