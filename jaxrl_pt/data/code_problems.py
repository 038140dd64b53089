"""Programming problems in MBPP's format: a task in words, and asserts that its program must pass.

A row has `text`, `test_list`, `code` (a solution) and perhaps `test_setup_code` and
`challenge_test_list`. An assert must read `assert EXPRESSION == LITERAL`. It is taken apart, so
that the program may be asked for the expression's value without being told the literal: the
reference answer is the JSON

    {"setup": text, "tests": [[expression, literal], …]}

which `verifiers/code.py` reads.
"""

import ast
from collections.abc import Iterator
import json
import sys
from typing import Any

from jaxrl_pt import config
from jaxrl_pt.data import sources
from jaxrl_pt.data.generated import Problem
from jaxrl_pt.errors import UserError


def problems(source: config.CodeProblems) -> Iterator[Problem]:
  """Yields the problems of the files, without those whose asserts cannot be taken apart.

  Raises:
    UserError: a file cannot be read, a row lacks a field, or no row can be asked.
  """
  left_out: list[str] = []
  number = -1
  for number, (place, row) in enumerate(sources.json_rows(source.glob)):
    problem = _problem(source, number, place, row)
    if isinstance(problem, Problem):
      yield problem
    else:
      left_out.append(problem)
  if left_out and len(left_out) == number + 1:
    raise UserError(f'No problem of {source.glob} can be asked: {left_out[0]}. Write asserts as '
                    'assert f(1) == 2.')
  if left_out:
    print(f'{len(left_out)} of {number + 1} problems are left out: {left_out[0]}', file=sys.stderr,
          flush=True)


def _problem(source: config.CodeProblems, number: int, place: str, row: dict[str, Any]
             ) -> Problem | str:
  """A row as a problem, or why it cannot be one."""
  text, code = (sources.text_of(row.get(field), place, 'CodeProblems.glob', field, row)
                for field in ('text', 'code'))
  shown = _texts(row, place, 'test_list')
  if not shown:
    raise UserError(f"{place} has no asserts in the field 'test_list': give some, or leave the row "
                    'out.')
  tests = []
  for test in (*shown, *_texts(row, place, 'challenge_test_list')):
    try:
      tests.append(_taken_apart(test))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      return f'{place} asserts what is not EXPRESSION == LITERAL: {test[:100]}'
  setup = _plain(str(row.get('test_setup_code') or ''))
  lines = '\n'.join(shown[:source.shown_tests])
  prompt = f'{_plain(text)}\nYour program should pass:\n{lines}\n' if lines else f'{text}\n'
  return Problem(number, prompt, json.dumps({'setup': setup, 'tests': tests}), place,
                 f'```python\n{_plain(code)}\n```')


def _texts(row: dict[str, Any], place: str, field: str) -> list[str]:
  values = row.get(field, [])
  if not isinstance(values, list):
    raise UserError(f'{place} has no list in the field {field!r}: write a list of asserts.')
  return [_plain(sources.text_of(value, place, 'CodeProblems.glob', field, row)).strip()
          for value in values]


def _plain(text: str) -> str:
  """The text with line feeds alone, as MBPP has both kinds of line ends."""
  return text.replace('\r\n', '\n').rstrip()


def _taken_apart(test: str) -> tuple[str, str]:
  """The two sides of an assert.

  Raises:
    ValueError, SyntaxError: it is not a single assert of an expression equal to a literal.
  """
  match ast.parse(test).body:
    case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]:
      ast.literal_eval(right)
      return ast.unparse(left), ast.unparse(right)
  raise ValueError('not an assert')
