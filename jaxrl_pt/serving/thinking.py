"""Thinking on, off, or as the policy likes, within a budget: what a request has to say for it.

A policy is made to think, or not to, in one of three ways, of which the first that it has is taken:

    modes      its first token says which: the policies of hybrid reasoning (LHRM 2505.14631)
    template   its chat template reads `enable_thinking` (or `thinking`), as Qwen3's does
    markers    its tokenizer has each marker of thinking as one token; a thought that ends before it
               has begun is an answer at once (2504.09858)

Where thinking is on, the response begins with the start marker, unless the prompt ends with it.
"""

from collections.abc import Sequence
import dataclasses
from dataclasses import dataclass
import functools
import re
from typing import Literal, NamedTuple, get_args

from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.serving.fields import ApiError, Fields, is_object
from jaxrl_pt.serving.text import Markers, encode_marker, spelled

Thinking = Literal['auto', 'on', 'off']
# The names by which templates ask for it: Qwen3's, and that of DeepSeek V3.1.
_SWITCHES = ('enable_thinking', 'thinking')
# The share of a response's tokens that an effort may take for thinking, by OpenRouter's table.
EFFORTS: dict[str, float] = {
    'none': 0.0, 'minimal': 0.1, 'low': 0.2, 'medium': 0.5, 'high': 0.8, 'xhigh': 0.95}
_NEAR_END = 32  # tokens of a prompt's end that may spell a marker and white space after it


@dataclass(frozen=True)
class Wish:
  """Whether a response is to think first.

  thinking: 'auto' leaves it to the policy.
  budget: the most tokens of a thought, after which its end is forced; None for no such budget.
  """

  thinking: Thinking = 'auto'
  budget: int | None = None

  def __post_init__(self) -> None:
    assert self.thinking in get_args(Thinking)
    if self.thinking == 'off' and self.budget is not None:
      raise UserError(f'A budget of {self.budget} thinking tokens does nothing where thinking is '
                      'off: leave one of them out.')


class Steering(NamedTuple):
  """What a wish comes to in one request of the engine, whose fields of these names say more."""

  forced: tuple[int, ...] = ()
  max_thought: int | None = None
  begins_thinking: bool = False


@dataclass(frozen=True)
class Thinker:
  """How one policy is made to think, or not to.

  template: of its conversations; None for prompts that are plain texts.
  """

  tokenizer: Tokenizer
  markers: Markers
  template: ChatTemplate | None = None

  @functools.cached_property
  def start(self) -> tuple[int, ...]:
    """The tokens of the start marker."""
    return encode_marker(self.tokenizer, self.markers.start)

  @functools.cached_property
  def end(self) -> tuple[int, ...]:
    """The tokens of the end marker."""
    return encode_marker(self.tokenizer, self.markers.end)

  @functools.cached_property
  def _no_think(self) -> tuple[int, ...]:
    """The tokens of the mode that answers at once; () where there are no modes."""
    return encode_marker(self.tokenizer, self.markers.no_think) if self.markers.no_think else ()

  @functools.cached_property
  def _switch(self) -> str:
    """The name of the template's variable; '' where it has none or modes come first."""
    source = '' if self.template is None or self._no_think else self.template.source
    # A template has to do without the variable, and so asks first whether it is there.
    return next((name for name in _SWITCHES if re.search(
        rf'(?<![.\w]){name}\s*(is\s+(not\s+)?defined|\|\s*default)', source)), '')

  @functools.cached_property
  def _table(self) -> list[bytes]:
    return spelled(self.tokenizer, self.markers)

  def told(self, wish: Wish) -> ChatTemplate:
    """The chat template, told of a wish where it reads it."""
    assert self.template is not None
    if wish.thinking == 'auto' or not self._switch:
      return self.template
    variables = (*self.template.variables, (self._switch, wish.thinking == 'on'))
    return dataclasses.replace(self.template, variables=variables)

  def is_open(self, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside a thought that the template has just begun, as some do."""
    if self.template is None:
      return False
    end = b''.join(self._table[i] for i in prompt[-_NEAR_END:] if i < len(self._table))
    return end.rstrip().endswith(self.markers.start.encode())

  def think(self, budget: int | None, prompt: Sequence[int]) -> Steering:
    """What makes any policy begin with a thought, of at most so many tokens."""
    return Steering(() if self.is_open(prompt) else self.start, budget, True)

  def steer(self, wish: Wish, prompt: Sequence[int]) -> Steering:
    """What a request with this prompt has to say.

    Args:
      wish: the wish.
      prompt: the tokens of the prompt, of the template that is `told` of the wish.

    Raises:
      UserError: the policy cannot be told whether to think, and has no thought to give a budget to.
    """
    is_open = self.is_open(prompt)
    if wish == Wish():
      return Steering(begins_thinking=is_open)
    has_markers = len(self.start) == len(self.end) == 1
    if not (self._no_think or self._switch or has_markers):
      raise UserError(
          'This policy cannot be told whether or how long to think: it has no modes, its chat '
          f'template reads no enable_thinking, and {self.markers.start!r} and {self.markers.end!r} '
          'are not one token each; leave thinking out, or start with --markers that are.')
    if wish.thinking == 'on':
      return self.think(wish.budget, prompt)
    if wish.thinking == 'auto':
      return Steering((), wish.budget, is_open)
    if self._no_think or self._switch:
      return Steering(self._no_think)
    return Steering((() if is_open else self.start) + self.end)


def take(fields: Fields, max_tokens: int, most: int) -> tuple[Wish, str]:
  """The wish of a body, and the name of the field that says it.

  Args:
    fields: of the body, of which chat_template_kwargs, reasoning_effort and thinking_token_budget
      are taken.
    max_tokens: the most tokens of the response, of which an effort gives thinking a share.
    most: the largest budget.

  Raises:
    ApiError: a value that cannot be, or two fields that contradict each other.
  """
  is_flag = lambda value: isinstance(value, bool)
  inner = Fields(fields.take('chat_template_kwargs', 'an object', is_object, {}),
                 'chat_template_kwargs')
  told = {name: inner.take(name, 'true or false', is_flag) for name in _SWITCHES}
  inner.finish()
  effort = fields.take('reasoning_effort', f'one of {", ".join(EFFORTS)}',
                       lambda x: isinstance(x, str) and x in EFFORTS)
  budget = fields.integer('thinking_token_budget', None, 0, most)
  says = {f'chat_template_kwargs.{name}': value for name, value in told.items()
          if value is not None}
  if effort is not None:
    says['reasoning_effort'] = effort != 'none'
  if len(set(says.values())) > 1:
    raise ApiError(400, f'{" and ".join(says)} contradict each other: expected one of them.',
                   param='reasoning_effort' if effort is not None else 'chat_template_kwargs')
  thinks = next(iter(says.values()), None)
  if budget is not None:
    field = 'thinking_token_budget'
    if thinks is False:
      raise ApiError(400, f'{field} = {budget} does nothing where {next(iter(says))} switches '
                     'thinking off: expected one of them.', param=field)
    if effort is not None:
      raise ApiError(400, f'{field} and reasoning_effort both say how long to think: expected one '
                     'of them.', param=field)
  elif effort not in (None, 'none'):
    budget = int(EFFORTS[effort] * max_tokens)
  thinking: Thinking = 'auto' if thinks is None else 'on' if thinks else 'off'
  names = [*(name.partition('.')[0] for name in says), 'thinking_token_budget']
  return Wish(thinking, budget), names[0]
