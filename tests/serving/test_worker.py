"""The engine's thread: all or none, nothing lost, nobody left waiting."""

import threading

import numpy as np
import pytest

from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.serving.constraint import Guide, regex_grammar
from jaxrl_pt.serving.worker import Busy, Stopped, Worker
from tests.serving.conftest import SIZES, TOKENIZER


class Heard:
  """A listener that keeps what it hears."""

  def __init__(self) -> None:
    self.last: dict[tuple[int, int], Response] = {}
    self.failure: Exception | None = None
    self.changed = threading.Condition()

  def __call__(self, number: int, response: Response | Exception) -> None:
    with self.changed:
      if isinstance(response, Exception):
        self.failure = response
      else:
        self.last[number, response.sample] = response
      self.changed.notify_all()

  def wait_for(self, num_finished: int) -> None:
    done = lambda: sum(bool(r.finish) for r in self.last.values()) == num_finished
    with self.changed:
      assert self.changed.wait_for(lambda: done() or self.failure, timeout=60)


def test_jobs_get_what_the_engine_draws(engine: Engine):
  requests = [Request((3, 4), 11, 9, 2), Request((5,), 12, 20, 3)]
  expected = engine.run(requests)
  worker, heard = Worker(engine), [Heard(), Heard()]
  worker.start()
  worker.submit(requests, heard[0])
  worker.submit(requests[1:], heard[1])
  heard[0].wait_for(5)
  heard[1].wait_for(3)
  worker.stop()
  for (number, sample), response in heard[0].last.items():
    np.testing.assert_array_equal(response.tokens, expected[number][sample].tokens)
  for (_, sample), response in heard[1].last.items():
    np.testing.assert_array_equal(response.tokens, expected[1][sample].tokens)


def test_room_is_promised_at_once_and_given_back(engine: Engine):
  """Before the thread runs nothing can finish, so that the counts are exact."""
  worker, heard = Worker(engine), Heard()
  job = worker.submit([Request((1,), 0, 4, 5)], heard)
  kept = worker.submit([Request((1,), 1, 4)], heard)
  with pytest.raises(Busy, match='6 responses are under way and at most 8'):
    worker.submit([Request((1,), 0, 4), Request((1,), 0, 4, 2)], Heard())
  with pytest.raises(UserError, match='9 responses'):
    worker.submit([Request((1,), 0, 4, 5), Request((1,), 0, 4, 4)], Heard())
  with pytest.raises(UserError, match='the prompt is empty'):
    worker.submit([Request((1,), 0, 4), Request((), 0, 4)], Heard())
  worker.cancel(job)  # Before it has begun: it never will.
  worker.start()
  heard.wait_for(1)
  assert list(heard.last) == [(0, 0)] and heard.last[0, 0].id == 1
  worker.cancel(kept)  # It has ended: nothing happens.
  whole = Heard()
  worker.submit([Request((1,), 2, 4, SIZES.queue)], whole)
  whole.wait_for(SIZES.queue)
  worker.stop()
  assert engine.room() == SIZES.queue


def test_room_for_constrained_responses_is_counted_too(engine: Engine):
  grammar = Guide(TOKENIZER, 257).constraint(regex_grammar('a{4}'), (TOKENIZER.eos_id,))
  held = lambda n, id: Request((1,), id, 4, n, stop=(TOKENIZER.eos_id,), constraint=grammar)
  worker, heard = Worker(engine), Heard()
  job = worker.submit([held(5, 0)], heard)
  worker.submit([held(1, 1), Request((1,), 2, 4)], heard)
  with pytest.raises(Busy, match='6 responses of a format are under way and at most 6'):
    worker.submit([held(1, 3)], Heard())
  with pytest.raises(UserError, match='7 responses of a format are asked for at once'):
    worker.submit([held(3, 3), held(4, 4)], Heard())
  worker.cancel(job)
  worker.start()
  heard.wait_for(2)
  assert heard.last[0, 0].tokens.tolist() == [97] * 4
  while worker.counters().result(timeout=60)['responses']:
    pass
  worker.stop()
  assert worker._masks == SIZES.constrained and worker._room == SIZES.queue == engine.room()


def test_going_down_tells_everybody(engine: Engine):
  worker, heard, late = Worker(engine), Heard(), Heard()
  worker.submit([Request((1,), 0, SIZES.response_len, 2)], heard)
  worker._inbox.put(None)
  worker.submit([Request((1,), 0, 4)], late)  # Behind the order to stop.
  worker.start()
  worker.stop()
  for listener in (heard, late):
    assert isinstance(listener.failure, Stopped)
  with pytest.raises(Stopped):
    worker.submit([Request((1,), 0, 4)], heard)
  with pytest.raises(Stopped):
    worker.counters().result()
  for handle in range(engine._num_handles):
    engine.cancel(handle)
  while engine.room() < SIZES.queue:
    engine.advance()


def test_a_first_token_comes_early_and_calls_stay_long(engine: Engine):
  worker = Worker(engine)
  steps = []
  for has_begun in (True, True, True, False, True):
    worker._has_begun = has_begun
    steps.append(worker._steps())
  assert steps == [1, None, 1, None, 1]
