"""The job that RL and RPT share: take prompts → generate → verify → advantage → update.

If the verifier is a function of arrays and there is one device, all but the first are one program
(`train.fused`). On a mesh they are dispatched one by one, after a weight sync to the sampler's
layout (`rollouts.stages`). A verifier that reads text works in processes of its own:

- on-policy, each batch is drawn by the parameters that it updates, so that generation waits for
  the update and the update for the verdict;
- one step off-policy, the next batch is drawn while this batch is verified. Its parameters are one
  step old when it is learned from, for which the correction makes up;
- in flight, the sampler works on the next batches too and goes on with them in the next step, so
  that no batch waits for its longest response alone (`sampling.in_flight`).

A run that is killed at any point and started again goes on as if it had not been killed, bit for
bit.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt import params as P
from jaxrl_pt.checksum import checksum
from jaxrl_pt.environments.base import Task
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs.kind import OTHER_START
from jaxrl_pt.models import adapters, transformer
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import memory, rules
from jaxrl_pt.rollouts import judge_guard, mismatch, record
from jaxrl_pt.rollouts.stages import Stages, Step, resamples
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.sampling import in_flight
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params, RolloutBatch, TrainState, Weighted

# The form in which a checkpoint keeps rollouts that were drawn ahead.
_PENDING = 'RolloutBatch'


class Reinforcement:
  """A run of reinforcement learning that has been opened. Final."""

  measured_first = True
  agrees_at_once = True

  def __init__(self, session: sessions.Session, method: cfg.Reinforced, reference_params: Params,
               environment: Task, new_method: Callable[[Params], Any]) -> None:
    """Compiles nothing yet.

    Args:
      session: the run's session.
      method: the run's objective.
      reference_params: the reference policy's parameters, from which the run also starts.
      environment: prompts, verifier and held-out measure.
      new_method: parameters → what `TrainState.method` holds before the first step.
    """
    run = session.run
    self.session, self._method, self._environment = session, method, environment
    self.flops_per_token = model_flops(run) / num_tokens(run)
    model = session.model(run.model)
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
    self._new_method = new_method
    self.abstract = states.abstract_state(model, self._optimizer, session.mesh, new_method)
    self._start_params, self._digest = reference_params, digest(reference_params)
    self._model = model
    # These settings and the environment's digest decide which prompts a batch's number stands for.
    self._order = {
        'Run.seed': run.seed, 'Rollouts.num_prompts': method.rollouts.num_prompts,
        f'{type(method).__name__}.positions_per_document': method.positions_per_document}
    self.stages = Stages(session, environment, _trained(model, reference_params, run.seed),
                         self._optimizer, method)
    self._guard = next((judge_guard.Guard(judge.guard, environment.num_held_out)
                        for judge in cfg.judge_of(method) if environment.num_held_out), None)
    self.stop_reason = ''
    self._batch = 0  # number of the next batch
    self._ahead: RolloutBatch | None = None  # rollouts of the next batch if they were drawn ahead

  def start(self) -> TrainState:
    """A state at step 0 with a copy of the reference policy's parameters."""
    state = states.state_of(self._model, self._start_params, self._optimizer, self.abstract,
                            self._new_method, self.session.run.seed)
    self._forget_start()
    return state

  def _forget_start(self) -> None:
    """Frees the policy that the run started from, where the state has all of it but the adapters.

    The frozen parameters of policy and reference policy are then one copy, which is the state's.
    """
    if self._model.config.adapter != cfg.NoAdapter():
      jax.tree.map(lambda x: x.delete(), self._start_params)

  # --- Resume -----------------------------------------------------------------------

  def check(self, position: dict[str, Any]) -> None:
    """Refuses a checkpoint of a run with other prompts or another reference policy.

    A batch's number must stand for the same prompts as before. With another seed every epoch has
    another order, and with another number of prompts a step another place in that order, so that
    some prompts would be left out and others asked twice.

    Args:
      position: what `saved` gave with the checkpoint's state.

    Raises:
      UserError: names what differs.
    """
    for name, value in self._order.items():
      # Checkpoints of earlier versions lack these settings.
      if position.get(name, value) != value:
        raise UserError(f'The checkpoint was made with {name} = {position[name]!r}, this run has '
                        f'{value!r}, which would ask some prompts twice and others not at all: '
                        f'resume with {name} = {position[name]!r}, or use a new --workdir.')
    if position['start'] != self._digest:
      raise UserError(OTHER_START)
    if position['task'] != self._environment.digest:
      judge = ', or the judge is not the one,' if cfg.judge_of(self._method) else ''
      raise UserError(f'The problems are not those{judge} that this run began with: put them back, '
                      'or use a new --workdir.')
    shards, ours = position.get('shards', 1), rules.num_shards(self.session.mesh)
    if isinstance(self._method.rollouts.mode, cfg.InFlight) and shards != ours:
      raise UserError(f'The checkpoint holds rollouts under way on {shards} shards of the data '
                      f'(Mesh.data × Mesh.fsdp), and this mesh has {ours}: resume on a mesh with '
                      f'{shards}, or use a new --workdir.')
    if self._draws_ahead and position.get('pending') != _PENDING:
      raise UserError('The checkpoint is of an earlier version, which kept rollouts that were '
                      'drawn ahead in another form: finish the run with that version, or use a '
                      'new --workdir.')

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Goes to the checkpoint's next batch, and takes over rollouts that had been drawn ahead."""
    self._forget_start()
    self._batch = position['batches']
    if self.stages.balance is not None:
      self.stages.balance.resume(position.get('lengths', ()))
    if self._guard is not None:
      self._guard.resume(position.get('guard', ()))
    if self._draws_ahead:
      # A copy, because the next step donates the state with its own pending rollouts.
      self._ahead = jax.tree.map(jnp.copy, state.method.pending)

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state with the rollouts drawn ahead, and what `check` and `resume` need."""
    if self._ahead is not None:
      state = dataclasses.replace(
          state, method=dataclasses.replace(state.method, pending=self._ahead))
    return state, {'step': step, 'batches': self._batch, 'start': self._digest,
                   'task': self._environment.digest, 'pending': _PENDING,
                   'shards': rules.num_shards(self.session.mesh),
                   'lengths': self.stages.balance.saved() if self.stages.balance else [],
                   'guard': self._guard.saved() if self._guard else [],
                   **self._order}

  @property
  def _draws_ahead(self) -> bool:
    return self._method.rollouts.mode == cfg.OneStepOff()

  # --- One step ---------------------------------------------------------------------

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches step `step`; its `finish` writes the rollouts if `dump_every` asks for them."""
    batch, rollouts = self._batch, self._method.rollouts
    state, done = self._dispatch(state, step)

    def finish() -> dict[str, float]:
      measured = self.stages.finish(state, done)
      if rollouts.dump_every and (step + 1) % rollouts.dump_every == 0:
        record.dump(self.session.workdir / record.FOLDER, step + 1, batch, done,
                    self.session.data.tokenizer)
      return measured

    return Dispatched(state, done.metrics, done.prompts.ids, num_tokens(self.session.run),
                      mismatch.gate(self.session, rollouts, step + 1, done), finish)

  def _dispatch(self, state: TrainState, step: int) -> tuple[TrainState, Step]:
    """Takes the next batch through all stages; the update may still be running on return."""
    stages, batch = self.stages, self._batch
    measure = (step + 1) % self.session.run.train.log_every == 0
    samples_dynamically = resamples(self._method.rollouts, step)
    if stages.fused and not samples_dynamically:
      self._batch += 1
      return stages.step(state, batch, measure)
    if samples_dynamically:
      verified, num_batches = stages.collect(state.params, batch, step)
      self._batch += num_batches
      state, done = stages.learn(state, *verified, measure)
      return state, done._replace(
          metrics={**done.metrics, 'rounds': Weighted.single(num_batches)})

    if isinstance(self._method.rollouts.mode, cfg.InFlight):
      self._batch += 1
      return self._continue(state, batch, step, measure)
    prompts, references = stages.take(batch)
    rollouts, self._ahead = self._ahead, None
    if rollouts is None:
      rollouts, pending = stages.draw_verified(state.params, prompts, references, batch, step)
    else:
      pending = stages.submit(prompts, rollouts, references)
    if self._draws_ahead:  # The verifier works on this batch while the next is drawn.
      self._ahead = stages.draw(state.params, stages.take(batch + 1)[0], batch + 1, step)
    verdict = stages.settle(pending)
    if self._ahead is not None:
      stages.wait(self._ahead)
    self._batch += 1
    return stages.learn(state, prompts, references, rollouts, verdict, measure)

  def _continue(self, state: TrainState, batch: int, step: int, measure: bool
                ) -> tuple[TrainState, Step]:
    """A step whose sampler goes on from the step before, and leaves responses under way."""
    prompts, references = self.stages.take(batch)
    state, rollouts, drawn = self.stages.draw_in_flight(state, batch, step)
    verdict = self.stages.settle(self.stages.submit(prompts, rollouts, references))
    state, done = self.stages.learn(state, prompts, references, rollouts, verdict, measure)
    return state, done._replace(metrics={**done.metrics, **drawn})

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """The environment's metrics on its held-out prompts, and what the guard of a judge says."""
    found = self._environment.score(state.params)
    if self._guard is None:
      return found
    trends, alarm = self._guard.note(step, found['validation/reward'],
                                     found['validation/accuracy'])
    if alarm and jax.process_index() == 0:
      print(f'warning: {alarm}.', file=sys.stderr, flush=True)
    stops = any(judge.guard.stop for judge in cfg.judge_of(self._method))
    self.stop_reason = alarm if stops else ''
    return {**found, 'guard/reward_z': trends.reward, 'guard/accuracy_z': trends.accuracy,
            'guard/alarm': float(bool(alarm))}


# --- Start ------------------------------------------------------------------------


def start_policy(run: cfg.Run, start_from: str, workdir: Path) -> policy.Policy:
  """Loads the policy that a run starts from, which is also its reference policy.

  Args:
    run: the run's settings.
    start_from: the setting that names the policy's work directory.
    workdir: the run's own work directory.

  Raises:
    UserError: the run does not fit the devices, its warm-up and decay overlap, or the policy has
      another model than the run.
  """
  memory.check_fits(run)
  start = policy.load_policy(places.policy(start_from, workdir, 'start_from'), mesh=run.mesh)
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  ours, theirs = dataclasses.asdict(run.model), dataclasses.asdict(start.model.config)
  for name, value in ours.items():
    # A run keeps its own copy of the parameters, in a type of its own, and may adapt them.
    if value != theirs[name] and name not in ('param_dtype', 'adapter'):
      raise UserError(f'Model.{name} = {value!r}, but the policy in {start_from} ends with '
                      f'{theirs[name]!r}: set it to that.')
  if start.model.config.adapter not in (cfg.NoAdapter(), run.model.adapter):
    raise UserError(f'The policy in {start_from} has {start.model.config.adapter}, and this run '
                    f'{run.model.adapter}: set Model.adapter to go on with its adapters, or merge '
                    'them (jaxrl-pt export --format hf, then import) and start from that.')
  return start


def _trained(model: Model, params: Params, seed: int) -> Params:
  """The trained parameters of a policy at its start: all, or a copy of its adapters.

  Args:
    model: the run's model.
    params: the policy's parameters, which may lack the adapters that the model has.
    seed: of the adapters' initial values.
  """
  if model.config.adapter == cfg.NoAdapter():
    return params
  of_adapters = jax.jit(lambda params: jax.tree.map(jnp.copy, P.trained(
      model.specs, adapters.adapt(model.specs, params, jax.random.key(seed)))))
  found: Params = of_adapters(params)
  return found


def adapted(model: Model, params: Params, seed: int) -> Params:
  """A policy's parameters with the adapters that `_trained` gives it; arguments as there."""
  if model.config.adapter == cfg.NoAdapter():
    return params
  return adapters.adapt(model.specs, params, jax.random.key(seed))


def digest(params: Params) -> str:
  """A hash of a policy's parameters."""
  return hashlib.sha256(json.dumps(checksum(params), sort_keys=True).encode()).hexdigest()


# --- Without opening a run --------------------------------------------------------


def num_tokens(run: cfg.Run) -> int:
  """Tokens that a step works on: each prompt once, and each response."""
  r = run.objective.rollouts
  assert r is not None
  return r.num_prompts * (r.prompt_len + r.group_size * r.response_tokens)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: forward in the sampler, forward and backward in the update.

  Prompts and responses count at their greatest length, and a response attends to its prompt.
  """
  r = run.objective.rollouts
  assert r is not None
  both = lambda context: sum(metrics.flops_per_token(run.model, context, backward=backward)
                             for backward in (False, True))
  of_prompt = r.prompt_len * both((r.prompt_len + 1) / 2)
  of_response = r.response_tokens * both(r.prompt_len + (r.response_tokens + 1) / 2)
  return r.num_prompts * (of_prompt + r.group_size * of_response)


def new_method(run: cfg.Run, mesh: Mesh, params: Params) -> Any:
  """`TrainState.method` before the first step, for methods without an average policy."""
  del params
  objective = run.objective
  assert objective.rollouts is not None and objective.algorithm is not None
  return states.new_method(objective.rollouts, objective.algorithm, run.model.d_model,
                           sampler=sampler_between_steps(run, mesh))


def sampler_between_steps(run: cfg.Run, mesh: Mesh) -> Any:
  """The idle sampler of a run whose responses are under way over several steps, else ()."""
  rollouts = run.objective.rollouts
  assert rollouts is not None
  if not isinstance(rollouts.mode, cfg.InFlight):
    return ()
  return in_flight.init(transformer.build(run.model, run.compute), rollouts, mesh)
