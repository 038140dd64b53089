r"""Which answers may reach a scorer that evaluates them.

Some of reasoning-gym's scorers hand the answer to Python's `eval`, or to sympy's `parse_expr`,
which calls `eval` too. A response is hostile: it could compute anything, its own verdict included.
These scorers therefore see an answer only if every token of it is known to be harmless:

    literals     a literal of Python (numbers, strings, lists) and nothing else, for `eval`
    expressions  numbers, + - * / ^ ** ( ) and, where the task has them, commas, variables and
                 the functions below, for `parse_expr`: no attribute, no string, no index, no
                 other name, no power of a power

`evaluating` searches a scorer's code for calls that evaluate text. A task whose scorer has such a
call is refused unless this file knows the task.
"""

import ast
from collections.abc import Callable, Iterator
import functools
import re
import types
from typing import Any

_LITERALS = frozenset({'binary_matrix', 'n_queens', 'spiral_matrix', 'string_insertion'})
_ARITHMETIC = frozenset({'countdown', 'puzzle24'})
_ALGEBRA = frozenset({'intermediate_integration', 'polynomial_multiplication',
                      'simple_integration'})
# Tasks whose scorers evaluate text of the problem, which the library wrote, and never the answer.
_OWN_TEXT = frozenset({'bitwise_arithmetic', 'number_sorting'})
_FUNCTIONS = frozenset({
    'Abs', 'acos', 'acosh', 'acot', 'asin', 'asinh', 'atan', 'atanh', 'cos', 'cosh', 'cot', 'csc',
    'erf', 'exp', 'ln', 'log', 'pi', 'sec', 'sin', 'sinh', 'sqrt', 'tan', 'tanh'})
_TOKEN = re.compile(r'(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)'
                    r'|(?P<name>[A-Za-z][A-Za-z0-9_]*)|(?P<sign>\*\*|[-+*/^(), ])', re.ASCII)
# Letters that an answer may have as names. S, N, O and Q are missing: sympy gives them other uses.
_LETTERS = frozenset('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMPRTUVWXYZ')
_POWER = re.compile(r'\s*(?:\*\*|\^)\s*')
_EXPONENT = re.compile(r'[-+]?(?:[0-9]{1,3}(?:\.[0-9]{1,3})?|[A-Za-z][A-Za-z0-9_]*)(?![\w.])|\(')
_MAX_CHARS, _MAX_NESTING, _MAX_DIGITS, _MAX_EXPONENT_DIGITS = 1000, 30, 100, 5
# Names whose call evaluates text, unpickles it, or starts a process with it.
_EVALUATING = frozenset({'eval', 'exec', '__import__', 'parse_expr', 'sympify', 'lambdify', 'loads',
                         'load', 'system', 'popen', 'Popen', 'check_output', 'run_path', 'unpickle',
                         'import_module', 'parse_latex', 'parse_mathematica'})


def evaluates(task: str) -> bool:
  """Whether the task is known to have a scorer that evaluates answers."""
  return task in _LITERALS or task in _ARITHMETIC or task in _ALGEBRA


def is_admissible(task: str, answer: str, right: str | None) -> bool:
  """Whether the scorer of `task` may see the answer.

  Args:
    task: the task's name in reasoning-gym.
    answer: the answer that the response states.
    right: the library's own answer, whose names are allowed in the stated answer.
  """
  if task in _LITERALS:
    return answer == right or _is_literal(answer)
  if task in _ARITHMETIC:
    return _is_expression(answer, frozenset())
  if task in _ALGEBRA:
    names = re.findall(r'[A-Za-z][A-Za-z0-9_]*', right or '', re.ASCII)
    return _is_expression(answer, _LETTERS | _FUNCTIONS | frozenset(names) - {'lambda'})
  return True


def _is_literal(answer: str) -> bool:
  if len(answer) > 10 * _MAX_CHARS:
    return False
  try:
    ast.literal_eval(answer.strip())
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return False
  return True


def _is_expression(answer: str, names: frozenset[str]) -> bool:
  if len(answer) > _MAX_CHARS or (not names and ',' in answer):
    return False
  place = depth = deepest = 0
  for token in _TOKEN.finditer(answer):
    if token.start() != place:
      return False
    place = token.end()
    number, name = token['number'], token['name']
    if (name and name not in names) or (number and len(number) > _MAX_DIGITS):
      return False
    depth += {'(': 1, ')': -1}.get(token[0], 0)
    deepest = max(deepest, depth)
    if depth < 0:
      return False
  return place == len(answer) and depth == 0 and deepest <= _MAX_NESTING and _has_small_powers(
      answer)


def _has_small_powers(answer: str) -> bool:
  """Whether every exponent is a number of at most three digits, a name, or a bracket of few digits.
  """
  for power in _POWER.finditer(answer):
    exponent = _EXPONENT.match(answer, power.end())
    if exponent is None:
      return False
    end = exponent.end()
    opening = end - 1 if exponent[0] == '(' else end
    if answer[opening:opening + 1] == '(':  # The exponent is a bracket or a function's call.
      end = _closing(answer, opening)
    inside = answer[exponent.start():end]
    is_large = sum(map(str.isdigit, inside)) > _MAX_EXPONENT_DIGITS
    if _POWER.search(inside) or is_large or _POWER.match(answer, end):
      return False
  return True


def _closing(answer: str, opening: int) -> int:
  """The place after the bracket that closes the bracket at `opening`."""
  depth = 0
  for place in range(opening, len(answer)):
    depth += {'(': 1, ')': -1}.get(answer[place], 0)
    if depth == 0:
      return place + 1
  return len(answer)


# --- Which scorers evaluate ---------------------------------------------------------


def refused(task: str, scorer: Callable[..., Any]) -> str | None:
  """Why answers to the task are not verified; None where they are.

  A task is refused if its scorer may evaluate answers that `is_admissible` does not check.
  """
  if evaluates(task) or task in _OWN_TEXT:
    return None
  calls = evaluating(scorer)
  if not calls:
    return None
  return (f'the scorer of the task {task!r} calls {", ".join(sorted(calls))}, which may evaluate '
          'the answer: it is refused')


def evaluating(scorer: Callable[..., Any]) -> set[str]:
  """Names by which a scorer, or a function of its library that it reaches, may evaluate text.

  It reads names in the compiled code, so that it finds too many rather than too few.
  """
  assert isinstance(scorer, types.MethodType)
  owner, start = scorer.__self__, scorer.__func__
  assert isinstance(start, types.FunctionType)
  library = start.__module__.split('.', maxsplit=1)[0]
  seen: set[types.CodeType] = set()
  todo: list[types.FunctionType] = [start]
  found: set[str] = set()
  while todo:
    function = todo.pop()
    if function.__code__ in seen:
      continue
    seen.add(function.__code__)
    for name in _names(function.__code__):
      reached = _reached(function, owner, name, library)
      if name in _EVALUATING and not reached and not _is_json(function, name):
        found.add(name)
      todo += reached
  return found


def _names(code: types.CodeType) -> Iterator[str]:
  yield from code.co_names
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from _names(constant)


def _is_json(function: types.FunctionType, name: str) -> bool:
  """Whether the name is that of `json.load` or `json.loads`, which evaluate nothing."""
  return name in ('load', 'loads') and 'json' in function.__code__.co_names


def _reached(function: types.FunctionType, owner: Any, name: str, library: str
             ) -> list[types.FunctionType]:
  """Python functions of `library` that `name` may stand for in a function."""
  candidates = [function.__globals__.get(name), getattr(type(owner), name, None)]
  functions = []
  for candidate in candidates:
    plain = _plain(candidate)
    members = vars(candidate).values() if isinstance(candidate, type) else ()
    functions += [f for f in [plain, *map(_plain, members)]
                  if f is not None and f.__module__.split('.', maxsplit=1)[0] == library]
  return functions


def _plain(value: Any) -> types.FunctionType | None:
  """The Python function beneath decorators of the standard library, or None."""
  if isinstance(value, (staticmethod, classmethod, functools.partial)):
    value = value.func if isinstance(value, functools.partial) else value.__func__
  value = getattr(value, '__wrapped__', value)
  return value if isinstance(value, types.FunctionType) else None
