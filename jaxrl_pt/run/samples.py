"""Texts that the engine draws from a policy."""

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import begun
from jaxrl_pt.run.policy import Policy, load_policy
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.serving import stream
from jaxrl_pt.serving.thinking import Steering, Thinker


class Reading(NamedTuple):
  """How the engine keeps and reads its cache; `cfg.Engine` says what the fields mean."""

  sparse: cfg.Dense | cfg.ReSA = cfg.Dense()
  drafts: cfg.Drafts = cfg.NoDrafts()
  kv: cfg.KV = 'model'


DENSE = Reading()
AS_IT_LIKES = Steering()


def make_engine(policy: Policy, config: cfg.Engine, *, seed: int,
                thinker: Thinker | None = None) -> Engine:
  """An engine that draws from a policy.

  Args:
    policy: the policy.
    config, seed: as `Engine` takes them.
    thinker: what the markers of thinking are; None where nobody asks for it.
  """
  tokenizer = policy.session.data.tokenizer
  start, end = ((), ()) if thinker is None else (thinker.start, thinker.end)
  return Engine(policy.model, policy.params, config, seed=seed,
                token_bytes=tokenizer.token_bytes(), unused_ids=tokenizer.unused_ids,
                think_end=end, think_start=start, version=policy.step, mesh=policy.session.mesh)


def engine_for(policy: Policy, prompts: list[str], *, num_tokens: int, num_samples: int, seed: int,
               prompt_len: int = 1, reading: Reading = DENSE, thinker: Thinker | None = None
               ) -> Engine:
  """An engine of the right size for `stream_samples`.

  Args:
    policy, num_tokens, num_samples: as in `stream_samples`.
    prompts: the prompts that are known; others may follow.
    seed: the seed of the noise; equal seeds draw equal samples.
    prompt_len: most tokens of the prompts that are not yet known.
    reading: how the cache is read.
    thinker: as for `make_engine`; a mode or marker may be forced beside the tokens of a sample.
  """
  tokenizer = policy.session.data.tokenizer
  num_tokens += 0 if thinker is None else len(thinker.start) + len(thinker.end)
  total = max(1, len(prompts)) * num_samples
  longest = max([prompt_len, *(len(begun(tokenizer, tokenizer.encode(p))) for p in prompts)])
  config = cfg.Engine(
      slots=min(total, 32), queue=max(num_samples, min(total, 256)), prompt_len=longest,
      response_len=num_tokens, prefill_chunk=min(longest, 128), steps_per_call=8,
      page_size=cfg.block_of(reading.sparse, reading.drafts) or 16, kv=reading.kv,
      sparse=reading.sparse, drafts=reading.drafts)
  return make_engine(policy, config, seed=seed, thinker=thinker)


def sample_workdir(workdir: Path, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
                   num_samples: int, seed: int, step: int | None = None) -> list[dict[str, Any]]:
  """`sample` with the policy of a work directory."""
  return sample(load_policy(workdir, step), prompts, sampler=sampler, num_tokens=num_tokens,
                num_samples=num_samples, seed=seed)


def sample(policy: Policy, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
           num_samples: int, seed: int, stop: tuple[str, ...] = ()) -> list[dict[str, Any]]:
  """Continuations of each prompt, by dense attention.

  Args:
    policy, prompts, sampler, num_tokens, num_samples, stop: as in `stream_samples`.
    seed: the seed of the noise; equal seeds draw equal samples.

  Returns:
    What `collect` returns.
  """
  engine = engine_for(policy, prompts, num_tokens=num_tokens, num_samples=num_samples, seed=seed)
  return collect(prompts, stream_samples(engine, policy, prompts, sampler=sampler, stop=stop,
                                         num_tokens=num_tokens, num_samples=num_samples))


def collect(prompts: list[str], pieces: Iterable[stream.Piece]) -> list[dict[str, Any]]:
  """The whole continuations that `stream_samples` yields in pieces.

  Returns:
    A dict for each prompt and sample: prompt, text, num_tokens, and logp, which is the sum of the
    tokens' log-probabilities in nats.
  """
  texts: dict[tuple[int, int], str] = collections.defaultdict(str)
  ends: dict[tuple[int, int], Response] = {}
  for piece in pieces:
    key = piece.number, piece.response.sample
    texts[key] += piece.text
    ends[key] = piece.response
  return [
      {'prompt': prompts[n], 'text': texts[n, g], 'num_tokens': len(ends[n, g].tokens),
       'logp': float(ends[n, g].logp.sum())} for n, g in sorted(ends)]


def stream_samples(engine: stream.Draws, policy: Policy, prompts: list[str], *,
                   sampler: cfg.Sampler, num_tokens: int, num_samples: int,
                   stop: tuple[str, ...] = (), steering: Steering = AS_IT_LIKES
                   ) -> Iterator[stream.Piece]:
  """Yields pieces of the continuations of each prompt as they are drawn.

  Each prompt is preceded by what documents begin with in training. An empty prompt is that alone.

  Args:
    engine: an engine that is large enough, such as `engine_for` makes.
    policy: the policy that draws.
    prompts: texts; a prompt's place in the list addresses the noise of its samples.
    sampler: temperature and filters.
    num_tokens: most tokens of a sample.
    num_samples: samples of each prompt.
    stop: texts that end a sample.
    steering: how the samples are made to think, with an engine that knows the markers.
  """
  tokenizer = policy.session.data.tokenizer
  forced, max_thought, begins = steering
  requests = [
      Request(tuple(begun(tokenizer, tokenizer.encode(prompt))), n, num_tokens + len(forced),
              num_samples, sampler, tokenizer.stop_ids, stop, forced, max_thought,
              begins_thinking=begins) for n, prompt in enumerate(prompts)]
  return stream.stream(engine, tokenizer, requests, starts_text=[not p for p in prompts])
