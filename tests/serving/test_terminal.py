"""What sample and chat print, with a real engine and scripted lines."""

from collections.abc import Iterator
import io
import os
import signal

import numpy as np
import pytest
from rich.console import Console

from jaxrl_pt.config import Sampler
from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.data.chat_files import plain
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.serving import terminal
from jaxrl_pt.serving.lines import read_lines
from jaxrl_pt.serving.stream import Piece, stream
from jaxrl_pt.serving.terminal import Chat
from jaxrl_pt.serving.text import Markers, printable
from tests.serving.conftest import SIZES, TOKENIZER

EOS = TOKENIZER.eos_id


def piece(number: int, sample: int, text: str, num_tokens: int, finish: str = '') -> Piece:
  return Piece(number, text, Response(number, sample, np.arange(num_tokens, dtype=np.int32),
                                      np.full(num_tokens, -0.5, np.float32),
                                      np.ones(num_tokens, np.float32), finish, 0))


def test_samples_are_shown_in_order_and_as_early_as_can_be():
  out, seen = io.StringIO(), []

  def pieces() -> Iterator[Piece]:
    for p in (piece(1, 0, 'x', 1), piece(0, 0, 'a', 1), piece(1, 0, 'y', 2, 'stop'),
              piece(0, 0, 'b', 2, 'length')):
      yield p
      seen.append(out.getvalue())

  terminal.show_samples(pieces(), ['P', 'Q'], 1, out)
  end = '\n--- 2 tokens, log-probability -1.00 nats\n'
  # The first prompt stands there at once; the second waits for its turn.
  assert seen == ['P', 'Pa', 'Pa', f'Pab{end}Qxy{end}']
  last = out.getvalue().removeprefix(seen[-1])
  assert last.startswith('=== 4 tokens in ') and last.endswith(' tokens/s\n')


def test_a_stream_answers_more_than_the_queue_takes(engine: Engine):
  requests = [Request((i + 1, i + 2), i, 6, 2, stop=(EOS,)) for i in range(9)]
  expected = engine.run(requests)
  texts, whole = {}, {}
  for p in stream(engine, TOKENIZER, requests):
    key = p.number, p.response.sample
    texts[key] = texts.get(key, '') + p.text
    whole[key] = p.response
  assert len(whole) == 18
  for (n, g), response in whole.items():
    np.testing.assert_array_equal(response.tokens, expected[n][g].tokens)
    assert texts[n, g] == TOKENIZER.decode(response.tokens)


def test_a_closed_stream_leaves_the_engine_idle(engine: Engine):
  pieces = stream(engine, TOKENIZER, [Request((1,), 0, SIZES.response_len, 6)])
  next(pieces)
  assert engine.room() < SIZES.queue
  pieces.close()
  assert engine.room() == SIZES.queue


def test_a_wrong_request_stops_the_stream_before_it_starts(engine: Engine):
  with pytest.raises(UserError, match='the prompt is empty'):
    next(stream(engine, TOKENIZER, [Request((1,), 0, 4), Request((), 1, 4)]))
  assert engine.room() == SIZES.queue


# --- Chat -----------------------------------------------------------------------------


def settings(**fields: object) -> Chat:
  return Chat(**{'tokenizer': TOKENIZER, 'template': plain(TOKENIZER), 'markers': Markers(),
                 'sampler': Sampler(), 'max_tokens': 24, **fields})


def talk(engine: Engine, lines: list[str], ansi: bool = False, **fields: object) -> str:
  out = io.StringIO()
  terminal.talk(engine, settings(**fields), lines, Console(
      file=out, force_terminal=ansi, color_system='standard' if ansi else None, width=80))
  return out.getvalue()


def test_a_conversation_goes_on(engine: Engine):
  """The second prompt holds the first answer's own tokens; turns address the randomness."""
  layout = ChatTemplate('<|endoftext|>{% for m in messages %}{{ m.content }}|{% endfor %}')
  text = talk(engine, ['hi', 'ho', '/quit', 'never'], template=layout, max_tokens=10)
  prompt, answers = [EOS], []
  for turn, line in enumerate(('hi', 'ho')):
    prompt += [*line.encode(), *b'|']
    drawn = engine.run([Request(tuple(prompt), turn, 10, stop=(EOS,))])[0][0]
    own = drawn.tokens.tolist()[:-1 if drawn.finish == 'stop' else None]
    # Bytes that are no UTF-8 text stay what they are.
    prompt += [*own, *b'|']
    answers += [line, TOKENIZER.decode(own).strip()]
  tight = lambda text: ''.join(text.split())  # A console widens tabs.
  for answer in answers[1::2]:
    assert tight(printable(answer)) in tight(text)
  assert text.count('tokens/s)') == 2


def test_equal_seeds_and_lines_get_equal_answers(engine: Engine):
  # A console widens a tab by where it stands in the piece of text that is written at once.
  strip = lambda text: [''.join(line.split()) for line in text.splitlines()
                        if 'tokens/s)' not in line]
  assert strip(talk(engine, ['hi', '/new', 'hi'])) == strip(talk(engine, ['hi', '/new', 'hi']))


def test_a_long_conversation_is_cut_and_says_so(engine: Engine):
  text = talk(engine, ['hi', 'ho', 'x' * 60, 'hu'], max_tokens=12)
  assert text.count('it no longer sees the first') >= 1
  assert 'the model takes 64 tokens' in text and 'shorten it' in text
  assert text.count('tokens/s)') == 3  # All but the message that is too long.


def test_a_thought_is_dim(engine: Engine):
  text = talk(engine, ['hi'], ansi=True, max_thought=5, max_answer=4)
  thought, _, answer = text.partition('\n')
  assert thought.startswith('\x1b[2m') and '\x1b[0m' in thought
  assert '<think>' not in text and '</think>' not in text
  assert not answer.lstrip('\n').startswith('\x1b[2m')
  assert '(24 tokens' in text  # 7 + 5 + 8 + 4: markers, thought, marker, answer


def test_ctrl_c_stops_the_answer_and_not_the_program(engine: Engine,
                                                      monkeypatch: pytest.MonkeyPatch):
  advance, calls = engine.advance, []

  def interrupted() -> list:
    calls.append(1)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGINT)
    return advance()

  monkeypatch.setattr(engine, 'advance', interrupted)
  text = talk(engine, ['hi', '/new', 'again'], max_tokens=90)
  assert text.count('(stopped)') == 1 and '(8 tokens' in text
  assert text.count('tokens/s)') == 2
  assert engine.room() == SIZES.queue
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_line_that_is_not_utf8(engine: Engine):
  assert 'not UTF-8' in talk(engine, ['a\udcff'])


def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO('é\r\nb\n\xff'.encode() + b'\xff')))
  typed = read_lines('> ')
  assert [next(typed), next(typed)] == ['é', 'b']
  with pytest.raises(UserError, match='not UTF-8 text'):
    next(typed)
