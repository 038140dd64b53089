"""Compiles chat templates so that the special tokens which they write stay told apart from text.

Each special token gets a *mark*: one character of Unicode's private-use planes that occurs in no
input. In the template's own literals the tokens are replaced by their marks before it is compiled.
So a mark in what it renders stands for a token that the template has written, however the text was
stripped, joined or sliced on the way, and a token that a message spells stays text.
"""

from collections.abc import Iterable, Sequence
import functools
import re
from types import CodeType
from typing import Any, NamedTuple

from jinja2 import nodes, visitor

from jaxrl_pt.data import chat_sandbox
from jaxrl_pt.data.chat_messages import ROLES

_PRIVATE = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))  # ranges of code points
# A text that is only looked for has to stay as it is; `replace` looks for its first argument.
_READING = frozenset(('count', 'endswith', 'find', 'index', 'lstrip', 'partition', 'removeprefix',
                      'removesuffix', 'rfind', 'rpartition', 'rsplit', 'rstrip', 'split',
                      'startswith', 'strip'))
_MARKED = 'marked!'  # no template can spell this name of a filter


class Marks(NamedTuple):
  """Characters that stand for special tokens: `first` for the first text, and so on.

  The `num_others` characters after these stand for what else has to be found again.
  """

  texts: tuple[str, ...]
  first: int
  num_others: int

  def of(self, number: int) -> str:
    """The mark of a text, or of something else, by its number."""
    return chr(self.first + number)

  def write(self, text: str) -> str:
    """The text with marks for special tokens."""
    return replaced(self.texts, self.first, text)

  def split(self, text: str) -> list[tuple[str, int | None]]:
    """The pieces of a marked text: plain ones with None, and marks with their numbers."""
    last = self.first + len(self.texts) + self.num_others - 1
    if last < self.first:
      return [(text, None)]
    pieces = re.split(f'([{chr(self.first)}-{chr(last)}])', text)  # each second one is a mark
    return [(piece, ord(piece) - self.first if i % 2 else None)
            for i, piece in enumerate(pieces) if piece]


def replaced(texts: tuple[str, ...], first: int, text: str) -> str:
  """A text with one character for each of `texts` in it; where several begin, the longest counts.

  Args:
    texts: what is replaced.
    first: the code point that stands for the first of them.
    text: any text.
  """
  if not texts:
    return text
  numbers = {one: i for i, one in enumerate(texts)}
  return _pattern(texts).sub(lambda found: chr(first + numbers[found[0]]), text)


@functools.lru_cache(maxsize=16)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
  return re.compile('|'.join(re.escape(s) for s in sorted(texts, key=len, reverse=True)))


def choose(texts: Sequence[str], num_others: int, inputs: Iterable[str]) -> Marks | None:
  """Marks of characters that occur in none of the inputs; None where there are too few."""
  wanted = len(texts) + num_others
  taken = sorted({ord(c) for text in inputs if not text.isascii() for c in text
                  if ord(c) >= _PRIVATE[0][0]})
  for low, high in _PRIVATE:
    start = low
    for code in [*(c for c in taken if low <= c < high), high]:
      if code - start >= wanted:
        return Marks(tuple(texts), start, num_others)
      start = code + 1
  return None


@functools.lru_cache(maxsize=64)
def compiled(source: str, texts: tuple[str, ...], first: int) -> CodeType:
  """The code of a template in whose literals marks stand for special tokens.

  Args:
    source: the template.
    texts, first: as in `Marks`.

  Raises:
    jinja2.TemplateSyntaxError: the source is no template.
  """
  environment = chat_sandbox.Sandbox()
  environment.filters[_MARKED] = str  # `render` gives the sandbox of each rendering its own
  tree = environment.parse(source)
  return environment.compile(_Rewriter(Marks(texts, first, 0)).visit(tree))


def render(source: str, marks: Marks, sandbox: chat_sandbox.Sandbox, variables: dict[str, Any]
           ) -> str:
  """The marked text that a template writes."""
  sandbox.filters[_MARKED] = lambda parts, roles: _marked(marks, parts, roles)
  return sandbox.render(compiled(source, marks.texts, marks.first), variables)


def _marked(marks: Marks, parts: Sequence[Any], roles: Sequence[int]) -> str:
  """The marked text of literals and roles that stand beside one another, as `<|` user `|>`."""
  if any(parts[i] not in ROLES for i in roles):
    return ''.join(str(part) if i in roles else marks.write(part) for i, part in enumerate(parts))
  return marks.write(''.join(parts))


def _filter(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
  made = nodes.Filter(node, name, list(arguments), [], None, None)
  made.set_lineno(node.lineno)
  return made


def _is_role(node: nodes.Node) -> bool:
  """Whether it reads the role of a message."""
  return (isinstance(node, nodes.Getattr) and node.attr == 'role') or (
      isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const)
      and node.arg.value == 'role')


def _is_literal(node: nodes.Node) -> bool:
  return isinstance(node, nodes.TemplateData) or (
      isinstance(node, nodes.Const) and isinstance(node.value, str))


def _literal(node: nodes.Node) -> nodes.Node:
  return nodes.Const(node.data).set_lineno(node.lineno) if isinstance(
      node, nodes.TemplateData) else node


class _Rewriter(visitor.NodeTransformer):
  """Marks literals, and puts the sandbox's bounds round loops and all that makes values."""

  def __init__(self, marks: Marks) -> None:
    self._marks = marks

  # --- Marks ------------------------------------------------------------------------

  def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
    node.data = self._marks.write(node.data)
    return node

  def visit_Const(self, node: nodes.Const) -> nodes.Node:
    if isinstance(node.value, str):
      node.value = self._marks.write(node.value)
    return node

  def visit_Output(self, node: nodes.Output) -> nodes.Node:
    parts: Any = self._grouped(node.nodes)
    node.nodes = parts
    return node

  def visit_Add(self, node: nodes.Add) -> nodes.Node:
    parts: list[nodes.Node] = [node.right]
    left = node.left
    while isinstance(left, nodes.Add):
      parts.append(left.right)
      left = left.left
    grouped: Any = self._grouped([left, *reversed(parts)])
    return functools.reduce(lambda a, b: nodes.Add(a, b).set_lineno(node.lineno), grouped)

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    parts: Any = self._grouped(node.nodes)
    return _filter(nodes.List(parts).set_lineno(node.lineno), chat_sandbox.JOINED)

  def _grouped(self, parts: Sequence[nodes.Node]) -> list[nodes.Node]:
    """The rewritten parts, in which literals and roles beside one another are one."""
    grouped: list[nodes.Node] = []
    group: list[nodes.Node] = []
    for part in [*parts, None]:
      if part is not None and (_is_literal(part) or _is_role(part)):
        group.append(part)
        continue
      grouped += self._group(group)
      group = []
      if part is not None:
        grouped.append(self.visit(part))
    return grouped

  def _group(self, group: list[nodes.Node]) -> list[nodes.Node]:
    if len(group) < 2:
      return [self.visit(part) for part in group]
    roles: Any = [nodes.Const(i) for i, part in enumerate(group) if _is_role(part)]
    parts: Any = [part if _is_role(part) else _literal(part) for part in group]
    return [_filter(nodes.List(parts).set_lineno(group[0].lineno), _MARKED, nodes.List(roles))]

  def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
    node.expr = self._plain(node.expr)
    for operand in node.ops:
      operand.expr = self._plain(operand.expr)
    return node

  def visit_Call(self, node: nodes.Call) -> nodes.Node:
    reads = node.node.attr if isinstance(node.node, nodes.Getattr) else ''
    num_read = len(node.args) if reads in _READING else int(reads == 'replace')
    read, node.args = [self._plain(one) for one in node.args[:num_read]], node.args[num_read:]
    self.generic_visit(node)
    node.args = read + node.args
    return node

  def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
    num_read = int(node.name == 'replace')
    read, node.args = [self._plain(one) for one in node.args[:num_read]], node.args[num_read:]
    self.generic_visit(node)
    node.args = read + node.args
    return node

  def _plain(self, node: nodes.Expr) -> nodes.Expr:
    """A text that is only looked for stays as it is; anything else is rewritten."""
    if isinstance(node, nodes.Const) or (
        isinstance(node, (nodes.List, nodes.Tuple))
        and all(isinstance(item, nodes.Const) for item in node.items)):
      return node
    return self.visit(node)

  # --- Bounds -----------------------------------------------------------------------

  def visit_For(self, node: nodes.For) -> nodes.Node:
    self.generic_visit(node)
    step = _filter(nodes.Const(True).set_lineno(node.lineno), chat_sandbox.STEP)
    node.body = [nodes.ExprStmt(step).set_lineno(node.lineno), *node.body]
    if node.test is not None:
      node.test = nodes.And(step, node.test).set_lineno(node.lineno)
    return node

  def visit_List(self, node: nodes.List) -> nodes.Node:
    self.generic_visit(node)
    return _filter(node, chat_sandbox.MADE)

  def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
    self.generic_visit(node)
    return node if node.ctx == 'store' else _filter(node, chat_sandbox.MADE)

  def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
    for pair in node.items:
      pair.key, pair.value = self._plain(pair.key), self.visit(pair.value)
    return _filter(node, chat_sandbox.MADE)

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
    node.node, node.arg = self.visit(node.node), self._plain(node.arg)
    return _filter(node, chat_sandbox.MADE) if isinstance(node.arg, nodes.Slice) else node
