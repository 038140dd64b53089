"""The layer rule: who may import whom, by reading the imports, and the soft size limits."""

import ast
from collections.abc import Iterator
import importlib.util
from pathlib import Path
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'jaxrl_pt'
KERNELS = ROOT / 'pallas_kernels'

# layer → the other layers of jaxrl_pt that it may import. A layer is a module or a folder
# directly below the package. What is not listed here fails until it finds its place.
_BASE = {'config', 'errors', 'files', 'types'}
_MODEL = _BASE | {'params', 'nn', 'parallel', 'models'}
_DRAWN = _MODEL | {'checksum', 'rl', 'sampling', 'token_bytes', 'verifiers'}
_TRAINED = _DRAWN | {'diffusion', 'train'}
_FILES = {'checkpoint', 'data', 'events', 'gin_bindings', 'metrics', 'report'}
_RUN = _TRAINED | _FILES | {'run'}
_EVERYTHING = _RUN | {'environments', 'game', 'interop', 'jobs', 'rollouts', 'scaling', 'serving',
                      'tpu'}
ALLOWED: dict[str, set[str]] = {
    'errors': set(),
    'files': {'errors'},
    'events': {'files'},
    'types': set(),
    'token_bytes': {'types'},
    'config': {'errors'},
    'params': {'types'},
    'gin_bindings': {'config', 'errors'},
    'nn': _BASE,
    'parallel': _BASE | {'params', 'nn', 'models'},
    'models': _BASE | {'params', 'nn'},
    'sampling': _MODEL | {'checksum', 'token_bytes'},
    'serving': _BASE | {'data', 'sampling', 'verifiers'},
    'rl': {'types', 'config', 'errors'},
    'verifiers': {'types', 'config', 'errors', 'token_bytes'},
    'data': _MODEL | {'checksum'},
    'checksum': {'types'},
    'checkpoint': _BASE | {'checksum'},
    'metrics': _BASE | {'events'},
    'report': _BASE | {'metrics'},
    'interop': _MODEL,
    'diffusion': _MODEL,
    'train': _DRAWN | {'diffusion'},
    'run': _TRAINED | _FILES | {'serving'},
    'environments': _RUN | {'serving'},
    'rollouts': _RUN | {'environments'},
    'jobs': _RUN | {'environments', 'game', 'rollouts'},
    'tpu': _EVERYTHING,
    'scaling': _EVERYTHING,
    'game': _MODEL | {'data', 'diffusion', 'sampling', 'verifiers', 'rl'},
    'quickstart': _EVERYTHING,
    'doctor': _EVERYTHING,
    'frontends': _EVERYTHING,
    'exchange': _EVERYTHING,
    'evaluation': _EVERYTHING,
    'playing': _EVERYTHING | {'evaluation'},
    'methods': {'rl'},
    'flag_types': {'errors'},
    'game_flags': {'flag_types'},
    'spatial_flags': {'flag_types'},
    'flags': {'flag_types', 'game_flags', 'spatial_flags'},
    'main': _EVERYTHING | {'methods', 'quickstart', 'doctor', 'frontends', 'exchange',
                           'evaluation', 'flags', 'playing'},
}
# Only here may the state of the process change: these names must not be called elsewhere.
PROCESS_STATE = ('jax.config.update', 'jax.distributed.initialize', 'os.environ.setdefault',
                 'os.environ.update', 'os.environ.pop', 'os.putenv', 'os.chdir', 'sys.exit')
# Soft limits, and the good reasons that beat them.
MAX_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_FIELDS = 12
EXCEPTIONS = {
    'jaxrl_pt/main.py': 'the flags and the one function of every command',
    'jaxrl_pt/gin_bindings.py': 'reads, checks and prints one language, and alone imports gin',
    'jaxrl_pt/tpu/hlo.py': 'one parser and the few questions put to what it reads',
    'Engine': 'each is a size or a switch of one compiled program, whatever the others are',
    'Model': 'the last five fields are there for imported models only',
}

FILES = sorted([*PACKAGE.rglob('*.py'), *KERNELS.rglob('*.py')])


def _name(path: Path) -> str:
  return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
  return ast.parse(path.read_text(encoding='utf-8'), str(path))


def _imports(path: Path) -> Iterator[str]:
  """Dotted names of all that a file imports, wherever in it; `from a import b` gives a.b."""
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{_name(path)}: write absolute imports'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _layer(path: Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def _violations(path: Path) -> list[str]:
  layer = _layer(path)
  if layer == '__init__':
    return [f'jaxrl_pt/__init__.py imports {n}' for n in _imports(path) if 'jaxrl_pt' in n]
  allowed = ALLOWED.get(layer)
  if allowed is None:
    return [f'{layer} has no place in the table of layers']
  used = {name.split('.')[1] for name in _imports(path) if name.startswith('jaxrl_pt.')}
  return [f'{layer} imports {other}' for other in sorted(used - allowed - {layer})]


@pytest.mark.parametrize('path', [p for p in FILES if PACKAGE in p.parents], ids=_name)
def test_imports_only_layers_below(path):
  assert _violations(path) == []


def test_the_rule_catches_each_kind_of_import(tmp_path, monkeypatch):
  monkeypatch.setattr(f'{__name__}.PACKAGE', tmp_path)
  (tmp_path / 'rl').mkdir()
  path = tmp_path / 'rl' / 'bad.py'
  for line in ('import jaxrl_pt.models.transformer', 'from jaxrl_pt.models import base',
               'from jaxrl_pt import models', 'def f():\n  from jaxrl_pt.models.base import Model'):
    path.write_text(line)
    assert _violations(path) == ['rl imports models'], line
  path.write_text('from jaxrl_pt.rl import advantages\nfrom jaxrl_pt.types import Rollout')
  assert _violations(path) == []


def test_layers_form_no_cycle():
  def reach(layer: str, seen: tuple[str, ...]) -> None:
    assert layer not in seen, ' → '.join((*seen, layer))
    for other in ALLOWED[layer] & below:
      reach(other, (*seen, layer))

  below = set(ALLOWED) - {'tpu', 'scaling'}
  for layer in below:
    others = ALLOWED[layer] - {layer}
    for other in others & below:
      reach(other, (layer,))


def test_only_open_asks_which_objective_a_run_has():
  """A new objective is a config type and a file in jobs/, which open.py names."""
  askers = {_name(path) for path in FILES if PACKAGE / 'config' not in path.parents
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.Match) and ast.unparse(node.subject).endswith('objective')}
  assert askers == {'jaxrl_pt/jobs/open.py'}


SCRIPTS = sorted([*(ROOT / 'experiments').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')])


@pytest.mark.parametrize('path', SCRIPTS, ids=_name)
def test_what_a_script_imports_of_the_package_is_there(path):
  """Scripts run seldom, and a name that moved would be missed when somebody needs it."""
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.ImportFrom) and node.module and (
        node.module.split('.')[0] in ('jaxrl_pt', 'pallas_kernels')):
      module = importlib.import_module(node.module)
      for alias in node.names:
        assert hasattr(module, alias.name) or importlib.util.find_spec(
            f'{node.module}.{alias.name}'), f'{_name(path)}:{node.lineno}'


def test_nothing_imports_main():
  assert [_name(p) for p in FILES if 'jaxrl_pt.main' in set(_imports(p))] == []


def test_only_gin_bindings_imports_gin():
  importers = [_name(p) for p in FILES
               if any(n.split('.')[0] == 'gin' for n in _imports(p))]
  assert importers == ['jaxrl_pt/gin_bindings.py']


def test_kernels_import_only_jax_numpy_and_the_standard_library():
  allowed = {'jax', 'numpy', 'pallas_kernels'} | set(sys.stdlib_module_names)
  for path in FILES:
    if KERNELS in path.parents:
      assert {n.split('.')[0] for n in _imports(path)} <= allowed, _name(path)


def test_the_product_never_imports_the_references():
  # `export --verify` is there to compare with them.
  for path in set(FILES) - {PACKAGE / 'interop' / 'verify.py'}:
    roots = {n.split('.')[0] for n in _imports(path)}
    assert not roots & {'torch', 'transformers', 'pytest', 'hypothesis', 'tests'}, _name(path)


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_only_main_touches_process_state(path):
  # The sandbox is entered by a process that was forked for it. The package itself sets what
  # libtpu reads when JAX first looks for devices, which is before any function of it can be
  # called by a library's user.
  if path in (PACKAGE / 'main.py', PACKAGE / '__init__.py', PACKAGE / 'verifiers' / 'sandbox.py',
              PACKAGE / 'verifiers' / 'isolated.py'):
    return
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Call):
      assert ast.unparse(node.func) not in PROCESS_STATE, f'{_name(path)}:{node.lineno}'
    if isinstance(node, (ast.Assign, ast.Delete, ast.AugAssign)):
      targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
      assert not any(ast.unparse(t).startswith('os.environ') for t in targets), (
          f'{_name(path)}:{node.lineno}')


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_soft_limits(path):
  """A file, a function and a config dataclass stay small; a kernel's body may be long."""
  num_lines = len(path.read_text(encoding='utf-8').splitlines())
  assert num_lines <= MAX_LINES or _name(path) in EXCEPTIONS, f'{num_lines} lines'
  for node in ast.walk(_tree(path)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and KERNELS not in path.parents:
      first = node.body[1 if ast.get_docstring(node) and node.body[1:] else 0]
      num_lines = (node.end_lineno or 0) - first.lineno + 1
      assert num_lines <= MAX_FUNCTION_LINES, f'{node.name}: {num_lines} lines'


def test_config_dataclasses_stay_small():
  for node in [n for path in (PACKAGE / 'config').glob('*.py') for n in _tree(path).body]:
    if isinstance(node, ast.ClassDef):
      num_fields = sum(isinstance(n, ast.AnnAssign) and 'ClassVar' not in ast.unparse(n.annotation)
                       for n in node.body)
      assert num_fields <= MAX_FIELDS or node.name in EXCEPTIONS, node.name
