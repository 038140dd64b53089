"""A real engine over a tiny random model and bytes as tokens, served on a free port."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import socket
import threading
import time
from typing import Any

import jax
import openai
import pytest
import uvicorn

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving import connections
from jaxrl_pt.serving.app import make_app
from jaxrl_pt.serving.protocol import Service
from jaxrl_pt.serving.worker import Worker

MODEL = transformer.build(cfg.Model(
    num_layers=1, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=257))
TOKENIZER = ByteTokenizer()
SIZES = cfg.Engine(slots=4, queue=8, prompt_len=64, response_len=96, page_size=8,
                   prefill_chunk=32, steps_per_call=4, constrained=6)


def make_engine(sizes: cfg.Engine = SIZES) -> Engine:
  params = P.init(MODEL.specs, jax.random.key(0))
  # A larger embedding (tied head) gives the random model opinions.
  params = {**params, 'embed': params['embed'] * 6}
  return Engine(MODEL, params, sizes, seed=5, token_bytes=TOKENIZER.token_bytes(),
                think_end=tuple(TOKENIZER.encode('</think>')))


@dataclasses.dataclass
class Running:
  """A server in a thread."""

  url: str
  service: Service
  worker: Worker
  server: uvicorn.Server

  def client(self, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f'{self.url}/v1', **{
        'api_key': 'none', 'max_retries': 0, 'timeout': 60, **options})

  def counters(self) -> dict[str, float]:
    return self.worker.counters().result(timeout=60)

  def wait_until_free(self) -> dict[str, float]:
    """The counters, once no response is under way."""
    deadline = time.monotonic() + 30
    while (counters := self.counters())['responses']:
      assert time.monotonic() < deadline, counters
      time.sleep(0.01)
    return counters


@contextlib.contextmanager
def running(engine: Engine, token: str | None = None, *,
            log: Callable[[str], None] | None = None, most: int | None = None,
            header_seconds: float = connections.HEADER_SECONDS,
            **settings: Any) -> Iterator[Running]:
  service = Service('tiny', TOKENIZER, engine.config, MODEL.config.vocab_size, **settings)
  worker = Worker(engine)
  server = uvicorn.Server(connections.server_config(
      make_app(service, worker, token, log), shutdown_seconds=20, most=most,
      header_seconds=header_seconds))
  with socket.create_server(('127.0.0.1', 0)) as listening:
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
      yield Running(f'http://127.0.0.1:{listening.getsockname()[1]}', service, worker, server)
    finally:
      server.should_exit = True
      thread.join(timeout=60)
      assert not thread.is_alive()


@pytest.fixture(scope='session')
def engine() -> Engine:
  """Compiled once; whoever takes it leaves it idle."""
  return make_engine()


@pytest.fixture
def server(engine: Engine) -> Iterator[Running]:
  with running(engine) as it:
    yield it
    counters = it.wait_until_free()
    assert counters['pages_in_use'] == counters['kept_pages']  # for prompts to come
