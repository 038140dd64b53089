"""Where a run's files are, from whatever directory it is looked at and wherever it was moved."""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg

CONFIG = 'config.gin'
TOKENIZER = 'tokenizer'
CHECKPOINTS = 'checkpoints'

# The settings that are paths.
_PATHS: dict[type, tuple[str, ...]] = {
    cfg.TextFiles: ('glob',), cfg.Jsonl: ('glob',), cfg.Parquet: ('glob',),
    cfg.ArrayRecord: ('glob',), cfg.JsonlProblems: ('glob',), cfg.SentencePiece: ('path',),
    cfg.HuggingFaceTokenizer: ('path',), cfg.Data: ('validation_glob', 'cache_dir'),
    **{kind: kind.policy_fields for kind in get_args(cfg.Objective)}}


def absolute(value: Any) -> Any:
  """The settings with every path made absolute, so that they mean the same from anywhere.

  Args:
    value: a run or a part of it.
  """
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return value
  changes = {f.name: absolute(getattr(value, f.name)) for f in dataclasses.fields(value)}
  for name in _PATHS.get(type(value), ()):
    if changes[name]:  # empty stands for none
      changes[name] = os.path.join(os.getcwd(), os.path.expanduser(changes[name]))
  return dataclasses.replace(value, **changes)


def policies(run: cfg.Run, workdir: Path) -> dict[str, str]:
  """{'start_from': path from `workdir`, …} of the policies that a run reads."""
  given = {name: getattr(run.objective, name) for name in run.objective.policy_fields}
  return {name: os.path.relpath(policy(text, workdir, name), workdir)
          for name, text in given.items() if text}


def policy(given: str, workdir: Path, name: str) -> Path:
  """The work directory of a policy that the run in `workdir` reads.

  Args:
    given: the path in the settings.
    workdir: of the run that reads it; where it has a checkpoint, that knows the way from there to
      the policy, which holds when both were moved together.
    name: of the setting.
  """
  path = Path(given).expanduser()
  if not (path / CONFIG).is_file() and checkpoint.steps(workdir / CHECKPOINTS):
    _, extras = checkpoint.read_extras(workdir / CHECKPOINTS)
    moved = extras.get('policies', {}).get(name)
    if moved and (workdir / moved / CONFIG).is_file():
      return Path(os.path.normpath(workdir.absolute() / moved))
  return path
