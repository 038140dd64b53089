"""Stages dispatched one by one: sampling again, and the same rewards as the one program."""

import dataclasses
import functools
from pathlib import Path
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.base import Task
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.rollouts import stages
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import optim, update
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier

N, G, S = 4, 4, 2
MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=11)


def make_session(rollouts: cfg.Rollouts) -> sessions.Session:
  objective = cfg.RL('unused', cfg.Problems(cfg.Arithmetic(9)), cfg.AnswerMatch(),
                     rollouts=rollouts, algorithm=cfg.Algorithm(advantage=cfg.DrGRPO()))
  run = cfg.Run(
      seed=1, model=MODEL, objective=objective,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)), train=cfg.Train(9))
  data = types.SimpleNamespace(tokenizer=types.SimpleNamespace(eos_id=0, stop_ids=(0,)))
  return sessions.Session(run, Path('unused'), '', make_mesh(cfg.Mesh()), data)


def take(batch: int) -> tuple[Prompts, list[str]]:
  """Prompts of one token; prompt n of batch b has the id 10 b + n."""
  ids = 10 * batch + np.arange(N, dtype=np.int32)
  rows = np.ones((N, 1), np.int32)
  return Prompts(rows, rows[:, 0], ids), [str(i) for i in ids]


def even_prompts_teach(prompts, rollouts) -> Verdict:
  """Of an even prompt the first sample is right, of an odd one all are wrong."""
  right = (prompts.ids[:, None] % 2 == 0) & (jnp.arange(G) == 0)
  correct = jnp.broadcast_to(right, rollouts.tokens.shape[:2]).astype(jnp.float32)
  return Verdict(correct, jnp.ones_like(correct), correct)


@functools.cache
def make(selection, verify=even_prompts_teach):
  rollouts = cfg.Rollouts(N, G, 1, S, selection=selection)
  session = make_session(rollouts)
  method = session.run.objective
  model = session.model(MODEL)
  optimizer = optim.make_optimizer(session.run.optimizer, 9, model.specs)
  state = states.init_state(model, optimizer, session.mesh, 0)
  state = state.replace(method=states.new_method(rollouts, method.algorithm, MODEL.d_model))
  environment = Task(take, DeviceVerifier(verify), lambda params: {}, '')
  return stages.Stages(session, environment, state.params, optimizer, method), state


def test_draws_again_until_every_group_teaches():
  several, state = make(cfg.DynamicSampling(max_rounds=3))
  (prompts, references, drawn, verdict), taken = several.collect(state.params, 5, 0)
  # Batches 5 and 6 have two even prompts each.
  assert taken == 2
  assert np.asarray(prompts.ids).tolist() == [50, 52, 60, 62]
  assert references == ('50', '52', '60', '62')
  assert np.asarray(verdict.correct.sum(-1)).tolist() == [1, 1, 1, 1]
  alone = several.draw(state.params, several.take(6)[0], 6, 0)
  np.testing.assert_array_equal(drawn.tokens[2:], alone.tokens[::2])


def test_after_the_last_round_uninformative_groups_fill_up():
  once, state = make(cfg.DynamicSampling(max_rounds=1))
  (prompts, references, _, verdict), taken = once.collect(state.params, 5, 0)
  assert taken == 1
  assert np.asarray(prompts.ids).tolist() == [50, 52, 51, 53]
  assert references == ('50', '52', '51', '53')
  assert np.asarray(verdict.correct.sum(-1)).tolist() == [1, 1, 0, 0]


def short_is_right(prompts, rollouts) -> Verdict:
  correct = (rollouts.tokens[..., 0] % 2 == 0).astype(jnp.float32)
  return Verdict(correct, jnp.ones_like(correct), correct)


def test_one_program_draws_verifies_and_learns_as_the_stages_do():
  several, state = make(cfg.AllGroups(), short_is_right)
  copy = lambda: jax.tree.map(jnp.copy, state)  # Both donate.
  assert several.fused
  fused, in_one = several.step(copy(), 0, measure=True)
  prompts, references = several.take(0)
  drawn = several.draw(state.params, prompts, 0, 0)
  verdict = several.settle(several.submit(prompts, drawn, references))
  staged, apart = several.learn(copy(), prompts, references, drawn, verdict, measure=True)
  np.testing.assert_array_equal(in_one.rollouts.tokens, drawn.tokens)
  np.testing.assert_array_equal(in_one.verdict.reward, verdict.reward)
  assert 0 < float(verdict.reward.mean()) < 1
  assert in_one.metrics.keys() == apart.metrics.keys()
  for name, value in in_one.metrics.items():
    np.testing.assert_allclose(value.mean(), apart.metrics[name].mean(), rtol=1e-4, atol=1e-6)
  for a, b in zip(jax.tree.leaves(fused.params), jax.tree.leaves(staged.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert float(in_one.metrics['kl'].mean()) < 1e-6  # It still is the start policy.


# --- The reference policy -----------------------------------------------------------

SAMPLER = cfg.Sampler(0.7)


def make_apart(kl: cfg.KL):
  """Stages, state, reference policy and run where policy and reference are far from equal."""
  rollouts = cfg.Rollouts(N, G, 1, S, sampler=SAMPLER)
  session = make_session(rollouts)
  method = dataclasses.replace(session.run.objective,
                               algorithm=cfg.Algorithm(advantage=cfg.DrGRPO(), kl=kl))
  session = dataclasses.replace(session, run=dataclasses.replace(session.run, objective=method))
  model = session.model(MODEL)
  optimizer = optim.make_optimizer(session.run.optimizer, 9, model.specs)
  state, other = (states.init_state(model, optimizer, session.mesh, seed) for seed in (0, 1))
  state = state.replace(method=states.new_method(rollouts, method.algorithm, MODEL.d_model))
  reference = {**other.params, 'embed': 30 * other.params['embed']}
  environment = Task(take, DeviceVerifier(short_is_right), lambda params: {}, '')
  found = stages.Stages(session, environment, reference, optimizer, method)
  return found, state, reference, session, optimizer


def plain_logp(model, params, prompts, tokens):
  """f32[N, G, S] by whole sequences, under the distribution that was drawn from."""
  first = np.broadcast_to(np.asarray(prompts.tokens)[:, None], (N, G, 1))
  rows = np.concatenate([first, np.asarray(tokens)], -1).reshape(N * G, 1 + S)
  positions = np.broadcast_to(np.arange(1 + S), rows.shape)
  hidden = model.apply(params, rows, positions, np.ones_like(rows))[:, :-1]
  logp = jax.nn.log_softmax((hidden @ model.head(params)) / SAMPLER.temperature)
  return jnp.take_along_axis(logp, rows[:, 1:, None], -1)[..., 0].reshape(N, G, S)


@pytest.mark.parametrize('kl', [cfg.KLInLoss(0.5, 'k3'),
                                pytest.param(cfg.KLInReward(0.5, 'k1'), marks=pytest.mark.slow)],
                         ids=lambda kl: type(kl).__name__)
def test_the_reference_of_a_step_is_the_start_policy_as_it_was_sampled(kl):
  """In the stages and in the one program, on logged steps and on others, against a learner that
  is given the log-probabilities by their definition."""
  several, state, reference, session, optimizer = make_apart(kl)
  copy = lambda: jax.tree.map(jnp.copy, state)  # The steps donate.
  prompts, references = several.take(0)
  drawn = several.draw(state.params, prompts, 0, 0)
  verdict = several.settle(several.submit(prompts, drawn, references))
  method, model = session.run.objective, session.model(MODEL)
  logp = plain_logp(model, reference, prompts, drawn.tokens)
  learn = update.make_learner(model, optimizer, session.run, method.rollouts, method.algorithm)
  want, _ = jax.jit(learn)(copy(), prompts, drawn, verdict, logp)
  u, mask = np.asarray(logp - drawn.logp), np.asarray(drawn.sampled)
  distance = ((np.exp(u) - 1 - u) * mask).sum() / mask.sum()
  swapped = ((np.exp(-u) - 1 + u) * mask).sum() / mask.sum()
  assert distance > 0.1 and abs(swapped - distance) > 0.1 * distance
  for measure in (False, True):
    staged, apart = several.learn(copy(), prompts, references, drawn, verdict, measure)
    fused, in_one = several.step(copy(), 0, measure)
    np.testing.assert_array_equal(in_one.rollouts.tokens, drawn.tokens)
    np.testing.assert_allclose(apart.metrics['kl'].mean(), distance, rtol=1e-4)
    assert ('kl' in in_one.metrics) == measure
    if measure:
      np.testing.assert_allclose(in_one.metrics['kl'].mean(), distance, rtol=1e-4)
    for got in (staged, fused):
      for a, b in zip(jax.tree.leaves(got.opt_state[1].mu), jax.tree.leaves(want.opt_state[1].mu),
                      strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
  assert np.abs(want.opt_state[1].mu['embed']).max() > 0
