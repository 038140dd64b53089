"""Jinja2's sandbox as `transformers` sets it up, with bounds on a template's time and memory.

A chat template comes with a model, from wherever that was fetched, and is a program. The sandbox
keeps it from Python's internals. Here it is also stopped where it computes for too long: each pass
of a loop, each call and each filter looks at the processor time of the thread. And everything that
it makes (texts, lists) is weighed, before it is made where one operation could make much from
little, so that memory stays bounded too. Filters and methods that no chat template needs and that
could not be bounded so are not there.
"""

from collections.abc import Callable, Iterable
import datetime
import functools
import json
import re
import time
from types import CodeType
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, runtime, sandbox

MOST_SECONDS = 5.0  # of processor time
MOST_SIZE = 10_000_000  # characters and elements of everything that one rendering makes
_MOST_ARGUMENT = 1000  # of an integer that a filter gets
_MOST_BITS = 10_000  # of an integer

_FILTERS = (
    'abs', 'capitalize', 'count', 'd', 'default', 'dictsort', 'e', 'escape', 'first', 'float',
    'int', 'items', 'last', 'length', 'list', 'lower', 'map', 'max', 'min', 'reject', 'rejectattr',
    'reverse', 'round', 'safe', 'select', 'selectattr', 'sort', 'title', 'trim', 'unique', 'upper')
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset((
        'capitalize', 'count', 'endswith', 'find', 'index', 'isalnum', 'isalpha', 'isdigit',
        'islower', 'isspace', 'isupper', 'join', 'lower', 'lstrip', 'partition', 'removeprefix',
        'removesuffix', 'replace', 'rfind', 'rpartition', 'rsplit', 'rstrip', 'split', 'splitlines',
        'startswith', 'strip', 'title', 'upper')),
    dict: frozenset(('get', 'items', 'keys', 'values')),
    list: frozenset(('count', 'index')),
    tuple: frozenset(('count', 'index')),
    int: frozenset(), float: frozenset(), bytes: frozenset()}
# Filters that only code rewritten by `chat_marks` calls: no template can spell these names.
STEP, MADE, JOINED = 'step!', 'made!', 'joined!'


class TooMuch(jinja2.TemplateRuntimeError):
  """A template computes for too long or makes too much."""


class _Namespace(jinja2.utils.Namespace):
  """Jinja's namespace without names that Python or Jinja could give a meaning to."""

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith('_'):
      raise jinja2.exceptions.SecurityError(f'the name {name!r} of a namespace begins with "_"')
    super().__setitem__(name, value)


class _Generation(ext.Extension):
  """The tag `generation`, by which templates mark what the assistant writes; it changes no text."""

  tags = {'generation'}

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


@jinja2.pass_environment
def _printed(environment: 'Sandbox', value: Any) -> str:
  return environment.text(value)


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
  """The environment of one rendering, which counts what that has used."""

  intercepted_binops = frozenset(('+', '*', '**', '%'))

  def __init__(self, now: datetime.datetime | None = None) -> None:
    """Starts to count.

    Args:
      now: the moment that `strftime_now` writes; None takes the clock's.
    """
    # Nothing is computed while a template is compiled, when nothing would stop it.
    super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0,
                     finalize=_printed, extensions=[_Generation, ext.loopcontrols])
    self.concat = self.joined  # type: ignore[method-assign] # Jinja reads it so
    own: dict[str, Callable[..., Any]] = {
        'tojson': self._json, 'string': self.text, 'replace': self._replaced,
        'join': lambda values, separator='': self.joined(values, self.text(separator)),
        JOINED: self.joined, MADE: self.made, STEP: self.step}
    self.filters = own | {name: self._guarded(self.filters[name]) for name in _FILTERS}
    self.globals = {
        'range': self._range, 'dict': lambda *args, **kwargs: dict(*args, **kwargs),
        'namespace': self._namespace, 'raise_exception': _raise,
        'strftime_now': lambda form: (now or datetime.datetime.now()).strftime(form),
        'cycler': self.globals['cycler'], 'joiner': self.globals['joiner']}
    self._end = time.thread_time() + MOST_SECONDS
    self._size = 0

  def render(self, code: CodeType, variables: dict[str, Any]) -> str:
    """The text that a compiled template writes.

    Raises:
      Exception: whatever the template does wrong; RecursionError and MemoryError among it.
    """
    template = jinja2.Template.from_code(self, code, self.make_globals(None))
    return self.joined(template.generate(**variables))

  # --- Bounds -----------------------------------------------------------------------

  def step(self, value: Any = True) -> Any:
    """Notes that the template goes on, and gives `value` back."""
    if time.thread_time() > self._end:
      raise TooMuch(f'it computes for more than {MOST_SECONDS:g} seconds')
    return value

  def spend(self, size: int) -> None:
    """Counts characters or elements that are about to be made."""
    self.step()
    self._size += size
    if self._size > MOST_SIZE:
      raise TooMuch(f'it makes more than {MOST_SIZE:,} characters')

  def made(self, value: Any) -> Any:
    """Counts a value, with all that it holds, and gives it back."""
    if isinstance(value, str):
      self.spend(len(value))
    elif isinstance(value, (list, tuple, dict)):
      self.spend(self._weight(value))
    return value

  def _weight(self, value: Any, *, is_plain: bool = False) -> int:
    """Characters and elements of a value; what it holds twice counts twice, as when it is written.

    Args:
      value: anything.
      is_plain: whether objects that are no JSON are refused.
    """
    left, weight = [value], 0
    while left:
      one = left.pop()
      weight += 1
      if isinstance(one, dict):
        left += [*one.keys(), *one.values()]
      elif isinstance(one, (list, tuple)):
        left += one
      elif isinstance(one, (str, range)):
        weight += len(one)
      elif is_plain and not isinstance(one, (int, float, runtime.Undefined, type(None))):
        raise jinja2.TemplateRuntimeError(f'it writes a {type(one).__name__}, which is no text')
      if weight + self._size > MOST_SIZE:
        raise TooMuch(f'it makes more than {MOST_SIZE:,} characters')
    return weight

  # --- What Jinja calls -------------------------------------------------------------

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    """Whether a template may read an attribute: of plain values only the listed methods."""
    for kind, names in _METHODS.items():
      if isinstance(obj, kind):
        return attr in names
    return super().is_safe_attribute(obj, attr, value)

  def wrap_str_format(self, value: Any) -> None:
    """Gives no safe form of `str.format`, whose widths have no bound: it is refused."""

  def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
    """Stops a template that reads what it must not, also where it would not use it."""
    raise jinja2.exceptions.SecurityError(
        f'the attribute {attribute!r} of a {type(obj).__name__}')

  def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a macro, function or method; the names leave the template's keywords free."""
    __self.step()
    owner, name = getattr(__obj, '__self__', None), getattr(__obj, '__name__', '')
    if isinstance(owner, str) and name == 'join':
      return __self.joined(args[0], owner)
    if isinstance(owner, str) and name == 'replace':
      return __self._replaced(owner, *args)
    return __self.made(super().call(__context, __obj, *args, **kwargs))

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    """An arithmetic operation, after a look at how much it would make."""
    self.step()
    sized = (str, list, tuple)
    if operator == '*':
      for one, number in ((left, right), (right, left)):
        if isinstance(one, sized) and isinstance(number, int):
          self.spend(self._weight(one) * max(number, 0))
    if isinstance(left, int) and isinstance(right, int):
      bits = {'*': left.bit_length() + right.bit_length(),
              '**': left.bit_length() * abs(right)}.get(operator, 0)
      if bits > _MOST_BITS:
        raise TooMuch(f'it makes an integer of more than {_MOST_BITS:,} bits')
    if operator == '%' and isinstance(left, str):
      self._weight(right, is_plain=True)
      if re.search(r'\*|\d{4}', left):
        raise TooMuch(f'it formats by {left[:40]!r}, a width of no bound')
    return self.made(super().call_binop(context, operator, left, right))

  def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that counts what it reads and makes."""
    @functools.wraps(function)  # with the mark by which Jinja gives it more than the value
    def guarded(*args: Any, **kwargs: Any) -> Any:
      self.spend(sum(len(value) for value in args
                     if isinstance(value, (str, list, tuple, dict, range))))
      for value in (*args[1:], *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MOST_ARGUMENT:
          raise TooMuch(f'it gives a filter the number {value}')
      return self.made(function(*args, **kwargs))
    return guarded

  # --- Functions and filters --------------------------------------------------------

  def text(self, value: Any) -> str:
    """The text of a value as Python writes it."""
    if isinstance(value, str):
      return value
    self._weight(value, is_plain=True)
    return str(value)

  def joined(self, values: Iterable[Any], separator: str = '') -> str:
    """The texts of values one after the other; they are counted before they are joined."""
    texts: list[str] = []
    for value in values:
      texts.append(self.text(value))
      self.spend(len(texts[-1]) + len(separator))
    return separator.join(texts)

  def _replaced(self, value: Any, old: str, new: str, count: int = -1) -> str:
    text = self.text(value)
    found = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    self.spend(len(text) + found * len(new))
    return text.replace(old, new, -1 if count is None else count)

  def _json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    if isinstance(indent, int) and indent > _MOST_ARGUMENT:
      raise TooMuch(f'it indents JSON by {indent}')
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                               sort_keys=sort_keys)
    self._weight(value)
    return self.joined(encoder.iterencode(value))

  def _range(self, *args: int) -> range:
    numbers = range(*args)
    if len(numbers) > sandbox.MAX_RANGE:
      raise TooMuch(f'it asks for a range of more than {sandbox.MAX_RANGE:,} numbers')
    return numbers

  def _namespace(self, *args: Any, **kwargs: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*args, **kwargs).items():
      namespace[name] = value
    return namespace


def _raise(message: Any) -> NoReturn:
  raise jinja2.TemplateRuntimeError(str(message))
