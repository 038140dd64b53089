"""Texts that the engine draws from a policy."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import begun
from jaxrl_pt.run.policy import Policy, load_policy
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.serving import stream


def make_engine(policy: Policy, config: cfg.Engine, *, seed: int,
                think_end: tuple[int, ...] = ()) -> Engine:
  """An engine that draws from a policy; arguments as `Engine` takes them."""
  tokenizer = policy.session.data.tokenizer
  return Engine(policy.model, policy.params, config, seed=seed, think_end=think_end,
                token_bytes=tokenizer.token_bytes(), unused_ids=tokenizer.unused_ids,
                version=policy.step, mesh=policy.session.mesh)


def sample_workdir(workdir: Path, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
                   num_samples: int, seed: int, step: int | None = None) -> list[dict[str, Any]]:
  """`sample` with the policy of a work directory."""
  return sample(load_policy(workdir, step), prompts, sampler=sampler, num_tokens=num_tokens,
                num_samples=num_samples, seed=seed)


def sample(policy: Policy, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
           num_samples: int, seed: int, stop: tuple[str, ...] = (),
           engine: Engine | None = None) -> list[dict[str, Any]]:
  """Continuations of each prompt; arguments as in `stream_samples`.

  Returns:
    A dict for each prompt and sample: prompt, text, num_tokens, and logp, which is the sum of the
    tokens' log-probabilities in nats.
  """
  texts: dict[tuple[int, int], str] = collections.defaultdict(str)
  ends: dict[tuple[int, int], Response] = {}
  for piece in stream_samples(policy, prompts, sampler=sampler, num_tokens=num_tokens,
                              num_samples=num_samples, seed=seed, stop=stop, engine=engine):
    key = piece.number, piece.response.sample
    texts[key] += piece.text
    ends[key] = piece.response
  return [
      {'prompt': prompts[n], 'text': texts[n, g], 'num_tokens': len(ends[n, g].tokens),
       'logp': float(ends[n, g].logp.sum())}
      for n in range(len(prompts)) for g in range(num_samples)]


def stream_samples(policy: Policy, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
                   num_samples: int, seed: int, stop: tuple[str, ...] = (),
                   engine: Engine | None = None) -> Iterator[stream.Piece]:
  """Yields pieces of the continuations of each prompt as they are drawn.

  Each prompt is preceded by what documents begin with in training. An empty prompt is that alone.

  Args:
    policy: the policy that draws.
    prompts: texts; a prompt's place in the list addresses the noise of its samples.
    sampler: temperature and filters.
    num_tokens: most tokens of a sample.
    num_samples: samples of each prompt.
    seed: the seed of the noise if `engine` is None; equal seeds draw equal samples.
    stop: texts that end a sample.
    engine: an engine that is large enough, with a seed of its own; None makes one.
  """
  tokenizer = policy.session.data.tokenizer
  requests = [
      Request(tuple(begun(tokenizer, tokenizer.encode(prompt))), n, num_tokens, num_samples,
              sampler, (tokenizer.eos_id,), stop) for n, prompt in enumerate(prompts)]
  if engine is None:
    total, longest = len(requests) * num_samples, max(len(r.prompt) for r in requests)
    engine = make_engine(policy, cfg.Engine(
        slots=min(total, 32), queue=max(num_samples, min(total, 256)), prompt_len=longest,
        response_len=num_tokens, prefill_chunk=min(longest, 128), steps_per_call=8), seed=seed)
  return stream.stream(engine, tokenizer, requests, starts_text=[not p for p in prompts])
