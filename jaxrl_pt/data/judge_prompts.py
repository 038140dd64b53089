r"""The prompts of a judge: a query and two responses, whose texts cannot pass for the prompt's own.

    system message                        where there is one
    ## Query                              the template's own lines
    …                                     the query
    ## Answer of Assistant 1
    …                                     the response that is shown first
    ## Answer of Assistant 2
    …
    ## Comparison
    … end with \boxed{Assistant 1} or \boxed{Assistant 2}.

Query and responses may be hostile. A line of theirs that begins like a line of the template or like
the turn of a role gets a backslash in front, and one that has backslashes there already one more,
so that the prompt can be taken apart in one way only (`parsed`). Nothing else of a text is changed:
verdicts that a response states stay there, because a verdict is read from what the judge writes and
never from its prompt. Special tokens that a text spells are text, as in all prompts.
"""

import functools
import re

from jaxrl_pt import config
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError

# What ends a line for str.splitlines, and for a model perhaps.
_BREAKS = '\n\r\v\f\x1c-\x1e\x85\u2028\u2029'
# White space within a line, and characters that are not seen.
_SPACE = f'(?:[^\\S{_BREAKS}]|[\u200b-\u200d\u2060\ufeff])*'
# How chats that are written as plain text begin a turn.
_ROLES = ('System:', 'User:', 'Human:', 'Assistant:', 'Tool:')


def messages(system: str, text: str) -> list[dict[str, str]]:
  """The messages of a chat that asks with a text, after a system message if there is one."""
  first = [{'role': 'system', 'content': system}] if system else []
  return [*first, {'role': 'user', 'content': text}]


def system_text(prompt: config.JudgePrompt) -> str:
  """The system message; empty where there is none."""
  return _named(prompt, prompt.system)


def text(prompt: config.JudgePrompt, query: str, first: str, second: str) -> str:
  """The user's message that shows a query and two responses in this order."""
  pieces = [_named(prompt, piece) for piece in prompt.pieces]
  shown = [escaped(prompt, x) for x in (query, first, second)]
  return ''.join(piece + inner for piece, inner in zip(pieces, (*shown, ''), strict=True))


def without_chat(prompt: config.JudgePrompt, user: str) -> str:
  """The prompt of a model that has no chats: the system message, an empty line, the user's."""
  system = system_text(prompt)
  return f'{system}\n\n{user}' if system else user


def parsed(prompt: config.JudgePrompt, shown: str) -> tuple[str, str, str]:
  """(query, first, second) of what `text` has made: whatever they say, there is one way to read it.

  Raises:
    ValueError: `text` has not made it.
  """
  pieces = [_named(prompt, piece) for piece in prompt.pieces]
  found, rest = [], shown
  for before, after in zip(pieces, pieces[1:], strict=False):
    if not rest.startswith(before):
      raise ValueError(f'no {before!r} where it belongs')
    rest = rest[len(before):]
    at = len(rest) - len(after) if after is pieces[-1] else rest.find(after)
    if at < 0 or not rest[at:].startswith(after):
      raise ValueError(f'no {after!r} after {before!r}')
    found.append(_escape(prompt)[1].sub(r'\1\2', rest[:at]))
    rest = rest[at:]
  query, first, second = found
  return query, first, second


def escaped(prompt: config.JudgePrompt, inner: str) -> str:
  """A text of others as it stands in a prompt."""
  return _escape(prompt)[0].sub(r'\1\\\2', inner)


@functools.lru_cache
def _escape(prompt: config.JudgePrompt) -> tuple[re.Pattern[str], re.Pattern[str]]:
  """The patterns of lines to put a backslash in, and of those to take one from."""
  own = {line.strip() for piece in prompt.pieces for line in _named(prompt, piece).splitlines()}
  lines = '|'.join(re.escape(line) for line in sorted({*own, *_ROLES} - {''}))
  begins = f'((?:\\A|(?<=[{_BREAKS}])){_SPACE})'
  return (re.compile(rf'{begins}(\\*)(?={lines})', re.IGNORECASE),
          re.compile(rf'{begins}\\(\\*)(?={lines})', re.IGNORECASE))


def _named(prompt: config.JudgePrompt, fixed: str) -> str:
  """A text of the operator's with the names of the responses and the verdicts in it."""
  verdict = prompt.verdict
  for place in (0, 1):
    fixed = fixed.replace(f'{{label_{place + 1}}}', verdict.labels[place])
    fixed = fixed.replace(f'{{verdict_{place + 1}}}', verdict.text(place))
  return fixed


def orders(first: str, second: str, is_swapped: bool) -> tuple[str, str]:
  """Two responses in the order in which they are shown."""
  return (second, first) if is_swapped else (first, second)


def check_tokenizer(prompt: config.JudgePrompt, tokenizer: Tokenizer) -> None:
  """Refuses a tokenizer that cannot write a judge's verdicts, so that no judge of it could.

  Raises:
    UserError: it cannot; it names the verdict and what becomes of it.
  """
  for place in (0, 1):
    verdict = prompt.verdict.text(place)
    spelled = tokenizer.decode(tokenizer.encode(verdict))
    if spelled.strip() != verdict:
      raise UserError(f"The judge's tokenizer makes {spelled!r} of the verdict {verdict!r}: choose "
                      'other labels (JudgePrompt.verdict), or a judge with another tokenizer.')
