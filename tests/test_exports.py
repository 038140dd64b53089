"""`cfg` is exactly what the modules of `config` define: no list of exports is kept by hand."""

import ast
from collections.abc import Iterator
import importlib
from pathlib import Path
import types

import pytest

from jaxrl_pt import config as cfg

FOLDER = Path(cfg.__file__).parent
# The package itself, and what its modules share but no run holds.
APART = {'__init__', 'checks'}
MODULES = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem not in APART)


def defined(text: str) -> Iterator[str]:
  """Public names that a module's text defines, which are not those that it imports."""
  for node in ast.parse(text).body:
    match node:
      case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
        names = [name]
      case ast.Assign(targets=targets):
        names = [target.id for target in targets if isinstance(target, ast.Name)]
      case ast.AnnAssign(target=ast.Name(id=name)):
        names = [name]
      case _:
        names = []
    yield from (name for name in names if not name.startswith('_'))


def names(module: str) -> list[str]:
  return list(defined((FOLDER / f'{module}.py').read_text(encoding='utf-8')))


@pytest.mark.parametrize('module', MODULES)
def test_every_name_of_a_module_is_exported(module):
  found = importlib.import_module(f'jaxrl_pt.config.{module}')
  assert names(module)
  for name in names(module):
    assert getattr(cfg, name) is getattr(found, name), f'cfg.{name}'


def test_no_two_modules_define_one_name():
  everything = [name for module in MODULES for name in names(module)]
  assert len(everything) > 100 and sorted(everything) == sorted(set(everything))


def test_no_name_of_a_setting_hides_a_module():
  assert all(isinstance(getattr(cfg, module), types.ModuleType) for module in MODULES)


def test_what_counts_as_defined():
  text = 'import os\nfrom a import b\nclass C: x = 1\nD = E = 2\nf: int = 3\n_g = 4\ndef h(): pass'
  assert list(defined(text)) == ['C', 'D', 'E', 'f', 'h']
