"""Chat templates: conversations to prompts and to examples for fine-tuning.

A template is a program in Jinja2 that comes with a model (`chat_template` of tokenizer_config.json)
and renders messages as `transformers` does; the texts are equal. The special tokens that it writes
are those tokens. The same characters in what a message says stay text, so that nobody can end a
turn from inside (`chat_marks`). It runs in a sandbox with bounds (`chat_sandbox`).
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
from dataclasses import dataclass
import datetime
import functools
import os
from typing import Any, NamedTuple

import jinja2

from jaxrl_pt.data import chat_marks, chat_messages, chat_sandbox, template_text
from jaxrl_pt.data.chat_marks import Marks
from jaxrl_pt.data.template_text import Span
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError

# What a template that asks for the date is told in training.
_TRAINING_TIME = datetime.datetime(2025, 1, 1)
_NO_MARKS = Marks((), 0, 0)
_MOST_MESSAGE = 300  # characters of a template's own words in an error


@dataclass(frozen=True)
class ChatTemplate:
  """A chat template and what it is told beside the messages.

  source: the template in Jinja2.
  tool_source: the template where there are tools, for models that have another one; '' for none.
  variables: pairs of name and value: `bos_token`, `eos_token` and whatever else templates read.
  name: where it comes from, for errors.
  now: what `strftime_now` writes; None takes the clock.
  stop_texts: texts that end an answer beside end tokens.
  """

  source: str
  tool_source: str = ''
  variables: tuple[tuple[str, Any], ...] = ()
  name: str = 'the chat template'
  now: datetime.datetime | None = None
  stop_texts: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for source in filter(None, (self.source, self.tool_source)):
      try:
        chat_marks.compiled(source, (), 0)
      except jinja2.TemplateSyntaxError as e:
        raise UserError(f'{_sentence(self.name)} is no Jinja2 template: line {e.lineno}: '
                        f'{_words(e)}.') from e
      except (RecursionError, MemoryError, SyntaxError) as e:
        raise UserError(f'{_sentence(self.name)} is nested too deeply.') from e

  def render(self, messages: Sequence[Any], tools: Sequence[Any] = (), *,
             add_generation_prompt: bool = False) -> str:
    """The text of a conversation, which is that of `transformers.apply_chat_template`.

    Args:
      messages: the turns so far, as `chat_messages.checked` takes them.
      tools: the descriptions of the tools that may be called.
      add_generation_prompt: whether the text goes on to where the assistant's next turn begins.

    Raises:
      UserError: a message is malformed, or the template refuses or fails.
    """
    return self._marked(_NO_MARKS, chat_messages.checked(messages),
                        chat_messages.check_tools(tools), add_generation_prompt)

  def _marked(self, marks: Marks, messages: Sequence[dict[str, Any]],
              tools: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
    """The marked text; tool calls are given in the first of three forms that the template takes.

    Templates disagree about the arguments (an object or its text) and about a turn that holds only
    calls (its content is none or empty). What they say of the first form is what is raised.
    """
    try:
      return self._attempt(marks, messages, tools, add_generation_prompt)
    except UserError:
      for other in chat_messages.other_forms(messages):
        with contextlib.suppress(UserError):
          return self._attempt(marks, other, tools, add_generation_prompt)
      raise

  def _attempt(self, marks: Marks, messages: Sequence[dict[str, Any]],
               tools: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
    told = {name: marks.write(value) if isinstance(value, str) else value
            for name, value in self.variables}
    told |= {'messages': list(messages), 'tools': list(tools) or None, 'documents': None,
             'add_generation_prompt': add_generation_prompt}
    source = self.tool_source if tools and self.tool_source else self.source
    try:
      return chat_marks.render(source, marks, chat_sandbox.Sandbox(self.now), told)
    except chat_sandbox.TooMuch as e:
      raise UserError(f'{_sentence(self.name)} was stopped: {e}.') from e
    except jinja2.exceptions.SecurityError as e:
      raise UserError(f'{_sentence(self.name)} reads what it must not: {_words(e)}.') from e
    except jinja2.TemplateError as e:
      raise UserError(f'{_sentence(self.name)} refuses these messages: {_words(e)}.') from e
    except Exception as e:  # A template is a program and may fail in any way.
      raise UserError(f'{_sentence(self.name)} fails on these messages: '
                      f'{type(e).__name__}: {_words(e)}.') from e


def _sentence(name: str) -> str:
  return name[:1].upper() + name[1:]


def _words(error: BaseException) -> str:
  return ' '.join(str(error).split()).rstrip('.')[:_MOST_MESSAGE] or type(error).__name__


# --- Tokens -----------------------------------------------------------------------


def prompt_ids(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Any],
               tools: Sequence[Any] = (), drawn: Mapping[int, Sequence[int]] | None = None
               ) -> list[int]:
  """The tokens of the prompt that asks for the assistant's next turn.

  These are what `transformers` gives for the rendered text, but for special tokens that messages
  spell: those are text here.

  Args:
    template: of the model.
    tokenizer: of the model.
    messages: the turns so far.
    tools: the descriptions of the tools that may be called.
    drawn: number of a message → the tokens of its content. They stand in the prompt as they are and
      are not encoded again; the template does not see them and moves them whole. It may see that
      they are drawn (`message.is_drawn`), and so bring their own white space with them.

  Raises:
    UserError: a message is malformed, the template refuses or fails, or it writes nothing.
  """
  ids = _Conversation(template, tokenizer, messages, tools, drawn or {}).ids(prompt=True)
  if not ids:
    raise UserError(f'{_sentence(template.name)} writes nothing for these messages: a prompt needs '
                    'at least one token.')
  return ids


class _Conversation:
  """The marked texts of one conversation and of its beginnings."""

  def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Any],
               tools: Sequence[Any], drawn: Mapping[int, Sequence[int]]) -> None:
    self.messages = chat_messages.checked(messages)
    self.tools = chat_messages.check_tools(tools)
    self._template, self._tokenizer, self._drawn = template, tokenizer, list(drawn.values())
    special = tuple(text for text in tokenizer.special_tokens if text)
    sources = template.source + template.tool_source
    # Tokens of the template that are no special ones, which the tokenizer finds in every text.
    self._letters = tuple(text for text in sorted(tokenizer.spellable_tokens) if text in sources)
    marks = chat_marks.choose(special, len(self._letters) + len(drawn), chat_messages.strings(
        [self.messages, self.tools, sources]))
    if marks is None:
      raise UserError('The messages hold nearly all characters of the private use planes of '
                      'Unicode: leave some out.')
    self._marks = marks
    # Only an assistant writes such tokens; in what others say they stay text.
    escape = functools.partial(chat_marks.replaced, self._letters, marks.first + len(special))
    others = [message for message in self.messages if message['role'] != 'assistant']
    for message in others if self._letters else ():
      message.update(chat_messages.mapped(escape, message))
    self.tools = chat_messages.mapped(escape, self.tools)
    for place, number in enumerate(drawn):
      self.messages[number] |= {'content': marks.of(len(special) + len(self._letters) + place),
                                'is_drawn': True}

  def text(self, num_messages: int, *, prompt: bool) -> str:
    """The marked text of the first messages, with or without the opening of the next turn."""
    return self._template._marked(self._marks, self.messages[:num_messages], self.tools, prompt)

  def ids(self, *, prompt: bool) -> list[int]:
    return self.encode(self.text(len(self.messages), prompt=prompt))

  def is_special(self, character: str) -> bool:
    """Whether a character of a marked text stands for a special token."""
    return 0 <= ord(character) - self._marks.first < len(self._marks.texts)

  def encode(self, marked: str, *, goes_on: bool = False) -> list[int]:
    """The tokens of a marked text, which begins the conversation or goes on after other tokens."""
    ids: list[int] = []
    spans: list[Span] = []
    special, letters = self._marks.texts, self._letters

    def end_spans() -> None:
      if spans:
        is_first = not (ids or goes_on)
        encode = template_text.encode if is_first else template_text.encode_next
        ids.extend(encode(self._tokenizer, spans))
        spans.clear()

    for piece, number in self._marks.split(marked):
      if number is None:
        spans.append(Span(piece, False))
      elif number < len(special):
        spans.append(Span(special[number], True))
      else:
        end_spans()
        number -= len(special)
        ids.extend(self._tokenizer.encode_letters(letters[number]) if number < len(letters)
                   else self._drawn[number - len(letters)])
    end_spans()
    return ids


def for_training(template: ChatTemplate) -> ChatTemplate:
  """The template at a fixed time, so that a run that is resumed on another day reads the same."""
  return template if template.now else dataclasses.replace(template, now=_TRAINING_TIME)


# --- Fine-tuning ------------------------------------------------------------------


class Example(NamedTuple):
  """Tokens of a conversation, and which of them the assistant writes."""

  tokens: list[int]
  is_written: list[bool]


def encode_conversation(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Any],
                        tools: Sequence[Any] = (), *, only_last: bool = False) -> Example:
  """A conversation as an example for fine-tuning.

  Up to each turn of the assistant the tokens are those of the prompt that asks for this turn. What
  the assistant writes is the turn up to the token that ends it, and that token.

  Args:
    template: of the model.
    tokenizer: of the model.
    messages: the turns, of which at least one is the assistant's.
    tools: the descriptions of the tools that may be called.
    only_last: whether only the assistant's last turn counts as written; the others may then stand
      there otherwise than they were written, as in templates that leave out earlier thoughts.

  Raises:
    UserError: a message is malformed, the template refuses or fails, there is no turn of the
      assistant, the template writes no token that ends it, or it writes a turn otherwise than the
      prompt asks for it, or otherwise once other turns follow.
  """
  talk = _Conversation(for_training(template), tokenizer, messages, tools, {})
  turns = [i for i, message in enumerate(talk.messages) if message['role'] == 'assistant']
  if not turns:
    raise UserError('messages holds no turn of the assistant, so there is nothing to learn.')
  turns = turns[-1:] if only_last else turns
  # What follows the last turn of the assistant teaches nothing.
  whole = talk.text(turns[-1] + 1, prompt=False)
  bounds = [_bounds(talk, whole, number, template.name) for number in turns]
  cuts = [place for pair in bounds for place in pair]
  pieces = _encode_in_pieces(talk, whole[:cuts[-1]], cuts)
  return Example([token for piece in pieces for token in piece],
                 [i % 2 == 1 for i, piece in enumerate(pieces) for _ in piece])


def encode_turns(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Any],
                 tools: Sequence[Any] = ()) -> Iterator[Example]:
  """One example for each turn of the assistant, in which this turn alone counts as written.

  So every turn is learnt after its own prompt, whatever the template leaves out later.
  """
  for i, message in enumerate(chat_messages.checked(messages)):
    if message['role'] == 'assistant':
      yield encode_conversation(template, tokenizer, messages[:i + 1], tools, only_last=True)


def _bounds(talk: _Conversation, whole: str, number: int, name: str) -> tuple[int, int]:
  """Where a turn of the assistant begins in the whole text, and where it ends."""
  asked, said = talk.text(number, prompt=True), talk.text(number + 1, prompt=False)
  if not said.startswith(asked):
    raise UserError(f'messages[{number}]: {name} writes this turn otherwise than its prompt asks '
                    'for it (it may leave out the thought), so that nothing could be learnt from '
                    'it: leave the turn out, or give another --template.')
  # Some templates end a whole conversation by a further token.
  goes_on = os.path.commonprefix([said, talk.text(number + 1, prompt=True)])
  end = next((i + 1 for i in range(len(goes_on) - 1, len(asked) - 1, -1)
              if talk.is_special(said[i])), None)
  if end is None:
    raise UserError(f'messages[{number}]: {name} writes no special token at the end of the '
                    "assistant's turn, so that a model could not learn where to stop: give a "
                    '--template that does.')
  if not whole.startswith(said[:end]):
    raise UserError(f'messages[{number}]: {name} writes this turn otherwise once others follow '
                    "(it may leave out earlier thoughts): make an example of each of the "
                    "assistant's turns.")
  return len(asked), end


def _encode_in_pieces(talk: _Conversation, text: str, cuts: Sequence[int]) -> list[list[int]]:
  """The tokens of a marked text, cut at places; whole where no token lies across a cut.

  Where one would, the text after the cut is encoded apart, as the tokens before it are there
  already when a model goes on from them.
  """
  tokens = talk.encode(text)
  pieces: list[list[int]] = []
  start = 0
  for cut in cuts:
    head = talk.encode(text[:cut])
    if tokens[:len(head)] != head or len(head) < start:
      break
    pieces.append(head[start:])
    start = len(head)
  else:
    return pieces
  places = [0, *cuts]
  return [talk.encode(text[a:b], goes_on=a > 0) for a, b in zip(places, cuts, strict=False)]
