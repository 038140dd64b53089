"""A judge as reward in whole runs: a real one, killed and resumed, and one that is deceived."""

import contextlib
import dataclasses
import json

import pytest

from jaxrl_pt import gin_bindings, metrics
from jaxrl_pt.environments import judge_engines, judge_reward
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import open as jobs
from tests import xla_flags
from tests.e2e.conftest import PRETRAIN, RL, WORDS
from tests.environments.test_judge_reward import Planted

pytestmark = pytest.mark.slow
JUDGE = PRETRAIN.replace('@cfg.NextToken()', "@cfg.SFT()\ncfg.SFT.start_from = ''").replace(
    'cfg.Data.source = @cfg.TextFiles()', """
cfg.Data.long_documents = 'cut'
cfg.Data.source = @cfg.Demonstrations()
cfg.Demonstrations.source = @cfg.JudgePairs()
cfg.JudgePairs.source = @cfg.ResultPreferences()
cfg.JudgePairs.is_worked = False
cfg.JudgePairs.prompt = @cfg.JudgePrompt()
cfg.JudgePrompt.system = ''
cfg.JudgePrompt.template = '{{query}}\\nA {{first}}\\nB {{second}}\\n?'
cfg.JudgePrompt.verdict = @cfg.MarkedVerdict()
cfg.ResultPreferences.source = @cfg.RedundantChecks()
cfg.RedundantChecks.size = 500
""").replace("cfg.TextFiles.glob = '{corpus}/*.txt'\n", '')
JUDGED = RL.replace('cfg.RL.verifier = @cfg.LengthVerifier()', """
cfg.RL.verifier = @cfg.JudgeReward()
cfg.JudgeReward.judge_from = '{judge}'
cfg.JudgeReward.model = @cfg.Model()
cfg.JudgeReward.truth = @cfg.PythonVerifier()
cfg.JudgeReward.prompt_len = 64
cfg.JudgeReward.response_tokens = 3
cfg.JudgeReward.slots = 8
cfg.PythonVerifier.target = 'tests.e2e.slow_verifier:has_two_words'
""").replace('cfg.LengthVerifier.min_chars = 2\ncfg.LengthVerifier.max_chars = 9\n', '').replace(
    '@cfg.Arithmetic()', '@cfg.JsonlProblems()').replace('cfg.Arithmetic.size = 200',
                                                         "cfg.JsonlProblems.glob = '{problems}'")


@pytest.fixture(scope='module')
def problems(tmp_path_factory):
  asked = [f'{a[:6]} {b[:4]} {c[:2]}' for a in WORDS[:8] for b in WORDS[:8] for c in WORDS[:3]]
  path = tmp_path_factory.mktemp('problems') / 'problems.jsonl'
  path.write_text(''.join(json.dumps({'question': one, 'answer': '-'}) + '\n'
                          for one in dict.fromkeys(asked)))
  return str(path)


@pytest.fixture(scope='module')
def make_judged(make_job, pretrained, problems):
  judge = make_job(JUDGE)
  done = judge.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return lambda **fields: make_job(JUDGED, start_from=str(pretrained.workdir),
                                   judge=str(judge.workdir), problems=problems, **fields)


def deterministic(job):
  return [metrics.deterministic(row) for row in job.rows()]


def test_a_real_judge_rewards_a_run_that_is_killed_and_goes_on(make_judged):
  whole = make_judged()
  done = whole.run()
  assert done.returncode == 0, done.stdout + done.stderr
  rows = deterministic(whole)
  assert rows[0]['validation/reward'] == 0.5  # The policy against itself.
  assert all(0 <= row['judge/no_verdict'] < 1 and row['judge/comparisons'] > 1 for row in rows[1:])
  assert all('accuracy' in row and row['accuracy/verified'] == 1 for row in rows[1:])
  killed = make_judged()
  killed.run_until(3, 15)
  assert 3 <= killed.last_step() < 8
  assert killed.run().returncode == 0 and deterministic(killed) == rows
  split = dataclasses.replace(make_judged(bindings=('cfg.Mesh.data = 2', 'cfg.Mesh.fsdp = 2')),
                              environment={**whole.environment,
                                           'XLA_FLAGS': xla_flags.with_devices(4)})
  done = split.run()
  assert done.returncode == 0, done.stdout + done.stderr
  same = deterministic(split)
  assert same[1]['judge/comparisons'] == rows[1]['judge/comparisons']
  assert same[1]['judge/no_verdict'] == pytest.approx(rows[1]['judge/no_verdict'], abs=0.1)


def test_a_run_that_deceives_its_judge_stops_and_goes_on_from_there(make_judged, monkeypatch,
                                                                    capsys):
  """The judge is planted: it prefers what has more of the letter e, of which words need spaces."""
  @contextlib.contextmanager
  def asking(self):
    yield Planted()

  monkeypatch.setattr(judge_engines.JudgeEngines, 'asking', asking)
  assert judge_reward.JudgeEngines.asking is asking

  def train(stop):
    job = make_judged(bindings=(
        'cfg.RL.eval_problems = 96', 'cfg.Problems.held_out = 0.5', 'cfg.Train.num_steps = 16',
        'cfg.Train.eval_every = 2', 'cfg.JudgeReward.guard = @cfg.JudgeGuard()',
        'cfg.JudgeGuard.window = 4', 'cfg.Checkpoint.every = 100', 'cfg.Checkpoint.keep = 9'))
    run = lambda stops: jobs.train(*_loaded(job, stops))
    if not stop:
      run(False)
      return job
    with pytest.raises(UserError, match='the policy has learned what deceives the judge. '
                       'Checkpoint written at step') as raised:
      run(True)
    at = int(str(raised.value).partition('written at step ')[2].partition(':')[0])
    assert job.last_step() == at < 16
    run(False)
    return job

  whole = train(False)
  rows = deterministic(whole)
  assert 'warning: Since step' in capsys.readouterr().err
  assert rows[-1]['validation/reward'] > 0.7
  assert rows[-1]['validation/accuracy'] < rows[0]['validation/accuracy'] - 0.1
  assert any(row.get('guard/alarm') for row in rows)
  assert deterministic(train(True)) == rows


def _loaded(job, stops):
  run, text = gin_bindings.load([str(job.gin_file)],
                                [*job.bindings, f'cfg.JudgeGuard.stop = {stops}'])
  return run, job.workdir, text
