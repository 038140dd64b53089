"""Hybrid Accuracy: equations against loops, results of made-up and of random policies."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings, metrics
from jaxrl_pt import main as cli
from jaxrl_pt import params as P
from jaxrl_pt.data import problems
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import hybrid, hybrid_report
from jaxrl_pt.evaluation import hybrid_accuracy as equations
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.types import NO_MODE, NO_THINK, THINK
from tests.environments.test_problems import make_session

FIRST = ['cfg.HybridAccuracy.run = @cfg.Run()']
FILES = ['gin/run/hgpo_tiny.gin', 'gin/eval/hybrid.gin']
SETTINGS = gin_bindings.load_value(cfg.HybridAccuracy, FILES, ['cfg.HybridAccuracy.samples = 4'],
                                   FIRST)


# --- Equations ------------------------------------------------------------------------


def slow_better(score, length, valid, margin):
  """m_gt of one prompt, by the words of its definition."""
  means = []
  for mode in (THINK, NO_THINK):
    counted = [(s, n) for s, n, v in zip(score[mode], length[mode], valid[mode]) if v]
    if not counted:
      return NO_MODE
    means.append((sum(s for s, _ in counted) / len(counted),
                  sum(n for _, n in counted) / len(counted)))
  (thinks, long), (at_once, short) = means
  if abs(thinks - at_once) <= margin + 1e-9:
    return THINK if long < short else NO_THINK
  return THINK if thinks > at_once else NO_THINK


@pytest.mark.parametrize('margin', [0.0, 0.25, 0.3])
def test_the_better_mode_and_the_share_that_chooses_it(margin: float):
  rng = np.random.default_rng(0)
  score = rng.integers(0, 2, (400, 2, 4)).astype(np.float32)
  length = rng.integers(1, 3, score.shape).astype(np.float32)
  valid = (rng.random(score.shape) < 0.7).astype(np.float32)
  better = equations.better_mode(score, length, valid, margin)
  assert better.tolist() == [slow_better(*row, margin) for row in zip(score, length, valid)]
  assert {THINK, NO_THINK, NO_MODE} == set(better.tolist())
  chosen = rng.integers(-1, 2, (400, 5))
  shares = equations.choice_is_better(chosen, better)
  rows = [np.mean([c == b for c in row]) for row, b in zip(chosen, better) if b != NO_MODE]
  assert equations.mean(shares) == pytest.approx(np.mean(rows))
  assert np.isnan(shares[better == NO_MODE]).all()


def test_ties_go_to_the_shorter_mode_and_else_to_an_answer_at_once():
  ones = np.ones((1, 2, 2))
  short = np.array([[[2.0, 2.0], [3.0, 3.0]]])
  better = lambda score, length, margin: equations.better_mode(score, length, ones, margin)[0]
  assert better(ones, short, 0.0) == THINK and better(ones, ones, 0.0) == NO_THINK
  ahead = np.array([[[1.0, 1.0], [1.0, 0.5]]])  # thinking, by 0.25
  assert better(ahead, short[:, ::-1], 0.25) == NO_THINK
  assert better(ahead, short[:, ::-1], 0.2) == THINK


def test_a_response_without_a_mode_chooses_wrongly():
  chosen = np.array([[NO_MODE, THINK], [NO_MODE, NO_MODE]])
  better = np.array([THINK, NO_MODE])
  np.testing.assert_array_equal(equations.choice_is_better(chosen, better), [0.5, np.nan])


def test_the_best_pair_of_budgets_at_equal_tokens():
  tokens, accuracy = np.array([10.0, 20.0, 30.0, 40.0]), np.array([0.2, 0.1, 0.6, 0.5])
  at = lambda wanted: float(equations.at_tokens(tokens, accuracy, np.array(wanted)))
  assert np.isnan(at(9.9)) and at(10.0) == 0.2
  assert at(20.0) == pytest.approx(0.4)  # Half of 10 and half of 30, over the point at 20.
  assert at(30.0) == pytest.approx(0.6) == at(99.0)  # More tokens need not be taken.
  rng = np.random.default_rng(1)
  tokens, accuracy = rng.random((6, 5)), rng.random((6, 5))
  wanted = tokens.min(-1) + rng.random(6) * 0.5
  shares = np.linspace(0, 1, 2001)
  for row, best in enumerate(equations.at_tokens(tokens, accuracy, wanted)):
    t, a = tokens[row], accuracy[row]
    mixed = max((a[i] + (a[j] - a[i]) * shares)[t[i] + (t[j] - t[i]) * shares <= wanted[row]].max(
        initial=-1) for i in range(5) for j in range(5))
    assert best == pytest.approx(mixed, abs=2e-3)


def test_a_coin_between_both_modes():
  tokens, accuracy = np.array([30.0, 10.0]), np.array([0.9, 0.5])
  at = lambda wanted: float(equations.mixture_at_tokens(tokens, accuracy, np.array(wanted)))
  assert [at(x) for x in (5, 10, 20, 30, 40)] == pytest.approx([0.5, 0.5, 0.7, 0.9, 0.9])
  equal = np.array([10.0, 10.0])
  assert equations.mixture_at_tokens(equal, accuracy, np.array(10.0)) == pytest.approx(0.7)


def test_intervals_hold_the_truth_as_often_as_they_say():
  rng, held = np.random.default_rng(2), 0
  for seed in range(200):
    values = (rng.random(60) < 0.3).astype(float)
    low, high = metrics.interval(equations.mean, (values,), 300, seed)
    held += low <= 0.3 <= high
  assert 0.88 < held / 200 < 0.99
  missing = np.full(5, np.nan)
  assert np.isnan(metrics.interval(equations.mean, (missing,), 100, 0)).all()


def test_difficulty_is_the_level_or_a_third_by_the_score_without_thinking():
  score = np.array([0.0, 0.0, 0.5, 0.6, 0.9, 1.0])
  assert equations.difficulties(['b', 'a'], score[:2]).tolist() == ['b', 'a']
  thirds = equations.difficulties([''] * 6, score).tolist()
  assert thirds == ['hardest third'] * 2 + ['middle third'] * 2 + ['easiest third'] * 2
  equal = equations.difficulties([''] * 4, np.array([0.0, 0.0, 0.0, 1.0])).tolist()
  assert equal == ['hardest third'] * 3 + ['easiest third']


# --- Results --------------------------------------------------------------------------


def drawn(correct: list[list[float]], tokens: float, mode: int) -> hybrid.Drawn:
  correct = np.array(correct, np.float32)
  ones = np.ones_like(correct)
  return hybrid.Drawn(correct, correct, ones, tokens * ones, np.full(correct.shape, mode))


def made_up() -> dict[str, hybrid.Drawn]:
  """Two easy prompts that both modes answer, and two hard ones that need thinking."""
  found = {asked.name: drawn([[1] * 4] * 4, 20, THINK) for asked in hybrid.kinds(SETTINGS, (1, 3))}
  for name in found:
    if name.startswith('budget'):
      found[name] = drawn([[0] * 4] * 4, 5 + int(name.split()[1]) / 2, THINK)
  found['no_think'] = drawn([[1] * 4] * 2 + [[0] * 4] * 2, 4, NO_THINK)
  at_once, thinks = (drawn([[1] * 4] * 2, n, m) for n, m in ((4, NO_THINK), (20, THINK)))
  for name, count in (('free', 4), ('greedy', 1)):
    found[name] = hybrid.Drawn(*(np.concatenate([getattr(half, f.name)[:, :count] for half in (
        at_once, thinks)]) for f in dataclasses.fields(hybrid.Drawn)))
  return found


def test_what_is_said_of_a_policy_that_always_chooses_well(tmp_path: Path):
  found = hybrid.summary(made_up(), ['easy', 'easy', 'hard', 'hard'], SETTINGS)
  assert found['h_acc']['greedy'] == found['h_acc']['drawn'] == {'value': 1, 'interval': [1, 1]}
  assert found['h_acc']['think_is_better'] == 0.5
  easy, hard = found['by_difficulty']['easy'], found['by_difficulty']['hard']
  assert [easy['think_drawn']['value'], hard['think_drawn']['value']] == [0, 1]
  assert hard['accuracy'] == {'free': 1, 'greedy': 1, 'think': 1, 'no_think': 0}
  assert easy['tokens'] == {'free': 4, 'greedy': 4, 'think': 20, 'no_think': 4}
  equal = {name: x['value'] for name, x in found['at_equal_tokens'].items()}
  assert equal['tokens'] == 12 and equal['free'] == 1
  assert equal['mixture'] == pytest.approx(0.75) and equal['never_think'] == 0.5
  assert equal['always_think'] == pytest.approx((12 - 5) / (20 - 5), abs=1e-5)
  assert equal['free_minus_always_think'] == pytest.approx(1 - 7 / 15, abs=1e-5)
  whole = {'step': 3, 'problems': 4, **found}
  shown = hybrid_report.text(whole)
  assert 'Hybrid Accuracy  100.0 % [100.0 %, 100.0 %] greedily' in shown and 'easy' in shown
  picture = hybrid_report.write(tmp_path / 'new' / 'found.json', 'jaxrl-pt eval', whole)
  assert picture.read_bytes().startswith(b'\x89PNG')
  assert json.loads((tmp_path / 'new' / 'found.json').read_text())['h_acc'] == found['h_acc']


def test_a_policy_that_is_cheaper_than_every_budget():
  made = made_up()
  made['free'] = made['no_think']
  found = hybrid.summary(made, ['easy'] * 4, SETTINGS)['at_equal_tokens']
  assert found['always_think']['value'] is None and found['always_think']['interval'][0] is None
  assert found['free_minus_always_think']['value'] is None
  assert 'takes more tokens at every budget' in hybrid_report.text({
      'problems': 4, **hybrid.summary(made, ['easy'] * 4, SETTINGS)})


# --- From gin files to a policy -------------------------------------------------------


def test_the_shipped_file_measures_as_the_paper_does():
  assert SETTINGS.sampler == cfg.Sampler(0.6, top_p=0.95)
  assert SETTINGS.modes == cfg.HybridModes('\x01', '\x03', think_end='\x02')
  assert [a.name for a in hybrid.kinds(SETTINGS, (1, 3))] == [
      'think', 'free', 'greedy', *(f'budget {b}' for b in (18, 12, 9, 6, 3, 0)), 'no_think']


def test_a_typo_in_the_file_and_a_run_without_problems_are_told(tmp_path: Path, capfd):
  with pytest.raises(UserError, match='Nothing reads cfg.GAE.lam'):
    gin_bindings.load_value(cfg.HybridAccuracy, FILES, ['cfg.GAE.lam = 0.5'], FIRST)
  run, text = gin_bindings.load(['gin/run/hft_tiny.gin'], ())
  (tmp_path / 'config.gin').write_text(text, encoding='utf-8')
  arguments = ['eval', '--workdir', str(tmp_path), '--gin_file', 'gin/eval/hybrid.gin']
  assert cli.main(arguments) == 2
  assert 'give the file of a run of @cfg.RL() too' in capfd.readouterr().err
  assert cli.main(['eval', '--workdir', str(tmp_path), '--output', 'x.json']) == 2
  assert '--output does nothing without --tasks or the settings' in capfd.readouterr().err


@pytest.mark.slow
def test_a_random_policy():
  """Lengths, modes and scores are those of the responses, whatever the kind."""
  method = dataclasses.replace(
      SETTINGS.method, problems=cfg.Problems(cfg.HybridSums(60), held_out=0.2),
      rollouts=dataclasses.replace(SETTINGS.method.rollouts, num_prompts=4, response_tokens=12))
  settings = dataclasses.replace(
      SETTINGS, run=dataclasses.replace(SETTINGS.run, objective=method), samples=2, free_samples=3,
      num_problems=6, slots=8, sampler=cfg.Sampler(), budgets=(0.0, 0.25))
  session = make_session(method)
  model = session.model(session.run.model)
  policy = Policy(session, model, P.init(model.specs, jax.random.key(0)), 7)
  lines: list[str] = []
  found = hybrid.measure(policy, settings, lines.append)
  assert [line.split(':')[0] for line in lines] == [
      'think', 'free', 'greedy', 'budget 3', 'budget 0', 'no_think']
  _, held_out = problems.load(method.problems)
  assert found['problems'] == min(6, len(held_out)) and found['step'] == 7
  rows = found['by_difficulty']
  assert set(rows) == {p.level for p in held_out[:6]} | {'all'}
  assert 1 < rows['all']['tokens']['think'] <= 12
  assert [point['budget'] for point in found['curve']] == [0, 3, None]
  assert hybrid.measure(policy, settings, lines.append) == found
