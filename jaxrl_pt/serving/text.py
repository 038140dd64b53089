"""Turns tokens into text while they are drawn, without stop strings and with the thought apart.

The engine's responses grow by tokens, and a token may end in the middle of a character, of a
stop string or of a marker. Bytes that could still become one of these are held back, so that the
pieces of text, joined, are the text of the whole response.
"""

import codecs
from collections.abc import Sequence
from typing import AnyStr, NamedTuple

from jaxrl_pt.data import template_text
from jaxrl_pt.data.tokenizer import Tokenizer


class Markers(NamedTuple):
  """Two texts that enclose a part of a response: by default thinking, at its start.

  no_think: the text with which a response begins that answers at once, where policies have such a
    mode. It belongs to neither thought nor answer.
  """

  start: str = '<think>'
  end: str = '</think>'
  no_think: str = ''


CALLS = Markers('<tool_call>', '</tool_call>')  # around each tool call
_NOTHING = Markers('\0', '\0')  # once the answer has begun, in which a second marker is text


def encode_marker(tokenizer: Tokenizer, marker: str) -> tuple[int, ...]:
  """A marker's tokens; it may be a special token, since only the operator chooses markers."""
  return tuple(template_text.encode(tokenizer, template_text.template(marker)))


def spelled(tokenizer: Tokenizer, markers: Markers) -> list[bytes]:
  """The tokenizer's `token_bytes`, in which markers that are special tokens spell themselves.

  These are the given markers of thinking and those of tool calls.
  """
  table = tokenizer.token_bytes()
  for marker in (*markers, *CALLS):
    if (token := tokenizer.special_tokens.get(marker)) is not None:
      table[token] = marker.encode()
  return table


def num_held(text: AnyStr, patterns: Sequence[AnyStr]) -> int:
  """Length of the longest end of `text` that could grow into one of the patterns."""
  longest = max((len(p) - 1 for p in patterns), default=0)
  return next((n for n in range(min(longest, len(text)), 0, -1)
               if any(p.startswith(text[len(text) - n:]) for p in patterns if len(p) > n)), 0)


class TextStream:
  """The text of one response, piece by piece."""

  def __init__(self, tokenizer: Tokenizer, table: Sequence[bytes],
               stop_strings: Sequence[str] = (), *, starts_text: bool = False) -> None:
    """Starts a stream before its first token.

    Args:
      tokenizer: the model's tokenizer.
      table: the bytes of each token, shared by all streams.
      stop_strings: those of the request; the one that ends the response is left out of the text.
      starts_text: whether the response starts a text because the prompt was none; the space that
        some tokenizers put before a text is then left out.
    """
    self._tokenizer, self._table = tokenizer, table
    self._stop_strings = [s.encode() for s in stop_strings]
    self._starts_text = starts_text
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
    self._bytes = bytearray()
    self._starts: list[int] = []  # offset of each token's first byte
    # It decodes all bytes, shown or not: a character counts once its last byte is there.
    self._counter = codecs.getincrementaldecoder('utf-8')('replace')
    self._offsets: list[int] = []  # number of whole characters before each token
    self._num_chars = 0
    self._shown = 0  # bytes given to the decoder
    self._num_given = 0  # tokens whose bytes are all shown

  def feed(self, tokens: Sequence[int], finish: str) -> tuple[str, range]:
    """Takes the next tokens and returns the text that has become certain.

    Args:
      tokens: the next tokens of the response.
      finish: the response's finish reason, '' while it runs.

    Returns:
      (the next piece of text, the numbers of the tokens whose text is now complete). A stop token
      is not among these tokens, nor are those that start inside or after a stop string.
    """
    before = len(self._bytes)
    for token in tokens:
      if self._starts_text and not self._starts:
        piece = self._tokenizer.decode_bytes([token])
      else:
        piece = self._table[token] if token < len(self._table) else b''
      before = len(self._bytes)
      self._starts.append(before)
      self._bytes += piece
      self._offsets.append(self._num_chars)
      self._num_chars += len(self._counter.decode(piece))
    end = len(self._bytes)
    if finish == 'stop_string':
      end = self._stop_start(before)
    elif not finish:
      end -= num_held(bytes(self._bytes[self._shown:]), self._stop_strings)
    text = self._decoder.decode(bytes(self._bytes[self._shown:end]), final=bool(finish))
    self._shown = max(end, self._shown)
    return text, self._given(finish)

  def offset(self, number: int) -> int:
    """How many whole characters of the response come before a token's text.

    A token that starts in the middle of a character starts where this character does.
    """
    return self._offsets[number]

  def _stop_start(self, newest: int) -> int:
    """The offset of the stop string that the newest token, at byte `newest`, has completed.

    Of several stop strings it is the one that ends first.
    """
    matches = []  # (end, start) in bytes
    for text in self._stop_strings:
      start = self._bytes.find(text, max(0, newest - len(text) + 1))
      if start >= 0:
        matches.append((start + len(text), start))
    return min(matches)[1] if matches else len(self._bytes)

  def _given(self, finish: str) -> range:
    first, last = self._num_given, len(self._starts) - (finish == 'stop')
    is_shown = lambda i: self._shown >= (
        self._starts[i + 1] if i + 1 < len(self._starts) else len(self._bytes))
    if finish == 'stop_string':
      is_shown = lambda i: self._starts[i] < self._shown
    while self._num_given < last and is_shown(self._num_given):
      self._num_given += 1
    return range(first, self._num_given)


class ThoughtSplitter:
  """Splits streamed text into a thought and the answer after it.

  The thought is the text that the markers enclose at the very start of the response. White space
  before the first marker and before the answer belongs to neither.
  """

  def __init__(self, markers: Markers, *, is_open: bool = False) -> None:
    """Starts before the first text; `is_open` says that the prompt has begun a thought."""
    self._markers = markers
    self._is_thinking, self._is_start = is_open, True
    self._held = ''

  def feed(self, text: str, *, last: bool = False) -> tuple[str, str]:
    """The next pieces of (thought, answer); `last` is True where no more text comes."""
    self._held += text
    thought = ''
    if self._is_start and not self._is_thinking:
      self._held = self._held.lstrip()
      start, _, no_think = self._markers
      if self._held.startswith(start):
        self._is_thinking, self._held = True, self._held[len(start):]
      elif no_think and self._held.startswith(no_think):
        self._held, self._markers = self._held[len(no_think):], _NOTHING
      elif not last and any(marker.startswith(self._held) for marker in (start, no_think)):
        return '', ''  # Still white space or a part of a marker.
    if self._is_thinking:
      thought = self._take_thought(last)
      if self._is_thinking:
        return thought, ''
    answer = self._held.lstrip() if self._is_start else self._held
    self._is_start = self._is_start and not answer
    self._held = ''
    return thought, answer

  def _take_thought(self, last: bool) -> str:
    thought, marker, answer = self._held.partition(self._markers.end)
    if marker:
      self._is_thinking, self._held = False, answer
      self._markers = _NOTHING
      return thought
    keep = 0 if last else num_held(self._held, [self._markers.end])
    shown, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
    return shown


def printable(text: str) -> str:
  """Text with visible signs in place of control characters, which could command a terminal."""
  return ''.join(c if c in '\n\t' or not _is_control(ord(c)) else _visible(ord(c)) for c in text)


def _is_control(code: int) -> bool:
  return code < 32 or 127 <= code < 160


def _visible(code: int) -> str:
  return chr(0x2400 + code) if code < 32 else '\u2421' if code == 127 else '\ufffd'
