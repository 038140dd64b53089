"""`jaxrl-pt methods`: every method file is listed, and what is listed exists and loads."""

from pathlib import Path

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings, main, methods

ROOT = Path(__file__).resolve().parents[1]
# Not methods of reinforcement learning.
OTHERS = {'bitnet', 'bitnet_v2', 'two_stage'}


def test_every_method_file_has_a_row():
  files = {f'gin/method/{p.name}' for p in (ROOT / 'gin/method').glob('*.gin')
           if p.stem not in OTHERS}
  assert {m.gin for m in methods.METHODS} == files


def test_every_tiny_run_of_reinforcement_learning_has_a_row():
  runs = {f'gin/run/{p.name}' for p in (ROOT / 'gin/run').glob('*_tiny.gin')
          if not p.stem.startswith(('pretrain', 'warmstart'))}
  assert {m.run for m in methods.METHODS if m.run} == runs


@pytest.mark.parametrize('method', methods.METHODS, ids=lambda m: m.name)
def test_files_exist_and_runs_start_from_a_shipped_run(method):
  assert (ROOT / method.gin).is_file()
  if method.experiment:
    assert (ROOT / method.experiment / 'README.md').is_file()
  if not method.run:
    return
  assert method.gin in (ROOT / method.run).read_text()
  objective = gin_bindings.load([str(ROOT / method.run)], ())[0].objective
  assert isinstance(objective, cfg.RPT | cfg.RL)
  start = Path(objective.start_from)
  assert start.parent == Path('runs') and (ROOT / 'gin/run' / f'{start.name}.gin').is_file()


def test_the_command_prints_the_table(capsys):
  assert main.main(['methods']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('method') and len(lines) == 1 + len(methods.METHODS)
