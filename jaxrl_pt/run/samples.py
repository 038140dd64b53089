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


class Reading(NamedTuple):
  """How the engine keeps and reads its cache; `cfg.Engine` says what the fields mean."""

  sparse: cfg.Dense | cfg.ReSA = cfg.Dense()
  drafts: cfg.Drafts = cfg.NoDrafts()
  kv: cfg.KV = 'model'


DENSE = Reading()


def make_engine(policy: Policy, config: cfg.Engine, *, seed: int,
                think_end: tuple[int, ...] = ()) -> Engine:
  """An engine that draws from a policy; arguments as `Engine` takes them."""
  tokenizer = policy.session.data.tokenizer
  return Engine(policy.model, policy.params, config, seed=seed, think_end=think_end,
                token_bytes=tokenizer.token_bytes(), unused_ids=tokenizer.unused_ids,
                version=policy.step, mesh=policy.session.mesh)


def engine_for(policy: Policy, prompts: list[str], *, num_tokens: int, num_samples: int, seed: int,
               prompt_len: int = 1, reading: Reading = DENSE) -> Engine:
  """An engine of the right size for `stream_samples`.

  Args:
    policy, num_tokens, num_samples: as in `stream_samples`.
    prompts: the prompts that are known; others may follow.
    seed: the seed of the noise; equal seeds draw equal samples.
    prompt_len: most tokens of the prompts that are not yet known.
    reading: how the cache is read.
  """
  tokenizer = policy.session.data.tokenizer
  total = max(1, len(prompts)) * num_samples
  longest = max([prompt_len, *(len(begun(tokenizer, tokenizer.encode(p))) for p in prompts)])
  config = cfg.Engine(
      slots=min(total, 32), queue=max(num_samples, min(total, 256)), prompt_len=longest,
      response_len=num_tokens, prefill_chunk=min(longest, 128), steps_per_call=8,
      page_size=cfg.block_of(reading.sparse, reading.drafts) or 16, kv=reading.kv,
      sparse=reading.sparse, drafts=reading.drafts)
  return make_engine(policy, config, seed=seed)


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
                   stop: tuple[str, ...] = ()) -> Iterator[stream.Piece]:
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
  """
  tokenizer = policy.session.data.tokenizer
  requests = [
      Request(tuple(begun(tokenizer, tokenizer.encode(prompt))), n, num_tokens, num_samples,
              sampler, tokenizer.stop_ids, stop) for n, prompt in enumerate(prompts)]
  return stream.stream(engine, tokenizer, requests, starts_text=[not p for p in prompts])
