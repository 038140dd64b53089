"""What the commands `sample` and `chat` show on a terminal."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
from dataclasses import dataclass
import functools
import signal
import threading
import time
from types import FrameType
from typing import Any, TextIO

from rich.console import Console

from jaxrl_pt import config as cfg
from jaxrl_pt.data import chat_files
from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.serving.conversation import fit
from jaxrl_pt.serving.stream import Piece, stream
from jaxrl_pt.serving.text import Markers, ThoughtSplitter, encode_marker, printable, spelled
from jaxrl_pt.serving.thinking import Thinker, Wish

# --- Samples --------------------------------------------------------------------------


def show_samples(pieces: Iterable[Piece], prompts: Sequence[str], num_samples: int,
                 out: TextIO) -> None:
  """Prints each prompt with its continuations, in order, as soon as they are drawn.

  The first unfinished response is shown token by token. What has been drawn of a later response
  is shown when its turn comes.
  """
  order = [(n, g) for n in range(len(prompts)) for g in range(num_samples)]
  texts = {key: prompts[key[0]] for key in order}
  ends: dict[tuple[int, int], str] = {}
  clean = printable if out.isatty() else str
  turn, num_tokens, start = 0, 0, time.perf_counter()
  for piece in pieces:
    response = piece.response
    key = (piece.number, response.sample)
    texts[key] += piece.text
    if response.finish:
      num_tokens += len(response.tokens)
      ends[key] = (f'\n--- {len(response.tokens)} tokens, log-probability '
                   f'{float(response.logp.sum()):.2f} nats\n')
    while turn < len(order):
      out.write(clean(texts[order[turn]]))
      texts[order[turn]] = ''
      if order[turn] not in ends:
        break
      out.write(ends[order[turn]])
      turn += 1
    out.flush()
  seconds = time.perf_counter() - start
  out.write(f'=== {num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:,.0f} tokens/s\n')
  out.flush()


# --- Chat -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
  """A conversation's settings.

  max_tokens: the largest number of tokens of an answer, its thought included.
  wish: whether an answer thinks first, and for how long.
  max_thought: drawn tokens after which the end of thinking is forced, where any model is made to
    think by the start marker; None leaves that to `wish`.
  max_answer: the largest number of tokens after the end of thinking.
  system: the system message, '' for none.
  """

  tokenizer: Tokenizer
  template: ChatTemplate
  markers: Markers
  sampler: cfg.Sampler
  max_tokens: int
  max_thought: int | None = None
  max_answer: int | None = None
  system: str = ''
  wish: Wish = Wish()

  def request(self, prompt: Sequence[int], turn: int) -> Request:
    """The request for the next answer; the number of the turn addresses its randomness."""
    steering = (self.thinker.steer(self.wish, prompt) if self.max_thought is None
                else self.thinker.think(self.max_thought, prompt))
    return Request(tuple(prompt), turn, self.max_tokens + len(steering.forced), 1, self.sampler,
                   self.end_tokens, self.template.stop_texts, steering.forced,
                   steering.max_thought, self.max_answer, begins_thinking=steering.begins_thinking)

  @functools.cached_property
  def thinker(self) -> Thinker:
    """How the policy is made to think, or not to."""
    return Thinker(self.tokenizer, self.markers, self.template)

  @functools.cached_property
  def end_tokens(self) -> tuple[int, ...]:
    """The tokens that end an answer."""
    return chat_files.end_tokens(self.template, self.tokenizer)


def talk(engine: Engine, chat: Chat, lines: Iterable[str], console: Console) -> None:
  """Answers line after line; the thought is dim, and Ctrl-C stops an answer.

  Args:
    engine: an engine with the markers of `chat.thinker`.
    chat: the conversation's settings.
    lines: what the user says; `/new` forgets the conversation, `/quit` ends it.
    console: the terminal that shows the answers.
  """
  note = lambda text: console.print(f'({text})', style='dim italic', markup=False,
                                    highlight=False)
  start: list[dict[str, Any]] = (
      [{'role': 'system', 'content': chat.system}] if chat.system else [])
  # Number of a message → its tokens, where it has been drawn; they are never encoded again.
  messages, drawn, turn = list(start), dict[int, list[int]](), 0
  for line in lines:
    match line.strip():
      case '':
        continue
      case '/quit':
        return
      case '/new':
        messages, drawn = list(start), {}
        note('a new conversation')
        continue
    asked = [*messages, {'role': 'user', 'content': line}]
    with _noting_interrupt() as is_interrupted:
      try:
        line.encode()
        prompt, num_cut = fit(chat.thinker.told(chat.wish), chat.tokenizer, asked,
                              engine.config.prompt_len, drawn)
      except (UserError, UnicodeEncodeError) as e:
        note(str(e) if isinstance(e, UserError) else 'that line is not UTF-8 text')
        continue
      if num_cut:
        note(f'the model takes {engine.config.prompt_len} tokens: of this conversation it no '
             f'longer sees the first {num_cut} messages')
      answer, tokens = _answer(engine, chat, chat.request(prompt, turn), console, is_interrupted)
    turn += 1
    if is_interrupted():
      note('stopped')
    if answer:
      messages = [*asked, {'role': 'assistant', 'content': answer}]
      if tokens:
        drawn[len(messages) - 1] = tokens


def _answer(engine: Engine, chat: Chat, request: Request, console: Console,
            is_interrupted: Callable[[], bool]) -> tuple[str, list[int]]:
  """Shows the answer as it is drawn; returns its text and its tokens, without its thought."""
  splitter = ThoughtSplitter(chat.markers, is_open=chat.thinker.is_open(request.prompt))
  answer, has_thought, num_tokens, began = '', False, 0, time.perf_counter()
  response: Response | None = None
  with contextlib.closing(stream(
      engine, chat.tokenizer, [request], table=spelled(chat.tokenizer, chat.markers))) as pieces:
    for piece in pieces:
      thought, text = splitter.feed(piece.text, last=bool(piece.response.finish))
      _show(console, thought, 'dim')
      if text and has_thought and not answer:
        console.print('\n')
      _show(console, text)
      has_thought, answer = has_thought or bool(thought), answer + text
      response, num_tokens = piece.response, len(piece.response.tokens)
      if is_interrupted():
        break
  console.print()
  rate = num_tokens / (time.perf_counter() - began)
  console.print(f'({num_tokens} tokens, {rate:,.0f} tokens/s)', style='dim italic', markup=False,
                highlight=False)
  answer = answer.strip()
  return answer, _answer_tokens(chat, response, answer) if response is not None else []


def _answer_tokens(chat: Chat, response: Response, answer: str) -> list[int]:
  """The tokens of the answer alone; none where a stop text ends it in the middle of a token."""
  tokens = response.tokens.tolist()[:-1 if response.finish == 'stop' else None]
  before = [list(encode_marker(chat.tokenizer, marker))
            for marker in (chat.markers.end, chat.markers.no_think) if marker]
  table = spelled(chat.tokenizer, chat.markers)
  text = lambda ids: b''.join(table[i] for i in ids if i < len(table)).decode('utf-8', 'replace')
  starts = [0, *(i for i in range(1, len(tokens) + 1)
                 if any(tokens[:i][-len(marker):] == marker for marker in before))]
  # After a stop text the answer ends before the last tokens.
  return next((tokens[start:stop] for start in starts
               for stop in range(len(tokens), start, -1)
               if text(tokens[start:stop]).strip() == answer), [])


def _show(console: Console, text: str, style: str | None = None) -> None:
  if text:
    console.print(printable(text), style=style, end='', markup=False, highlight=False,
                  emoji=False, soft_wrap=True)


@contextlib.contextmanager
def _noting_interrupt() -> Iterator[Callable[[], bool]]:
  """Ctrl-C only sets a flag, which is returned: an engine that is interrupted in a step is lost."""
  interrupted = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield interrupted.is_set  # Python delivers signals to the main thread only.
    return

  def note(number: int, frame: FrameType | None) -> None:
    del number, frame
    interrupted.set()

  previous = signal.signal(signal.SIGINT, note)
  try:
    yield interrupted.is_set
  finally:
    signal.signal(signal.SIGINT, previous)
