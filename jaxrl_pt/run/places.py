"""Where a run's files are, in whatever directory a command runs and wherever the run was moved."""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from jaxrl_pt.data import token_table

CONFIG = 'config.gin'
TOKENIZER = 'tokenizer'
CHECKPOINTS = 'checkpoints'
# What a work directory of an imported model keeps of the folder it came from, and where.
CARRIED = 'huggingface'
SMALL_FILES = ('config.json', 'generation_config.json', 'tokenizer_config.json',
               'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
               'chat_template.jinja')

# The settings that are paths.
_PATHS: dict[type, tuple[str, ...]] = {
    cfg.TextFiles: ('glob',), cfg.Jsonl: ('glob',), cfg.Parquet: ('glob',),
    cfg.ArrayRecord: ('glob',), cfg.Conversations: ('glob',), cfg.Preferences: ('glob',),
    cfg.HybridConversations: ('glob', 'evaluation_glob'),
    cfg.JsonlProblems: ('glob',), cfg.SentencePiece: ('path',),
    cfg.HuggingFaceDataset: ('path',), cfg.JudgeReward: ('judge_from',),
    cfg.InsideModel: ('model_from',),
    cfg.HuggingFaceTokenizer: ('path',), cfg.Data: ('validation_glob', 'cache_dir'),
    **{kind: kind.policy_fields for kind in get_args(cfg.Objective)}}


def absolute(value: Any) -> Any:
  """The settings with every path made absolute, so that they mean the same in any directory.

  Args:
    value: a `cfg.Run`, or the value of one of its fields.
  """
  if isinstance(value, tuple):
    return tuple(map(absolute, value))
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return value
  changes = {f.name: absolute(getattr(value, f.name)) for f in dataclasses.fields(value)}
  for name in _PATHS.get(type(value), ()):
    if changes[name]:  # An empty text stands for no path.
      changes[name] = os.path.join(os.getcwd(), os.path.expanduser(changes[name]))
  return dataclasses.replace(value, **changes)


def with_own_tokenizer(data: cfg.Data, workdir: Path) -> cfg.Data:
  """The data with the copy of the tokenizer in `workdir`, if its own file is not there.

  The one file that a work directory keeps of a tokenizer is the file that the tokenizer was made
  from, so that a directory that was moved, or whose tokenizer has gone, can still read other text.
  """
  match data.tokenizer:
    case cfg.HuggingFaceTokenizer(path=path) | cfg.SentencePiece(path=path):
      copies = [workdir / TOKENIZER / name for name in token_table.DEFINITION.values()]
      copy = next((c for c in copies if c.is_file()), None)
      if copy is not None and not Path(path).expanduser().exists():
        tokenizer = dataclasses.replace(data.tokenizer, path=str(copy.absolute()))
        return dataclasses.replace(data, tokenizer=tokenizer)
  return data


def carried(run: cfg.Run, workdir: Path) -> Path | None:
  """The folder with the chat template and the other small files of a Hugging Face model, if any.

  A run that starts from a policy has those of that policy, until it has a copy of its own.
  """
  folders = [workdir / CARRIED]
  for name in run.objective.policy_fields[:1]:
    if getattr(run.objective, name):
      folders.append(policy(getattr(run.objective, name), workdir, name) / CARRIED)
  return next((folder for folder in folders if folder.is_dir()), None)


def policies(run: cfg.Run, workdir: Path) -> dict[str, str]:
  """{'start_from': path relative to `workdir`, …}: where the policies are that a run reads."""
  given = {name: getattr(run.objective, name) for name in run.objective.policy_fields}
  for judge in cfg.judge_of(run.objective):
    given['judge_from'] = judge.judge_from
  for place in cfg.place_of(run.objective):
    given['model_from'] = place.model_from
  return {name: os.path.relpath(policy(text, workdir, name), workdir)
          for name, text in given.items() if text}


def policy(given: str, workdir: Path, name: str) -> Path:
  """The work directory of a policy that the run in `workdir` reads.

  If the path in the settings leads nowhere, the relative path in the run's newest checkpoint is
  taken, which still holds when both directories were moved together.

  Args:
    given: the path in the settings.
    workdir: the work directory of the run that reads the policy.
    name: the setting's name, such as 'start_from'.
  """
  path = Path(given).expanduser()
  if not (path / CONFIG).is_file() and checkpoint.steps(workdir / CHECKPOINTS):
    _, extras = checkpoint.read_extras(workdir / CHECKPOINTS)
    moved = extras.get('policies', {}).get(name)
    if moved and (workdir / moved / CONFIG).is_file():
      return Path(os.path.normpath(workdir.absolute() / moved))
  return path
