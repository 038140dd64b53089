"""What a run opens before its first step, and keeps open until the last."""

from collections.abc import Mapping
import dataclasses
from dataclasses import dataclass
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from jaxrl_pt.data import loader
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.data.tokenizer import drawable
from jaxrl_pt.errors import MissingFileError, UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import hosts, rules
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import places
from jaxrl_pt.run.places import CHECKPOINTS, TOKENIZER
from jaxrl_pt.types import Batch


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
    return models.build(config, self.run.compute, self.mesh)

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
    for name in run.objective.policy_fields[:1]:  # Its data are those of the policy it began with.
      base = places.policy(getattr(run.objective, name), workdir, name) / 'data'
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
  objective: Any = run.objective
  if objective.rollouts is None:
    return run
  sampler = drawable(objective.rollouts.sampler, data.tokenizer, run.model.vocab_size)
  if set(sampler.banned) >= set(range(run.model.vocab_size)):
    raise UserError(f'Sampler.banned names all {data.tokenizer.vocab_size} tokens of the '
                    'tokenizer, so nothing can be drawn: leave some out.')
  rollouts = dataclasses.replace(objective.rollouts, sampler=sampler)
  return dataclasses.replace(run, objective=dataclasses.replace(objective, rollouts=rollouts))


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
