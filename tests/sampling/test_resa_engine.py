"""Sparse attention behind the engine's interface: batches, and the texts of dense attention."""

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.sampling.resa_engine import ResaEngine
from tests.sampling.test_engine import MODEL, PARAMS, SEED, STOP, assert_equal, expected, requests


def test_batches_of_every_block_are_dense():
  """Five prompts of three samples in a queue of six: two batches, and one that is half full."""
  config = cfg.Engine(slots=6, queue=6, prompt_len=8, response_len=20)
  engine = ResaEngine(MODEL, PARAMS, config, cfg.ReSA(block=4, active=1.0), num_drafts=2,
                      sampler=cfg.Sampler(), num_samples=3, stop_id=STOP, seed=SEED)
  waiting, done, handles = requests(), [], {}
  while waiting or engine.room() < config.queue:
    while waiting and engine.room() >= 3:
      request = waiting.pop(0)
      handles[engine.submit(request)] = request.id
    for handle, response in engine.advance():
      assert handles[handle] == response.id
      done.append(response)
  assert len(done) == 15
  assert_equal(done, expected(cfg.Sampler()))
  assert engine.drafts.agreed == engine.drafts.drafted > 0  # Drafts of every block are right.

  engine.cancel(engine.submit(requests()[0]))
  assert engine.room() == config.queue
  for request, reason in ((Request((), 0, 20, 3), 'has 0 tokens'),
                          (Request((1,) * 9, 0, 20, 3), 'has 9 tokens and the cache takes 1 to 8'),
                          (Request((1,), 0, 20, 3, stop_strings=('a',)), 'takes no --stop')):
    with pytest.raises(UserError, match=reason):
      engine.check(request)
