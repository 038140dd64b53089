"""What RL and RPT share: take prompts → generate → verify → advantage → update.

Where the verifier is a function of arrays and there is one device, the four last are one program
(`train.fused`). On a mesh they are dispatched one by one, with a weight sync to the sampler's
layout between them. Where the verifier reads text, it works in processes of its own
(`rollouts.stages`):

- on-policy, each batch is drawn by the parameters that it updates, so generation waits for the
  update, the update for the verdict, and only logging and evaluation run beside them;
- one step off-policy, the next batch is drawn while this one is verified, by parameters that
  are one step old when it is learned from, which the correction pays for.

Killed at any point and started again, a run repeats what it would have done, bit for bit.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.checksum import checksum
from jaxrl_pt.environments.base import Environment
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import memory
from jaxrl_pt.rollouts import mismatch, record
from jaxrl_pt.rollouts.stages import Stages, Step, resamples
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params, RolloutBatch, TrainState, Weighted

# What a checkpoint keeps of rollouts that were drawn ahead.
_PENDING = 'RolloutBatch'


class Reinforcement:
  """A run of reinforcement learning that has been opened. Final."""

  measured_first = True
  agrees_at_once = True

  def __init__(self, session: sessions.Session, method: cfg.Reinforced, start: Params,
               environment: Environment, new_method: Callable[[Params], Any]) -> None:
    """Compiles nothing yet.

    Args:
      session: of the run.
      method: its objective.
      start: parameters of the start policy, which is also the reference of the KL.
      environment: prompts, verifier and held-out measure.
      new_method: makes of the parameters what `TrainState.method` holds at first.
    """
    run = session.run
    self.session, self._method, self._environment = session, method, environment
    self.flops_per_token = metrics.flops_per_token(run.model, method.rollouts.prompt_len / 2)
    model = session.model(run.model)
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
    self._new_method = new_method
    self.abstract = states.abstract_state(model, self._optimizer, session.mesh, new_method)
    self._start, self._digest = start, digest(start)
    # Settings that, with the prompts, decide which prompts a batch's number stands for.
    self._order = {
        'Run.seed': run.seed, 'Rollouts.num_prompts': method.rollouts.num_prompts,
        f'{type(method).__name__}.positions_per_document': method.positions_per_document}
    self.stages = Stages(session, environment, start, self._optimizer, method)
    self._batch = 0  # the number of the next one
    self._ahead: RolloutBatch | None = None  # its responses, if they are drawn already

  def start(self) -> TrainState:
    """The start policy, about to take its first step."""
    return states.state_of(self._start, self._optimizer, self.abstract, self._new_method)

  # --- Resume -----------------------------------------------------------------------

  def check(self, position: dict[str, Any]) -> None:
    """Refuses to go on with other prompts than the checkpoint's batch numbers stand for, or from
    another policy.

    With another seed every epoch has another order, and with other sizes of a step another place
    in it: going on would leave some prompts out and ask others twice.
    """
    for name, value in self._order.items():
      # Checkpoints from before these were recorded have none of them.
      if position.get(name, value) != value:
        raise UserError(f'The checkpoint was made with {name} = {position[name]!r}, this run has '
                        f'{value!r}, which would ask some prompts twice and others not at all: '
                        f'resume with {name} = {position[name]!r}, or use a new --workdir.')
    if position['start'] != self._digest:
      raise UserError(f'The policy in {self._method.start_from} is not the one that this run '
                      'started from: put it back, or use a new --workdir.')
    if position['task'] != self._environment.digest:
      raise UserError('The problems are not those that this run began with: put them back, or '
                      'use a new --workdir.')
    if self._draws_ahead and position.get('pending') != _PENDING:
      raise UserError('The checkpoint is of an earlier version, which kept rollouts that were '
                      'drawn ahead in another form: finish the run with that version, or use a '
                      'new --workdir.')

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Goes to the checkpoint's batch, with the rollouts that it had drawn ahead."""
    self._batch = position['batches']
    if self._draws_ahead:
      # A copy: the state's own arrays are donated to the step that learns from them.
      self._ahead = jax.tree.map(jnp.copy, state.method.pending)

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state with what has been drawn ahead, and its place among the prompts."""
    if self._ahead is not None:
      state = dataclasses.replace(
          state, method=dataclasses.replace(state.method, pending=self._ahead))
    return state, {'step': step, 'batches': self._batch, 'start': self._digest,
                   'task': self._environment.digest, 'pending': _PENDING, **self._order}

  @property
  def _draws_ahead(self) -> bool:
    return self._method.rollouts.mode == cfg.OneStepOff()

  # --- One step ---------------------------------------------------------------------

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches a step, and keeps its rollouts where they are asked for."""
    batch, rollouts = self._batch, self._method.rollouts
    state, done = self._stepped(state, step)

    def finish() -> dict[str, float]:
      found = self.stages.finish(state, done)
      if rollouts.dump_every and (step + 1) % rollouts.dump_every == 0:
        record.dump(self.session.workdir / record.FOLDER, step + 1, batch, done,
                    self.session.data.tokenizer)
      return found

    return Dispatched(state, done.metrics, done.prompts.ids, num_tokens(self.session.run),
                      mismatch.gate(self.session, rollouts, step + 1, done), finish)

  def _stepped(self, state: TrainState, step: int) -> tuple[TrainState, Step]:
    """Prompts → responses → verdict → advantage → update, as far as dispatched."""
    stages, batch = self.stages, self._batch
    measure = (step + 1) % self.session.run.train.log_every == 0
    again = resamples(self._method.rollouts, step)
    if stages.fused and not again:
      self._batch += 1
      return stages.step(state, batch, measure)
    if again:
      verified, taken = stages.collect(state.params, batch, step)
      self._batch += taken
      state, done = stages.learn(state, *verified, measure)
      return state, done._replace(metrics={**done.metrics, 'rounds': Weighted.single(taken)})

    prompts, references = stages.take(batch)
    drawn, self._ahead = self._ahead, None
    if drawn is None:
      drawn = stages.draw(state.params, prompts, batch, step)
    pending = stages.submit(prompts, drawn, references)
    if self._draws_ahead:  # While the verifier works.
      self._ahead = stages.draw(state.params, stages.take(batch + 1)[0], batch + 1, step)
    verdict = stages.settle(pending)
    if self._ahead is not None:
      stages.wait(self._ahead)
    self._batch += 1
    return stages.learn(state, prompts, references, drawn, verdict, measure)

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """What the environment measures on what it holds out."""
    del step
    return self._environment.score(state.params)


# --- Start ------------------------------------------------------------------------


def start_policy(run: cfg.Run, start_from: str, workdir: Path) -> policy.Policy:
  """The policy to begin with, once the run is known to fit the devices, and it to fit the run."""
  memory.check_fits(run)
  start = policy.load_policy(places.policy(start_from, workdir, 'start_from'), mesh=run.mesh)
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  ours, theirs = dataclasses.asdict(run.model), dataclasses.asdict(start.model.config)
  for name, value in ours.items():
    if value != theirs[name]:
      raise UserError(f'Model.{name} = {value!r}, but the policy in {start_from} ends with '
                      f'{theirs[name]!r}: set it to that.')
  return start


def digest(params: Params) -> str:
  """Names a policy by its content."""
  return hashlib.sha256(json.dumps(checksum(params), sort_keys=True).encode()).hexdigest()


# --- Without opening a run --------------------------------------------------------


def num_tokens(run: cfg.Run) -> int:
  """Tokens a step works on: each prompt once, and each response."""
  r = run.objective.rollouts
  assert r is not None
  return r.num_prompts * (r.prompt_len + r.group_size * r.response_tokens)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: the sampler goes forward over the tokens that the update trains on."""
  r = run.objective.rollouts
  assert r is not None
  return 4 * num_tokens(run) * metrics.flops_per_token(run.model, r.prompt_len / 2,
                                                       backward=False)


def new_method(run: cfg.Run, params: Params) -> Any:
  """What a method keeps that has no average policy."""
  del params
  objective = run.objective
  assert objective.rollouts is not None and objective.algorithm is not None
  return states.new_method(objective.rollouts, objective.algorithm, run.model.d_model)
