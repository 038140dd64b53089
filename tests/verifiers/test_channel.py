"""Messages under one deadline and a bound, whatever the other side does."""

import os
import threading
import time

import pytest

from jaxrl_pt.verifiers.channel import Closed, Deadline, Malformed, receive, send


@pytest.fixture
def pipe():
  ends = os.pipe()
  os.set_blocking(ends[0], False)
  yield ends
  for fd in ends:
    try:
      os.close(fd)
    except OSError:  # the test has closed it
      pass


def test_a_message_arrives_whole(pipe):
  message = {'text': '\ud800 \0 ü' + 'x' * 20000, 'numbers': [1.5, float('inf')], 'none': None}
  send(pipe[1], message, Deadline(5))
  assert receive(pipe[0], Deadline(5), 1 << 20) == message


@pytest.mark.parametrize('data, expected', [
    (b'\xff\xff\xff\xff', 'a message of 4,294,967,295 bytes, where 100 are the most'),
    (b'\0\0\0\x02{}{', 'more than one message'), (b'\0\0\0\x03[1]', 'not a JSON object'),
    (b'\0\0\0\x04null', 'not a JSON object'), (b'\0\0\0\x02{a', 'not JSON'),
    (b'\0\0\0\x02\xff\xfe', 'not JSON'), (b'\0\0\0\0', 'not JSON')])
def test_what_is_no_message_is_refused_at_once(pipe, data, expected):
  os.write(pipe[1], data)
  with pytest.raises(Malformed, match=expected):
    receive(pipe[0], Deadline(60), 100)


def test_the_end_of_the_other_side_is_noticed(pipe):
  os.write(pipe[1], b'\0\0')
  os.close(pipe[1])
  with pytest.raises(Closed):
    receive(pipe[0], Deadline(60), 100)
  os.close(pipe[0])
  with pytest.raises(Closed):
    send(pipe[1], {}, Deadline(60))


def test_a_deadline_does_not_begin_again_with_each_byte(pipe):
  os.write(pipe[1], b'\0\0\0\x63')
  is_over = threading.Event()

  def drip() -> None:
    for _ in range(90):
      if not is_over.wait(0.05):
        os.write(pipe[1], b'x')

  dripping = threading.Thread(target=drip)
  dripping.start()
  start = time.monotonic()
  with pytest.raises(TimeoutError):
    receive(pipe[0], Deadline(0.4), 100)
  assert time.monotonic() - start < 3
  is_over.set()
  dripping.join()


def test_who_does_not_read_is_not_waited_for(pipe):
  os.set_blocking(pipe[1], False)
  with pytest.raises(TimeoutError):
    send(pipe[1], {'text': 'x' * (1 << 20)}, Deadline(0.2))
