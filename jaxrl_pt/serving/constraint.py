"""Holds a response to a JSON schema, a regular expression or the form of tool calls.

llguidance reads a grammar and says after each token which tokens may come next. The engine sets
the logits of all others to −∞ before it draws, so that a token's log-probability is that under the
masked distribution.
"""

from collections.abc import Sequence
import json
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
import numpy as np

from jaxrl_pt.data.tokenizer import Tokenizer

# JSON may have white space between its parts. Without a bound, a model of strong habits could
# write nothing else.
_WHITE_SPACE = r'[\x20\x0A\x0D\x09]{0,20}'
# A grammar comes from a client: to read it must not take many seconds, nor a step much of one.
_MOST_READ = 100_000  # characters
_LIMITS = LLParserLimits(initial_lexer_fuel=300_000, max_lexer_states=20_000,
                         max_grammar_size=10_000, verbose_errors=False)
_LEAD = '\x02'  # A character that no tokenizer merges with the next one.
_MOST_CHARACTERS = 200  # of llguidance's own words in an error


def json_grammar(schema: dict[str, Any]) -> str:
  """The grammar of the JSON texts of a schema, with at most 20 characters of white space in a row.

  Raises:
    ValueError: the schema is nested too deeply.
  """
  try:
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={'whitespace_pattern': _WHITE_SPACE})
  except RecursionError as e:
    raise ValueError('recursion limit exceeded') from e


def regex_grammar(pattern: str) -> str:
  r"""The grammar of the texts that a regular expression matches from end to end.

  As in JSON schemas, \d and \w are characters of ASCII.

  Raises:
    ValueError: the expression ends within an escape, which llguidance would leave out.
  """
  if (len(pattern) - len(pattern.rstrip('\\'))) % 2:
    raise ValueError('a single backslash at its end')
  return LLMatcher.grammar_from_lark(f'start: /{regex_to_lark(pattern, "dw")}/')


class Constraint:
  """What one response has to look like, as it grows; `Guide.constraint` makes it."""

  def __init__(self, matcher: LLMatcher, num_words: int, stops: tuple[int, ...],
               thought_end: tuple[int, ...]) -> None:
    self._matcher, self._num_words, self._stops = matcher, num_words, stops
    self._thought_end = thought_end
    self._newest: tuple[int, ...] = ()  # tokens of the thought, as many as its end marker has
    self._has_stopped = False
    self.only_stops = np.zeros(num_words, np.uint32)  # the mask of the stop tokens
    for token in stops:
      self.only_stops[token // 32] |= np.uint32(1 << token % 32)

  @property
  def error(self) -> str:
    """Why llguidance has given up, '' while it has not."""
    return self._matcher.get_error()

  @property
  def is_thinking(self) -> bool:
    """Whether the thought goes on, so that any token may come."""
    return self._newest != self._thought_end

  @property
  def is_done(self) -> bool:
    """Whether nothing but a stop token may follow."""
    return self._has_stopped or (not self.is_thinking and self._matcher.is_stopped())

  @property
  def is_met(self) -> bool:
    """Whether the text so far, its thought aside, is a whole one of the grammar."""
    return (not self.is_thinking and not self._matcher.is_error()
            and self._matcher.is_accepting())

  def mask(self) -> np.ndarray:
    """u32[⌈V / 32⌉], whose bit t % 32 of word t // 32 says whether token t may come next.

    Where the grammar is at its end, these are the stop tokens alone. So they are where no token
    spells what must come, or llguidance gives up because a step has become too costly.
    """
    if self.is_thinking:
      return np.full(self._num_words, 0xFFFFFFFF, np.uint32)
    if self.is_done:
      return self.only_stops.copy()
    # llguidance gives a word too many where 32 divides its vocabulary.
    allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[:self._num_words]
    words = np.zeros(self._num_words, np.uint32)
    words[:len(allowed)] = allowed
    if self._matcher.is_error() or not (words & ~self.only_stops).any():
      return self.only_stops.copy()
    # llguidance knows one token that ends a text, and a conversation may have more.
    return words | self.only_stops if self._matcher.is_accepting() else words

  def accept(self, token: int) -> None:
    """Goes on by the next token of the response, drawn under the mask or forced in a thought."""
    if self.is_thinking:
      self._newest = (*self._newest, token)[-len(self._thought_end):]
    elif token in self._stops:
      self._has_stopped = True
    else:
      self._matcher.consume_token(token)  # A token outside the mask makes it fail for good.

  def copy(self) -> 'Constraint':
    """A constraint in the same state, for another sample."""
    other = Constraint(self._matcher.deep_copy(), self._num_words, self._stops,
                       self._thought_end)
    other._newest, other._has_stopped = self._newest, self._has_stopped
    return other


class _Spelling:
  """A tokenizer in the form that llguidance's `TokenizerWrapper` takes."""

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._encode, self._table = tokenizer.encode, tokenizer.token_bytes()
    self._ids = {piece: i for i, piece in enumerate(self._table) if piece}
    self._lead = tokenizer.encode(_LEAD)
    self.tokens = list(self._table)
    self.special_token_ids = [i for i, piece in enumerate(self._table) if not piece]
    # A grammar names a special token as it is written; no text of a grammar spells it.
    for text, token in tokenizer.special_tokens.items():
      if token in self.special_token_ids:
        self.tokens[token] = text.encode()
    self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id

  def __call__(self, text: str) -> list[int]:
    """Tokens that spell a piece of a text, and no space that encoding puts before a whole one.

    llguidance asks this where a grammar leaves no choice of bytes, and takes wrong tokens ill.
    """
    ids, num_lead = self._encode(_LEAD + text), len(self._lead)
    if ids[:num_lead] == self._lead:
      ids = ids[num_lead:]
    if b''.join(self._table[i] for i in ids) == text.encode():
      return ids
    return self._greedy(text.encode())

  def _greedy(self, text: bytes) -> list[int]:
    """The longest token first; it stops before bytes that no token has."""
    ids: list[int] = []
    while text:
      longest = next((n for n in range(len(text), 0, -1) if text[:n] in self._ids), 0)
      if not longest:
        return [self.eos_token_id]
      ids.append(self._ids[text[:longest]])
      text = text[longest:]
    return ids


class Guide:
  """Makes constraints for the vocabulary of one model."""

  def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Reads the vocabulary.

    Args:
      tokenizer: the model's tokenizer.
      vocab_size: V of the model, which may be more than the tokenizer's.
    """
    self._num_words = -(-vocab_size // 32)
    self._tokenizer = LLTokenizer(TokenizerWrapper(_Spelling(tokenizer)))

  def constraint(self, grammar: str, stops: Sequence[int], thought_end: tuple[int, ...] = ()
                 ) -> Constraint:
    """The constraint of a response that has not begun.

    Args:
      grammar: what `json_grammar`, `regex_grammar` or `tools.grammar` returns.
      stops: the tokens that end the response; they may come as soon as the text is a whole one.
      thought_end: the tokens of the marker that ends thinking, if the response begins with a
        thought, or those that are forced in place of one; the grammar holds for what comes after
        them.

    Raises:
      ValueError: the grammar is malformed or too large, or no text meets it; it says which.
    """
    if len(grammar) > _MOST_READ:
      raise ValueError(f'it has more than {_MOST_READ} characters')
    matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
    # Some grammars that nothing meets only show it at their first token, and some expressions that
    # are too large only when a second copy comes to it.
    for _ in range(2):
      trial = Constraint(matcher.deep_copy(), self._num_words, tuple(stops), ())
      has_end_alone = (trial.mask() == trial.only_stops).all()
      if trial.error or (has_end_alone and not trial.is_met):
        raise ValueError(_sentence(trial.error))
    return Constraint(matcher, self._num_words, tuple(stops), thought_end)


def _sentence(error: str) -> str:
  """The part of llguidance's error that says what is wrong, in one line."""
  lines = [line.strip() for line in error.splitlines() if line.strip()]
  told = next((line for line in lines if line.startswith('error: ')), lines[0] if lines else '')
  if not told or told.startswith('NoExtension'):
    return 'no text of this tokenizer meets it'
  return told.removeprefix('error: ').rstrip('.')[:_MOST_CHARACTERS]
