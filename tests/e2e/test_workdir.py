"""A work directory belongs to one run, goes on as it was, and its loss is one sentence."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
import shutil
import signal
import subprocess

import pytest

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from jaxrl_pt.main import main
from jaxrl_pt.run.policy import load_policy
from tests.e2e.conftest import RL, Job
from tests.e2e.test_bad_input import complaint, copy_of, settings, train_argv

ENDLESS = ('cfg.Train.num_steps = 1000000', 'cfg.AdamW.schedule = @cfg.ConstantRate()',
           'cfg.ConstantRate.learning_rate = 0.01', 'cfg.Train.tensorboard = True')


def started(job: Job, step: int = 22) -> subprocess.Popen[str]:
  """The run, with the row of `step` written.

  A save goes on beside the training and ends before the next one begins: once step 21 has run,
  step 10's checkpoint is whole.
  """
  process = subprocess.Popen(job.command(), env=job.environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  job.wait_for(step, process)
  return process


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
  """Exit code and the lines of stderr; a run that hangs fails."""
  try:
    _, err = process.communicate(timeout=120)
  finally:
    process.kill()
  return process.returncode, err.splitlines()


def test_a_second_run_is_refused_until_the_first_is_dead(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]):
  job = make_job(bindings=ENDLESS)
  process = started(job)
  try:
    line = complaint(capsys, *train_argv(job, *ENDLESS))
    assert f'Another run is using the work directory {job.workdir}' in line
    assert f'process {process.pid} on ' in line
    before = job.last_step()
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
  finally:
    process.kill()
  last = checkpoint.steps(job.workdir / 'checkpoints')[-1]
  bindings = (*ENDLESS, f'cfg.Train.num_steps = {last + 5}')
  assert main(train_argv(job, *bindings)) == 0
  assert last >= before - 20 and [r['step'] for r in job.rows()] == list(range(1, last + 6))


def test_other_settings_are_refused_by_name_and_go_on_with_leave(
    pretrained: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path):
  job = copy_of(pretrained, tmp_path)
  argv = train_argv(job, 'cfg.Cosine.peak_rate = 0.02', 'cfg.Train.num_steps = 62')
  line = complaint(capsys, *argv)
  assert 'Cosine.peak_rate 0.01 → 0.02' in line and '--allow_changes Cosine.peak_rate' in line
  assert 'num_steps' not in line
  assert settings(job) == settings(pretrained)
  assert 'no such setting' in complaint(capsys, *argv, '--allow_changes', 'AdamW.esp')
  assert main([*argv, '--allow_changes', 'Cosine.peak_rate']) == 0
  out = capsys.readouterr().out
  assert 'Settings that differ from here on: ' in out
  assert 'Cosine.peak_rate 0.01 → 0.02' in out and 'Train.num_steps 60 → 62' in out
  assert (job.workdir / 'config_until_step_60.gin').read_text() == settings(pretrained)
  assert 'cfg.Cosine.peak_rate = 0.02' in settings(job)
  assert [r['step'] for r in job.rows()] == list(range(1, 63))


def test_a_checkpoint_with_names_of_an_earlier_version_opens(
    pretrained: Job, monkeypatch: pytest.MonkeyPatch):
  real = checkpoint.read_extras

  def earlier(*args):
    step, extras = real(*args)
    text = extras['config'].replace('cfg.Cosine.peak_rate', 'cfg.Cosine.peak')
    assert text != extras['config']
    return step, {**extras, 'config': text}

  monkeypatch.setattr(checkpoint, 'read_extras', earlier)
  schedule = load_policy(pretrained.workdir).session.run.optimizer.schedule
  assert schedule == cfg.Cosine(0.01)


def test_rows_that_are_gone_are_missed(pretrained: Job, capsys: pytest.CaptureFixture[str],
                                       tmp_path: Path):
  job = copy_of(pretrained, tmp_path)
  path = job.workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[:7] + lines[8:]))
  argv = train_argv(job, 'cfg.Train.num_steps = 61')
  assert 'row 8 should be step 8, but is step 9' in complaint(capsys, *argv)
  assert main([*argv, '--allow_changes', 'metrics.jsonl']) == 0
  assert [r['step'] for r in job.rows()] == [*range(1, 8), *range(9, 62)]


def test_other_surroundings_are_said(pretrained: Job, tmp_path: Path):
  job = copy_of(pretrained, tmp_path)
  fewer = dataclasses.replace(
      job, environment={**job.environment, 'NPROC': '1'},
      bindings=('cfg.Train.num_steps = 61',))
  done = fewer.run()
  assert done.returncode == 0, done.stderr
  assert 'checkpoint 60 was made in other surroundings (CPU threads ' in done.stdout
  assert 'now 1)' in done.stdout


def lose(workdir: Path) -> None:
  workdir.rename(workdir.with_name('elsewhere'))


def unlink(workdir: Path) -> None:
  (workdir / 'metrics.jsonl').unlink()


@pytest.mark.parametrize('change, said', [
    pytest.param(lose, 'was deleted or renamed', marks=pytest.mark.slow),
    (unlink, 'its rows have been put back')])
def test_a_run_that_loses_its_files_stops_with_one_sentence(
    make_job: Callable[..., Job], change: Callable[[Path], None], said: str):
  job = make_job(bindings=ENDLESS)
  process = started(job, 25)  # The checkpoint of step 10 is whole by then.
  saved = checkpoint.steps(job.workdir / 'checkpoints')
  change(job.workdir)
  code, err = ended(process)
  assert code == 2 and len(err) == 1, err
  assert said in err[0] and 'the last good checkpoint' in err[0] and saved[-1] >= 10
  if change is unlink:
    assert [r['step'] for r in job.rows()] == list(range(1, job.last_step() + 1))
    last = checkpoint.steps(job.workdir / 'checkpoints')[-1]
    assert f'is step {last} in ' in err[0]
    assert main(train_argv(job, *ENDLESS, f'cfg.Train.num_steps = {last + 2}')) == 0
  else:  # Nothing is begun anew, but for the save that was under way.
    assert not list(job.workdir.glob('[!c]*')) and not job.workdir.joinpath('config.gin').exists()


def test_a_disk_that_fills_up_stops_the_run_with_one_sentence(
    make_job: Callable[..., Job], tmp_path: Path):
  """Also the writer of TensorBoard's events, which once died in a thread of its own."""
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(tmp_path)],
                           capture_output=True, text=True, check=False)
  if mounted.returncode:
    pytest.skip(f'no right to mount a small tmpfs here: {mounted.stderr.strip()}')
  try:
    made = make_job(bindings=ENDLESS)
    job = Job(made.gin_file, tmp_path / 'work', made.environment, ENDLESS)
    process = started(job, 25)
    with (tmp_path / 'filler').open('wb', buffering=0) as filler, pytest.raises(OSError):
      while True:
        filler.write(bytes(4096))
    code, err = ended(process)
    assert code == 2 and len(err) == 1, err
    assert 'No space left' in err[0] or 'no space left' in err[0]
    last = checkpoint.steps(job.workdir / 'checkpoints')[-1]
    assert f'the last good checkpoint is step {last} in {job.workdir}' in err[0]
    (tmp_path / 'filler').unlink()
    assert main(train_argv(job, *ENDLESS, f'cfg.Train.num_steps = {last + 2}')) == 0
    assert [r['step'] for r in job.rows()] == list(range(1, last + 3))
  finally:
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)


# --- Without the texts, from elsewhere ----------------------------------------------------


@pytest.fixture
def home(make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
  """A short run of its own texts, both named by paths below the current directory."""
  made = make_job()
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'texts').mkdir()
  for i in range(60):
    (tmp_path / 'texts' / f'{i}.txt').write_text(f'the model reads word {i} of {i * i} bytes.\n')
  bindings = ("cfg.TextFiles.glob = 'texts/*.txt'", 'cfg.Train.num_steps = 4',
              'cfg.Checkpoint.every = 2', 'cfg.Train.eval_every = 2')
  job = Job(made.gin_file, Path('work'), made.environment, bindings)
  assert main(train_argv(job, *bindings)) == 0
  return job


def sampled(workdir: Path, capsys: pytest.CaptureFixture[str]) -> str:
  capsys.readouterr()
  assert main(['sample', '--workdir', str(workdir), '--prompt', 'the ', '--num_tokens', '8',
               '--json']) == 0
  return capsys.readouterr().out


@pytest.mark.slow
def test_a_model_is_used_without_its_texts_wherever_it_is(
    home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch):
  before = sampled(home.workdir, capsys)
  assert main(['eval', '--workdir', 'work', '--json']) == 0
  evaluated = capsys.readouterr().out
  shutil.rmtree('texts')
  # Goes on from the prepared examples, and says so.
  longer = [*train_argv(home, *home.bindings), '--gin_bindings', 'cfg.Train.num_steps = 5',
            '--gin_bindings', 'cfg.Checkpoint.keep = 9']
  assert main(longer) == 0
  assert 'the texts are not there' in capsys.readouterr().out
  (tmp_path / 'other').mkdir()
  (tmp_path / 'work').rename(tmp_path / 'other' / 'moved')
  monkeypatch.chdir('/')
  moved = tmp_path / 'other' / 'moved'
  shutil.rmtree(moved / 'checkpoints' / '5')
  assert sampled(moved, capsys) == before
  assert main(['eval', '--workdir', str(moved), '--json']) == 0
  assert capsys.readouterr().out == evaluated
  for path in moved.iterdir():  # weights, tokenizer and config are enough
    if path.name not in ('checkpoints', 'tokenizer', 'config.gin'):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert sampled(moved, capsys) == before
  assert 'texts' in complaint(capsys, 'eval', '--workdir', str(moved))


def test_a_touched_corpus_is_not_prepared_again(home: Job):
  for path in Path('texts').iterdir():
    path.touch()
  assert main(train_argv(home, *home.bindings, 'cfg.Train.num_steps = 5')) == 0
  assert len(list(Path('work/data').glob('data-*'))) == 1


@pytest.mark.slow
def test_reinforcement_finds_its_start_from_anywhere_and_after_both_moved(
    home: Job, make_job: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch):
  shutil.rmtree('texts')
  made = make_job(RL, start_from='work')
  few = ("cfg.TextFiles.glob = 'texts/*.txt'", 'cfg.Train.num_steps = 2')
  job = Job(made.gin_file, Path('reinforced'), made.environment, few)
  assert main(train_argv(job, *few)) == 0
  assert f"cfg.RL.start_from = '{tmp_path}/work'" in settings(job)
  monkeypatch.chdir('/')
  sampled(tmp_path / 'reinforced', capsys)
  assert main(['replay', '--workdir', str(tmp_path / 'reinforced'), '--only', 'sampler']) == 0
  (tmp_path / 'other').mkdir()
  for name in ('work', 'reinforced'):
    (tmp_path / name).rename(tmp_path / 'other' / name)
  moved = dataclasses.replace(job, workdir=tmp_path / 'other' / 'reinforced')
  assert main(['replay', '--workdir', str(moved.workdir), '--only', 'sampler']) == 0
  # The same command from another directory: the way from run to policy still holds.
  assert main(train_argv(moved, *few, 'cfg.Train.num_steps = 4')) == 0
  assert [r['step'] for r in moved.rows()] == [0, 1, 2, 3, 4]
