"""What the quickstart says of its own numbers."""

from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from jaxrl_pt import main as cli
from jaxrl_pt import quickstart


def rows_with(sampled: tuple[float, ...], argmax: tuple[float, ...]) -> list[dict]:
  """Metrics rows in which the accuracies rise by so many points from 10 %."""
  def row(step: int, scale: float) -> dict:
    values = {f'validation/{split}_count': 1000.0 for split in quickstart.DIFFICULTIES}
    for decoding, changes in (('sampled', sampled), ('argmax', argmax)):
      for split, change in zip(quickstart.DIFFICULTIES, changes, strict=True):
        values[f'validation/{split}_{decoding}'] = 0.1 + scale * change / 100
    return {'step': step, **values}
  return [row(0, 0.0), {'step': 1, 'loss': 1.0}, row(2, 1.0)]


@pytest.mark.parametrize('sampled, argmax, expected', [
    ((4, 3, 2), (-1.5, -1.4, -0.8),
     'Sampled predictions became better on every split while the argmax became worse by 0.8 to '
     '1.5 points on every split: this is sharper sampling, not look-ahead.'),
    ((4, 3, 2), (-0.3, 0, 2),
     'Sampled predictions became better on every split while the argmax became worse by 0.3 '
     'points on easy and became better by 2.0 points on hard: this is sharper sampling, not '
     'look-ahead.'),
    ((4, 3, 2), (0.01, 0, -0.01),
     'Sampled predictions became better on every split while the argmax did not change: this is '
     'sharper sampling, not look-ahead.'),
    ((4, 3, 2), (1.2, 1.0, 3),
     'Sampled predictions became better on every split while the argmax became better by 1.0 to '
     '3.0 points on every split, which sharper sampling does not explain.'),
    ((4, 0, 2), (1, 1, -2),
     'RPT did not raise the sampled accuracy of every split in this run, and the argmax became '
     'worse by 2.0 points on hard and became better by 1.0 points on easy and medium: train it '
     'longer (cfg.Train.num_steps).'),
])
def test_summary_says_plainly_what_the_argmax_did(sampled, argmax, expected):
  # 1e-9: a change of exactly one point must not depend on rounding of 0.1 + 0.01.
  argmax = tuple(change + 1e-9 for change in argmax)
  assert quickstart.accuracy_table(rows_with(sampled, argmax))[1] == expected


def test_table_has_both_decodings_of_every_split():
  table, _ = quickstart.accuracy_table(rows_with((1, 2, 3), (0, -1, 1)))
  assert len(table) == 1 + 2 * len(quickstart.DIFFICULTIES)
  assert table[4] == ['medium', 'argmax', '10.0 %', '9.0 %', '-1.0', '1000']


def test_a_mistake_that_a_child_finds_is_said_once(tmp_path: Path, capfd):
  (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
  with pytest.raises(SystemExit) as ended:
    cli.main(['quickstart', '--data', str(tmp_path / '*.txt'), '--workdir', str(tmp_path / 'w')])
  assert ended.value.code == 2
  complaints = capfd.readouterr().err.splitlines()
  assert len(complaints) == 1 and 'latin.txt is not UTF-8' in complaints[0]


def _children(pid: int) -> list[int]:
  listed = Path(f'/proc/{pid}/task/{pid}/children')
  return [int(child) for child in listed.read_text().split()] if listed.is_file() else []


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_tour_that_is_ended_takes_its_training_along(number, tmp_path):
  process = subprocess.Popen(
      [sys.executable, '-m', 'jaxrl_pt.main', 'quickstart', '--workdir', str(tmp_path / 'tour')],
      cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
  try:
    deadline = time.monotonic() + 200
    while not (children := _children(process.pid)):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=100) == 128 + number
    assert not [pid for pid in children if Path(f'/proc/{pid}').exists()]
  finally:
    process.kill()
    process.wait()
