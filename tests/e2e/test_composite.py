"""A run whose verifier is made of several is opened again by every command."""

from collections.abc import Callable
import json
import re

import pytest

from jaxrl_pt.main import main
from tests.e2e.conftest import RL, Job

BINDINGS = (
    'cfg.RL.verifier = @cfg.Composite()',
    'cfg.Composite.verifiers = [@cfg.LengthVerifier(), @cfg.MathVerifier(), '
    '@boxed/cfg.MathVerifier()]',
    'cfg.Composite.weights = [1.0, 0.5, -0.25]', 'cfg.MathVerifier.symbolic = False',
    "cfg.MathVerifier.answer = 'last_number'", "boxed/cfg.MathVerifier.answer = 'boxed'",
    'cfg.Train.num_steps = 2', 'cfg.Checkpoint.every = 1', 'cfg.Rollouts.dump_every = 1')


@pytest.mark.slow
def test_every_command_opens_it(pretrained: Job, make_job: Callable[..., Job],
                                capsys: pytest.CaptureFixture[str]):
  job = make_job(RL, bindings=BINDINGS, start_from=str(pretrained.workdir))
  done = job.run()
  assert done.returncode == 0, done.stderr
  workdir = ['--workdir', str(job.workdir)]
  for command in (['sample', '--prompt', '1', '--num_tokens', '2', '--json'], ['eval', '--json'],
                  ['replay', '--only', 'sampler', '--json'],
                  ['replay', '--only', 'learner', '--step', '1', '--json']):
    assert main([*command, *workdir]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)
  # The record of a run starts the next one, which may begin with this one's policy.
  again = Job(job.workdir / 'config.gin', job.workdir.parent / 'again', job.environment,
              (f"cfg.RL.start_from = '{job.workdir}'", 'cfg.Train.num_steps = 1'))
  done = again.run()
  assert done.returncode == 0, done.stderr
  text = (again.workdir / 'config.gin').read_text()
  assert re.search(r'@verifiers_\d/cfg\.MathVerifier\(\)', text)
