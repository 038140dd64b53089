"""What both training loops open before their first step, and keep open until the last."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from dataclasses import dataclass
import functools
import importlib.metadata
import os
from pathlib import Path
import shutil
import time
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import checkpoint, files, metrics
from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Checkpointer, Restored
from jaxrl_pt.data import loader
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.data.tokenizer import drawable
from jaxrl_pt.errors import MissingFileError, UserError
from jaxrl_pt.gin_bindings import current_names
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import hosts, kernels, rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.train import places, resume
from jaxrl_pt.train.places import CHECKPOINTS, CONFIG, TOKENIZER
from jaxrl_pt.types import Array, Batch, TrainState, Weighted


@dataclass(frozen=True)
class Session:
  """The run's fixed surroundings: files, devices, data."""

  run: cfg.Run
  workdir: Path
  resolved_text: str
  mesh: Mesh
  data: loader.Prepared
  # Settings that may differ from those of the checkpoint resumed from, by their dotted names.
  allow: frozenset[str] = frozenset()

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


def open_session(run: cfg.Run, workdir: Path, resolved_text: str, *,
                 data: loader.Prepared | None = None, data_dir: Path | None = None,
                 allow: frozenset[str] = frozenset()) -> Session:
  """Opens the mesh and the data, checking that they and the model fit together.

  Args:
    data: what is opened already; None prepares the run's own.
    data_dir: where it is then kept if `Data.cache_dir` is empty; None means the work
      directory's own `data`.
    allow: as in `Session`.

  Raises:
    UserError: a mesh that does not divide, a vocabulary too small, unreadable data.
  """
  mesh = make_mesh(run.mesh)
  rules.check_divides(run, mesh)
  if data is None:
    data = _prepare(run.data, workdir, data_dir or workdir / 'data')
  if data.tokenizer.vocab_size > run.model.vocab_size:
    raise UserError(
        f'The tokenizer has {data.tokenizer.vocab_size} tokens but Model.vocab_size = '
        f'{run.model.vocab_size}: set it to at least {data.tokenizer.vocab_size}.')
  return Session(_drawing_tokens(run, data), workdir, resolved_text, mesh, data, allow)


def _prepare(data: cfg.Data, workdir: Path, directory: Path) -> loader.Prepared:
  """The run's prepared data; without its texts those that its checkpoint was trained on."""
  try:
    return loader.prepare(data, directory)
  except MissingFileError:
    if checkpoint.steps(workdir / CHECKPOINTS):
      _, extras = checkpoint.read_extras(workdir / CHECKPOINTS)
      found = _prepared_before(data, workdir, extras)
      if found is not None:
        print(f'note: the texts are not there; the examples prepared from them in '
              f'{found.directory} are.', flush=True)
        return found
    raise


def _prepared_before(data: cfg.Data, workdir: Path, extras: Mapping[str, Any]
                     ) -> loader.Prepared | None:
  """The prepared data of a checkpoint if they are where they were, or moved with its directory."""
  where = extras.get('data', {})
  for directory in (workdir / where['relative'], Path(where['absolute'])) if where else ():
    if loader.is_prepared(directory, data):
      return loader.open_prepared(directory)
  return None


def policy_data(run: cfg.Run, workdir: Path, extras: Mapping[str, Any]) -> loader.Prepared:
  """The tokenizer of a trained policy, and its data if they are asked for and still there.

  Args:
    run: of the policy.
    workdir: where its weights lie.
    extras: of its checkpoint.

  Raises:
    UserError: the tokenizer is damaged, or not the one that the checkpoint was trained with.
  """
  directory = workdir / TOKENIZER

  @functools.cache
  def data() -> loader.Prepared:
    base = workdir / 'data'
    if not isinstance(run.objective, cfg.NextToken):
      base = places.policy(run.objective.start_from, workdir, 'start_from') / 'data'
    found = _prepared_before(run.data, workdir, extras) or loader.prepare(run.data, base)
    check_tokenizer(found, extras['tokenizer'], workdir)
    return found

  if not directory.is_dir():  # as earlier versions left it, with the data alone
    return data()
  tokenizer = tokenizers.load(directory)
  opened = loader.Prepared(tokenizer, directory, lambda: (data().train, data().validation))
  check_tokenizer(opened, extras['tokenizer'], workdir)
  return opened


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
  data = session.data.directory.absolute()
  return {
      'loader': dict(loader_state),
      'config': session.resolved_text,
      'objective': type(session.run.objective).__name__,
      'model': dataclasses.asdict(session.run.model),
      'tokenizer': session.data.tokenizer.fingerprint,
      'data': {'absolute': str(data), 'relative': os.path.relpath(data, session.workdir)},
      'policies': places.policies(session.run, session.workdir),
      'environment': resume.environment(list(session.mesh.devices.flat)),
      'versions': {name: importlib.metadata.version(name)
                   for name in ('jaxrl_pt', 'jax', 'optax', 'orbax-checkpoint')},
  }


def check_tokenizer(data: loader.Prepared, saved: str, workdir: Path) -> None:
  """Refuses another tokenizer than the checkpoint was trained with.

  Args:
    data: whose tokenizer it is.
    saved: the fingerprint in the checkpoint.
    workdir: of the checkpoint.

  Raises:
    UserError: the fingerprints differ.
  """
  if saved != data.tokenizer.fingerprint:
    raise UserError(
        f'The tokenizer in {data.directory} ({data.tokenizer.fingerprint[:12]}) is not the one '
        f'that the model in {workdir} was trained with ({saved[:12]}): use the same Data '
        'settings, or a new --workdir.')


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

  def sync(self) -> None:
    """Writes the pending row and waits until all rows are on disk: a checkpoint comes next.

    Raises:
      UserError: as `flush`; a non-finite step never reaches a checkpoint.
    """
    self.flush()
    self._writer.sync()

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

  Prints what differs from the settings and surroundings of the checkpoint.

  Raises:
    UserError: the checkpoint is not of this run; the work directory stays as it was.
  """
  if checkpointer.latest_step() is None:
    return fresh(), None
  # Before the arrays: another objective's or model's state is another tree.
  step, extras = checkpoint.read_extras(session.workdir / CHECKPOINTS)
  _check_settings(session, step, extras)
  restored = checkpointer.restore(abstract)
  if restored.step != step:
    _check_settings(session, restored.step, restored.extras)
  check_tokenizer(session.data, restored.extras['tokenizer'], session.workdir)
  if jax.process_index() == 0:
    print(f'Resuming from step {restored.step} in {session.workdir}', flush=True)
    for line in _differences(session, restored):
      print(line, flush=True)
  return restored.state, restored.extras['loader']


def _check_settings(session: Session, step: int, extras: Mapping[str, Any]) -> None:
  check_objective(session, extras)
  found = resume.differences(current_names(extras['config']), session.resolved_text)
  resume.check_settings(found, session.allow, f'checkpoint {step} in {session.workdir}')


def _differences(session: Session, restored: Restored) -> Iterator[str]:
  found = resume.differences(current_names(restored.extras['config']), session.resolved_text)
  if found:
    yield 'Settings that differ from here on: ' + ', '.join(map(str, found))
  here = resume.environment(list(session.mesh.devices.flat))
  sentence = resume.describe_environment(restored.extras.get('environment', {}), here,
                                         restored.step)
  if sentence:
    yield sentence


def record(session: Session, step: int) -> None:
  """Writes the run's tokenizer and settings into its work directory, once nothing can refuse it.

  Settings that differ from those until now are kept beside them, as config_until_step_N.gin.

  Args:
    step: that the run goes on from.

  Raises:
    Unwritable: the directory cannot be written.
  """
  if jax.process_index() != 0:
    return
  _record_tokenizer(session.data.tokenizer, session.workdir / TOKENIZER)
  config = session.workdir / CONFIG
  before = config.read_text(encoding='utf-8') if config.is_file() else None
  if before == session.resolved_text:
    return
  if before is not None and step:
    files.write_text(session.workdir / f'config_until_step_{step}.gin', before)
  files.write_text(config, session.resolved_text)


def _record_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
  """Keeps the tokenizer beside the weights: with them it is all that using the model takes."""
  with contextlib.suppress(UserError):  # none yet, or not whole
    if tokenizers.load(directory).fingerprint == tokenizer.fingerprint:
      return
  temporary = directory.with_name(f'.{directory.name}')
  with files.writing(directory):
    for old in (temporary, directory):
      shutil.rmtree(old, ignore_errors=True)
    tokenizer.save(temporary)
    temporary.rename(directory)
