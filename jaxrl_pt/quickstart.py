"""The first five minutes: the main job on real text, offline, and what it proves.

Pretrains a tiny ternary model (W1.58A8 → A4) in a child process, kills that process with
SIGKILL on purpose, resumes it, and compares the state bit for bit with an uninterrupted
run; then reinforces the model with RPT and writes one report. Every number it prints is
measured in the run that prints it.
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
# The run is killed a little after the first checkpoint and compared at the second.
COMPARED_CHECKPOINTS = 2
USER_MISTAKE = 2  # the exit code of a command that has said in one line what is wrong
PARAGRAPH = r'(?<=\n\n)(?=\S)'  # where one starts
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
    # Compiled programs are shared between the children: the second start is quick.
    cache = str(self.workdir.parent / 'compilation_cache')
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache,
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
                   # A CPU step allocates and frees large blocks: spare it the page faults.
                   'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
    return subprocess.Popen(command, env=environment)

  def run(self) -> None:
    """Runs to the end.

    Raises:
      SystemExit: the child failed because of a mistake of the user, which it has said.
      UserError: it failed otherwise.
    """
    with _ended(self.start) as process:
      code = process.wait()
    if code:
      self._failed(code)

  def _failed(self, code: int) -> NoReturn:
    if code == USER_MISTAKE:
      raise SystemExit(code)
    raise UserError(f'The run in {self.workdir} stopped with exit code {code}; its message '
                    'stands above.')

  def run_until(self, reached: Callable[[], bool], with_signal: signal.Signals) -> None:
    """Runs until `reached()`, then sends the signal and waits for the end.

    Raises:
      SystemExit, UserError: as `run`; UserError also if the child ended by itself before.
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
  """Signals that would unwind this process do so at the end of the block."""
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
  """Never leaves a child behind, whatever interrupts the parent."""
  process = None
  try:
    with _held_signals():  # Between its birth and our knowing of it, a child would be lost.
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
  """Runs the whole tour in `workdir`, whose earlier contents of the tour are replaced.

  Args:
    workdir: receives pretrain/, uninterrupted/, rpt/ and report.html.
    data_glob: text files to learn instead of the standard library's own text.
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
  gin_bindings.load([RPT_GIN], list(rpt_bindings))  # A mistake shows before the long work.

  _say(f'1. Pretraining a ternary transformer ({_describe(config)}); it will be killed once')
  every = config.checkpoint.every
  kill_after = every + max(1, every // 4)
  pretrain.run_until(lambda: pretrain.last_step() >= kill_after, signal.SIGKILL)
  killed_at = pretrain.last_step()
  print(f'Killed with SIGKILL after step {killed_at}. Starting the same command again.')
  pretrain.run()

  compared = COMPARED_CHECKPOINTS * every
  _say(f'2. Is the resumed run bit-identical? An uninterrupted run to step {compared}')
  reference = _Child(PRETRAIN_GIN, data, workdir / 'uninterrupted')
  reference.run_until(lambda: reference.last_step() > compared, signal.SIGTERM)
  verdict = _compare(pretrain.workdir, reference.workdir, compared, killed_at)
  print(verdict)

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
  _write_report(workdir, verdict, samples, table, summary, seconds)
  print(f'\nDone in {seconds:.0f} s. Look at {workdir / "report.html"}')


def _data_bindings(data_glob: str | None) -> tuple[str, ...]:
  if data_glob is None:
    return ()
  absolute = str(Path(data_glob).expanduser().absolute())
  # Paragraphs as documents, so that even a single file has some to hold out.
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
  """Compares every leaf of both checkpoints and every metrics row up to `step`.

  Raises:
    RuntimeError: they differ; that would be a defect of this program.
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
    rows of text (the first is the header) and one honest sentence or two.
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
  """What the changes, in points by split, mean. A fall is called a fall, however small."""
  if min(sampled.values()) <= 0:
    return ('RPT did not raise the sampled accuracy of every split in this run, and '
            f'{_moved(argmax)}: train it longer (cfg.Train.num_steps).')
  better = f'Sampled predictions became better on every split while {_moved(argmax)}'
  if min(argmax.values()) >= 1.0:
    return f'{better}, which sharper sampling does not explain.'
  return f'{better}: this is sharper sampling, not look-ahead.'


def _moved(argmax: dict[str, float]) -> str:
  """The change of the argmax in words: which splits became worse, which better, by how much."""
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


def _write_report(workdir: Path, verdict: str, samples: list[dict], table: list[list[str]],
                  summary: str, seconds: float) -> None:
  sections = [
      report.Section('Next-token accuracy on held-out text', rows=table, text=summary),
      report.Section('Killed and resumed', text=verdict),
      report.Section('Samples after RPT', rows=[
          ['prompt', 'continuation'], *([s['prompt'], s['text']] for s in samples)]),
      report.Section('Time', text=f'{seconds:.0f} s in all.'),
  ]
  (workdir / 'quickstart.json').write_text(json.dumps(
      {'verdict': verdict, 'table': table, 'summary': summary, 'seconds': seconds}, indent=2))
  report.write_report(workdir, stages={'pretraining': workdir / 'pretrain',
                                       'RPT': workdir / 'rpt'}, sections=sections)
