"""The programs of a step of reinforcement learning with abstract arguments, for preflight."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.environments import judging, multi_turn
from jaxrl_pt.environments.judge_engines import judge_run
from jaxrl_pt.jobs.kind import Program, abstract
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import shard_meshes
from jaxrl_pt.rollouts.balance import is_balanced
from jaxrl_pt.rollouts.stages import is_fused, resamples
from jaxrl_pt.sampling import engine_rows, slots, weight_sync
from jaxrl_pt.sampling import state as engine_state
from jaxrl_pt.sampling.prefix_cache import PrefixCache
from jaxrl_pt.sampling.requests import Vocabulary
from jaxrl_pt.token_bytes import TokenBytes, token_table
from jaxrl_pt.train import optim, programs
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Array, Prompts, RolloutBatch, TrainState, Verdict

# Preflight has no tokenizer, so these stand in for one.
_LONGEST_TOKEN = 16  # bytes of the longest token
STOP_IDS = (0,)  # the token that ends a text


def of_step(run: cfg.Run, mesh: Mesh, method: cfg.Reinforced, prompts: Prompts, verifier: Any,
            new_method: Any) -> list[Program]:
  """The fused step if the run's step is one program, else the programs of its stages.

  A run whose dynamic sampling begins at a later step has both.

  Args:
    run, mesh, method: the run, its mesh and its objective.
    prompts: abstract prompts, from `abstract_prompts`.
    verifier: a DeviceVerifier or PolicyVerifier; None stands for a verifier that reads text.
    new_method: parameters → what `TrainState.method` holds before the first step.
  """
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  state = states.abstract_state(model, optimizer, mesh, new_method)
  fused: list[Program] = []
  if is_fused(verifier, method.rollouts, mesh.size):
    step = programs.fused_step(run, mesh, method, optimizer, verifier, STOP_IDS,
                               _mode_ids(method.rollouts))
    fused = [Program(f'{type(method).__name__} step: sampler, verifier and update', step,
                     (state, P.trained(model.specs, state.params), prompts))]
    if not resamples(method.rollouts, run.train.num_steps):
      return fused
    if resamples(method.rollouts, 0):
      fused = []
  return [*fused, *_stages(run, mesh, method, prompts, state, optimizer)]


def _stages(run: cfg.Run, mesh: Mesh, method: cfg.Reinforced, prompts: Prompts,
            state: TrainState, optimizer: optax.GradientTransformation) -> list[Program]:
  """The programs of the stages; arguments as in `of_step`, and the abstract state."""
  rollouts, algorithm = method.rollouts, method.algorithm
  shape = rollouts.num_prompts, rollouts.group_size, rollouts.response_tokens
  rows, everywhere = rules.row_sharding(mesh), rules.replicated(mesh)
  reals, ints = abstract(shape, jnp.float32, rows), abstract(shape, jnp.int32, rows)
  number, group = abstract((), jnp.int32, everywhere), abstract(shape[:2], jnp.float32, rows)
  mode_ids = _mode_ids(rollouts)
  drawn = RolloutBatch(ints, reals, reals, reals, ints, ints,
                       abstract(shape[:2], jnp.int32, rows) if mode_ids else ())
  # The reference policy's parameters have the shapes and shardings of the policy's, and the frozen
  # ones are the policy's.
  model = models.build(run.model, run.compute, mesh)
  specs = model.specs
  reference, moments = P.trained(specs, state.params), (state.opt_state, state.method)
  others = [Program('learner: advantages and updates',
                    programs.learner_step(run, mesh, optimizer, rollouts, algorithm),
                    (state, prompts, drawn, Verdict(group, group, group), reals), 3 / 4,
                    beside=reference),
            Program('reference policy: log-probabilities for KL',
                    programs.reference_logp(run, mesh, rollouts, algorithm),
                    (state.params, prompts, drawn), 1 / 4,
                    beside=(P.trained(specs, state.params), moments))]
  synced, beside = _synced(run, mesh, mesh, rollouts.slots), [reference, moments]
  if mesh.size > 1:
    at_rest = P.frozen(specs, synced)  # It stays where it is from step to step.
    others = [p._replace(beside=(p.beside, at_rest)) for p in others]
    others += _weight_sync(run, mesh, rollouts.slots, state.params, beside)
  if mesh.size > 1 or rollouts.slots.packed or rollouts.slots.head != 'model':
    beside = [reference, state]
  for judge in cfg.judge_of(method):
    judging, kept = _judge(run, mesh, judge, [reference, state])
    beside = [*beside, kept]
    others = [*judging, *(p._replace(beside=(p.beside, kept)) for p in others)]
  if isinstance(method, cfg.RL) and isinstance(method.verifier, cfg.Interactive):
    multi_turn.check_hosts(mesh)
    config = multi_turn.engine_config(rollouts, method.verifier, rules.num_shards(mesh))
    engine = _engine('engine: prefill and decode of turns', run, mesh, config, rollouts.slots,
                     beside)
    # Its pages stay where they are from step to step.
    return [engine, *(p._replace(beside=(p.beside, engine.args[4])) for p in others)]
  if isinstance(rollouts.mode, cfg.InFlight):
    continued = programs.in_flight_sampler(run, mesh, rollouts, STOP_IDS, mode_ids).draw
    others_of_method = dataclasses.replace(state.method, pending={})
    return [Program('sampler in flight: prefill and decode', continued,
                    (synced, state.method.pending, number, number), 1 / 4,
                    beside=[reference, state.opt_state, others_of_method]),
            *others]
  sample = programs.sampler(run, mesh, rollouts, STOP_IDS, mode_ids)
  order = abstract((rollouts.num_prompts,), jnp.int32, everywhere)
  args = synced, prompts, number, number, None, order if is_balanced(method, mesh) else None
  return [Program('sampler: prefill and decode', sample, args, 1 / 4, beside=beside),
          *others]


def _mode_ids(rollouts: cfg.Rollouts) -> tuple[int, ...]:
  """Tokens that stand in for those of the modes."""
  return () if rollouts.modes == cfg.SingleMode() else (1, 2)


def _weight_sync(run: cfg.Run, mesh: Mesh, slots: cfg.Slots, params: Any, beside: Any
                 ) -> list[Program]:
  """The programs of a weight sync on several devices.

  Args:
    run, mesh, slots: of the policy whose parameters are moved, and of its sampler.
    params: its abstract parameters.
    beside: what is kept on the devices besides them.
  """
  model = models.build(run.model, run.compute, mesh)
  settings = model, mesh, run.model.quant.is_ternary, run.compute.dtype, slots.head
  leaving, synced = weight_sync.abstract_leaving(*settings), _synced(run, mesh, mesh, slots)
  leaf, arrived = max(zip(jax.tree.leaves(leaving), jax.tree.leaves(synced), strict=True),
                      key=lambda pair: pair[0].size)
  return [
      Program('weight sync: what the sampler reads of the parameters',
              weight_sync.make_leave(*settings), (params,), 0.0, beside=beside),
      Program('weight sync: the largest of them to the sampler',
              weight_sync.mover(arrived.sharding, arrived.dtype), (leaf,), 0.0,
              beside=[*beside, params, synced])]


def _judge(run: cfg.Run, mesh: Mesh, settings: cfg.JudgeReward, beside: Any
           ) -> tuple[list[Program], Any]:
  """The programs of a judge, and what of it stays on the devices: its parameters and its pages.

  Args:
    run, mesh: the run and its mesh.
    settings: the judge.
    beside: what the policy keeps on the devices while the judge is asked.
  """
  of_judge = judge_run(run, settings)
  specs = models.build(of_judge.model, run.compute, mesh).specs
  laid_out = rules.param_shardings(specs, mesh, rules.TRAIN)
  params = jax.tree.map(lambda x, there: abstract(x.shape, x.dtype, there), P.abstract(specs),
                        laid_out)
  # The prompts of a judge are texts: their lengths are all that is known of them.
  config = judging.engine_sizes(settings.prompt_len, settings.response_tokens, settings.slots)
  kept = params if mesh.size > 1 else ()  # One device reads the parameters themselves.
  engine = _engine('judge: prefill and decode of verdicts', of_judge, mesh, config, cfg.Slots(),
                   [*beside, kept])._replace(share=0.0)
  pages = engine.args[4]
  synced = _weight_sync(of_judge, mesh, cfg.Slots(), params, [*beside, pages]) if (
      mesh.size > 1) else []
  return [*(p._replace(name=f'judge: {p.name}') for p in synced), engine], (params, pages)


def _engine(name: str, run: cfg.Run, mesh: Mesh, config: cfg.Engine, slots_of_run: cfg.Slots,
            beside: Any) -> Program:
  """The program of an engine, of which each data shard has one.

  Args:
    name: of the program.
    run, mesh: the run with the engine's model, and its mesh.
    config: the engine's sizes.
    slots_of_run: how the weights are held.
    beside: what is kept on the devices besides.
  """
  shard, num_shards = shard_meshes(mesh)[0], rules.num_shards(mesh)
  model = models.build(run.model, run.compute, shard, rules.SAMPLE)
  everywhere = rules.replicated(shard)
  shape = engine_rows.shape(config, run.model.vocab_size)
  vocabulary = Vocabulary((), longest_tokens(run.model), jnp.ones(run.model.vocab_size, bool))
  placed = lambda tree: jax.tree.map(lambda x: abstract(x.shape, x.dtype, everywhere), tree)
  now = jax.eval_shape(lambda: engine_state.init(model, shape, vocabulary, config.kv))
  layout = engine_rows.layout(shard, now)
  now = jax.tree.map(lambda x, there: abstract(x.shape, x.dtype, there), now, layout)
  queue = placed(engine_rows.empty_queue(shape, PrefixCache(shape.documents, shape.document_len)))
  number, key = abstract((), jnp.int32, everywhere), jax.eval_shape(lambda: jax.random.key(0))
  params = _synced(run, mesh, shard, slots_of_run)
  advance = functools.partial(slots.advance, model, shape, vocabulary)
  return Program(name, jax.jit(advance, donate_argnums=4, out_shardings=layout),
                 (params, placed(key), number, queue, now, number), 1 / 4, beside=beside,
                 copies=num_shards)


def _synced(run: cfg.Run, mesh: Mesh, there: Mesh, slots: cfg.Slots) -> Any:
  """The parameters that a sampler on the mesh `there` gets of a trainer on a mesh."""
  model = models.build(run.model, run.compute, there)
  if mesh.size > 1:
    return weight_sync.abstract(model, there, run.model.quant.is_ternary,
                                run.compute.dtype, slots.head)
  read = jax.eval_shape(programs.held(run, mesh, slots), P.abstract(model.specs))
  return jax.tree.map(lambda x: abstract(x.shape, x.dtype, rules.replicated(mesh)), read)


def longest_tokens(model: cfg.Model) -> TokenBytes:
  """The bytes of a vocabulary whose tokens are all as long as the longest of any tokenizer."""
  return token_table([bytes(_LONGEST_TOKEN)] * model.vocab_size, model.vocab_size)


def abstract_prompts(rollouts: cfg.Rollouts, mesh: Mesh, extras: dict[str, tuple[Any, ...]],
                     per_document: int = 1) -> Prompts:
  """Prompts whose arrays are `jax.ShapeDtypeStruct`.

  Args:
    rollouts: the settings with the number and length of prompts.
    mesh: the run's mesh.
    extras: {name: (shape, dtype) of one prompt's array} of `Prompts.extras`.
    per_document: the number of prompts that share a document.
  """
  rows, n = rules.row_sharding(mesh), rollouts.num_prompts
  each = abstract((n,), jnp.int32, rows)
  more: dict[str, Array] = {name: abstract((n, *shape), dtype, rows)
                            for name, (shape, dtype) in extras.items()}
  return Prompts(abstract((n // per_document, rollouts.prompt_len), jnp.int32, rows), each, each,
                 extras=more)
