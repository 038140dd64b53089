"""The quickstart: pretraining, a resume after a kill, and RPT on real text, in minutes and offline.

It pretrains a tiny ternary model (W1.58A8 → A4) in a child process, kills that process with SIGKILL
on purpose, resumes the run, and compares its state bit for bit with that of an uninterrupted run.
Then it reinforces the model with RPT and writes one report. Every number that it prints is measured
in the run that prints it.
"""

from collections.abc import Callable, Iterator
import contextlib
from dataclasses import dataclass
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings, metrics, report
from jaxrl_pt.errors import UserError

PRETRAIN_GIN = 'gin/run/pretrain_tiny.gin'
RPT_GIN = 'gin/run/rpt_tiny.gin'
# The run is killed a little after its first checkpoint, and compared at its second.
COMPARED_CHECKPOINTS = 2
USER_MISTAKE = 2  # the exit code of a command that has said in one line what is wrong
PARAGRAPH = r'(?<=\n\n)(?=\S)'  # matches where a paragraph starts
DIFFICULTIES = ('easy', 'medium', 'hard')


@dataclass(frozen=True)
class _Child:
  """One `jaxrl-pt train` command, run in a process of its own."""

  gin_file: str
  bindings: tuple[str, ...]
  workdir: Path

  def start(self) -> subprocess.Popen[bytes]:
    command = [sys.executable, '-m', 'jaxrl_pt.main', 'train', '--gin_file', self.gin_file,
               '--workdir', str(self.workdir)]
    for binding in self.bindings:
      command += ['--gin_bindings', binding]
    # The children share compiled programs, so that the second start is quick.
    cache = str(self.workdir.parent / 'compilation_cache')
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache,
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
                   # A step on a CPU allocates and frees large blocks; huge pages spare page faults.
                   'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
    return subprocess.Popen(command, env=environment)

  def run(self) -> None:
    """Runs the command to its end.

    Raises:
      SystemExit: the command failed because of a user's mistake, which it has told.
      UserError: the command failed otherwise.
    """
    with _ended(self.start) as process:
      code = process.wait()
    if code:
      self._failed(code)

  def _failed(self, code: int) -> NoReturn:
    """Raises what `run` raises for an exit code."""
    if code == USER_MISTAKE:
      raise SystemExit(code)
    raise UserError(f'The run in {self.workdir} stopped with exit code {code}; its message '
                    'stands above.')

  def run_until(self, reached: Callable[[], bool], with_signal: signal.Signals) -> None:
    """Runs the command until `reached()`, then sends it a signal and waits for its end.

    Raises:
      SystemExit, UserError: as `run`, if the command ended before the signal.
    """
    with _ended(self.start) as process:
      while not reached():
        if process.poll() is not None:
          self._failed(process.returncode)
        time.sleep(0.05)
      process.send_signal(with_signal)
      process.wait()

  def last_step(self) -> int:
    """The last step whose row is in metrics.jsonl, 0 before the first."""
    path = self.workdir / 'metrics.jsonl'
    rows = metrics.read_rows(path) if path.is_file() else []
    return int(rows[-1]['step']) if rows else 0


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
  """Defers signals that would unwind this process to the end of the context."""
  noted: list[int] = []
  numbers = [s for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
             if threading.current_thread() is threading.main_thread()
             and callable(signal.getsignal(s))]
  previous = {s: signal.signal(s, lambda number, frame: noted.append(number)) for s in numbers}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
    if noted:
      signal.raise_signal(noted[0])


@contextlib.contextmanager
def _ended(start: Callable[[], subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
  """Starts a child process and ends it with the context, whatever interrupts this process."""
  process = None
  try:
    # A signal between the child's start and the assignment would leave the child behind.
    with _held_signals():
      process = start()
    yield process
  finally:
    if process is not None and process.poll() is None:
      process.terminate()
      try:
        process.wait(timeout=30)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _signals_end() -> Iterator[None]:
  """SIGTERM and SIGHUP unwind this process, so that it ends its child before itself."""
  def end(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise SystemExit(128 + number)

  numbers = [s for s in (signal.SIGTERM, signal.SIGHUP)
             if threading.current_thread() is threading.main_thread()
             and signal.getsignal(s) is signal.SIG_DFL]
  for number in numbers:
    signal.signal(number, end)
  try:
    yield
  finally:
    for number in numbers:
      signal.signal(number, signal.SIG_DFL)


def run(workdir: Path, data_glob: str | None) -> None:
  """Runs the whole quickstart in `workdir`, and replaces what an earlier quickstart left there.

  Args:
    workdir: receives data/, compilation_cache/, pretrain/, uninterrupted/, rpt/, plots/,
      quickstart.json and report.html.
    data_glob: text files to learn; None takes the text of Python's standard library.
  """
  with _signals_end():
    _run(workdir, data_glob)


def _run(workdir: Path, data_glob: str | None) -> None:
  started = time.perf_counter()
  for name in ('pretrain', 'uninterrupted', 'rpt'):
    shutil.rmtree(workdir / name, ignore_errors=True)
  data = (*_data_bindings(data_glob), f"cfg.Data.cache_dir = '{workdir.absolute() / 'data'}'")
  pretrain = _Child(PRETRAIN_GIN, data, workdir / 'pretrain')
  config, _ = gin_bindings.load([PRETRAIN_GIN], list(data))
  rpt_bindings = (*data, f"cfg.RPT.start_from = '{workdir / 'pretrain'}'")
  gin_bindings.load([RPT_GIN], list(rpt_bindings))  # A mistake here shows before the long work.

  _say(f'1. Pretraining a ternary transformer ({_describe(config)}); it will be killed once')
  every = config.checkpoint.every
  kill_after = every + max(1, every // 4)
  pretrain.run_until(lambda: pretrain.last_step() >= kill_after, signal.SIGKILL)
  killed_at = pretrain.last_step()
  print(f'Killed with SIGKILL after step {killed_at}. Starting the same command again.')
  pretrain.run()

  compared = COMPARED_CHECKPOINTS * every
  _say(f'2. Is the resumed run bit-identical? An uninterrupted run to step {compared}')
  uninterrupted = _Child(PRETRAIN_GIN, data, workdir / 'uninterrupted')
  uninterrupted.run_until(lambda: uninterrupted.last_step() > compared, signal.SIGTERM)
  comparison = _compare(pretrain.workdir, uninterrupted.workdir, compared, killed_at)
  print(comparison)

  _say('3. Reinforcement pre-training (RPT) on positions the model is unsure of')
  rpt = _Child(RPT_GIN, rpt_bindings, workdir / 'rpt')
  rpt.run()

  _say('4. What came of it')
  samples = _samples(rpt.workdir)
  for sample in samples:
    print(f'  {sample["prompt"]!r} → {sample["text"]!r}')
  table, summary = accuracy_table(metrics.read_rows(rpt.workdir / 'metrics.jsonl'))
  print(_as_text(table))
  print(summary)
  seconds = time.perf_counter() - started
  _write_report(workdir, comparison, samples, table, summary, seconds)
  print(f'\nDone in {seconds:.0f} s. Look at {workdir / report.FILE}')


def _data_bindings(data_glob: str | None) -> tuple[str, ...]:
  if data_glob is None:
    return ()
  absolute = str(Path(data_glob).expanduser().absolute())
  # Each paragraph is a document, so that even a single file has documents to hold out.
  return ('cfg.Data.source = @cfg.TextFiles()', f'cfg.TextFiles.glob = {absolute!r}',
          f'cfg.TextFiles.document_start = {PARAGRAPH!r}',
          'cfg.Data.validation_fraction = 0.05')


def _describe(config: cfg.Run) -> str:
  from jaxrl_pt import params
  from jaxrl_pt.models import transformer
  count = params.count(transformer.build(config.model).specs)
  quant = config.model.quant
  return f'{count / 1e6:.1f}M parameters, {quant.weights} weights, {quant.activations} activations'


def _say(title: str) -> None:
  print(f'\n\033[1m{title}\033[0m' if sys.stdout.isatty() else f'\n{title}', flush=True)


# --- Bit-identity ---------------------------------------------------------------


def _compare(resumed: Path, uninterrupted: Path, step: int, killed_at: int) -> str:
  """Compares all arrays of both runs' checkpoints of a step, and all metrics rows up to it.

  Returns:
    The result in words.

  Raises:
    RuntimeError: the runs differ, which would be a defect of this program.
  """
  import jax
  import numpy as np

  from jaxrl_pt.jobs.open import load_state
  first, second = (jax.tree_util.tree_leaves_with_path(load_state(w, step))
                   for w in (resumed, uninterrupted))
  different = [jax.tree_util.keystr(path) for (path, a), (_, b) in zip(first, second, strict=True)
               if np.asarray(a).tobytes() != np.asarray(b).tobytes()]
  rows = [[metrics.deterministic(r) for r in metrics.read_rows(w / 'metrics.jsonl')
           if r['step'] <= step] for w in (resumed, uninterrupted)]
  if different or rows[0] != rows[1]:
    raise RuntimeError(f'the resumed run differs from the uninterrupted one at step {step}: '
                       f'{different or "metrics"}')
  return (f'Killed by SIGKILL after step {killed_at}, resumed, and at step {step} bit-identical '
          f'to an uninterrupted run: {len(first)} arrays and {len(rows[0])} metrics rows equal.')


# --- The table ------------------------------------------------------------------


def accuracy_table(rows: list[dict]) -> tuple[list[list[str]], str]:
  """Next-token accuracy on held-out positions before and after RPT, and what it means.

  Args:
    rows: metrics rows; the first and the last with `validation/` keys are compared.

  Returns:
    The table, whose first row is the header, and a sentence or two on what it means.
  """
  evaluated = [r for r in rows if 'validation/easy_sampled' in r]
  before, after = evaluated[0], evaluated[-1]
  table = [['held-out positions', 'decoding', 'before RPT', 'after RPT', 'change, points', 'n']]
  gains = {}
  for split in DIFFICULTIES:
    for decoding in ('sampled', 'argmax'):
      key = f'validation/{split}_{decoding}'
      old, new = 100 * before[key], 100 * after[key]
      gains[split, decoding] = new - old
      table.append([split, decoding, f'{old:.1f} %', f'{new:.1f} %', f'{new - old:+.1f}',
                    str(int(before[f'validation/{split}_count']))])
  sampled, argmax = ({split: gains[split, decoding] for split in DIFFICULTIES}
                     for decoding in ('sampled', 'argmax'))
  return table, _summary(sampled, argmax)


def _summary(sampled: dict[str, float], argmax: dict[str, float]) -> str:
  """What changes of the accuracy mean, given in points by split. Any fall is called a fall."""
  if min(sampled.values()) <= 0:
    return ('RPT did not raise the sampled accuracy of every split in this run, and '
            f'{_moved(argmax)}: train it longer (cfg.Train.num_steps).')
  better = f'Sampled predictions became better on every split while {_moved(argmax)}'
  if min(argmax.values()) >= 1.0:
    return f'{better}, which sharper sampling does not explain.'
  return f'{better}: this is sharper sampling, not look-ahead.'


def _moved(argmax: dict[str, float]) -> str:
  """The changes of the argmax in words: on which splits it became worse or better, by how much."""
  parts = []
  for word, sign in (('worse', -1), ('better', 1)):
    changes = {split: sign * change for split, change in argmax.items()
               if round(sign * change, 1) > 0}
    if changes:
      low, high = f'{min(changes.values()):.1f}', f'{max(changes.values()):.1f}'
      span = low if low == high else f'{low} to {high}'
      where = 'every split' if len(changes) == len(argmax) else ' and '.join(changes)
      parts.append(f'became {word} by {span} points on {where}')
  return f'the argmax {" and ".join(parts) or "did not change"}'


def _as_text(table: list[list[str]]) -> str:
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  return '\n'.join('  ' + '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
                   for row in table)


def _samples(workdir: Path) -> list[dict]:
  from jaxrl_pt.run.samples import sample_workdir
  prompts = ['def __init__(self', 'Return the ', 'import ']
  return sample_workdir(workdir, prompts, sampler=cfg.Sampler(temperature=0.7), num_tokens=32,
                        num_samples=1, seed=0)


def _write_report(workdir: Path, comparison: str, samples: list[dict], table: list[list[str]],
                  summary: str, seconds: float) -> None:
  sections = [
      report.Section('Next-token accuracy on held-out text', rows=table, text=summary),
      report.Section('Killed and resumed', text=comparison),
      report.Section('Samples after RPT', rows=[
          ['prompt', 'continuation'], *([s['prompt'], s['text']] for s in samples)]),
      report.Section('Time', text=f'{seconds:.0f} s in all.'),
  ]
  (workdir / 'quickstart.json').write_text(json.dumps(
      {'verdict': comparison, 'table': table, 'summary': summary, 'seconds': seconds}, indent=2))
  report.write_report(workdir, stages={'pretraining': workdir / 'pretrain',
                                       'RPT': workdir / 'rpt'}, sections=sections)
