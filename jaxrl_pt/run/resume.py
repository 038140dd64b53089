"""Which settings may differ between a checkpoint and the run that resumes from it.

A checkpoint holds the settings and the surroundings that it was made with, and a resume prints
every difference by its dotted name. Settings are of four kinds:

- `FREE` settings say how a run is carried out, watched and kept, and may change.
- `BY_CONTENT` settings say where data lie; the content of the data is compared instead.
- `FIXED` settings cannot change, because no state of one value goes on with another.
- All other settings change the numbers of later steps, and may change only if the user allows it by
  name (`--allow_changes Cosine.peak_rate`).
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

# Settings that say how a run is carried out, watched and kept. Its numbers stay the same up to
# rounding.
FREE = frozenset((
    'Train.num_steps',  # later steps follow the schedule of the new length
    'Train.accumulation', 'Train.group_parts', 'Train.log_every', 'Train.eval_every',
    'Train.eval_batches', 'Train.tensorboard',
    'Checkpoint.every', 'Checkpoint.keep', 'Checkpoint.keep_every',
    'Mesh.data', 'Mesh.fsdp', 'Mesh.tensor', 'Mesh.context',
    'Compute.remat', 'Compute.unroll', 'Compute.loss_chunk',
    'Data.cache_dir', 'Data.num_workers', 'Mixture.names',
    'RL.eval_problems', 'RPT.eval_positions', 'RPT.difficulty', 'HybridModes.think_end',
    'Rollouts.dump_every', 'Rollouts.mismatch_gate', 'VerifierPool.num_workers',
    'Diffusion.sampling_steps', 'Flow.sampling_shift',
    'JudgeGuard.window', 'JudgeGuard.threshold', 'JudgeGuard.stop'))
# Settings that say where data lie or how examples are made of them. The examples themselves are
# compared by their digest, the tokenizer by its fingerprint, the start policy by its parameters.
BY_CONTENT = frozenset((
    'Data.source', 'Data.tokenizer', 'Data.seq_len', 'Data.validation_fraction',
    'Data.validation_glob', 'Data.long_documents', 'PythonStdlib.max_bytes', 'TextFiles.glob',
    'TextFiles.document_start', 'Jsonl.glob', 'Jsonl.text_field', 'Parquet.glob',
    'Parquet.column', 'ArrayRecord.glob', 'ArrayRecord.feature', 'HuggingFaceDataset.path',
    'HuggingFaceDataset.split', 'HuggingFaceDataset.column', 'Seqio.name', 'Seqio.module',
    'Seqio.feature', 'Mixture.sources', 'Conversations.glob', 'WeightedConversations.sources',
    'WeightedConversations.weights', 'Demonstrations.source', 'TrainedBPE.vocab_size',
    'HuggingFaceTokenizer.path', 'HuggingFaceTokenizer.end_of_text',
    'HuggingFaceTokenizer.begin_of_text', 'SentencePiece.path', 'SentencePiece.has_begin',
    'JsonlProblems.glob', 'JudgeReward.judge_from', 'RPT.start_from', 'RPT.proxy_from',
    'RL.start_from', 'Diffusion.vae_from',
    'SFT.start_from', 'DPO.start_from', 'RewardModel.start_from', 'Preferences.glob',
    'SlipPreferences.source', 'ResultPreferences.source', 'JudgePairs.source',
    *(f'HybridConversations.{f.name}' for f in dataclasses.fields(cfg.HybridConversations))))
# Settings of the model that leave the arrays of its state as they are. All others decide which
# arrays there are, so that no state of one value goes on with another.
SAME_ARRAYS = frozenset((
    'Model.rope_theta', 'Model.rope', 'Model.activation', 'Model.norm_epsilon', 'Model.quant',
    'DiT.quant', 'DiT.conditions', 'VAE.offset', 'VAE.scale'))
FIXED_MODEL = frozenset(f'{kind.__name__}.{field.name}' for kind in (
    cfg.Model, cfg.DiT, cfg.FrameHistory, cfg.Recurrent, cfg.VAE, cfg.LogicNet)
                        for field in dataclasses.fields(kind)
                        ) - SAME_ARRAYS | {'LoRA.rank', 'LoRA.projections'}
# Settings that no run can change: the state would have other arrays, or the examples another order.
FIXED = FIXED_MODEL | {'Run.seed', 'Train.batch_size', 'Mixture.weights', 'Rollouts.num_prompts',
                       'RPT.positions_per_document'}

ANY = '*'  # in place of a name: every setting that may differ only with leave


class Difference(NamedTuple):
  """A setting whose value in the checkpoint differs from this run's."""

  name: str  # dotted
  before: str  # as gin text, or '(unset)' if the checkpoint has no such setting
  now: str  # as gin text

  def __str__(self) -> str:
    return f'{self.name} {self.before} → {self.now}'


# --- Settings -------------------------------------------------------------------


def _bindings(text: str) -> dict[str, str]:
  """{'Cosine.peak_rate': '0.01', …} of settings as gin text with one setting a line."""
  lines = (line.partition(' = ') for line in text.splitlines())
  return {name.replace('cfg.', ''): value for name, equals, value in lines if equals}


def _owner(name: str) -> str:
  """The type whose field a dotted name is: 'Cosine' of 'Cosine.peak_rate'."""
  return name.rpartition('.')[0]


def _value(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text  # gin's reference to a type, such as @cfg.Cosine()


def _default(name: str) -> Any:
  """The default of a setting; if it has none, the class Difference, which equals no value."""
  owner, _, field = name.rpartition('.')
  kind = vars(cfg).get(owner.rpartition('/')[2])
  if kind is None or not dataclasses.is_dataclass(kind):
    return Difference
  spec = {f.name: f for f in dataclasses.fields(kind)}[field]
  if spec.default_factory is not dataclasses.MISSING:
    return f'@cfg.{type(spec.default_factory()).__name__}()'
  return Difference if spec.default is dataclasses.MISSING else spec.default


def differences(before: str, now: str) -> list[Difference]:
  """The settings in which two gin texts differ.

  If a field holds another type than before, only that field is named, and not the fields of either
  type. A setting that an earlier version did not have differs only if it is not at its default.

  Args:
    before: the checkpoint's settings.
    now: this run's settings.
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
  """The settings that `--allow_changes` lets differ.

  Args:
    names: the flag's values; none of them stands for all settings.

  Raises:
    UserError: there is no such setting, or it cannot change within a run.
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
  """Whether `allowed` lets the setting `name` differ."""
  return not allowed.isdisjoint((name, ANY))


def check_settings(changes: Iterable[Difference], allowed: frozenset[str], where: str) -> None:
  """Refuses a resume whose numbers would be those of another run.

  Args:
    changes: the settings that differ.
    allowed: names of settings that may differ; ANY stands for all.
    where: the checkpoint in words, for messages.

  Raises:
    UserError: names every setting that must not differ, with both values.
  """
  changes = list(changes)
  model = [d for d in changes if d.name in FIXED_MODEL]
  fixed = model or [d for d in changes if d.name in FIXED]
  if fixed:
    what = 'another model' if model else 'another run'
    differing = ', '.join(f'{d.name} is {d.before} in the checkpoint and {d.now} in this run'
                          for d in fixed)
    raise UserError(f'{where} belongs to {what}: {differing}; use the settings it was trained '
                    'with, or another work directory.')
  refused = [d for d in changes if d.name not in FREE | BY_CONTENT
             and not may_differ(d.name, allowed)]
  if refused:
    settings = ', '.join(map(str, refused))
    raise UserError(
        f'{where} was made with other settings ({settings}), and going on would '
        'change the numbers: use those it was trained with, choose another work directory, or add '
        f'--allow_changes {" ".join(d.name for d in refused)}.')


# --- Surroundings ---------------------------------------------------------------


def environment(devices: list[jax.Device]) -> dict[str, Any]:
  """The surroundings of a run: all that a step's last bits depend on besides the settings."""
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
  """Threads and processor, since XLA splits sums among threads and compiles for the processor."""
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
  """One sentence on what differs from the surroundings of the checkpoint; None if nothing does."""
  changed = [f'{name} {before[name]!r}, now {now.get(name)!r}'
             for name in before if before[name] != now.get(name)]
  if not changed:
    return None
  return (f'note: checkpoint {step} was made in other surroundings ({"; ".join(changed)}): the '
          'examples stay the same, the last bits of the numbers may not.')
