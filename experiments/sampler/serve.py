"""64 concurrent streams against `jaxrl-pt serve`, clients leaving at random.

    python experiments/sampler/serve.py --workdir runs/pretrain_tiny

Without a model in the work directory, one is trained briefly: what it says does not matter
here. The server is a process of its own. Each of 64 requests (prompt, seed, length) is first
answered alone; then 64 clients send random ones of them for a minute and leave some streams
early. Every stream that was read to the end must equal the answer alone, every other one must
be a beginning of it; afterwards no response may be left and the cache must be as it was.
Three more minutes show whether the memory goes on growing. Results: results/serve.json and .png.
"""

import argparse
import asyncio
from collections import Counter
import contextlib
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import random
import subprocess
import sys
import time

import httpx2
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / 'results'
NUM_STREAMS, SLOTS, PROMPT_LEN, RESPONSE_LEN = 64, 64, 128, 256
PROMPTS = ('def ', 'class Parser:\n', 'import os\n', 'Return the ', 'é and ü: ', '# ' * 40,
           'for i in range(', '"""A test of ')


@dataclass
class Round:
  """What one round of load has shown."""

  outcomes: Counter[str] = field(default_factory=Counter)
  first_tokens: list[float] = field(default_factory=list)  # seconds
  num_tokens: int = 0


# --- The server -----------------------------------------------------------------------


@contextlib.contextmanager
def serving(workdir: Path):
  """Yields (process, URL of the API)."""
  command = [sys.executable, '-m', 'jaxrl_pt.main', 'serve', '--workdir', str(workdir), '--port',
             '0', '--slots', str(SLOTS), '--queue', str(2 * NUM_STREAMS), '--prompt_len',
             str(PROMPT_LEN), '--response_len', str(RESPONSE_LEN)]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    line = process.stdout.readline()
    assert line.startswith('Serving '), line
    yield process, line.split()[-1]
    process.terminate()
    assert process.wait(timeout=60) == 0, 'the server did not go down in good order'
  finally:
    process.kill()


def resident_mb(pid: int) -> float:
  pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def gauges(url: str) -> dict[str, float]:
  lines = httpx2.get(f'{url.removesuffix("/v1")}/metrics', timeout=60).text.splitlines()
  return {k.removeprefix('jaxrl_pt_'): float(v) for k, v in (
      line.rsplit(' ', 1) for line in lines if not line.startswith('#'))}


def wait_until_idle(url: str) -> dict[str, float]:
  while (found := gauges(url))['responses']:
    time.sleep(0.2)
  return found


# --- The clients ----------------------------------------------------------------------


def make_requests(rng: random.Random) -> list[dict]:
  return [{'prompt': PROMPTS[i % len(PROMPTS)], 'seed': i, 'stream': True,
           'max_tokens': min(RESPONSE_LEN, int(16 * rng.paretovariate(1)))}
          for i in range(NUM_STREAMS)]


async def read(client: httpx2.AsyncClient, url: str, body: dict, most: int | None,
               shown: Round) -> tuple[str, bool]:
  """The text of a stream, up to `most` pieces of it, and whether it came to its end."""
  start, text, num = time.perf_counter(), '', 0
  async with client.stream('POST', f'{url}/completions', json=body) as response:
    response.raise_for_status()
    async for line in response.aiter_lines():
      if line == 'data: [DONE]':
        return text, True
      if not line.startswith('data: '):
        continue
      if num == 0:
        shown.first_tokens.append(time.perf_counter() - start)
      num += 1
      text += json.loads(line.removeprefix('data: '))['choices'][0]['text']
      if most is not None and num >= most:
        break
  return text, False


async def user(client: httpx2.AsyncClient, url: str, requests: list[dict], alone: list[str],
               rng: random.Random, end: float, shown: Round) -> None:
  while time.perf_counter() < end:
    number = rng.randrange(len(requests))
    most = rng.randrange(1, 12) if rng.random() < 0.4 else None
    try:
      text, is_whole = await read(client, url, requests[number], most, shown)
    except httpx2.HTTPStatusError as e:
      shown.outcomes[f'status {e.response.status_code}'] += 1
      continue
    except httpx2.HTTPError:
      shown.outcomes['lost'] += 1
      continue
    if is_whole:
      shown.outcomes['whole' if text == alone[number] else 'mixed'] += 1
    elif most is None:
      shown.outcomes['lost'] += 1
    else:
      shown.outcomes['left early' if alone[number].startswith(text) else 'mixed'] += 1


async def load(url: str, requests: list[dict], alone: list[str], seed: int, seconds: float,
               pid: int) -> tuple[Round, list[tuple[float, float]]]:
  """One round: all users, and the server's memory meanwhile, (seconds, MB)."""
  shown, memory = Round(), []
  limits = httpx2.Limits(max_connections=NUM_STREAMS, max_keepalive_connections=NUM_STREAMS)
  start = time.perf_counter()
  async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
    users = [asyncio.create_task(user(
        client, url, requests, alone, random.Random(1000 * seed + i), start + seconds, shown))
        for i in range(NUM_STREAMS)]
    while not all(u.done() for u in users):
      memory.append((time.perf_counter() - start, resident_mb(pid)))
      await asyncio.sleep(1)
    await asyncio.gather(*users)
  return shown, memory


async def answer_alone(url: str, requests: list[dict], shown: Round) -> list[str]:
  async with httpx2.AsyncClient(timeout=120) as client:
    return [(await read(client, url, body, None, shown))[0] for body in requests]


# --- Numbers --------------------------------------------------------------------------


def percentile(values: list[float], q: float) -> dict[str, float]:
  """The percentile in milliseconds, with a bootstrap 95 % interval."""
  data, rng = np.array(values) * 1000, np.random.default_rng(0)
  resampled = np.percentile(rng.choice(data, (1000, len(data))), q, axis=1)
  low, high = np.percentile(resampled, [2.5, 97.5])
  return {'ms': round(float(np.percentile(data, q)), 1), 'low': round(float(low), 1),
          'high': round(float(high), 1)}


def plot(rounds: list[Round], memories: list[list[tuple[float, float]]], path: Path) -> None:
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
  for i, shown in enumerate(rounds):
    values = np.sort(shown.first_tokens) * 1000
    left.plot(values, np.linspace(0, 1, len(values)), label=f'minute {i + 1}')
  left.set(xscale='log', xlabel='first-token latency, ms', ylabel='share of streams',
           title=f'{NUM_STREAMS} concurrent streams')
  left.legend()
  start, most = 0.0, 0.0
  for i, memory in enumerate(memories):
    seconds, mb = np.array(memory).T
    right.plot(start + seconds, mb, label=f'minute {i + 1}')
    start, most = start + seconds[-1], max(most, mb.max())
  right.set(xlabel='seconds under load', ylabel='resident memory of the server, MB',
            ylim=(0, 1.2 * most), title='Memory')
  right.legend()
  figure.savefig(path, dpi=120)


def train(workdir: Path) -> None:
  subprocess.run([sys.executable, '-m', 'jaxrl_pt.main', 'train', '--gin_file',
                  'gin/run/pretrain_tiny.gin', '--workdir', str(workdir), '--gin_bindings',
                  'cfg.Train.num_steps = 60'], cwd=ROOT, check=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', type=Path, default=Path('runs/pretrain_tiny'))
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--rounds', type=int, default=4)
  args = parser.parse_args()
  workdir = args.workdir.resolve()
  if not (workdir / 'checkpoints').is_dir():
    train(workdir)
  requests = make_requests(random.Random(0))
  rounds, memories, after, single = [], [], [], Round()
  with serving(workdir) as (process, url):
    alone = asyncio.run(answer_alone(url, requests, single))
    before = wait_until_idle(url)
    for seed in range(args.rounds):
      shown, memory = asyncio.run(load(url, requests, alone, seed, args.seconds, process.pid))
      idle = wait_until_idle(url)
      rounds.append(shown)
      memories.append(memory)
      after.append({'pages_in_use': idle['cache_pages_in_use'], 'responses': idle['responses'],
                    'resident_mb': round(resident_mb(process.pid), 1)})
      print(shown.outcomes, after[-1], percentile(shown.first_tokens, 50), flush=True)
    last = gauges(url)
  results = {
      'streams': NUM_STREAMS, 'slots': SLOTS, 'seconds': args.seconds,
      'cores': len(os.sched_getaffinity(0)), 'load_average': os.getloadavg()[0],
      'one_stream_first_token_p50': percentile(single.first_tokens, 50),
      'pages_in_use_before': before['cache_pages_in_use'],
      'tokens': last['tokens_total'] - before['tokens_total'],
      'decode_steps': last['decode_steps_total'] - before['decode_steps_total'],
      'rounds': [{
          'outcomes': dict(shown.outcomes), 'first_token_p50': percentile(shown.first_tokens, 50),
          'first_token_p99': percentile(shown.first_tokens, 99),
          'resident_mb': {q: round(float(np.percentile([mb for _, mb in memory], p)), 1)
                          for q, p in (('median', 50), ('max', 100))}, 'after': state}
          for shown, memory, state in zip(rounds, memories, after, strict=True)]}
  bad = sum(shown.outcomes['lost'] + shown.outcomes['mixed'] for shown in rounds)
  results['lost_or_mixed'] = bad
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'serve.json').write_text(json.dumps(results, indent=2) + '\n')
  plot(rounds, memories, RESULTS / 'serve.png')
  print(json.dumps(results, indent=2))
  assert not bad and all(not state['responses'] for state in after)


if __name__ == '__main__':
  main()
