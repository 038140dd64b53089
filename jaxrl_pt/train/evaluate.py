"""Evaluation and sampling of a policy: during training, and from a work directory."""

import collections
from collections.abc import Iterator
import dataclasses
from dataclasses import dataclass
import functools
import math
from pathlib import Path
from typing import Any

import jax

from jaxrl_pt import checkpoint, gin_bindings, metrics
from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Restored
from jaxrl_pt.data import loader
from jaxrl_pt.data.tokenizer import begun
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.serving import stream
from jaxrl_pt.train import losses, optim, places
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params, TrainState, Weighted


def evaluate_packed(session: sessions.Session, model: cfg.Model, params: Params,
                    packed: loader.Packed, limit: int) -> dict[str, float]:
  """Loss in nats per target, bits per byte of text, accuracy of the argmax.

  bits per byte = loss / ln 2 · targets / bytes, with targets and UTF-8 bytes counted over
  the whole split; exact when `limit` is 0, which takes all batches.
  """
  run = session.run
  evaluate = _compiled_evaluation(session, model)
  totals: dict[str, Weighted] = {}
  match run.objective:
    case cfg.RL(rollouts=rollouts):
      rows = rollouts.num_prompts
    case _:
      rows = run.train.batch_size
  for batch in loader.eval_batches(packed, rows, limit):
    values = evaluate(params, session.put_global(batch))
    totals = {k: Weighted(totals[k].sum + v.sum, totals[k].count + v.count) if totals else v
              for k, v in values.items()}
  results = metrics.host_values(totals)
  results['bits_per_byte'] = (results['loss'] / math.log(2) * packed.num_targets
                              / packed.num_bytes)
  return results


@functools.lru_cache(maxsize=4)
def _compiled_evaluation(session: sessions.Session, model: cfg.Model) -> Any:
  chunk = session.run.compute.loss_chunk
  return jax.jit(losses.evaluation(session.model(model), chunk))


# --- From a work directory ------------------------------------------------------


@dataclass(frozen=True)
class Policy:
  """A trained model with all that is needed to use it."""

  session: sessions.Session
  model: Model
  params: Params
  step: int


def load_policy(workdir: Path, step: int | None = None, mesh: cfg.Mesh = cfg.Mesh()) -> Policy:
  """Restores the policy of a work directory onto the devices at hand.

  Weights, tokenizer and settings in the directory are all it takes; the run's data are opened
  when they are asked for.

  Args:
    workdir: written by `train`.
    step: which checkpoint; None takes the newest good one.
    mesh: how to lay it over the devices, whatever mesh trained it.

  Raises:
    UserError: no such directory, no checkpoint, another tokenizer.
  """
  session, restored = _restore(workdir, step, mesh, part='params')
  model = session.model(cfg.model_at(session.run, restored.step))
  return Policy(session, model, restored.state, restored.step)


def _restore(workdir: Path, step: int | None, mesh: cfg.Mesh, part: str
             ) -> tuple[sessions.Session, Restored]:
  if not (workdir / places.CONFIG).is_file():
    raise UserError(f'{workdir} holds no config.gin: give the --workdir of a finished or '
                    'interrupted train run.')
  checkpoints = workdir / places.CHECKPOINTS
  # The settings that these weights were made with, which those of later steps may not be.
  _, extras = checkpoint.read_extras(checkpoints, step)
  run, text = gin_bindings.load([], [gin_bindings.current_names(extras['config'])])
  run = dataclasses.replace(run, mesh=mesh)
  session = sessions.open_session(run, workdir, text,
                                  data=sessions.policy_data(run, workdir, extras))
  # Of the optimizer only the tree of its state is read, which no schedule changes: a run whose
  # schedule would be refused today can still be opened.
  settings = dataclasses.replace(run.optimizer, schedule=cfg.ConstantRate(1.0))
  optimizer = optim.make_optimizer(settings, run.train.num_steps)
  abstract = states.abstract_state(session.model(run.model), optimizer, session.mesh,
                                   lambda params: states.new_method(run, params))
  restored = checkpoint.restore(checkpoints, abstract.params if part == 'params' else abstract,
                                step, part=part)
  return session, restored


def load_state(workdir: Path, step: int | None = None) -> TrainState:
  """The whole training state of a checkpoint, e.g. to compare two runs."""
  return load_run(workdir, step)[1].state


def load_run(workdir: Path, step: int | None = None) -> tuple[sessions.Session, Restored]:
  """A run as a checkpoint has it: its surroundings, whole state and extras."""
  return _restore(workdir, step, cfg.Mesh(), part='')


def evaluate_workdir(workdir: Path, *, step: int | None = None,
                     data: cfg.Data | None = None) -> dict[str, Any]:
  """The `eval` command: the whole validation split under a checkpoint.

  Args:
    workdir, step: as `load_policy` takes them.
    data: another data set to evaluate on; None opens the run's own.
  """
  policy = load_policy(workdir, step)
  opened = policy.session.data
  if data is not None:
    opened = loader.prepare(data, workdir / 'data')
    sessions.check_tokenizer(opened, policy.session.data.tokenizer.fingerprint, workdir)
  packed = opened.validation
  if len(packed) == 0:
    raise UserError(f'{opened.directory} has no validation documents: set '
                    'Data.validation_fraction above 0.')
  results = evaluate_packed(policy.session, policy.model.config, policy.params, packed, limit=0)
  return {'step': policy.step, 'num_targets': packed.num_targets,
          'num_bytes': packed.num_bytes, **results}


# --- Sampling -------------------------------------------------------------------------


def make_engine(policy: Policy, config: cfg.Engine, *, seed: int,
                think_end: tuple[int, ...] = ()) -> Engine:
  """The engine of a policy; arguments as `Engine` takes them."""
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
  """One dict per prompt and sample: prompt, text, num_tokens, logp (sum, nats).

  Arguments as in `stream_samples`.
  """
  texts: dict[tuple[int, int], str] = collections.defaultdict(str)
  ends: dict[tuple[int, int], Response] = {}
  for piece in stream_samples(policy, prompts, sampler=sampler, num_tokens=num_tokens,
                              num_samples=num_samples, seed=seed, stop=stop, engine=engine):
    key = piece.number, piece.response.sample
    texts[key] += piece.text
    ends[key] = piece.response
  return [
      {'prompt': prompts[n], 'text': texts[n, g], 'num_tokens': int(ends[n, g].mask.sum()),
       'logp': float((ends[n, g].logp * ends[n, g].mask).sum())}
      for n in range(len(prompts)) for g in range(num_samples)]


def stream_samples(policy: Policy, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
                   num_samples: int, seed: int, stop: tuple[str, ...] = (),
                   engine: Engine | None = None) -> Iterator[stream.Piece]:
  """Continuations of each prompt, as they are drawn.

  Each begins as documents do in training; an empty one is that beginning alone.

  Args:
    policy: whose.
    prompts: their numbers address the randomness.
    sampler, num_tokens, num_samples, stop: of every request.
    seed: equal seeds draw equal samples.
    engine: one that is large enough; None makes one of just the size (and its own seed).
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
