"""Counters of the server, for Prometheus to scrape."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
# (name, explanation, key of `Worker.counters`)
_GAUGES = (
    ('responses', 'Responses waiting or under way.', 'responses'),
    ('cache_pages_in_use', 'Pages of the key/value cache in use.', 'pages_in_use'),
    ('cache_pages_kept', 'Of these, pages that are kept for prompts to come.', 'kept_pages'),
    ('slot_occupancy', 'Share of slots that drew, over all steps.', 'occupancy'))
_COUNTERS = (
    ('decode_steps', 'Decode steps.', 'steps'),
    ('prefilled_tokens', 'Prompt tokens computed.', 'prefilled'),
    ('prefix_cache_hits', 'Prompts whose beginning was found in the cache.', 'prefix_hits'),
    ('prefix_cache_hit_tokens', 'Prompt tokens found in the cache.', 'prefix_hit_tokens'))


class Telemetry:
  """Counts since the server's start. Only the server's event loop reads and writes them."""

  def __init__(self) -> None:
    self._registry = CollectorRegistry()
    count = lambda name, about, labels=(): Counter(
        name, about, labels, namespace='jaxrl_pt', registry=self._registry)
    self.requests = count('requests', 'HTTP requests by path and status.', ('path', 'status'))
    self.prompt_tokens = count('prompt_tokens', 'Tokens of accepted prompts.')
    self.tokens = count('tokens', 'Tokens of responses.')
    self.disconnects = count('disconnects', 'Requests whose client left before the end.')
    self.first_token_seconds = Histogram(
        'first_token_seconds', 'From the arrival of a request to its first token.',
        namespace='jaxrl_pt', registry=self._registry, buckets=_BUCKETS)

  def exposition(self, engine: Mapping[str, float], accept: str) -> tuple[bytes, str]:
    """The counters in the format that a client accepts.

    Args:
      engine: what `Worker.counters` returns.
      accept: the Accept header of the client's request, '' where there is none.

    Returns:
      (the text, its content type).
    """
    encode, content_type = choose_encoder(accept)
    return encode(_Both(self._registry, engine)), content_type


class _Both(Collector):
  """The server's counters and then those of the engine."""

  def __init__(self, registry: CollectorRegistry, engine: Mapping[str, float]) -> None:
    self._registry, self._engine = registry, engine

  def collect(self) -> Iterator[Metric]:
    yield from self._registry.collect()
    for name, about, key in _GAUGES:
      yield GaugeMetricFamily(f'jaxrl_pt_{name}', about, self._engine[key])
    for name, about, key in _COUNTERS:
      yield CounterMetricFamily(f'jaxrl_pt_{name}', about, self._engine[key])
