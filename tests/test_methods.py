"""`jaxrl-pt methods`: every method file is listed, and what is listed exists and loads."""

from pathlib import Path

import pytest

from jaxrl_pt import gin_bindings, main, methods

ROOT = Path(__file__).resolve().parents[1]
# Not methods of reinforcement learning.
OTHERS = {'bitnet', 'bitnet_v2', 'dpo', 'ipo', 'reward_model', 'sft', 'two_stage'}
METHODS = methods.methods()


def test_every_method_file_has_a_row():
  files = {p.stem for p in (ROOT / 'gin/method').glob('*.gin')} - OTHERS
  assert {m.gin for m in METHODS} == files


def test_every_tiny_run_of_reinforcement_learning_has_a_row():
  runs = {p.stem.removesuffix('_tiny') for p in (ROOT / 'gin/run').glob('*_tiny.gin')
          if gin_bindings.load([str(p)], ())[0].objective.rollouts is not None}
  assert {m.run for m in METHODS} == runs


@pytest.mark.parametrize('method', METHODS, ids=lambda m: m.name)
def test_files_exist_and_runs_start_from_a_shipped_run(method):
  assert (ROOT / 'gin/method' / f'{method.gin}.gin').is_file()
  if method.experiment:
    assert (ROOT / 'experiments' / method.experiment / 'README.md').is_file()
  run = ROOT / 'gin/run' / f'{method.run}_tiny.gin'
  assert f'gin/method/{method.gin}.gin' in run.read_text()
  objective = gin_bindings.load([str(run)], ())[0].objective
  assert objective.rollouts is not None
  start = Path(objective.start_from)
  assert start.parent == Path('runs') and (ROOT / 'gin/run' / f'{start.name}.gin').is_file()


def test_the_command_prints_the_table(capsys):
  assert main.main(['methods']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('method') and len(lines) == 1 + len(METHODS)
