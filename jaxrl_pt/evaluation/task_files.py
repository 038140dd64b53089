"""Which tasks of lm-eval run: those that need no code but lm-eval's own and no network.

A task is a YAML file. It can name Python functions (`!function file.name`), classes, metrics that
the library `evaluate` fetches as scripts, and data sets by the name of a repository. The rule:

- Code that runs is code of the installed package lm_eval. Its own tasks may name functions that
  lie in its own folder. The files of `--include_path` may name functions by their place in that
  package (`!function lm_eval.tasks.wikitext.preprocess_wikitext.process_results`) and no others.
- Templates are rendered in Jinja2's sandbox.
- Nothing is fetched. The files of `--include_path` read JSON, CSV, text, Parquet or Arrow files.
  lm-eval's own tasks find their data in the cache of the library `datasets`, or not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
import difflib
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import sandbox
import lm_eval
from lm_eval import utils
from lm_eval.api import metrics as _registers_metrics  # noqa: F401
from lm_eval.api import registry
from lm_eval.tasks import TaskManager
import yaml

from jaxrl_pt.errors import UserError

_OWN = Path(lm_eval.__file__).resolve().parent
_FUNCTION, _OWN_FUNCTIONS = '!function', 'lm_eval.tasks.'
BUILDERS = ('json', 'csv', 'text', 'parquet', 'arrow')
# Settings that run code or read other files, which only lm-eval's own tasks may have.
_REFUSED = ('class', 'custom_dataset', 'use_prompt')


class Function(str):
  """The place of a Python function, which is not imported."""


class _Loader(yaml.SafeLoader):
  """Reads a task's file without running anything."""


_Loader.add_constructor(_FUNCTION, lambda loader, node: Function(node.value))


def manager_of(names: Sequence[str], include_path: Path | None) -> TaskManager:
  """The index of tasks in which all names are found, once all their files have been checked.

  Args:
    names: names of tasks, groups or tags.
    include_path: a folder with YAML files; None for lm-eval's own tasks alone.

  Raises:
    UserError: a name is not known, a file is no task, or a task needs foreign code or the network.
  """
  if include_path is not None and not include_path.is_dir():
    raise UserError(f'--include_path {include_path} is no folder: give the one with the tasks\' '
                    'YAML files.')
  found = TaskManager(include_path=include_path, include_defaults=False)
  if not set(names) <= set(found.all_tasks):
    if include_path is not None:  # The index leaves out, without a word, what it cannot read.
      indexed = {entry.yaml_path for entry in found.task_index.values()}
      for path in sorted(set(include_path.rglob('*.yaml')) - indexed):
        for name in _included(_read(path)):
          _read(path.parent / name)
    # lm-eval's own files, over ten thousand, take some twenty seconds to read.
    found = TaskManager(include_path=include_path)
  for name in names:
    if name not in found.task_index:
      near = difflib.get_close_matches(name, found.all_tasks, 1)
      hint = f'; did you mean {near[0]!r}' if near else ''
      where = 'lm-eval has none of that name' if include_path is None else (
          f'neither {include_path} nor lm-eval has one')
      raise UserError(f'Unknown task {name!r}: {where}{hint}.')
  for path in dict.fromkeys(_files(names, found.task_index, set())):
    _check_file(path, set())
  return found


def _files(names: Sequence[str], index: Mapping[str, Any], seen: set[str]) -> Iterator[Path]:
  """The files of the named tasks and of all members of groups and tags among them."""
  for name in names:
    if name in seen or name not in index:
      continue
    seen.add(name)
    entry = index[name]
    if entry.yaml_path is None:
      yield from _files(sorted(entry.tags), index, seen)
      continue
    yield entry.yaml_path
    members = (entry.cfg or {}).get('task')
    if isinstance(members, list):
      yield from _files([*_names(members)], index, seen)


def _names(members: Sequence[Any]) -> Iterator[str]:
  for member in members:
    if isinstance(member, str):
      yield member
    elif isinstance(member, dict):
      inner = member.get('task')
      yield from _names(inner) if isinstance(inner, list) else ()
      yield from (x for x in (inner, member.get('group')) if isinstance(x, str))


def _check_file(path: Path, seen: set[Path]) -> bool:
  """Refuses a file that runs foreign code or fetches something, and those that it includes.

  Returns:
    Whether a function of lm-eval's own computes the metrics, which then have any names.
  """
  path = path.resolve()
  if path in seen:
    return False
  seen.add(path)
  content = _read(path)
  found = [_check_file(path.parent / name, seen) for name in _included(content)]
  computes = any(found) or 'process_results' in content
  _check(content, path, computes)
  return computes


def _read(path: Path) -> dict[str, Any]:
  try:
    content = yaml.load(path.read_bytes(), _Loader)
  except (OSError, yaml.YAMLError, ValueError, RecursionError) as e:
    reason = ' '.join(str(e).split())
    raise UserError(f'{path} is no readable task: {reason[:300]}.') from e
  if not isinstance(content, dict):
    raise UserError(f'{path} is no task: write a YAML mapping with the key "task".')
  return content


def _included(content: dict[str, Any]) -> list[str]:
  names = content.get('include', [])
  return [str(name) for name in (names if isinstance(names, list) else [names])]


def _check(value: Any, path: Path, computes: bool) -> None:
  """Refuses settings of one file, however deep they stand."""
  if isinstance(value, Function):
    is_own = value.startswith(_OWN_FUNCTIONS) and not (path.parent / 'lm_eval').exists()
    if not is_own and _OWN not in path.parents:
      raise UserError(f'{path} names the Python function {value}, and only functions of lm-eval\'s '
                      f'own tasks are run: write !function {_OWN_FUNCTIONS}…, or a template.')
  elif isinstance(value, list):
    for item in value:
      _check(item, path, computes)
  elif isinstance(value, dict):
    computes = computes or 'process_results' in value
    for key, item in value.items():
      _check(item, path, computes)
      _check_code(key, item, path, computes)
      if _OWN not in path.parents:
        _check_users_file(key, item, path)


def _check_code(key: Any, value: Any, path: Path, computes: bool) -> None:
  """Refuses what would run generated code, or a script that the library evaluate fetches."""
  if key in ('unsafe_code', 'hf_evaluate') and value:
    raise UserError(f'{path} sets {key}, and no foreign code is run: leave it out.')
  if key == 'metric_list' and isinstance(value, list) and not computes:
    for entry in value:
      name = entry.get('metric') if isinstance(entry, dict) else None
      if not isinstance(name, Function) and name not in registry.metric_registry:
        raise UserError(f'{path}: lm-eval has no metric {name!r} of its own, and the library '
                        'evaluate would fetch a script of that name: choose another.')


def _check_users_file(key: Any, value: Any, path: Path) -> None:
  """Refuses what tasks of `--include_path` must not say and lm-eval's own may."""
  if key in _REFUSED and value:
    raise UserError(f'{path} sets {key}, which would run or read something else: leave it out.')
  if key == 'dataset_path' and value not in BUILDERS:
    raise UserError(f'{path}: dataset_path = {value!r} would be fetched, and tasks of '
                    f'--include_path read local files: write {", ".join(BUILDERS)} and name the '
                    'files in dataset_kwargs.data_files.')
  if key in ('data_files', 'data_dir') and '://' in str(value):
    raise UserError(f'{path}: {key} = {value!r} would be fetched: name local files.')
  if key == 'trust_remote_code' and value:
    raise UserError(f'{path} sets trust_remote_code, and no foreign code is run: leave it out.')


def render_in_sandbox() -> None:
  """Makes lm-eval render its templates in Jinja2's sandbox.

  A template of lm-eval's own environment can reach any object of Python, and so run any code.
  """
  safe = sandbox.ImmutableSandboxedEnvironment(
      loader=jinja2.BaseLoader(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
  safe.filters['regex_replace'] = utils.regex_replace
  utils.env = safe
