"""What both training loops open before their first step, and keep open until the last."""

from collections.abc import Callable, Mapping
import dataclasses
from dataclasses import dataclass
import importlib.metadata
from pathlib import Path
import time
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.checkpoint import Checkpointer, Restored
from jaxrl_pt.data import loader
from jaxrl_pt.data.tokenizer import drawable
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import hosts, kernels, rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.types import Array, Batch, TrainState, Weighted


@dataclass(frozen=True)
class Session:
  """The run's fixed surroundings: files, devices, data."""

  run: cfg.Run
  workdir: Path
  resolved_text: str
  mesh: Mesh
  data: loader.Prepared

  def model(self, config: cfg.Model) -> Model:
    """The model on this session's mesh."""
    return build_model(config, self.run.compute, self.mesh)

  def put(self, batch: Batch) -> Batch:
    """This host's part of a batch, whose rows and tokens are `owned`, → the global batch."""
    shape = self.run.train.batch_size, self.run.data.seq_len
    return jax.tree.map(lambda x, sharding: hosts.from_part(x, shape[:x.ndim], sharding), batch,
                        rules.batch_sharding(self.mesh))

  def owned(self) -> tuple[np.ndarray, ...]:
    """The rows of a batch, and the tokens of each, that this host's devices hold."""
    shape = self.run.train.batch_size, self.run.data.seq_len
    rows: Any = rules.batch_sharding(self.mesh).tokens
    return hosts.owned(rows, shape)

  def put_global(self, batch: Batch) -> Batch:
    """The same whole batch on every host → one global, sharded batch."""
    return jax.tree.map(hosts.from_whole, batch, rules.batch_sharding(self.mesh))

  def put_rows(self, tree: Any) -> Any:
    """Any tree of whole [N, …] arrays → global arrays with N split like a batch's rows."""
    sharding = rules.row_sharding(self.mesh)
    return jax.tree.map(lambda x: hosts.from_whole(x, sharding), tree)


def build_model(config: cfg.Model, compute: cfg.Compute, mesh: Mesh,
                table: rules.Rules = rules.TRAIN) -> Model:
  """The model as every program on this mesh computes it, laid out by the table."""
  return transformer.build(config, compute, rules.make_constrain(mesh, table),
                           kernels.make_ops(mesh, table))


def claim_workdir(workdir: Path, resolved_text: str) -> None:
  """Makes the work directory, and writes the run's settings into it if it has none yet.

  Those of an earlier run stay until `restore_or_init` has found that this one continues it.

  Raises:
    UserError: it cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / 'config.gin').open('a', encoding='utf-8') as file:
      if file.tell() == 0:
        file.write(resolved_text)
  except OSError as e:
    raise UserError(f'The work directory {workdir} cannot be written ({e.strerror}): choose '
                    'another --workdir.') from e


def open_session(run: cfg.Run, workdir: Path, resolved_text: str,
                 data_dir: Path | None = None) -> Session:
  """Opens the mesh and the data, checking that they and the model fit together.

  Args:
    data_dir: where prepared data is kept if `Data.cache_dir` is empty; None means
      the work directory's own `data`.

  Raises:
    UserError: a mesh that does not divide, a vocabulary too small, unreadable data.
  """
  mesh = make_mesh(run.mesh)
  rules.check_divides(run, mesh)
  data = loader.prepare(run.data, Path(run.data.cache_dir or data_dir or workdir / 'data'))
  if data.tokenizer.vocab_size > run.model.vocab_size:
    raise UserError(
        f'The tokenizer has {data.tokenizer.vocab_size} tokens but Model.vocab_size = '
        f'{run.model.vocab_size}: set it to at least {data.tokenizer.vocab_size}.')
  return Session(_drawing_tokens(run, data), workdir, resolved_text, mesh, data)


def _drawing_tokens(run: cfg.Run, data: loader.Prepared) -> cfg.Run:
  """The run whose rollouts never hold an id that no token has.

  Raises:
    UserError: every token is banned.
  """
  match run.objective:
    case cfg.RPT() | cfg.RL() as method:
      sampler = drawable(method.rollouts.sampler, data.tokenizer, run.model.vocab_size)
      if set(sampler.banned) >= set(range(run.model.vocab_size)):
        raise UserError(f'Sampler.banned names all {data.tokenizer.vocab_size} tokens of the '
                        'tokenizer, so nothing can be drawn: leave some out.')
      rollouts = dataclasses.replace(method.rollouts, sampler=sampler)
      return dataclasses.replace(run, objective=dataclasses.replace(method, rollouts=rollouts))
    case _:
      return run


def checkpoint_extras(session: Session, loader_state: Mapping[str, Any]) -> dict[str, Any]:
  """The JSON half of a checkpoint: all that is needed to go on, or to sample elsewhere."""
  return {
      'loader': dict(loader_state),
      'config': session.resolved_text,
      'objective': type(session.run.objective).__name__,
      'model': dataclasses.asdict(session.run.model),
      'tokenizer': session.data.tokenizer.fingerprint,
      'versions': {name: importlib.metadata.version(name)
                   for name in ('jaxrl_pt', 'jax', 'optax', 'orbax-checkpoint')},
  }


def check_tokenizer(session: Session, restored: Restored) -> None:
  """Refuses to go on with another tokenizer than the checkpoint was trained with.

  Raises:
    UserError: the fingerprints differ.
  """
  saved = restored.extras['tokenizer']
  if saved != session.data.tokenizer.fingerprint:
    raise UserError(
        f'The tokenizer in {session.data.directory} ({session.data.tokenizer.fingerprint[:12]}) '
        f'is not the one that checkpoint {restored.step} in {session.workdir} was trained with '
        f'({saved[:12]}): use the same Data settings, or a new --workdir.')


def check_objective(session: Session, extras: Mapping[str, Any]) -> None:
  """Refuses to go on with RPT where pretraining stopped, or the other way round.

  Raises:
    UserError: the checkpoint is of another objective.
  """
  saved, ours = extras.get('objective'), type(session.run.objective).__name__
  if saved != ours:
    raise UserError(f'The work directory {session.workdir} holds a run of {saved}, this one is '
                    f'{ours}: choose another --workdir.')


@dataclass
class _Pending:
  """A dispatched step whose metrics are still on their way."""

  step: int
  values: dict[str, Weighted]
  ids: Array
  num_tokens: Array | int
  check: Callable[[dict[str, float]], None] | None


class Recorder:
  """Fetches each step's metrics one step late, so that the device never waits for the host.

  A non-finite loss or gradient stops the run before that step can reach a checkpoint.
  """

  def __init__(self, writer: metrics.Writer, checkpointer: Checkpointer, mesh: Mesh,
               flops_per_token: float) -> None:
    self._writer = writer
    self._devices = list(mesh.devices.flat)
    self._flops_per_token = flops_per_token
    self._checkpointer = checkpointer
    self._pending: _Pending | None = None
    self._extra: dict[str, float] = {}
    self._timing: dict[str, float] = {}
    self._started = self._last = time.perf_counter()
    self._busy = 0.0

  def dispatched(self, step: int, values: dict[str, Weighted], ids: Array,
                 num_tokens: Array | int,
                 check: Callable[[dict[str, float]], None] | None = None) -> None:
    """Notes that step `step` (counted from 1) is under way; writes the one before it.

    Args:
      ids: of the examples of all hosts, a global array.
      num_tokens: of all hosts.
      check: gets the step's metrics when they are there, and may stop the run.
    """
    self.flush()
    self._pending = _Pending(step, values, ids, num_tokens, check)

  def add(self, values: Mapping[str, float]) -> None:
    """Adds evaluation results to the row of the pending step."""
    self._extra.update(values)

  def time(self, values: Mapping[str, float]) -> None:
    """Adds times and speeds of its stages to the row of the pending step."""
    self._timing.update(values)

  def restart_clock(self) -> None:
    """Leaves out of the step time what has just been done (evaluation, compilation)."""
    self._last = time.perf_counter()

  def flush(self) -> None:
    """Writes the pending row.

    Raises:
      UserError: a metric of the step is not finite; names step, batch, last checkpoint.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    values = metrics.host_values(pending.values)
    bad = sorted(k for k, v in values.items() if not np.isfinite(v))
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    self._busy += seconds
    speed = float(pending.num_tokens) / max(seconds, 1e-9)
    timing = {'seconds': seconds, 'tokens_per_second': speed,
              'model_flops_per_second': speed * self._flops_per_token,
              'goodput': self._busy / max(now - self._started, 1e-9)}
    mfu = metrics.mfu(timing['model_flops_per_second'], self._devices)
    if mfu is not None:  # Only where the device's peak is known.
      timing['mfu'] = mfu
    self._writer.write(pending.step, {**values, **self._extra}, {**timing, **self._timing})
    self._extra, self._timing = {}, {}
    if bad:
      good = self._checkpointer.latest_step()
      raise UserError(
          f'{", ".join(bad)} became non-finite at step {pending.step} on examples '
          f'{hosts.on_host(pending.ids).tolist()}: the last good checkpoint is '
          f'{"none" if good is None else f"step {good}"}; lower the learning rate or the clip, '
          'then run the same command again to go on from there.')
    if pending.check is not None:
      pending.check(values)


def restore_or_init(session: Session, checkpointer: Checkpointer, abstract: TrainState,
                    fresh: Any) -> tuple[TrainState, dict[str, Any] | None]:
  """The newest good checkpoint's state and loader state, or `fresh()` and None.

  Raises:
    UserError: the checkpoint is not of this run; the work directory stays as it was.
  """
  config = session.workdir / 'config.gin'
  if checkpointer.latest_step() is None:
    config.write_text(session.resolved_text, encoding='utf-8')
    return fresh(), None
  # Before the arrays: another objective's state is another tree.
  check_objective(session, checkpointer.read_extras())
  restored = checkpointer.restore(abstract)
  check_tokenizer(session, restored)
  config.write_text(session.resolved_text, encoding='utf-8')
  print(f'Resuming from step {restored.step} in {session.workdir}', flush=True)
  return restored.state, restored.extras['loader']
