"""What may differ between a run so far and the run that goes on from its checkpoint.

A checkpoint knows the settings and the surroundings it was made with. Every difference is
printed by its dotted name. Whether the run goes on is decided by one table: what only carries
out, watches or keeps the run may change freely; what names data by a place is checked by the
data's content instead; some settings a state cannot outlive; and all others change the numbers
of the steps to come, so that they need leave by name (`--allow_changes Cosine.peak_rate`).
"""

import ast
from collections.abc import Iterable, Mapping
import dataclasses
import importlib.metadata
import os
from pathlib import Path
import platform
from typing import Any, NamedTuple

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.errors import UserError

# Change how a run is carried out, watched and kept: its numbers stay the same up to rounding.
FREE = frozenset((
    'Train.num_steps',  # later steps follow the schedule of the new length
    'Train.accumulation', 'Train.log_every', 'Train.eval_every', 'Train.eval_batches',
    'Train.tensorboard',
    'Checkpoint.every', 'Checkpoint.keep', 'Checkpoint.keep_every',
    'Mesh.data', 'Mesh.fsdp', 'Mesh.tensor', 'Mesh.context',
    'Compute.remat', 'Compute.unroll', 'Compute.loss_chunk',
    'Data.cache_dir', 'Data.num_workers',
    'RL.eval_problems', 'RPT.eval_positions', 'RPT.difficulty',
    'Rollouts.dump_every', 'Rollouts.mismatch_gate', 'VerifierPool.num_workers'))
# Say where data lie or how examples are made of them. The examples themselves are compared by
# their digest, the tokenizer by its fingerprint, the start policy by its weights.
BY_CONTENT = frozenset((
    'Data.source', 'Data.tokenizer', 'Data.seq_len', 'Data.validation_fraction',
    'Data.validation_glob', 'Data.long_documents', 'PythonStdlib.max_bytes', 'TextFiles.glob',
    'TextFiles.document_start', 'Jsonl.glob', 'Jsonl.text_field', 'Parquet.glob',
    'Parquet.column', 'ArrayRecord.glob', 'ArrayRecord.feature', 'Seqio.name', 'Seqio.module',
    'Seqio.feature', 'Demonstrations.source', 'TrainedBPE.vocab_size',
    'HuggingFaceTokenizer.path', 'HuggingFaceTokenizer.end_of_text',
    'HuggingFaceTokenizer.begin_of_text', 'SentencePiece.path', 'SentencePiece.has_begin',
    'JsonlProblems.glob', 'RPT.start_from', 'RPT.proxy_from', 'RL.start_from'))
# Settings of the model that leave the arrays of its state as they are. All others decide which
# arrays there are, so that no state of one value goes on with another.
SAME_ARRAYS = frozenset((
    'Model.rope_theta', 'Model.activation', 'Model.norm_epsilon', 'Model.quant'))
FIXED_MODEL = frozenset(f'Model.{field.name}' for field in dataclasses.fields(cfg.Model)
                        ) - SAME_ARRAYS
# These decide the order of the examples too.
FIXED = FIXED_MODEL | {'Run.seed', 'Train.batch_size', 'Rollouts.num_prompts',
                       'RPT.positions_per_document'}

ANY = '*'  # leave for every setting that needs one


class Difference(NamedTuple):
  """A setting by its dotted name, as gin text before and now; '(unset)' where it was not."""

  name: str
  before: str
  now: str

  def __str__(self) -> str:
    return f'{self.name} {self.before} → {self.now}'


# --- Settings -------------------------------------------------------------------


def _bindings(text: str) -> dict[str, str]:
  """{'Cosine.peak_rate': '0.01', …} of a resolved text, which has one setting a line."""
  lines = (line.partition(' = ') for line in text.splitlines())
  return {name.replace('cfg.', ''): value for name, equals, value in lines if equals}


def _owner(name: str) -> str:
  return name.rpartition('.')[0]


def _value(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text  # a reference such as @cfg.Cosine()


def _default(name: str) -> Any:
  """The default of a setting; the class itself, which equals nothing, where it has none."""
  owner, _, field = name.rpartition('.')
  kind = vars(cfg).get(owner.rpartition('/')[2])
  if kind is None or not dataclasses.is_dataclass(kind):
    return Difference
  found = {f.name: f for f in dataclasses.fields(kind)}[field]
  if found.default_factory is not dataclasses.MISSING:
    return f'@cfg.{type(found.default_factory()).__name__}()'
  return Difference if found.default is dataclasses.MISSING else found.default


def differences(before: str, now: str) -> list[Difference]:
  """The settings in which two resolved texts differ.

  Of two types chosen for one field only the choice is named, not the fields of either. A
  setting that an earlier version did not have yet differs only if it is not at its default.
  """
  old, new = _bindings(before), _bindings(now)
  owners = {_owner(name) for name in old}
  found = []
  for name, value in new.items():
    if name in old:
      if old[name] != value and _value(old[name]) != _value(value):
        found.append(Difference(name, old[name], value))
    elif _owner(name) in owners and _value(value) != _default(name):
      found.append(Difference(name, '(unset)', value))
  return found


def check_allowed(names: Iterable[str]) -> frozenset[str]:
  """The names that `--allow_changes` gives leave for; none of them means all.

  Raises:
    UserError: a name that no setting has, or one that cannot change within a run.
  """
  allowed = frozenset(names) or frozenset((ANY,))
  for name in sorted(allowed - {ANY, metrics.FILE}):
    owner, _, field = name.rpartition('.')
    kind = vars(cfg).get(owner.rpartition('/')[2])
    known = kind is not None and dataclasses.is_dataclass(kind) and field in {
        f.name for f in dataclasses.fields(kind)}
    if not known:
      raise UserError(f'--allow_changes {name}: there is no such setting; write it as in '
                      'config.gin without cfg., e.g. Cosine.peak_rate.')
    if name in FIXED:
      raise UserError(f'--allow_changes {name}: no run goes on with another {name}; use a new '
                      '--workdir.')
  return allowed


def may_differ(name: str, allowed: frozenset[str]) -> bool:
  """Whether there is leave for `name`."""
  return not allowed.isdisjoint((name, ANY))


def check_settings(found: Iterable[Difference], allowed: frozenset[str], where: str) -> None:
  """Refuses a resume whose numbers would be those of another run.

  Args:
    found: what differs.
    allowed: names that may; ANY stands for all.
    where: the checkpoint in words.

  Raises:
    UserError: names every setting in the way, with both values.
  """
  found = list(found)
  model = [d for d in found if d.name in FIXED_MODEL]
  fixed = model or [d for d in found if d.name in FIXED]
  if fixed:
    what = 'another model' if model else 'another run'
    differing = ', '.join(f'{d.name} is {d.before} in the checkpoint and {d.now} in this run'
                          for d in fixed)
    raise UserError(f'{where} belongs to {what}: {differing}; use the settings it was trained '
                    'with, or another work directory.')
  asked = [d for d in found if d.name not in FREE | BY_CONTENT
           and not may_differ(d.name, allowed)]
  if asked:
    raise UserError(
        f'{where} was made with other settings ({", ".join(map(str, asked))}), and going on would '
        'change the numbers: use those it was trained with, choose another work directory, or add '
        f'--allow_changes {" ".join(d.name for d in asked)}.')


# --- Surroundings ---------------------------------------------------------------


def environment(devices: list[jax.Device]) -> dict[str, Any]:
  """All that a step's last bits depend on beside the settings: what else would give others."""
  return {
      'device': devices[0].device_kind,
      'devices': len(devices),
      'hosts': jax.process_count(),
      **(_cpu() if devices[0].platform == 'cpu' else {}),
      'platform_version': devices[0].client.platform_version,
      'jax': importlib.metadata.version('jax'),
      'jaxlib': importlib.metadata.version('jaxlib'),
      'XLA_FLAGS': ' '.join(sorted(os.environ.get('XLA_FLAGS', '').split())),
      'LIBTPU_INIT_ARGS': os.environ.get('LIBTPU_INIT_ARGS', ''),
  }


def _cpu() -> dict[str, Any]:
  """XLA's CPU splits sums among its threads and compiles for the processor's own vectors."""
  threads = os.environ.get('NPROC') or str(len(os.sched_getaffinity(0)))
  return {'CPU threads': int(threads) if threads.isdigit() else threads, 'CPU': _processor()}


def _processor() -> str:
  try:
    lines = Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
  except OSError:
    return platform.processor()
  return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
              platform.processor())


def describe_environment(before: Mapping[str, Any], now: Mapping[str, Any], step: int
                         ) -> str | None:
  """One sentence on what differs from the surroundings of the checkpoint, if anything does."""
  changed = [f'{name} {before[name]!r}, now {now.get(name)!r}'
             for name in before if before[name] != now.get(name)]
  if not changed:
    return None
  return (f'note: checkpoint {step} was made in other surroundings ({"; ".join(changed)}): the '
          'examples stay the same, the last bits of the numbers may not.')
