"""The loop of every run: step → record → evaluate → save → stop.

The loop resumes by itself. When the same command is run again, the run goes on from its newest good
checkpoint, bit for bit as if it had never stopped.
"""

import jax

from jaxrl_pt import metrics
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.errors import UserError
from jaxrl_pt.run import resume, saved
from jaxrl_pt.run.interrupt import stop_on_signals
from jaxrl_pt.run.job import Job
from jaxrl_pt.run.recorder import Recorder


def run(job: Job) -> None:
  """Takes a job from its newest checkpoint, or from its start, to its last step.

  Raises:
    UserError: a checkpoint of another run, a full disk, a non-finite loss, a job that stops itself.
    Preempted: a signal came before the last step; a checkpoint has been saved.
  """
  session = job.session
  train, workdir = session.run.train, session.workdir
  with Checkpointer(workdir / 'checkpoints', session.run.checkpoint) as checkpointer, \
       stop_on_signals() as stop:
    state, position = saved.restore_or_init(job, checkpointer)
    if position is not None:
      job.resume(state, position)
    first = int(state.step)
    writer = metrics.Writer(
        workdir, resume_step=-1 if job.measured_first and not first else first,
        num_steps=train.num_steps, tensorboard=train.tensorboard, log_every=train.log_every,
        incomplete=resume.may_differ(metrics.FILE, session.allow))
    saved.record(session, first)
    recorder = Recorder(writer, checkpointer, session.mesh, job.flops_per_token)

    with writer:
      if job.measured_first and not first:
        writer.write(0, job.evaluate(state, 0), {})
      for step in range(first, train.num_steps):
        done = job.step(state, step)
        state = done.state
        recorder.dispatched(step + 1, done.metrics, done.ids, done.num_tokens, done.check)
        if done.finish is not None:
          recorder.time(done.finish())

        is_last = step + 1 == train.num_steps
        reason = ''
        if is_last or (step + 1) % train.eval_every == 0:
          recorder.add(job.evaluate(state, step + 1))
          reason = '' if is_last else job.stop_reason
        stops = stop.agreed(wait=job.agrees_at_once)
        if is_last or stops or reason or (step + 1) % session.run.checkpoint.every == 0:
          recorder.sync()  # A non-finite step never reaches a checkpoint.
          kept, position = job.saved(state, step + 1)
          checkpointer.save(step + 1, kept, saved.checkpoint_extras(session, position))
          recorder.restart_clock()
        if reason:
          checkpointer.wait()
          raise UserError(f'{reason}. Checkpoint written at step {step + 1}: mend the judge, or '
                          'run the same command to go on all the same.')
        if stops and not is_last:
          checkpointer.wait()
          stop.stop(step + 1)
      recorder.flush()
  if jax.process_index() == 0:
    from jaxrl_pt import report  # It loads matplotlib, for which no run waits that begins.
    report.write_report(workdir)
