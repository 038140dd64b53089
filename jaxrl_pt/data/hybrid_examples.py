"""Examples that think first and examples that answer at once, for hybrid fine-tuning.

A row of a JSON-lines file has `prompt`, `thinking`, which is empty where the answer comes at once,
and `answer`. The tags round them are the operator's, and become special tokens where the tokenizer
has such; the same characters in what a row says stay text.

    think      <think>thinking</think>answer
    no-think   <no_think>answer</no_think>

Rows that say the same as an earlier one are left out, and so are those whose prompt shares an
n-gram of words with a prompt of the evaluation sets.

Source: LHRM 2505.14631, section 3.1, which names no method of decontamination; 13-grams of words
are those of GPT-3 (2005.14165, appendix C).
"""

from collections.abc import Iterator
import re
from typing import Any, NamedTuple

from jaxrl_pt import config
from jaxrl_pt.data import sources
from jaxrl_pt.data.template_text import Span
from jaxrl_pt.errors import UserError

_EXPECTED = '{"prompt": "…", "thinking": "…", "answer": "…"}'


class Example(NamedTuple):
  """A row that is learned; its completion as pieces of the operator's and of the row's."""

  place: str
  prompt: str
  completion: tuple[Span, ...]


class Counts(NamedTuple):
  """What became of the rows of a source."""

  thinking: int
  at_once: int
  duplicates: int
  contaminated: int

  def __str__(self) -> str:
    return (f'hybrid examples: {self.thinking} think and {self.at_once} answer at once; '
            f'{self.duplicates} duplicates and {self.contaminated} rows with an n-gram of the '
            'evaluation sets have been left out')


def examples(source: config.HybridConversations) -> Iterator[Example]:
  """Yields the rows of a source that are learned, always in the same order.

  Raises:
    UserError: a row lacks a field, or its answer is empty; the message names file and line.
  """
  return (found for found in _sorted_out(source) if isinstance(found, Example))


def counts(source: config.HybridConversations) -> Counts:
  """What becomes of the rows of a source."""
  found = list(_sorted_out(source))
  thinks = sum(isinstance(x, Example) and x.completion[0].text == source.think for x in found)
  duplicates, contaminated = found.count('duplicate'), found.count('contaminated')
  return Counts(thinks, len(found) - thinks - duplicates - contaminated, duplicates, contaminated)


def _sorted_out(source: config.HybridConversations) -> Iterator[Example | str]:
  """Each row, or why it is left out."""
  evaluated = set[tuple[str, ...]]()
  if source.evaluation_glob:
    for place, row in sources.json_rows(source.evaluation_glob):
      wanted = f'{{"{source.evaluation_field}": "…"}}'
      evaluated |= ngrams(_text(row, source.evaluation_field, place, wanted), source.ngram)
  seen = set[tuple[str, str, str]]()
  for place, row in sources.json_rows(source.glob):
    prompt, thinking, answer = (
        _text(row, name, place) for name in ('prompt', 'thinking', 'answer'))
    if not answer.strip():
      raise UserError(f"{place}: 'answer' is empty, so that nothing is learned from it: drop the "
                      'row.')
    said = prompt.strip(), thinking.strip(), answer.strip()
    if said in seen:
      yield 'duplicate'
    elif ngrams(prompt, source.ngram) & evaluated:
      yield 'contaminated'
    else:
      yield Example(place, prompt, _completion(source, thinking, answer))
    seen.add(said)


def _completion(source: config.HybridConversations, thinking: str, answer: str
                ) -> tuple[Span, ...]:
  if thinking.strip():
    return (Span(source.think, True), Span(thinking, False), Span(source.think_end, True),
            Span(answer, False))
  end = (Span(source.no_think_end, True),) if source.no_think_end else ()
  return (Span(source.no_think, True), Span(answer, False), *end)


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
  """All n-grams of a text's words, in lower case; a shorter text is one by itself."""
  words = re.findall(r'\w+', text.lower())
  if not words:
    return set()
  return {tuple(words[i:i + size]) for i in range(max(1, len(words) - size + 1))}


def _text(row: dict[str, Any], name: str, place: str, wanted: str = _EXPECTED) -> str:
  value = row.get(name)
  if not isinstance(value, str) or not sources.is_unicode(value):
    raise UserError(f'{place} has no text in {name!r}: write {wanted}.')
  return value
