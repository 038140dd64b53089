"""The jitted programs of a run: what its loop dispatches, and what preflight compiles.

The loops call the functions that make a step; `of_run` puts the same steps beside abstract
arguments, so that a program can be lowered for devices that are not there and without data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.parallel import rules
from jaxrl_pt.train import losses, optim, rl_step
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch, Prompts
from jaxrl_pt.verifiers import next_token as verifier

# Without a tokenizer at hand: bytes of the longest token, and the token that ends a text.
_LONGEST_TOKEN = 16
_STOP_ID = 0


class Program(NamedTuple):
  """A jitted function and the abstract arguments that the loop would call it with."""

  name: str
  run: Any  # of jax.jit
  args: tuple[Any, ...]


def pretrain_step(run: cfg.Run, mesh: Mesh, model: cfg.Model,
                  optimizer: optax.GradientTransformation) -> Any:
  """The jitted step(state, batch) of pretraining; the state is donated."""
  loss = losses.next_token(sessions.build_model(model, run.compute, mesh),
                           run.compute.loss_chunk)
  schedule = optim.learning_rate(run.optimizer.schedule, run.train.num_steps)
  step = make_train_step(loss, optimizer, schedule, run.train.accumulation)
  return jax.jit(step, donate_argnums=0)


def rpt_step(run: cfg.Run, mesh: Mesh, optimizer: optax.GradientTransformation,
             table: verifier.TokenBytes, stop_id: int) -> Any:
  """The jitted step(state, prompts) of RPT, sampler and learner in one; the state is donated."""
  model = sessions.build_model(run.model, run.compute, mesh)
  return jax.jit(rl_step.make_rpt_step(model, optimizer, run, table, stop_id), donate_argnums=0)


def continuation_len(method: cfg.RPT) -> int:
  """Tokens of truth that a prompt carries along."""
  return 4 * method.rollouts.response_tokens


def num_tokens(run: cfg.Run) -> int:
  """Tokens a step works on; in RPT each prompt once, and each response."""
  match run.objective:
    case cfg.NextToken():
      return run.train.batch_size * run.data.seq_len
    case cfg.RPT(rollouts=r):
      return r.num_prompts * (r.prompt_len + r.group_size * r.response_tokens)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: RPT's sampler goes forward over the tokens its learner trains on."""
  match run.objective:
    case cfg.NextToken():
      return num_tokens(run) * metrics.flops_per_token(run.model, (run.data.seq_len + 1) / 2)
    case cfg.RPT(rollouts=r):
      forward = metrics.flops_per_token(run.model, r.prompt_len / 2, backward=False)
      return 4 * num_tokens(run) * forward


def of_run(run: cfg.Run, mesh: Mesh) -> list[Program]:
  """The steps that the run's loop would dispatch, each with its abstract arguments.

  A pretraining run whose activations change on the way has a step for each.

  Raises:
    UserError: a mesh axis divides no size of the run.
  """
  rules.check_divides(run, mesh)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps)
  state = states.abstract_state(sessions.build_model(run.model, run.compute, mesh), optimizer,
                                mesh)
  match run.objective:
    case cfg.NextToken():
      first, last = cfg.model_at(run, 0), cfg.model_at(run, run.train.num_steps - 1)
      return [Program(f'pretraining step, {model.quant.activations} activations',
                      pretrain_step(run, mesh, model, optimizer),
                      (state, _abstract_batch(run, mesh)))
              for model in dict.fromkeys((first, last))]
    case cfg.RPT() as method:
      table = verifier.token_table([bytes(_LONGEST_TOKEN)] * run.model.vocab_size,
                                   run.model.vocab_size)
      return [Program('RPT step: sampler, verifier and learner',
                      rpt_step(run, mesh, optimizer, table, _STOP_ID),
                      (state, _abstract_prompts(method, mesh)))]


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _abstract_batch(run: cfg.Run, mesh: Mesh) -> Batch:
  shardings = rules.batch_sharding(mesh)
  rows, length = run.train.batch_size, run.data.seq_len
  ints = _abstract((rows, length), jnp.int32, shardings.tokens)  # type: ignore[arg-type]
  return Batch(ints, ints, ints, ints,
               _abstract((rows, length), jnp.float32, shardings.weights),  # type: ignore[arg-type]
               _abstract((rows,), jnp.int32, shardings.ids))  # type: ignore[arg-type]


def _abstract_prompts(method: cfg.RPT, mesh: Mesh) -> Prompts:
  rows = rules.row_sharding(mesh)
  n = method.rollouts.num_prompts
  each = _abstract((n,), jnp.int32, rows)
  return Prompts(_abstract((n, method.rollouts.prompt_len), jnp.int32, rows), each, each,
                 _abstract((n, continuation_len(method)), jnp.int32, rows), each,
                 _abstract((n,), jnp.float32, rows))
