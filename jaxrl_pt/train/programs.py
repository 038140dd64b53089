"""The jitted programs of a run: what its loop dispatches, and what preflight compiles.

The loops call the functions that make a step; `of_run` puts the same steps beside abstract
arguments, so that a program can be lowered for devices that are not there and without data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.parallel import rules
from jaxrl_pt.sampling import handover
from jaxrl_pt.token_bytes import TokenBytes, token_table
from jaxrl_pt.train import learner, losses, optim, rl_step
from jaxrl_pt.train import rlp_step as rlp
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch, Params, Prompts, Rollout, TrainState, Verdict
from jaxrl_pt.verifiers import exact
from jaxrl_pt.verifiers import next_token as verifier
from jaxrl_pt.verifiers.base import DeviceVerifier

# Without a tokenizer at hand: bytes of the longest token, the token that ends a text, and bytes
# of the longest answer.
_LONGEST_TOKEN = 16
_STOP_ID = 0
_ANSWER_BYTES = 16


class Program(NamedTuple):
  """A jitted function and the abstract arguments that the loop would call it with.

  share: of the step's model FLOPs (`model_flops`) that are its own.
  beside: abstract arrays that the loop keeps on the devices while it runs.
  """

  name: str
  run: Any  # of jax.jit
  args: tuple[Any, ...]
  share: float = 1.0
  beside: Any = ()


def pretrain_step(run: cfg.Run, mesh: Mesh, model: cfg.Model,
                  optimizer: optax.GradientTransformation) -> Any:
  """The jitted step(state, batch) of pretraining; the state is donated."""
  loss = losses.next_token(sessions.build_model(model, run.compute, mesh),
                           run.compute.loss_chunk)
  schedule = optim.learning_rate(run.optimizer.schedule, run.train.num_steps)
  step = make_train_step(loss, optimizer, schedule, run.train.accumulation)
  return jax.jit(step, donate_argnums=0)


def fused_step(run: cfg.Run, mesh: Mesh, optimizer: optax.GradientTransformation,
               verify: DeviceVerifier, stop_id: int) -> Any:
  """The jitted step(state, start policy, prompts): sampler, verifier and learner in one."""
  model = sessions.build_model(run.model, run.compute, mesh)
  return jax.jit(rl_step.make_fused_step(model, optimizer, run, verify, stop_id,
                                         by_token=_is_gated(run)), donate_argnums=0)


def rlp_step(run: cfg.Run, mesh: Mesh, optimizer: optax.GradientTransformation,
             markers: rlp.Markers) -> Any:
  """The jitted step(state, start policy, prompts) of RLP."""
  model = sessions.build_model(run.model, run.compute, mesh)
  return jax.jit(rlp.make_step(model, optimizer, run, markers, by_token=_is_gated(run)),
                 donate_argnums=0)


def sampler(run: cfg.Run, mesh: Mesh, rollouts: cfg.Rollouts, stop_id: int) -> Any:
  """The jitted sample(handed-over params, prompts, batch, version) → Rollout."""
  model = sessions.build_model(run.model, run.compute, mesh, rules.SAMPLE)
  return jax.jit(rl_step.make_sampler(model, run.seed, rollouts, stop_id))


def learner_step(run: cfg.Run, mesh: Mesh, optimizer: optax.GradientTransformation,
                 rollouts: cfg.Rollouts, algorithm: cfg.Algorithm) -> Any:
  """The jitted learn(state, experience) → (state, metrics); the state is donated."""
  model = sessions.build_model(run.model, run.compute, mesh)
  return jax.jit(learner.make_learner(model, optimizer, run, rollouts, algorithm,
                                      by_token=rollouts.is_gated), donate_argnums=0)


def reference(run: cfg.Run, mesh: Mesh, rollouts: cfg.Rollouts) -> Any:
  """The jitted logp(start policy, prompts, rollout) → f32[N, G, S]."""
  model = sessions.build_model(run.model, run.compute, mesh)
  return jax.jit(lambda params, prompts, rollout: rl_step.reference_logp(
      model, params, prompts, rollout, rollouts.sampler, run.compute.loss_chunk))


def hand_over(run: cfg.Run, mesh: Mesh) -> Callable[[Params, int], Params]:
  """(params, version) → the sampler's copy of them, checked on arrival.

  On one device nothing travels, and the trainer's parameters are the sampler's as they are.
  """
  if mesh.size == 1:
    return lambda params, version: params
  model = sessions.build_model(run.model, run.compute, mesh)
  give = handover.make_hand_over(model, mesh, _packed(run), run.compute.dtype)
  return lambda params, version: give(params, version).params


def _is_gated(run: cfg.Run) -> bool:
  return not isinstance(run.objective, cfg.NextToken) and run.objective.rollouts.is_gated


def _packed(run: cfg.Run) -> bool:
  return run.model.quant.weights == 'ternary'


def continuation_len(method: cfg.RPT) -> int:
  """Tokens of truth that a prompt carries along."""
  return 4 * method.rollouts.response_tokens


def num_tokens(run: cfg.Run) -> int:
  """Tokens a step works on; in RPT each prompt once, and each response."""
  match run.objective:
    case cfg.NextToken():
      return run.train.batch_size * run.data.seq_len
    case cfg.RPT(rollouts=r) | cfg.RL(rollouts=r):
      return r.num_prompts * (r.prompt_len + r.group_size * r.response_tokens)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: RPT's sampler goes forward over the tokens its learner trains on."""
  match run.objective:
    case cfg.NextToken():
      return num_tokens(run) * metrics.flops_per_token(run.model, (run.data.seq_len + 1) / 2)
    case cfg.RPT(rollouts=r) | cfg.RL(rollouts=r):
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
                                mesh, lambda params: states.new_method(run, params))
  match run.objective:
    case cfg.NextToken():
      first, last = cfg.model_at(run, 0), cfg.model_at(run, run.train.num_steps - 1)
      return [Program(f'pretraining step, {model.quant.activations} activations',
                      pretrain_step(run, mesh, model, optimizer),
                      (state, _abstract_batch(run, mesh)))
              for model in dict.fromkeys((first, last))]
    case cfg.RPT(reward=cfg.InformationGain()) as method:
      prompts = _abstract_prompts(method.rollouts, continuation_len(method), mesh)
      step = rlp_step(run, mesh, optimizer, rlp.Markers(1, _STOP_ID + 1))
      return [Program('RLP step: thoughts, gains and learner', step,
                      (state, state.params, prompts))]
    case cfg.RPT() as method:
      table = _longest_tokens(run.model)
      prompts = _abstract_prompts(method.rollouts, continuation_len(method), mesh,
                                  method.positions_per_document)
      marker = verifier.NO_MARKER if method.prediction == cfg.Direct() else _STOP_ID + 1
      return _rl_programs(run, mesh, state, method, prompts,
                          verifier.device_verifier(table, method.reward, marker))
    case cfg.RL() as method:
      judge = None
      if isinstance(method.verifier, cfg.AnswerMatch):
        judge = exact.device_verifier(_longest_tokens(run.model), b'#', _STOP_ID)
      prompts = _abstract_prompts(method.rollouts, _ANSWER_BYTES, mesh)
      return _rl_programs(run, mesh, state, method, prompts, judge)


def _rl_programs(run: cfg.Run, mesh: Mesh, state: TrainState, method: cfg.RPT | cfg.RL,
                 prompts: Prompts, verify: DeviceVerifier | None) -> list[Program]:
  """One program if a verifier on the device, the mode and a mesh of one allow it, else those of
  the stages; both if groups are drawn again from a later step on."""
  rollouts, algorithm = method.rollouts, method.algorithm
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps)
  in_one: list[Program] = []
  if verify is not None and rollouts.mode == cfg.OnPolicy() and mesh.size == 1:
    step = fused_step(run, mesh, optimizer, verify, _STOP_ID)
    in_one = [Program(f'{type(method).__name__} step: sampler, verifier and learner', step,
                      (state, state.params, prompts))]
    match rollouts.selection:
      case cfg.AllGroups():
        return in_one
      case cfg.DynamicSampling(from_step=0):
        in_one = []
  shape = rollouts.num_prompts, rollouts.group_size, rollouts.response_tokens
  rows, everywhere = rules.row_sharding(mesh), rules.replicated(mesh)
  reals, number = _abstract(shape, jnp.float32, rows), _abstract((), jnp.int32, everywhere)
  group = _abstract(shape[:2], jnp.float32, rows)
  rollout = Rollout(_abstract(shape, jnp.int32, rows), reals, reals, number)
  experience = learner.Experience(prompts, rollout, Verdict(group, group, group), reals)
  start, moments = state.params, (state.opt_state, state.method)
  found = [Program('learner: advantages and updates',
                   learner_step(run, mesh, optimizer, rollouts, algorithm),
                   (state, experience), 3 / 4, beside=start),
           Program('start policy: log-probabilities for KL', reference(run, mesh, rollouts),
                   (start, prompts, rollout), 1 / 4, beside=state)]
  handed, beside = state.params, [start, moments]
  if mesh.size > 1:
    model = sessions.build_model(run.model, run.compute, mesh)
    found.append(Program('hand-over: parameters to the sampler',
                         handover.make_move(model, mesh, _packed(run), run.compute.dtype),
                         (state.params,), 0.0, beside=beside))
    beside = [start, state]
    handed = handover.abstract(model, mesh, _packed(run), run.compute.dtype)
  sample = sampler(run, mesh, rollouts, _STOP_ID)
  return [*in_one,
          Program('sampler: prefill and decode', sample, (handed, prompts, number, number), 1 / 4,
                  beside=beside),
          *found]


def _longest_tokens(model: cfg.Model) -> TokenBytes:
  return token_table([bytes(_LONGEST_TOKEN)] * model.vocab_size, model.vocab_size)


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _abstract_batch(run: cfg.Run, mesh: Mesh) -> Batch:
  shardings = rules.batch_sharding(mesh)
  rows, length = run.train.batch_size, run.data.seq_len
  ints = _abstract((rows, length), jnp.int32, shardings.tokens)  # type: ignore[arg-type]
  return Batch(ints, ints, ints, ints,
               _abstract((rows, length), jnp.float32, shardings.weights),  # type: ignore[arg-type]
               _abstract((rows,), jnp.int32, shardings.ids))  # type: ignore[arg-type]


def _abstract_prompts(rollouts: cfg.Rollouts, num_continuation: int, mesh: Mesh,
                      per_document: int = 1) -> Prompts:
  rows = rules.row_sharding(mesh)
  n = rollouts.num_prompts
  each = _abstract((n,), jnp.int32, rows)
  return Prompts(_abstract((n // per_document, rollouts.prompt_len), jnp.int32, rows), each, each,
                 _abstract((n, num_continuation), jnp.int32, rows), each,
                 _abstract((n,), jnp.float32, rows))
