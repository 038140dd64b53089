"""The settings that a run takes from the policy it starts from, for `train --start_from`."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

from jaxrl_pt import checkpoint, gin_bindings
from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.run import places


def bindings(workdir: Path, gin_files: list[str], given: list[str]) -> list[str]:
  """Gin statements that make a run start from a policy, to stand between its files and bindings.

  They name the policy, and take its model's shape and its tokenizer from the record of its newest
  checkpoint; `Model.param_dtype` stays the run's own, and so do its data, where it names any. A
  supervised stage has data of its own and reads the policy's tokenizer itself.

  Args:
    workdir: the work directory of the policy.
    gin_files, given: the files and bindings of the run.

  Raises:
    UserError: no such policy, or the run's objective starts from none.
  """
  if not (workdir / places.CONFIG).is_file():
    raise UserError(f'--start_from {workdir} holds no config.gin: give the work directory of a '
                    'trained or imported model.')
  parsed = gin_bindings.parse(gin_files, given)
  # A value that chooses a type is written @cfg.Type().
  chosen = [repr(b.value).rpartition('cfg.')[2].removesuffix('()') for b in parsed
            if b.name == 'cfg.Run.objective']
  starting = {kind.__name__: kind for kind in get_args(cfg.Objective)
              if 'start_from' in kind.policy_fields}
  if not chosen or chosen[-1] not in starting:
    said = f'@cfg.{chosen[-1]}()' if chosen else 'none'
    raise UserError(f'--start_from needs a run that starts from a policy, and Run.objective is '
                    f'{said}: choose one of {", ".join(sorted(starting))}.')
  step, extras = checkpoint.read_extras(workdir / places.CHECKPOINTS)
  run, _ = gin_bindings.load([], [gin_bindings.current_names(extras['config'])])
  run = dataclasses.replace(run, model=cfg.model_at(run, step))
  types, owners = _types(run.model), [('Run', 'model')]
  if starting[chosen[-1]].examples is not None:
    pass  # Its data are its own, and Data.tokenizer = @cfg.PolicyTokenizer() names the policy's.
  elif any(b.name == 'cfg.Run.data' for b in parsed):
    types |= _types(run.data.tokenizer)
    owners.append(('Data', 'tokenizer'))
  else:
    types |= _types(run.data)
    owners.append(('Run', 'data'))
  taken = [line for line in gin_bindings.dump(places.absolute(run)).splitlines()
           if line.startswith('cfg.') and _is_taken(line, types, owners)]
  return [*taken, f'cfg.{chosen[-1]}.start_from = {str(workdir)!r}']


def _is_taken(line: str, types: set[str], owners: list[tuple[str, str]]) -> bool:
  name, field = line.split(' = ', 1)[0].split('.')[1:3]
  if (name, field) == ('Model', 'param_dtype'):
    return False
  return name in types or (name, field) in owners


def _types(value: Any) -> set[str]:
  """The names of the types of a setting and of all that it holds."""
  if not dataclasses.is_dataclass(value):
    return set()
  return {type(value).__name__}.union(
      *(_types(getattr(value, field.name)) for field in dataclasses.fields(value)))
