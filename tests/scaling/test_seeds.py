"""Rows that survive an interrupt, and intervals over seeds."""

import types

import pytest

from jaxrl_pt.scaling import runs, seeds


def test_interval_by_hand():
  # Mean 2, s = 1, K = 3: t(0.975, 2) = 4.302653, over √3.
  assert seeds.interval([1, 2, 3]) == {'mean': 2.0, 'half_width_95': 2.4841}
  assert seeds.interval([1, 2, 3], digits=1)['half_width_95'] == 2.5
  one = seeds.interval([7.0])
  assert one == {'mean': 7.0, 'half_width_95': None}
  assert seeds.shown(one) == '7.000' and seeds.shown(seeds.interval([1, 2, 3]), 1) == '2.0 ± 2.5'


def test_a_torn_row_costs_itself_alone(tmp_path):
  path = tmp_path / 'runs.jsonl'
  assert seeds.finished_rows(path) == []
  seeds.append_row(path, {'seed': 0})
  whole = path.read_bytes()
  seeds.append_row(path, {'seed': 1})
  torn = path.read_bytes()
  for length in range(len(whole), len(torn) - 1):
    path.write_bytes(torn[:length])
    rows = seeds.finished_rows(path)
    assert {'seed': 0} in rows and len(rows) <= 2
    seeds.append_row(path, {'seed': 2})
    assert seeds.finished_rows(path)[-1] == {'seed': 2}


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
  called = []
  def run(command, **kwargs):
    called.append(command)
    (tmp_path / 'run').mkdir(exist_ok=True)
    (tmp_path / 'run' / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    return types.SimpleNamespace(returncode=0)
  monkeypatch.setattr(runs.subprocess, 'run', run)
  rows = runs.train('gin/run/x.gin', tmp_path / 'run', ['cfg.Run.seed = 3'])
  assert rows == [{'step': 1, 'loss': 2.0}] and called[0][-2:] == ['--gin_bindings',
                                                                  'cfg.Run.seed = 3']
  runs.train('gin/run/x.gin', tmp_path / 'run')
  assert len(called) == 2  # It was interrupted: without a report it goes on.
  (tmp_path / 'run' / 'report.html').touch()
  assert runs.train('gin/run/x.gin', tmp_path / 'run') == rows and len(called) == 2


def test_a_run_that_fails_says_why(tmp_path):
  with pytest.raises(SystemExit, match=r'run ended with 2 .*run\.log.*nothing\.gin'):
    runs.train('nothing.gin', tmp_path / 'run')
