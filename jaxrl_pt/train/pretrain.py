"""Pretraining: next-token prediction on packed documents, one readable loop.

Resumes by itself: run the same command again and it goes on from the newest good
checkpoint, bit for bit as if it had never stopped.
"""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics, report
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.data import loader
from jaxrl_pt.parallel import memory
from jaxrl_pt.train import optim, programs, resume
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.train.evaluate import evaluate_packed
from jaxrl_pt.train.interrupt import stop_on_signals
from jaxrl_pt.train.workdir import claimed


def train(run: cfg.Run, workdir: Path, resolved_text: str,
          allow: frozenset[str] = frozenset()) -> None:
  """Trains `run` to its last step in `workdir`, resuming what is there.

  Args:
    run: with a NextToken objective.
    workdir: receives config.gin, data/, checkpoints/, metrics.jsonl, plots and report.html.
    resolved_text: the run as gin text, saved with it.
    allow: settings that may differ from those of the checkpoint resumed from (`resume`).

  Raises:
    UserError: a mistake in settings or files, a full disk, a non-finite loss, another run in
      `workdir`.
    Preempted: a signal came before the last step; what has been learned is saved.
  """
  optim.check_schedule(run.optimizer.schedule, run.train.num_steps)
  memory.check_fits(run)
  with claimed(workdir):
    _train(run, workdir, resolved_text, allow)


def _train(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]) -> None:
  # --- Open ---------------------------------------------------------------------
  session = sessions.open_session(run, workdir, resolved_text, allow=allow)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps)
  # Only the activations' quantiser changes over a run: every model has the same state.
  abstract = states.abstract_state(session.model(run.model), optimizer, session.mesh)
  rows, tokens = session.owned()
  batches = loader.train_iterator(
      session.data.train, seed=run.seed, batch_size=run.train.batch_size, rows=rows,
      tokens=tokens, num_workers=run.data.num_workers)

  with contextlib.closing(batches), \
       Checkpointer(workdir / 'checkpoints', run.checkpoint) as checkpointer, \
       stop_on_signals() as stop:
    # --- Restore or initialise --------------------------------------------------
    state, loader_state = sessions.restore_or_init(
        session, checkpointer, abstract,
        lambda: states.init_state(session.model(run.model), optimizer, session.mesh, run.seed))
    if loader_state is not None:
      batches.set_state(loader_state)
    start = int(state.step)
    writer = metrics.Writer(workdir, resume_step=start, num_steps=run.train.num_steps,
                            tensorboard=run.train.tensorboard, log_every=run.train.log_every,
                            incomplete=resume.may_differ(metrics.FILE, allow))
    sessions.record(session, start)
    recorder = sessions.Recorder(
        writer, checkpointer, session.mesh,
        metrics.flops_per_token(run.model, run.data.seq_len / 2))
    compiled = functools.cache(
        lambda model: programs.pretrain_step(run, session.mesh, model, optimizer))

    # --- Train ------------------------------------------------------------------
    with writer:
      for step in range(start, run.train.num_steps):
        model_config = cfg.model_at(run, step)
        batch = session.put(next(batches))
        state, values = compiled(model_config)(state, batch)
        recorder.dispatched(step + 1, values, batch.ids, values['loss'].count)

        is_last = step + 1 == run.train.num_steps
        if is_last or (step + 1) % run.train.eval_every == 0:
          recorder.add(_validate(session, model_config, state, run))
        stops = stop.agreed(wait=False)
        if is_last or stops or (step + 1) % run.checkpoint.every == 0:
          recorder.sync()  # A non-finite step never reaches a checkpoint.
          checkpointer.save(step + 1, state,
                            sessions.checkpoint_extras(session, batches.get_state()))
          recorder.restart_clock()
        if stops and not is_last:
          checkpointer.wait()
          stop.stop(step + 1)
      recorder.flush()
    if jax.process_index() == 0:
      checkpointer.wait()
      report.write_report(workdir)


def _validate(session: sessions.Session, model: cfg.Model, state: Any,
              run: cfg.Run) -> dict[str, float]:
  if len(session.data.validation) == 0:
    return {}
  results = evaluate_packed(session, model, state.params, session.data.validation,
                            limit=run.train.eval_batches)
  return {f'validation/{name}': value for name, value in results.items()}
