"""Evaluation and sampling of a policy: during training, and from a work directory."""

import dataclasses
from dataclasses import dataclass
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import checkpoint, gin_bindings, metrics
from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Restored
from jaxrl_pt.data import loader
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import decode
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params, Prompts, TrainState, Weighted


def evaluate_packed(session: sessions.Session, model: cfg.Model, params: Params,
                    packed: loader.Packed, limit: int) -> dict[str, float]:
  """Loss in nats per target, bits per byte of text, accuracy of the argmax.

  bits per byte = loss / ln 2 · targets / bytes, with targets and UTF-8 bytes counted over
  the whole split; exact when `limit` is 0, which takes all batches.
  """
  run = session.run
  evaluate = _compiled_evaluation(session, model)
  totals: dict[str, Weighted] = {}
  for batch in loader.eval_batches(packed, run.train.batch_size, limit):
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


def load_policy(workdir: Path, step: int | None = None, data: cfg.Data | None = None,
                mesh: cfg.Mesh = cfg.Mesh()) -> Policy:
  """Restores the policy of a work directory onto the devices at hand.

  Args:
    workdir: written by `train`.
    step: which checkpoint; None takes the newest good one.
    data: another data set to evaluate on; None opens the run's own.
    mesh: how to lay it over the devices, whatever mesh trained it.

  Raises:
    UserError: no such directory, no checkpoint, another tokenizer.
  """
  session, restored = _restore(workdir, step, data, mesh, part='params')
  model = session.model(cfg.model_at(session.run, restored.step))
  return Policy(session, model, restored.state, restored.step)


def _restore(workdir: Path, step: int | None, data: cfg.Data | None,
             mesh: cfg.Mesh, part: str) -> tuple[sessions.Session, Restored]:
  config_file = workdir / 'config.gin'
  if not config_file.is_file():
    raise UserError(f'{workdir} holds no config.gin: give the --workdir of a finished or '
                    'interrupted train run.')
  run, text = gin_bindings.load([str(config_file)], [])
  run = dataclasses.replace(run, mesh=mesh, data=data or run.data)
  data_dir: Path | None
  match run.objective:
    case cfg.NextToken():
      data_dir = None
    case method:
      data_dir = Path(method.start_from) / 'data'  # Where `rl.train` has left it.
  session = sessions.open_session(run, workdir, text, data_dir)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps)
  abstract = states.abstract_state(session.model(run.model), optimizer, session.mesh,
                                   lambda: states.new_method(run))
  restored = checkpoint.restore(workdir / 'checkpoints',
                                abstract.params if part == 'params' else abstract, step, part=part)
  sessions.check_tokenizer(session, restored)
  return session, restored


def load_state(workdir: Path, step: int | None = None) -> TrainState:
  """The whole training state of a checkpoint, e.g. to compare two runs."""
  return _restore(workdir, step, None, cfg.Mesh(), part='')[1].state


def evaluate_workdir(workdir: Path, *, step: int | None = None,
                     data: cfg.Data | None = None) -> dict[str, Any]:
  """The `eval` command: the whole validation split under a checkpoint."""
  policy = load_policy(workdir, step, data)
  packed = policy.session.data.validation
  if len(packed) == 0:
    raise UserError(f'{policy.session.data.directory} has no validation documents: set '
                    'Data.validation_fraction above 0.')
  results = evaluate_packed(policy.session, policy.model.config, policy.params, packed, limit=0)
  return {'step': policy.step, 'num_targets': packed.num_targets,
          'num_bytes': packed.num_bytes, **results}


def sample_workdir(workdir: Path, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
                   num_samples: int, seed: int, step: int | None = None) -> list[dict[str, Any]]:
  """The `sample` command: continuations of each prompt, with their log-probabilities."""
  return sample(load_policy(workdir, step), prompts, sampler=sampler, num_tokens=num_tokens,
                num_samples=num_samples, seed=seed)


def sample(policy: Policy, prompts: list[str], *, sampler: cfg.Sampler, num_tokens: int,
           num_samples: int, seed: int) -> list[dict[str, Any]]:
  """One dict per prompt and sample: prompt, text, num_tokens, logp (sum, nats).

  An empty prompt starts from the end-of-text token, as documents do.
  """
  tokenizer = policy.session.data.tokenizer
  encoded = [tokenizer.encode(p) or [tokenizer.eos_id] for p in prompts]
  rollout = generate_tokens(policy, encoded, sampler=sampler, num_tokens=num_tokens,
                            num_samples=num_samples, seed=seed)
  tokens, mask, logp = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.logp))
  return [
      {'prompt': prompt, 'text': _text(tokenizer, tokens[n, g][mask[n, g] > 0]),
       'num_tokens': int(mask[n, g].sum()), 'logp': float((logp[n, g] * mask[n, g]).sum())}
      for n, prompt in enumerate(prompts) for g in range(num_samples)]


def _text(tokenizer: tokenizers.Tokenizer, ids: np.ndarray) -> str:
  return tokenizer.decode([i for i in ids.tolist() if i != tokenizer.eos_id])


def generate_tokens(policy: Policy, prompts: list[list[int]], *, sampler: cfg.Sampler,
                    num_tokens: int, num_samples: int, seed: int) -> Any:
  """Rollout of token prompts, right-padded to the longest."""
  lengths = np.array([len(p) for p in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[:len(prompt)] = prompt
  generate = jax.jit(functools.partial(
      decode.generate, policy.model, sampler=sampler, num_samples=num_samples,
      num_tokens=num_tokens, stop_id=policy.session.data.tokenizer.eos_id))
  return generate(policy.params, decode_prompts(tokens, lengths), key=jax.random.key(seed),
                  version=policy.step)


def decode_prompts(tokens: np.ndarray, lengths: np.ndarray) -> Prompts:
  """Prompts without a known continuation; row numbers address the randomness."""
  rows = len(lengths)
  nothing = jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32)
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), jnp.arange(rows, dtype=jnp.int32),
                 *nothing, jnp.zeros(rows, jnp.float32))
