"""What is learned from the token of a mode: the learner against a plain loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import tables
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.sampling.groups import make_sampler
from jaxrl_pt.train import rollout_metrics
from jaxrl_pt.types import THINK, RolloutBatch, Verdict
from tests.train.test_update import MODEL, PARAMS, PROMPTS, G, N, S, Verified, learn, make_run

IDS, MODES = (1, 2), cfg.HybridModes()
CORRECT = jnp.asarray(np.random.default_rng(3).integers(0, 2, (N, G)), jnp.float32)


@functools.cache
def drawn(forced: bool) -> RolloutBatch:
  run = make_run(cfg.Algorithm(), modes=cfg.HybridModes(forced=forced))
  sample = make_sampler(MODEL, 1, run.objective.rollouts, stop_ids=(0,), mode_ids=IDS)
  return jax.jit(sample)(PARAMS, PROMPTS, jnp.int32(0), jnp.int32(0))


def verified(forced: bool) -> Verified:
  valid = jnp.ones((N, G)).at[1, 2].set(0)
  return Verified(PROMPTS, drawn(forced), Verdict(CORRECT, valid, CORRECT), jnp.zeros((N, G, S)))


def plain_logp(params, rollouts: RolloutBatch):
  """f32[N, G, S] by a whole forward pass over each prompt and response."""
  def one(tokens_T, length, response_S):
    both = jnp.zeros(len(tokens_T) + S, jnp.int32)
    both = both.at[:len(tokens_T)].set(tokens_T)
    both = jax.lax.dynamic_update_slice(both, response_S, (length,))
    hidden = MODEL.apply(params, both[None], jnp.arange(len(both))[None],
                         jnp.ones((1, len(both)), jnp.int32))
    logp = jax.nn.log_softmax(hidden[0] @ MODEL.head(params))
    at = length - 1 + jnp.arange(S)
    return logp[at, response_S]

  over_group = jax.vmap(one, (None, None, 0))
  return jax.vmap(over_group)(PROMPTS.tokens, PROMPTS.lengths, rollouts.tokens)


CASES = {
    'hgpo': (cfg.HGPO(), True, True), 'adapt_think': (cfg.AdaptThink(0.3), True, True),
    'efficiency': (cfg.ModeEfficiency(), True, True), 'thinkless': (cfg.Thinkless(), False, True),
    'forced but not learned': (cfg.GRPO(), True, False)}


@pytest.mark.parametrize('name', [
    'hgpo', 'adapt_think', 'forced but not learned',
    *(pytest.param(n, marks=pytest.mark.slow) for n in ('efficiency', 'thinkless'))])
def test_the_learner_equals_a_plain_loss(name):
  advantage, forced, counts_mode = CASES[name]
  algorithm = cfg.Algorithm(advantage=advantage, surrogate=cfg.PPOClip(0.3, 0.3))
  batch, rollouts = verified(forced), drawn(forced)
  mask = rollouts.sampled if not (forced and counts_mode) else rollouts.in_response
  mask = mask * batch.verdict.valid[..., None]
  zeros = jnp.zeros_like(mask)
  a, _ = tables.ADVANTAGES[type(advantage)].compute(advantage, Scored(
      CORRECT, rollouts.lengths() * batch.verdict.valid, batch.verdict.valid, zeros, mask, zeros,
      zeros, zeros, rollouts.mode))

  def loss(params):
    logp = jnp.where(mask > 0, plain_logp(params, rollouts), 0.0)
    old = jax.lax.stop_gradient(logp)
    if isinstance(advantage, cfg.AdaptThink):
      old = old.at[..., 0].set(jnp.log(0.5))  # Modes were drawn evenly.
    ratio = jnp.exp(logp - old)
    terms = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.7, 1.3) * a)
    return (terms * mask).sum() / (mask.sum(-1) > 0).sum()

  value, gradient = jax.value_and_grad(loss)(PARAMS)
  _, metrics = learn(algorithm, batch, modes=cfg.HybridModes(forced=forced))
  assert metrics['loss'] == pytest.approx(float(value), rel=1e-4, abs=1e-5)
  assert metrics['grad_norm'] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)
  assert metrics['mismatch'] == pytest.approx(1.0, abs=1e-4)
  assert abs(float(value)) > 1e-3 or name != 'adapt_think'


def test_metrics_of_each_mode():
  rollouts, verdict = drawn(True), verified(True).verdict
  found = {k: float(v.mean()) for k, v in rollout_metrics.of(rollouts, verdict, CORRECT).items()}
  thinks, valid = np.asarray(rollouts.mode) == THINK, np.asarray(verdict.valid) > 0
  first = np.exp(np.asarray(rollouts.logp[..., 0]))
  assert found['think'] == pytest.approx(first[thinks & valid].mean(), rel=1e-5)
  for name, rows in (('think', thinks & valid), ('no_think', ~thinks & valid)):
    assert found[f'accuracy/{name}'] == pytest.approx(np.asarray(CORRECT)[rows].mean(), rel=1e-5)
    lengths = np.asarray(rollouts.lengths())[rows]
    assert found[f'response_length/{name}'] == pytest.approx(lengths.mean(), rel=1e-5)
  free = rollout_metrics.of(drawn(False), verdict, CORRECT)
  chosen = (np.asarray(drawn(False).mode) == THINK)[valid]
  assert float(free['think'].mean()) == pytest.approx(chosen.mean(), rel=1e-5)
