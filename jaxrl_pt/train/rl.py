"""Reinforcement learning: take prompts → generate → verify → advantage → update → log.

Every method runs through this one loop. Where the verifier is a function of arrays and there is
one device, the four middle stages are one program (`rl_step`). On a mesh they are dispatched one
by one, with a hand-over to the sampler's layout between them. Where the verifier reads text, it
works in processes of its own (`stages`):

- on-policy, each batch is drawn by the parameters that it updates, so generation waits for the
  update, the update for the verdict, and only logging and evaluation run beside them;
- one step off-policy, the next batch is drawn while this one is verified, by parameters that
  are one step old when it is learned from, which the correction pays for.

Killed at any point and started again, a run repeats what it would have done, bit for bit.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics, report
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.checksum import checksum
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import memory
from jaxrl_pt.train import (
  evaluate,
  held_out,
  mismatch,
  optim,
  places,
  problem_task,
  programs,
  resume,
  rollouts,
  rpt,
)
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.train.interrupt import stop_on_signals
from jaxrl_pt.train.stages import Drawn, Judged, Stages
from jaxrl_pt.train.tasks import Task
from jaxrl_pt.train.workdir import claimed
from jaxrl_pt.types import Params, TrainState, Weighted


def train(run: cfg.Run, workdir: Path, resolved_text: str,
          allow: frozenset[str] = frozenset()) -> None:
  """Runs the method to its last step in `workdir`, resuming what is there.

  Args:
    run: with an objective of reinforcement learning, whose start_from names a work directory.
    workdir: receives config.gin, checkpoints/, metrics.jsonl, report.html and, as asked for,
      rollouts/.
    resolved_text: the run as gin text, saved with it.
    allow: settings that may differ from those of the checkpoint resumed from (`resume`).

  Raises:
    UserError: a mistake in settings or files, a full disk, a non-finite loss, another run in
      `workdir`.
    Preempted: a signal came before the last step; what has been learned is saved.
  """
  method = run.objective
  assert not isinstance(method, cfg.NextToken)
  start = _start_policy(run, method.start_from, workdir)
  with claimed(workdir):
    # Problems are asked in the start policy's own tokens; only RPT reads documents.
    ours = start.session.data if isinstance(method, cfg.RL) else None
    session = sessions.open_session(run, workdir, resolved_text, data=ours, allow=allow,
                                    data_dir=start.session.workdir / 'data')
    sessions.check_tokenizer(session.data, start.session.data.tokenizer.fingerprint,
                             start.session.workdir)
    _train(session, start)


def _train(session: sessions.Session, start: evaluate.Policy) -> None:
  # --- Open ---------------------------------------------------------------------
  run, workdir, method = session.run, session.workdir, session.run.objective
  assert not isinstance(method, cfg.NextToken)
  model = session.model(run.model)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps * method.algorithm.updates)
  new_method = lambda params: states.new_method(run, params)
  abstract = states.abstract_state(model, optimizer, session.mesh, new_method)
  digest = _digest(start.params)

  with open_task(session, method, model, start.params) as task, \
       Checkpointer(workdir / 'checkpoints', run.checkpoint) as checkpointer, \
       stop_on_signals() as stop:
    # --- Restore or start from the pretrained policy -----------------------------
    state, saved = sessions.restore_or_init(
        session, checkpointer, abstract,
        lambda: states.state_of(start.params, optimizer, abstract, new_method))
    stages = Stages(session, task, start.params, optimizer, method.rollouts, method.algorithm)
    check_order(saved or {}, run)
    turn = _Turn(0, None) if saved is None else _resumed(saved, digest, task, method, stages, state)
    first = int(state.step)
    writer = metrics.Writer(workdir, resume_step=first or -1, num_steps=run.train.num_steps,
                            tensorboard=run.train.tensorboard, log_every=run.train.log_every,
                            incomplete=resume.may_differ(metrics.FILE, session.allow))
    sessions.record(session, first)
    recorder = sessions.Recorder(
        writer, checkpointer, session.mesh,
        metrics.flops_per_token(run.model, method.rollouts.prompt_len / 2))

    with writer:
      if first == 0:
        writer.write(0, task.score(state.params), {})

      # --- Train ------------------------------------------------------------------
      for step in range(first, run.train.num_steps):
        state, turn, done = _step(stages, state, turn, step, method, run.train.log_every)
        recorder.dispatched(step + 1, done.values, done.drawn.prompts.ids, programs.num_tokens(run),
                            mismatch.gate(session, method.rollouts, checkpointer, step + 1, done))
        recorder.time(stages.finish(state, done))
        if method.rollouts.dump_every and (step + 1) % method.rollouts.dump_every == 0:
          rollouts.dump(workdir / rollouts.FOLDER, step + 1, done, session.data.tokenizer)

        is_last = step + 1 == run.train.num_steps
        if is_last or (step + 1) % run.train.eval_every == 0:
          recorder.add(task.score(state.params))
        stops = stop.agreed(wait=True)
        if is_last or stops or (step + 1) % run.checkpoint.every == 0:
          recorder.sync()
          checkpointer.save(step + 1, _with_pending(state, turn), sessions.checkpoint_extras(
              session, _position(run, step + 1, turn, digest, task)))
          recorder.restart_clock()
        if stops and not is_last:
          checkpointer.wait()
          stop.stop(step + 1)
  if jax.process_index() == 0:
    report.write_report(workdir)


# --- One step -------------------------------------------------------------------


class _Turn(NamedTuple):
  """What the next step starts with: its batch's number, and that batch if already drawn."""

  batch: int
  ahead: Drawn | None


def _step(stages: Stages, state: TrainState, turn: _Turn, step: int, method: cfg.RL | cfg.RPT,
          log_every: int) -> tuple[TrainState, _Turn, Judged]:
  """One step: prompts → responses → verdict → advantage → update, as far as dispatched."""
  measure = (step + 1) % log_every == 0
  selection = method.rollouts.selection
  resamples = isinstance(selection, cfg.DynamicSampling) and step >= selection.from_step
  if stages.fused and not resamples:
    state, done = stages.step(state, turn.batch, measure)
    return state, _Turn(turn.batch + 1, None), done
  if resamples:
    drawn, verdict, taken = stages.collect(state.params, turn.batch, step)
    state, done = stages.learn(state, drawn, verdict, measure)
    rounds = {**done.values, 'rounds': Weighted.single(taken)}
    return state, _Turn(turn.batch + taken, None), done._replace(values=rounds)

  drawn = turn.ahead or stages.draw(state.params, turn.batch, step)
  ticket = stages.submit(drawn)
  ahead = None
  if method.rollouts.mode == cfg.OneStepOff():
    ahead = stages.draw(state.params, turn.batch + 1, step)  # While the verifier works.
  verdict = stages.judge(ticket)
  if ahead is not None:
    stages.wait(ahead)
  state, done = stages.learn(state, drawn, verdict, measure)
  return state, _Turn(turn.batch + 1, ahead), done


# --- Start and resume -----------------------------------------------------------


@contextlib.contextmanager
def open_task(session: sessions.Session, method: cfg.RL | cfg.RPT, model: Model,
              start: Params) -> Iterator[Task]:
  """The task of a method, its verifier's processes running as long as the context is open."""
  match method:
    case cfg.RPT():
      yield rpt.make_task(session, method, model, start)
    case cfg.RL():
      with problem_task.open_task(session, method) as task:
        yield task


def _start_policy(run: cfg.Run, start_from: str, workdir: Path) -> evaluate.Policy:
  """The policy to begin with, once the run is known to fit the devices, and it to fit the run."""
  memory.check_fits(run)
  start = evaluate.load_policy(places.policy(start_from, workdir, 'start_from'), mesh=run.mesh)
  _check_start(run, start_from, start)
  held_out.check(run, start.session.run)
  return start


def _check_start(run: cfg.Run, start_from: str, start: evaluate.Policy) -> None:
  assert not isinstance(run.objective, cfg.NextToken)
  optim.check_schedule(run.optimizer.schedule,
                       run.train.num_steps * run.objective.algorithm.updates)
  ours, theirs = dataclasses.asdict(run.model), dataclasses.asdict(start.model.config)
  for name, value in ours.items():
    if value != theirs[name]:
      raise UserError(f'Model.{name} = {value!r}, but the policy in {start_from} ends with '
                      f'{theirs[name]!r}: set it to that.')


def _digest(params: Params) -> str:
  """Names the start policy by its content."""
  return hashlib.sha256(json.dumps(checksum(params), sort_keys=True).encode()).hexdigest()


def order_identity(run: cfg.Run) -> dict[str, int]:
  """Settings that, with the prompts, decide which prompts a batch's number stands for.

  With another seed every epoch has another order, and with other sizes of a step another place
  in it: going on would leave some prompts out and ask others twice.
  """
  match run.objective:
    case cfg.NextToken():
      raise TypeError('the order of pretraining is the loader\'s')
    case cfg.RPT(rollouts=rollouts, positions_per_document=shared):
      return {'Run.seed': run.seed, 'Rollouts.num_prompts': rollouts.num_prompts,
              'RPT.positions_per_document': shared}
    case cfg.RL(rollouts=rollouts):
      return {'Run.seed': run.seed, 'Rollouts.num_prompts': rollouts.num_prompts}


def _position(run: cfg.Run, step: int, turn: _Turn, digest: str, task: Task) -> dict[str, Any]:
  """Where a checkpoint stands among the prompts, and what their order follows from."""
  return {'step': step, 'batches': turn.batch, 'start': digest, 'task': task.digest,
          **order_identity(run)}


def check_order(saved: dict[str, Any], run: cfg.Run) -> None:
  """Refuses to go on with other prompts than the checkpoint's batch numbers stand for.

  Raises:
    UserError: another seed, or other sizes of a step.
  """
  for name, value in order_identity(run).items():
    # Checkpoints from before these were recorded have none of them.
    if saved.get(name, value) != value:
      raise UserError(f'The checkpoint was made with {name} = {saved[name]!r}, this run has '
                      f'{value!r}, which would ask some prompts twice and others not at all: '
                      f'resume with {name} = {saved[name]!r}, or use a new --workdir.')


def _resumed(saved: dict[str, Any], digest: str, task: Task, method: cfg.RL | cfg.RPT,
             stages: Stages, state: TrainState) -> _Turn:
  """Where a checkpoint stands among the batches, with the rollouts it had drawn ahead.

  Raises:
    UserError: the start policy or the prompts are not those that the run began with.
  """
  if saved['start'] != digest:
    raise UserError(f'The policy in {method.start_from} is not the one that this run started '
                    'from: put it back, or use a new --workdir.')
  if saved['task'] != task.digest:
    raise UserError('The problems are not those that this run began with: put them back, or use a '
                    'new --workdir.')
  batch = saved['batches']
  if method.rollouts.mode != cfg.OneStepOff():
    return _Turn(batch, None)
  # A copy: the state's own arrays are donated to the step that learns from them.
  return _Turn(batch, stages.drawn(batch, jax.tree.map(jnp.copy, state.method.pending)))


def _with_pending(state: TrainState, turn: _Turn) -> TrainState:
  """The state with what has been drawn ahead, as a checkpoint keeps it."""
  if turn.ahead is None:
    return state
  return dataclasses.replace(
      state, method=dataclasses.replace(state.method, pending=turn.ahead.rollout))
