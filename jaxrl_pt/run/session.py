"""The session: the mesh and the data, which a run opens before its first step."""

from collections.abc import Callable, Mapping
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
from jaxrl_pt.data import build, chat_files, loader
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.data.tokenizer import drawable
from jaxrl_pt.errors import MissingFileError, UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import hosts, rules
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import places
from jaxrl_pt.run.places import CHECKPOINTS, TOKENIZER
from jaxrl_pt.train import programs
from jaxrl_pt.types import Batch, Params


@dataclass(frozen=True)
class Session:
  """The settings, files, devices and data of a run, which stay the same from step to step."""

  run: cfg.Run
  workdir: Path
  resolved_text: str  # the settings as gin text
  mesh: Mesh
  prepared: loader.Prepared | None  # None in a run that learns from games, which are no files
  # Dotted names of settings that may differ from those of the checkpoint resumed from.
  allow: frozenset[str] = frozenset()

  @property
  def data(self) -> loader.Prepared:
    """The tokenizer and the texts."""
    assert self.prepared is not None, 'a run that learns from games has no texts'
    return self.prepared

  def model(self, config: cfg.Model) -> Model:
    """A model on this session's mesh."""
    return models.build(config, self.run.compute, self.mesh)

  @functools.cached_property
  def sync_weights(self) -> Callable[[Params, int], Params]:
    """(parameters, version) → the sampler's copy of them; one for all that draw in the run."""
    method = self.run.objective
    assert isinstance(method, cfg.Reinforced), 'only reinforcement learning draws'
    return programs.weight_sync(self.run, self.mesh, method.rollouts.slots)

  def put(self, batch: Batch) -> Batch:
    """Makes the global batch of this host's part, whose rows and tokens are `owned`."""
    shape = self.run.train.batch_size, self.run.data.seq_len
    return jax.tree.map(lambda x, sharding: hosts.from_part(x, shape[:x.ndim], sharding), batch,
                        rules.batch_sharding(self.mesh))

  def owned(self) -> tuple[np.ndarray, ...]:
    """The rows of a batch, and the tokens of each, that this host's devices hold."""
    shape = self.run.train.batch_size, self.run.data.seq_len
    rows: Any = rules.batch_sharding(self.mesh).tokens
    return hosts.owned(rows, shape)

  def put_global(self, batch: Batch) -> Batch:
    """Makes the global, sharded batch of a whole batch that is the same on every host."""
    return jax.tree.map(hosts.from_whole, batch, rules.batch_sharding(self.mesh))

  def put_rows(self, tree: Any) -> Any:
    """Makes global arrays of a tree of whole [N, …] arrays; N is split like a batch's rows."""
    sharding = rules.row_sharding(self.mesh)
    return jax.tree.map(lambda x: hosts.from_whole(x, sharding), tree)


def open_session(run: cfg.Run, workdir: Path, resolved_text: str, *,
                 data: loader.Prepared | None = None, data_dir: Path | None = None,
                 allow: frozenset[str] = frozenset(),
                 tokenizer: tokenizers.Tokenizer | None = None) -> Session:
  """Opens the mesh and the data, checking that they and the model fit together.

  Args:
    run, workdir, resolved_text, allow: the fields of `Session`.
    data: data that are already open; None prepares the run's own, unless it learns from games.
    data_dir: where prepared data are kept if `Data.cache_dir` is empty; None takes `data` in the
      work directory.
    tokenizer: that of the policy that the run starts from, for `PolicyTokenizer`.

  Raises:
    UserError: the mesh does not divide a size, the model's vocabulary is too small, the data cannot
      be read, or every token is banned.
  """
  mesh = make_mesh(run.mesh)
  rules.check_divides(run, mesh)
  if not isinstance(run.data, cfg.Data):
    return Session(run, workdir, resolved_text, mesh, None, allow)
  if data is None:
    data = _prepare(run, workdir, data_dir or workdir / 'data', tokenizer)
  if data.tokenizer.vocab_size > run.model.vocab_size:
    raise UserError(
        f'The tokenizer has {data.tokenizer.vocab_size} tokens but Model.vocab_size = '
        f'{run.model.vocab_size}: set it to at least {data.tokenizer.vocab_size}.')
  return Session(_drawing_tokens(run, data), workdir, resolved_text, mesh, data, allow)


def making(run: cfg.Run, data: cfg.Data, workdir: Path,
           tokenizer: tokenizers.Tokenizer | None) -> build.Making:
  """What the examples of a run are made of.

  Args:
    run: the run, whose objective says what an example is.
    data: the settings of data, which may be others than the run's.
    workdir: the run's work directory.
    tokenizer: the tokenizer of the run's policy, for `PolicyTokenizer`.
  """
  takes = data.tokenizer == cfg.PolicyTokenizer()
  examples = run.objective.examples or 'documents'
  folder = None if examples == 'documents' else places.carried(run, workdir)
  return build.Making(examples, tokenizer if takes else None,
                      None if folder is None else chat_files.read(folder))


def _prepare(run: cfg.Run, workdir: Path, directory: Path,
             tokenizer: tokenizers.Tokenizer | None) -> loader.Prepared:
  """The run's prepared data; if its texts are gone, the prepared data of its checkpoint."""
  try:
    return loader.prepare(run.data, directory, making(run, run.data, workdir, tokenizer))
  except MissingFileError:
    if checkpoint.steps(workdir / CHECKPOINTS):
      _, extras = checkpoint.read_extras(workdir / CHECKPOINTS)
      prepared = _prepared_before(run.data, workdir, extras, run.objective.examples)
      if prepared is not None:
        print(f'note: the texts are not there; the examples prepared from them in '
              f'{prepared.directory} are.', flush=True)
        return prepared
    raise


def _prepared_before(data: cfg.Data, workdir: Path, extras: Mapping[str, Any],
                     examples: cfg.Examples | None) -> loader.Prepared | None:
  """The prepared data of a checkpoint if they are where they were or moved with `workdir`."""
  paths = extras.get('data', {})
  for directory in (workdir / paths['relative'], Path(paths['absolute'])) if paths else ():
    if build.is_prepared(directory, data, examples):
      return loader.open_prepared(directory)
  return None


def policy_data(run: cfg.Run, workdir: Path, extras: Mapping[str, Any]) -> loader.Prepared:
  """The tokenizer of a trained policy, with its data, which are opened when they are asked for.

  Args:
    run: the settings of the policy's run.
    workdir: the work directory of that run.
    extras: the extras of the policy's checkpoint.

  Raises:
    UserError: the tokenizer is damaged, or not the one that the checkpoint was trained with.
  """
  directory = workdir / TOKENIZER

  @functools.cache
  def data() -> loader.Prepared:
    base = workdir / 'data'
    # A run without examples of its own has those of the policy that it starts from.
    for name in run.objective.policy_fields[:1] if run.objective.examples is None else ():
      base = places.policy(getattr(run.objective, name), workdir, name) / 'data'
    ours = places.with_own_tokenizer(run.data, workdir)
    prepared = _prepared_before(ours, workdir, extras, run.objective.examples)
    if prepared is None:
      own = tokenizers.load(directory) if ours.tokenizer == cfg.PolicyTokenizer() else None
      prepared = loader.prepare(ours, base, making(run, ours, workdir, own))
    check_tokenizer(prepared, extras['tokenizer'], workdir)
    return prepared

  if not directory.is_dir():  # Earlier versions kept the tokenizer only with the data.
    return data()
  tokenizer = tokenizers.load(directory)
  opened = loader.Prepared(tokenizer, directory, lambda: (data().train, data().validation))
  check_tokenizer(opened, extras['tokenizer'], workdir)
  return opened


def _drawing_tokens(run: cfg.Run, data: loader.Prepared) -> cfg.Run:
  """The settings with a sampler that never draws an id without a token.

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
    data: the data with the tokenizer.
    saved: the tokenizer's fingerprint in the checkpoint.
    workdir: the work directory of the checkpoint.

  Raises:
    UserError: the fingerprints differ.
  """
  if saved != data.tokenizer.fingerprint:
    raise UserError(
        f'The tokenizer in {data.directory} ({data.tokenizer.fingerprint[:12]}) is not the one '
        f'that the model in {workdir} was trained with ({saved[:12]}): use the same Data '
        'settings, or a new --workdir.')
