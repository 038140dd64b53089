"""The tables that say what each config type computes: they are whole, and name the right ones."""

import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import (
  advantages,
  corrections,
  hgpo,
  mode_choice,
  objectives,
  shaping,
  tables,
  token_advantages,
)
from jaxrl_pt.types import Verdict
from tests.rl.test_advantages import PLAIN

METHODS = Path(__file__).parents[2] / 'gin/method'
KINDS = {'advantage': (cfg.Advantage, tables.ADVANTAGES),
         'surrogate': (cfg.Surrogate, tables.SURROGATES),
         'aggregation': (cfg.Aggregation, tables.AGGREGATIONS),
         'correction': (cfg.Correction, tables.CORRECTIONS),
         'shaping': (cfg.Shaping, tables.SHAPINGS)}


@pytest.mark.parametrize('kind', KINDS)
def test_every_choice_of_a_kind_has_one_entry_and_no_entry_is_of_another(kind):
  union, table = KINDS[kind]
  assert set(table) == set(get_args(union))
  assert len(get_args(union)) == len(set(get_args(union)))
  for entry in table.values():
    assert entry.equation.strip() and callable(entry.compute)
    assert not entry.needs_policy or kind == 'advantage'  # The learner asks advantages alone.


def test_no_type_stands_in_two_modules_of_a_kind():
  """One of two entries would be lost where the tables are put together."""
  modules = advantages, token_advantages, hgpo, mode_choice
  assert len(tables.ADVANTAGES) == sum(len(module.TABLE) for module in modules)


def test_every_kind_of_choice_of_an_algorithm_has_a_table():
  """But KL, whose place, in the reward or in the loss, is no function of the same arguments."""
  chosen = {f.name for f in dataclasses.fields(cfg.Algorithm)
            if f.default_factory is not dataclasses.MISSING}
  assert chosen == {*KINDS, 'kl'}


def test_titles_and_gin_files_are_distinct_and_exist():
  entries = [entry for _, table in KINDS.values() for entry in table.values()]
  named = [entry for entry in entries if entry.title or entry.gin]
  assert all(entry.title and entry.gin for entry in named)
  for values in ([entry.title for entry in named], [entry.gin for entry in named]):
    assert len(values) == len(set(values)) > 10
  for entry in named:
    assert (METHODS / f'{entry.gin}.gin').is_file(), entry.gin


@pytest.mark.parametrize('kind', KINDS)
def test_the_file_of_a_choice_makes_it(kind):
  for choice, entry in KINDS[kind][1].items():
    if entry.gin:
      text = (METHODS / f'{entry.gin}.gin').read_text(encoding='utf-8')
      assert f'cfg.Algorithm.{kind} = @cfg.{choice.__name__}()' in text


# --- What is computed ---------------------------------------------------------------

N, G, S = 3, 4, 6


def scored(seed: int) -> advantages.Scored:
  """A random batch, one row of which was not verified; some tokens are not learned from."""
  random = np.random.default_rng(seed)
  there = np.arange(S) < random.integers(1, S + 1, (N, G, 1))
  valid = np.ones((N, G), np.float32)
  valid[1, 2] = 0
  mask = (there * (random.random((N, G, S)) < 0.8)).astype(np.float32) * valid[..., None]
  real = lambda *shape: random.normal(size=shape).astype(np.float32)
  return advantages.Scored(
      real(N, G), (there.sum(-1) * valid).astype(np.float32), valid, real(N, G, S), mask,
      -np.abs(real(N, G, S)), np.square(real(N, G, S)), real(N, G, S),
      random.integers(-1, 2, (N, G)))


def test_every_advantage_is_written_out():
  assert {type(config) for config in PLAIN} == set(tables.ADVANTAGES)


@pytest.mark.parametrize('config', PLAIN, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize('seed', range(3))
def test_each_advantage_is_the_function_that_it_names(config, seed):
  batch, entry = scored(seed), tables.ADVANTAGES[type(config)]
  found, returns = entry.compute(config, batch)
  want = np.asarray(PLAIN[config](batch))
  want = want if want.ndim == 3 else np.broadcast_to(want[..., None], (N, G, S))
  np.testing.assert_array_equal(found, want)
  assert np.abs(want).max() > 0.1
  targets = np.zeros((N, G, S))
  if isinstance(config, cfg.GAE):
    targets = token_advantages.generalised(
        batch.token_rewards, batch.values, batch.mask, config.gamma, config.lam)[1]
  np.testing.assert_array_equal(returns, targets)


@pytest.mark.parametrize('config', PLAIN, ids=lambda c: type(c).__name__)
def test_only_advantages_that_say_so_read_scores_of_the_policy(config):
  batch, entry = scored(0), tables.ADVANTAGES[type(config)]
  other = batch._replace(logp=batch.logp - 1, collision=0 * batch.collision,
                         values=batch.values + 1)
  one, two = (np.asarray(entry.compute(config, x)[0]) for x in (batch, other))
  assert (one != two).any() == entry.needs_policy


LOGP, OLD, ADVANTAGE = np.random.default_rng(9).normal(size=(3, N, G, S)).astype(np.float32)
MASK = scored(0).mask


@pytest.mark.parametrize('config, want', [
    (cfg.PolicyGradient(), lambda: objectives.policy_gradient(LOGP, ADVANTAGE)),
    (cfg.PPOClip(0.1, 0.3), lambda: objectives.ppo_clip(LOGP, OLD, ADVANTAGE, low=0.1, high=0.3)),
    (cfg.DualClip(0.1, 0.3, 1.5), lambda: objectives.dual_clip(
        LOGP, OLD, ADVANTAGE, low=0.1, high=0.3, bound=1.5)),
    (cfg.GSPO(0.1, 0.3), lambda: objectives.gspo(
        LOGP, OLD, ADVANTAGE, MASK, low=0.1, high=0.3)),
    (cfg.CISPO(0.4, 0.3), lambda: objectives.cispo(LOGP, OLD, ADVANTAGE, low=0.4, high=0.3))],
                         ids=lambda c: type(c).__name__)
def test_each_surrogate_is_the_function_that_it_names(config, want):
  found = tables.SURROGATES[type(config)].compute(config, LOGP, OLD, ADVANTAGE, MASK)
  for got, expected in zip(found, want(), strict=True):
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('config, want', [
    (cfg.NoCorrection(), lambda: MASK),
    (cfg.TokenTIS(1.5), lambda: corrections.token_truncated(LOGP, OLD, MASK, 1.5)),
    (cfg.SequenceTIS(1.5), lambda: corrections.sequence_truncated(LOGP, OLD, MASK, 1.5)),
    (cfg.Rejection(0.7, 1.5), lambda: corrections.rejected(LOGP, OLD, MASK, 0.7, 1.5))],
                         ids=lambda c: type(c).__name__)
def test_each_correction_is_the_function_that_it_names(config, want):
  found = tables.CORRECTIONS[type(config)].compute(config, LOGP, OLD, MASK)
  np.testing.assert_array_equal(found, want())


@pytest.mark.parametrize('config, want', [
    (cfg.TokenMean(), objectives.token_mean),
    (cfg.SequenceMeanTokenSum(), objectives.sequence_mean_token_sum),
    (cfg.SequenceMeanTokenMean(), objectives.sequence_mean_token_mean),
    (cfg.ConstantDivisor(7), objectives.token_sum_over(N * G * 7)),
    (cfg.DecoupledModes(0.3), objectives.decoupled_modes(0.3))],
                         ids=lambda c: type(c).__name__)
def test_each_aggregation_is_the_function_that_it_names(config, want):
  found = tables.AGGREGATIONS[type(config)].compute(config, N * G)
  np.testing.assert_array_equal(found(LOGP, MASK), want(LOGP, MASK))


@pytest.mark.parametrize('config', [
    cfg.NoShaping(), cfg.Overlong(6, 4), cfg.Kimi(0.5), cfg.ShortRL(1, 0.1, 0.5, 2.0)],
                         ids=lambda c: type(c).__name__)
def test_each_shaping_is_the_function_that_it_names(config):
  batch = scored(0)
  correct = (batch.reward > 0).astype(np.float32)
  verdict = Verdict(batch.reward, batch.valid, correct)
  gate = np.float32(0.3)
  bonus, after, metrics = tables.SHAPINGS[type(config)].compute(
      config, verdict, batch.lengths, gate)
  match config:
    case cfg.NoShaping():
      assert bonus is None and after == gate and not metrics
      return
    case cfg.Overlong():
      want = shaping.overlong(batch.lengths, 6, 4)
    case cfg.Kimi():
      want = 0.5 * shaping.kimi(batch.lengths, correct, batch.valid)
    case cfg.ShortRL():
      bonus_of, is_open, kept = shaping.short_rl(
          gate, batch.lengths, correct, batch.valid, slack_tokens=1, slack_accuracy=0.1, ema=0.5)
      want, gate = 2.0 * bonus_of, kept
      assert metrics['gate_open'].mean() == is_open and metrics['gate_accuracy'].mean() == kept
  np.testing.assert_array_equal(bonus, want)
  assert after == gate
  paid = np.asarray(want * batch.valid).sum()
  assert metrics['length_reward'].sum == pytest.approx(paid, abs=1e-5)
