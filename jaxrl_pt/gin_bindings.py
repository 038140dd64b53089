"""Builds one `config.Run`, or another type, from gin files; the only module that imports gin.

Only fields of the dataclasses of `config` can be bound, as `cfg.<Type>.<field>`, and a method is
chosen by choosing a type: `cfg.Run.objective = @cfg.RPT()`. Where a run holds two values of one
type, a scope tells them apart: `@strict/cfg.MathVerifier()` with
`strict/cfg.MathVerifier.answer = 'gsm8k'`. This module reads the files itself, so that it can name
every mistake with its file and line. gin then builds the value and is cleared, so that no global
setting outlives `load`. Imports are refused.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import contextlib
import dataclasses
from dataclasses import dataclass
import difflib
import io
import itertools
import math
from pathlib import Path
import re
import sysconfig
import tokenize
from typing import Any, NoReturn, TypeVar

import gin
from gin import config_parser
from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError

_TYPES: dict[str, type] = {
    value.__name__: value for value in vars(cfg).values()
    if isinstance(value, type) and dataclasses.is_dataclass(value)}
for _type in _TYPES.values():
  gin.register(_type, module='cfg')

Value = TypeVar('Value')

# Names of settings in earlier versions, and their names now.
_RENAMED = {
    'Constant.peak': 'ConstantRate.learning_rate', 'Constant': 'ConstantRate',
    'Cosine.peak': 'Cosine.peak_rate', 'Cosine.end': 'Cosine.end_rate',
    'WSD.peak': 'WSD.peak_rate', 'WSD.end': 'WSD.end_rate',
    'TwoStage.peak': 'TwoStage.peak_rate', 'TwoStage.second_peak': 'TwoStage.second_peak_rate',
    'TwoStage.end': 'TwoStage.end_rate', 'Every': 'RefreshEvery', 'Never': 'RefreshNever'}
_REQUIRED = 'gin.REQUIRED'
_COMMAND_LINE = '--gin_bindings'
# Folders of the shipped gin files: beside the package of a checkout, or where an installation puts
# data files.
_SHIPPED = (Path(__file__).resolve().parent.parent,
            Path(sysconfig.get_path('data')) / 'share' / 'jaxrl_pt')


# --- Statements -------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
  """`@cfg.Type()` or, with a scope, `@scope/cfg.Type()`; without () where not `evaluate`."""

  type_name: str
  evaluate: bool
  scope: str = ''

  def __repr__(self) -> str:
    return f'@{_prefix(self.scope)}cfg.{self.type_name}' + ('()' if self.evaluate else '')


@dataclass(frozen=True)
class _Macro:
  """`%name`."""

  name: str

  def __repr__(self) -> str:
    return f'%{self.name}'


@dataclass(frozen=True)
class _Binding:
  """A statement `<scope>/cfg.<owner>.<field> = value`, or a macro where `owner` is empty."""

  owner: str
  field: str
  value: Any
  where: str
  scope: str = ''

  @property
  def name(self) -> str:
    return f'{_prefix(self.scope)}cfg.{self.owner}.{self.field}' if self.owner else self.field


class _Delegate(config_parser.ParserDelegate):
  """Keeps references and macros as written, so that they can be checked and printed."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
    scope, name = _scope_and_type(scoped_configurable_name)
    return _Reference(name, evaluate, scope)

  def macro(self, macro_name: str) -> _Macro:
    return _Macro(macro_name)


def _close(name: str, options: Iterable[str], otherwise: str, prefix: str = '') -> str:
  """A sentence with the options that are close to a mistaken name, or else with all of them."""
  options = sorted(options)
  near = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
  if near:
    return 'did you mean ' + ' or '.join(prefix + option for option in near) + '?'
  return f'{otherwise} ' + ', '.join(prefix + option for option in options) + '.'


def _check_name(name: str) -> None:
  if name in _RENAMED:
    raise UserError(f'cfg.{name} is called cfg.{_RENAMED[name]} now: write that.')


def current_names(text: str) -> str:
  """The resolved text of an earlier version, as checkpoints hold it, with the names of now."""
  for old, new in _RENAMED.items():
    text = re.sub(rf'(^|[/@])cfg\.{re.escape(old)}\b', rf'\1cfg.{new}', text, flags=re.MULTILINE)
  return text


def _prefix(scope: str) -> str:
  return f'{scope}/' if scope else ''


def _scope_and_type(selector: str) -> tuple[str, str]:
  """`cfg.Model` or `Model` → ('', 'Model'); `mine/cfg.Model` → ('mine', 'Model')."""
  scope, _, selector = selector.rpartition('/')
  if '/' in scope:
    raise UserError(f'{scope + "/" + selector!r} has a scope in a scope: give the value one name, '
                    f'as in {scope.replace("/", "_")}/{selector}.')
  name = selector.removeprefix('cfg.')
  _check_name(name)
  if name not in _TYPES:
    raise UserError(f'There is no setting type {selector!r}: '
                    + _close(name, _TYPES, 'there are', 'cfg.'))
  return scope, name


def _find(name: str, including: Path | None) -> Path:
  """The path of the gin file `name`.

  It is searched for in the folders above the including file, in the working directory, and among
  the shipped files.
  """
  if '\0' in name:
    raise UserError(f'{name!r} is not a file name.')
  path = Path(name).expanduser()
  if path.is_absolute():
    candidates = [path]
  else:
    above = list(including.resolve().parents) if including else []
    candidates = [folder / path for folder in (*above, Path.cwd(), *_SHIPPED)]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  shipped = [p.relative_to(root).as_posix() for root in _SHIPPED
             for p in (root / 'gin').rglob('*.gin')]
  near = difflib.get_close_matches(path.as_posix(), sorted(set(shipped)), n=3)
  hint = 'did you mean ' + ' or '.join(near) + '?' if near else (
      'give a path below the working directory, an absolute one, or a shipped gin/run/*.gin.')
  raise UserError(f'There is no gin file {name}: {hint}')


def _read(path: Path) -> str:
  try:
    return path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as e:
    raise UserError(f'{path} is not UTF-8 text (byte {e.start}): give a gin file.') from e
  except OSError as e:
    raise UserError(f'{path} cannot be read ({e.strerror}): check the path and its '
                    'permissions.') from e


def _at(label: str, line: int) -> str:
  return label if label == _COMMAND_LINE else f'{label} line {line}'


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """Puts `where` before the message of a UserError that is raised inside."""
  try:
    yield
  except UserError as e:
    raise UserError(f'{where}: {e}') from e


def _statements(text: str, label: str) -> Iterator[tuple[Any, str]]:
  """Yields gin's statements, each with its file and line."""
  parser: Iterator[Any] | None = None
  line = 1
  while True:
    try:
      parser = parser or config_parser.ConfigParser(io.StringIO(text), _Delegate())
      statement = next(parser, None)
    except UserError as e:
      message, *appended = str(e).split('\n')  # gin has appended the line number.
      found = re.search(r' line (\d+)', ' '.join(appended))
      raise UserError(f'{_at(label, int(found[1]) if found else line)}: {message}') from e
    except (RecursionError, MemoryError) as e:
      raise UserError(f'{_at(label, line)}: a value is nested too deeply: no setting holds more '
                      'than lists of lists.') from e
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError) as e:
      reason = str(e.args[0] if e.args else e).split('\n')[-1].strip().rstrip('.')
      line = e.lineno or line if isinstance(e, SyntaxError) else line
      raise UserError(f'{_at(label, line)}: this is not gin ({reason}); write '
                      'cfg.Type.field = value, with strings in quotes.') from e
    if statement is None:
      return
    line = statement.location.line_num
    yield statement, _at(label, line)


def _parse(text: str, label: str, path: Path | None, stack: tuple[Path, ...]
           ) -> Iterator[_Binding]:
  """Yields the bindings of `text` in order, with those of included files in the places of these."""
  for statement, where in _statements(text, label):
    match statement:
      case config_parser.IncludeStatement(filename=name):
        with _named(where):
          included = _find(name, path)
          if included.resolve() in stack:
            raise UserError(f'{name} includes itself: remove one of the include lines.')
        yield from _parse_file(name, included, stack)
        continue
      case config_parser.ImportStatement():
        raise UserError(f'{where}: a run cannot import Python modules; remove the line.')
    with _named(where):
      match statement:
        case config_parser.BindingStatement():
          binding = _checked(statement, where)
          _check_writable(binding)
          yield binding
        case config_parser.BlockDeclaration(scope=scope, selector=selector):
          _scope_and_type(_prefix(scope) + selector)


def _parse_file(name: str, path: Path, stack: tuple[Path, ...]) -> Iterator[_Binding]:
  yield from _parse(_read(path), name, path, (*stack, path.resolve()))


def _checked(statement: config_parser.BindingStatement, where: str) -> _Binding:
  if not statement.arg_name:
    if statement.scope:
      raise UserError(f'{statement.scope}/{statement.selector} is a macro with a scope: write '
                      f'{statement.selector} = value.')
    return _Binding('', statement.selector, statement.value, where)
  _check_name(f'{statement.selector.removeprefix("cfg.")}.{statement.arg_name}')
  scope, owner = _scope_and_type(_prefix(statement.scope) + statement.selector)
  fields = [f.name for f in dataclasses.fields(_TYPES[owner])]
  if statement.arg_name not in fields:
    raise UserError(f'cfg.{owner} has no field {statement.arg_name!r}: '
                    + (_close(statement.arg_name, fields, 'it has') if fields else 'it has none.'))
  return _Binding(owner, statement.arg_name, statement.value, where, scope)


def _check_writable(binding: _Binding) -> None:
  """Refuses numbers that could not be written as gin again."""
  for leaf in _leaves(binding.value):
    if isinstance(leaf, float) and not math.isfinite(leaf):
      raise UserError(f'{binding.name} holds a number beyond what 64 bits can express: write a '
                      'smaller one.')
    if isinstance(leaf, int) and leaf.bit_length() > 1000:
      raise UserError(f'{binding.name} holds a whole number of {leaf.bit_length()} bits: no '
                      'setting takes one so large.')


# --- Which bindings a run reads ---------------------------------------------------


def _leaves(value: Any) -> Iterator[Any]:
  if isinstance(value, Mapping):
    value = [*value.keys(), *value.values()]
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from _leaves(item)
  else:
    yield value


def _read_names(final: Iterable[_Binding], root: type) -> set[str]:
  """Names of the bindings that building a value of type `root` reads.

  As in gin, a value in a scope reads the bindings of this scope and, for the fields that these
  leave out, the bindings without a scope.
  """
  by_owner: dict[tuple[str, str], dict[str, _Binding]] = {}
  for binding in final:
    owner = binding.owner or f'%{binding.field}'
    by_owner.setdefault((binding.scope, owner), {})[binding.field] = binding
  names: set[str] = set()
  seen: set[tuple[str, str]] = set()
  todo = [('', root.__name__)]
  while todo:
    node = todo.pop()
    if node in seen:
      continue
    seen.add(node)
    scope, owner = node
    for binding in {**by_owner.get(('', owner), {}), **by_owner.get(node, {})}.values():
      names.add(binding.name)
      # In gin a macro is also a scope, with the macro's name, for what its value holds.
      inner = scope if binding.owner else binding.field
      for leaf in _leaves(binding.value):
        match leaf:
          case _Reference(type_name=name, scope=explicit):
            todo.append((explicit or inner, name))
          case _Macro(name=name):
            todo.append(('', f'%{name}'))
  return names


def _live(bindings: list[_Binding], root: type) -> tuple[list[_Binding], list[_Binding]]:
  """The bindings that the run reads, and those that a later choice of a type has made void.

  If a type was chosen and later replaced (`schedule = @cfg.WSD()`, then `@cfg.Cosine()`), the
  bindings of the first type are void if they were made before the replacement.

  Raises:
    UserError: a binding is not read, and would not have been read when it was made.
  """
  final = _final(bindings)
  live = _read_names(final, root)
  kept = [b for b in final if b.name in live]
  dropped = [b for b in final if b.name not in live]
  dead = [b for b in dropped if not _was_live(b, bindings, root)]
  if dead:
    names = ', '.join(f'{b.name} ({b.where})' for b in dead)
    first = dead[0]
    chosen = f'@{_prefix(first.scope)}cfg.{first.owner}()'
    mend = f'choose {chosen} somewhere or remove the binding' if first.owner else 'remove it'
    raise UserError(f'Nothing reads {names}: {mend}.')
  return kept, dropped


def _final(bindings: Iterable[_Binding]) -> list[_Binding]:
  return list({binding.name: binding for binding in bindings}.values())


def _was_live(binding: _Binding, bindings: list[_Binding], root: type) -> bool:
  """Whether the run, cut off at or after this binding, would have read it."""
  made = max(i for i, b in enumerate(bindings) if b.name == binding.name)
  return any(binding.name in _read_names(_final(bindings[:end]), root)
             for end in range(made + 1, len(bindings) + 1))


def _check_values(bindings: list[_Binding]) -> None:
  """Checks that all macros are set and no required value is missing.

  Raises:
    UserError: a macro or a required value is missing.
  """
  macros = {b.field for b in bindings if not b.owner}
  for binding in bindings:
    for leaf in _leaves(binding.value):
      if leaf == _Macro(_REQUIRED):
        raise UserError(f'{binding.name} has no value yet ({binding.where}): add '
                        f'--gin_bindings "{binding.name} = …".')
      if isinstance(leaf, _Macro) and leaf.name not in macros:
        near = difflib.get_close_matches(leaf.name, sorted(macros), n=1)
        hint = f'did you mean %{near[0]}?' if near else f'write {leaf.name} = value first.'
        raise UserError(f'{binding.name} uses %{leaf.name}, which is not set '
                        f'({binding.where}): {hint}')


# --- Build ------------------------------------------------------------------------


def _build(bindings: list[_Binding], root: type[Value]) -> Value:
  where: dict[str, list[str]] = {}
  for b in bindings:
    where.setdefault(f'{b.owner}.{b.field}', []).append(b.where)
  gin.clear_config()
  try:
    gin.parse_config([f'{b.name} = {b.value!r}' for b in bindings])
    value = gin.get_configurable(root)()
  except UserError as e:
    message = str(e).split('\n')[0]  # The other lines are gin's, about its place in the tree.
    # With scopes a field may be bound in several places, of which the value tells the right one.
    exact = [b.where for b in bindings if message.startswith(f'{b.owner}.{b.field} = {b.value!r}:')]
    origin = ' or '.join(exact or where.get(message.split(' ')[0], ()))
    raise UserError(f'{origin}: {message}' if origin else message) from e
  except TypeError as e:
    _raise_missing(e)
  except RecursionError as e:
    raise UserError('The settings contain a type that refers to itself through @cfg.…(): '
                    'look for a field set to its own type.') from e
  finally:
    gin.clear_config()
  assert isinstance(value, root)
  return value


def _raise_missing(error: TypeError) -> NoReturn:
  """Turns Python's error about a missing argument into a UserError of one sentence."""
  found = re.match(r'(?:cfg\.)?(\w+)\.__(?:init|new)__\(\) missing .* arguments?: (.*)',
                   str(error).split('\n')[0])
  if not found:
    raise error
  fields = re.findall(r"'(\w+)'", found[2])
  names = ', '.join(f'cfg.{found[1]}.{field}' for field in fields)
  them = 'it' if len(fields) == 1 else 'them'
  raise UserError(f'{names} must be set: bind {them} in a gin file or with '
                  f'--gin_bindings.') from error


def _without_texts(bindings: list[_Binding]) -> list[_Binding]:
  """The bindings with a placeholder for required texts (paths, names of data) that are missing."""
  def is_text(binding: _Binding) -> bool:
    fields = dataclasses.fields(_TYPES[binding.owner]) if binding.owner else ()
    return any(f.name == binding.field and f.type is str for f in fields)

  return [dataclasses.replace(b, value='placeholder')
          if b.value == _Macro(_REQUIRED) and is_text(b) else b for b in bindings]


def parse(gin_files: Iterable[str], bindings: Iterable[str]) -> list[_Binding]:
  """The bindings of some gin files, and of statements that come after them."""
  parsed: list[_Binding] = []
  for name in gin_files:
    parsed += _parse_file(str(name), _find(str(name), None), ())
  for text in bindings:
    parsed += _parse(text, _COMMAND_LINE, None, ())
  return parsed


def binds(name: str, gin_files: Iterable[str], bindings: Iterable[str]) -> bool:
  """Whether a setting, such as 'Run.objective', or any of a type, such as 'Run', is bound."""
  return any(name in (b.owner, f'{b.owner}.{b.field}') for b in parse(gin_files, bindings))


def load_value(root: type[Value], gin_files: Iterable[str], bindings: Iterable[str],
               first: Iterable[str] = ()) -> Value:
  """Builds a value of a type of `config` that is no run, such as the settings of one command.

  Args:
    root: the type.
    gin_files, bindings: as in `resolve`.
    first: gin statements that come before the files.

  Raises:
    UserError: as in `resolve`.
  """
  kept, _ = _live([*parse((), first), *parse(gin_files, bindings)], root)
  _check_values(kept)
  return _build(kept, root)


def resolve(gin_files: Iterable[str], bindings: Iterable[str], *, without_data: bool = False
            ) -> tuple[cfg.Run, tuple[str, ...]]:
  """Builds the run of some gin files and bindings.

  Args:
    gin_files: paths: absolute, below the working directory, or of shipped files (`gin/run/…`).
    bindings: gin statements that come after the files, e.g. 'cfg.Train.num_steps = 10'.
    without_data: whether required paths and names may be missing, since nothing will be opened.

  Returns:
    The run, and the names of the bindings that a later choice of a type has made void.

  Raises:
    UserError: an unknown name, a wrong value, a missing required value, a binding that nothing
      reads, or an unreadable file; the message names file and line.
  """
  parsed = parse(gin_files, bindings)
  if not parsed:
    raise UserError('No settings given: add --gin_file gin/run/pretrain_tiny.gin or another '
                    'run file.')
  kept, dropped = _live(parsed, cfg.Run)
  if without_data:
    kept = _without_texts(kept)
  _check_values(kept)
  return _build(kept, cfg.Run), tuple(b.name for b in dropped)


def load(gin_files: Iterable[str], bindings: Iterable[str]) -> tuple[cfg.Run, str]:
  """Builds the run of some gin files and bindings.

  Args:
    gin_files: paths: absolute, below the working directory, or of shipped files (`gin/run/…`).
    bindings: gin statements that come after the files.

  Returns:
    The run, and its resolved text: every field as gin, so that loading the text alone
    gives an equal run whatever the defaults have become.

  Raises:
    UserError: a mistake in the settings, as in `resolve`.
  """
  run, _ = resolve(gin_files, bindings)
  return run, dump(run)


def dump(run: cfg.Run) -> str:
  """The run as gin text: one line for each field, defaults included, types in order of first use.

  Of several values of one type the first has no scope. Each other value has a scope with the name
  of the field that holds it and, if the field is a collection, with its place: the third verifier
  of `Composite.verifiers` is `verifiers_3/cfg.MathVerifier`. Loading the text gives an equal run.
  Names of scopes in gin files are not kept.
  """
  known: list[tuple[_Reference, Any]] = []
  todo: list[tuple[_Reference, Any]] = []

  def reference(value: Any, place: str) -> _Reference:
    name = type(value).__name__
    same = [(found, other) for found, other in known if found.type_name == name]
    for found, other in same:
      if other == value:
        return found
    scope = _unused(place, {found.scope for found, _ in known}) if same else ''
    known.append((_Reference(name, evaluate=True, scope=scope), value))
    todo.append(known[-1])
    return known[-1][0]

  def text(value: Any, place: str) -> str:
    if dataclasses.is_dataclass(value):
      return repr(reference(value, place))
    if isinstance(value, Mapping):
      items = [f'{text(key, place)}: {text(x, f"{place}_{i}")}'
               for i, (key, x) in enumerate(value.items(), 1)]
      return f'{{{", ".join(items)}}}'
    if isinstance(value, (tuple, list)):
      items = [text(x, f'{place}_{i}') for i, x in enumerate(value, 1)]
      return f'({", ".join(items)}{"," if len(items) == 1 else ""})'
    # A subclass, such as NumPy's float64, prints itself in a way that gin does not know.
    plain = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return repr(plain(value) if plain else value)

  reference(run, '')
  blocks: list[str] = []
  while todo:
    found, owner = todo.pop(0)
    prefix = f'{_prefix(found.scope)}cfg.{found.type_name}'
    lines = [f'{prefix}.{field.name} = {text(getattr(owner, field.name), field.name)}'
             for field in dataclasses.fields(owner)]
    blocks += ['\n'.join(lines) + '\n'] if lines else []
  return '\n'.join(blocks)


def _unused(name: str, taken: Collection[str]) -> str:
  """The name, or the name with a number if it is taken.

  Each scope must belong to one value, whatever its type: in gin a scope also holds for the values
  inside its value.
  """
  numbered = (f'{name}_{i}' for i in itertools.count(2))
  return name if name not in taken else next(n for n in numbered if n not in taken)
