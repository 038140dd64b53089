"""Counters of the server, in Prometheus' text format."""

import bisect
from collections import Counter
from collections.abc import Mapping

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


class Telemetry:
  """Counts since the server's start. Only the server's event loop reads and writes them."""

  def __init__(self) -> None:
    self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
    self.num_prompt_tokens = self.num_tokens = self.num_disconnects = 0
    self._first_tokens = [0] * (len(_BUCKETS) + 1)
    self._first_token_seconds = 0.0

  def note_first_token(self, seconds: float) -> None:
    """Counts the seconds from the arrival of a request to its first token."""
    self._first_tokens[bisect.bisect_left(_BUCKETS, seconds)] += 1
    self._first_token_seconds += seconds

  def text(self, engine: Mapping[str, float]) -> str:
    """The counters in Prometheus' text format, together with those of `Worker.counters`."""
    lines: list[str] = []

    def add(name: str, kind: str, about: str, samples: Mapping[str, float]) -> None:
      lines.append(f'# HELP jaxrl_pt_{name} {about}')
      lines.append(f'# TYPE jaxrl_pt_{name} {kind}')
      lines.extend(f'jaxrl_pt_{name}{suffix} {value:.10g}' for suffix, value in samples.items())

    add('requests_total', 'counter', 'HTTP requests by path and status.', {
        f'{{path="{path}",status="{status}"}}': n
        for (path, status), n in sorted(self.requests.items())})
    add('prompt_tokens_total', 'counter', 'Tokens of accepted prompts.',
        {'': self.num_prompt_tokens})
    add('tokens_total', 'counter', 'Tokens of responses.', {'': self.num_tokens})
    add('disconnects_total', 'counter', 'Requests whose client left before the end.',
        {'': self.num_disconnects})
    cumulative, samples = 0, {}
    for bound, num in zip([*_BUCKETS, '+Inf'], self._first_tokens, strict=True):
      cumulative += num
      samples[f'_bucket{{le="{bound}"}}'] = float(cumulative)
    add('first_token_seconds', 'histogram', 'From the arrival of a request to its first token.',
        samples | {'_sum': self._first_token_seconds, '_count': cumulative})
    for name, kind, about, key in (
        ('responses', 'gauge', 'Responses waiting or under way.', 'responses'),
        ('cache_pages_in_use', 'gauge', 'Pages of the key/value cache in use.', 'pages_in_use'),
        ('slot_occupancy', 'gauge', 'Share of slots that drew, over all steps.', 'occupancy'),
        ('decode_steps_total', 'counter', 'Decode steps.', 'steps'),
        ('prefilled_tokens_total', 'counter', 'Prompt tokens computed.', 'prefilled')):
      add(name, kind, about, {'': engine[key]})
    return '\n'.join(lines) + '\n'
