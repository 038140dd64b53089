"""Text piece by piece: whole characters, stop strings trimmed, thought apart from answer."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest

from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.serving.text import Markers, TextStream, ThoughtSplitter, printable

BYTES = ByteTokenizer()
quick = settings(max_examples=60, deadline=None, derandomize=True)


def text_stream(tokenizer=BYTES, stop_strings=(), **options):
  return TextStream(tokenizer, tokenizer.token_bytes(), stop_strings, **options)


def feed_all(stream, tokens, finish, sizes):
  """Feeds the tokens in portions; returns the pieces and the numbers of all given tokens."""
  pieces, given_tokens, start = [], [], 0
  ends = sorted({min(s, len(tokens)) for s in sizes} | {len(tokens)})
  for end in ends:
    text, numbers = stream.feed(tokens[start:end], finish if end == len(tokens) else '')
    pieces.append(text)
    given_tokens.extend(numbers)
    start = end
  return pieces, given_tokens


@quick
@given(st.binary(max_size=24), st.lists(st.integers(1, 24), max_size=6))
@example('aé€😀'.encode(), [2, 4, 5, 7, 9])
@example(b'\xe2\x82', [1])
def test_pieces_join_to_the_whole_text(data, sizes):
  pieces, numbers = feed_all(text_stream(), list(data), 'length', sizes)
  assert ''.join(pieces) == data.decode('utf-8', 'replace')
  assert numbers == list(range(len(data)))


@quick
@given(st.text(alphabet='aé€😀', max_size=8))
def test_a_character_comes_whole_with_its_last_byte(text):
  stream, shown = text_stream(), ''
  data = text.encode()
  for i, byte in enumerate(data):
    shown += stream.feed([byte], '')[0]
    # All characters that are complete, and nothing of the one that is not.
    assert shown == data[:i + 1].decode('utf-8', 'ignore')


def slow_stop(data: bytes, stops: list[bytes]) -> tuple[int, int] | None:
  """(tokens until the engine stops, bytes kept), token by token, by the definition."""
  for n in range(1, len(data) + 1):
    starts = [n - len(s) for s in stops if data[:n].endswith(s)]
    if starts:
      return n, min(starts)
  return None


@quick
@given(st.text(alphabet='ab', max_size=16), st.lists(st.text(alphabet='ab', min_size=1, max_size=4),
                                                     min_size=1, max_size=3),
       st.lists(st.integers(1, 16), max_size=4))
@example('aab', ['ab', 'b'], [1, 2, 3])  # Both end at once: the longer one is left out.
@example('abab', ['aba', 'b'], [1])
def test_a_stop_string_is_left_out_and_never_shown_in_part(text, stops, sizes):
  found = slow_stop(text.encode(), [s.encode() for s in stops])
  num, kept = found or (len(text), len(text))
  tokens = list(text.encode())[:num]
  stream = text_stream(BYTES, stops)
  pieces, numbers = feed_all(stream, tokens, 'stop_string' if found else 'length', sizes)
  assert ''.join(pieces) == text[:kept]
  assert numbers == list(range(kept))


def test_a_stop_string_may_end_inside_a_token():
  class Pairs(ByteTokenizer):
    def token_bytes(self):
      return [b'ab', b'cd', b'ef']

  stream = text_stream(Pairs(), ['bc'])
  assert stream.feed([2, 0], '') == ('efa', range(1))
  # The token with the `a` before the stop string is a token of the text, `cd` is not.
  assert stream.feed([1], 'stop_string') == ('', range(1, 2))


def test_the_token_that_ends_the_text_is_none_of_it():
  stream = text_stream()
  assert stream.feed([*b'ok', BYTES.eos_id], 'stop') == ('ok', range(2))


def test_the_space_before_a_text_is_left_out_only_where_a_text_starts():
  class Dummy(ByteTokenizer):
    def token_bytes(self):
      return [b' once', b' upon']

    def decode_bytes(self, ids):
      return b''.join(self.token_bytes()[i] for i in ids)[1:]

  assert text_stream(Dummy(), starts_text=True).feed([0, 1], 'length')[0] == 'once upon'
  assert text_stream(Dummy()).feed([0, 1], 'length')[0] == ' once upon'


@pytest.mark.parametrize(('pieces', 'offsets'), [
    ([b'a', b'\xc3', b'\xa9', b'b'], [0, 1, 1, 2]),  # 'aéb'
    ([b'\xf0', b'\x9f', b'\x98\x80!', b'x'], [0, 0, 0, 2]),  # '😀!x'
    ([b'a\xc3', b'\xa9b\xe2', b'\x82\xac'], [0, 1, 3]),  # 'aéb€'
    ([b'\xff', b'a', b'\xe2\x82', b'b'], [0, 1, 2, 2]),  # '\ufffda\ufffdb'
    ([b'\xc3\xa9', b'', b'b'], [0, 1, 1])])  # a token without bytes
def test_a_tokens_offset_counts_whole_characters_before_it(pieces, offsets):
  class Pieces(ByteTokenizer):
    def token_bytes(self):
      return pieces

  tokens = list(range(len(pieces)))
  for portions in ([len(pieces)], tokens):
    stream = text_stream(Pieces())
    feed_all(stream, tokens, 'length', portions)
    assert [stream.offset(i) for i in tokens] == offsets


@quick
@given(st.text(alphabet='aé€😀', min_size=1, max_size=8))
def test_offsets_of_bytes_are_the_places_of_their_characters(text):
  stream = text_stream()
  stream.feed(list(text.encode()), 'length')
  wanted = [i for i, c in enumerate(text) for _ in c.encode()]
  assert [stream.offset(i) for i in range(len(wanted))] == wanted


def test_offsets_follow_the_text_without_the_space_before_it():
  class Dummy(ByteTokenizer):
    def token_bytes(self):
      return [b' once', b' upon']

    def decode_bytes(self, ids):
      return b''.join(self.token_bytes()[i] for i in ids)[1:]

  stream = text_stream(Dummy(), starts_text=True)
  stream.feed([0, 1], 'length')
  assert [stream.offset(0), stream.offset(1)] == [0, 4]


def test_a_token_beyond_the_tokenizer_spells_nothing():
  assert text_stream().feed([97, 300, 98], 'length') == ('ab', range(3))


# --- Thought --------------------------------------------------------------------------


@pytest.mark.parametrize(('text', 'thought', 'answer'), [
    ('plain answer', '', 'plain answer'),
    (' <think>why</think>\n\nbecause', 'why', 'because'),
    ('<think>cut off', 'cut off', ''),
    ('<think></think>x', '', 'x'),
    ('<thin air', '', '<thin air'),
    ('<thi', '', '<thi'),
    ('say <think>no</think>', '', 'say <think>no</think>'),
    ('<think>a</think>b<think>c</think>', 'a', 'b<think>c</think>'),
    ('<think>a</thin</think> b', 'a</thin', 'b'),
    ('<think>a</thi', 'a</thi', ''),
    (' \n', '', ''),
])
@pytest.mark.parametrize('size', [1, 3, 100])
def test_thought_and_answer(text, thought, answer, size):
  splitter = ThoughtSplitter(Markers())
  pieces = [splitter.feed(text[i:i + size]) for i in range(0, len(text), size)]
  pieces.append(splitter.feed('', last=True))
  assert (''.join(p[0] for p in pieces), ''.join(p[1] for p in pieces)) == (thought, answer)


def test_a_thought_is_shown_while_it_is_drawn():
  splitter = ThoughtSplitter(Markers('[', ']'))
  assert splitter.feed('[so') == ('so', '')
  assert splitter.feed(' far') == (' far', '')
  assert splitter.feed('] then') == ('', 'then')


def test_control_characters_cannot_command_the_terminal():
  assert printable('a\x1b[31mé\n\t\x07\x7f\x9b') == 'a\u241b[31mé\n\t\u2407\u2421\ufffd'
