"""The stages of a step, dispatched one by one: draw, submit, judge, compare, learn.

For verifiers on the host, for policies that draw a step ahead, and for sampling again until
groups teach something. The device works on what has been dispatched while the host waits for
verdicts; `seconds` says where the time of a step went.
"""

from collections.abc import Sequence
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.rl import kl, selection
from jaxrl_pt.train import programs, rl_step
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train.learner import BY_TOKEN, Experience
from jaxrl_pt.train.tasks import FirstBatches, InStep, OnDevice, OnHost, Task, Ticket, settled
from jaxrl_pt.types import Array, Params, Prompts, Rollout, TrainState, Verdict, Weighted


class Drawn(NamedTuple):
  """A batch of prompts and the responses that are being drawn to it."""

  batch: int  # its number in the task
  prompts: Prompts
  references: Sequence[str]
  rollout: Rollout


class Judged(NamedTuple):
  """A batch with its verdict and what the update measured."""

  drawn: Drawn
  verdict: Verdict
  values: dict[str, Weighted]
  by_token: Weighted | None = None  # `learner.BY_TOKEN`, where a mismatch can stop the run


class _Ready(NamedTuple):
  """The verdict of a verifier on the device, which is there when the device gets to it."""

  verdict: Verdict


class Stages:
  """The compiled programs of one run and the clock of their stages. Final."""

  def __init__(self, session: sessions.Session, task: Task, start: Params,
               optimizer: optax.GradientTransformation, rollouts: cfg.Rollouts,
               algorithm: cfg.Algorithm) -> None:
    """Compiles nothing yet.

    Args:
      session, task: of the run.
      start: the start policy's parameters.
      optimizer: of the state.
      rollouts, algorithm: of the run's objective.
    """
    run, mesh, stop_id = session.run, session.mesh, session.data.tokenizer.eos_id
    self._session, self._task, self._start = session, task, start
    self._rollouts, self._algorithm = rollouts, algorithm
    self._sample = programs.sampler(run, mesh, rollouts, stop_id)
    self._hand_over = programs.hand_over(run, mesh)
    self._learn = programs.learner_step(run, mesh, optimizer, rollouts, algorithm)
    self._reference = programs.reference(run, mesh, rollouts)
    # On a mesh the sampler has a layout of its own, which one program would not let it have.
    self.fused = isinstance(task.judge, InStep) or (
        isinstance(task.judge, OnDevice) and rollouts.mode == cfg.OnPolicy() and mesh.size == 1)
    match task.judge:
      case OnDevice(verify):
        self._verify = jax.jit(verify)
        self._fused_step = programs.fused_step(run, mesh, optimizer, verify, stop_id)
      case InStep(markers):
        self._fused_step = programs.rlp_step(run, mesh, optimizer, markers)
    self.seconds: dict[str, float] = {}
    self._parsed: float | None = None  # of the batch that the host judged last
    self._beginning = FirstBatches()

  def clock(self, stage: str, since: float) -> None:
    """Adds the time since `since` to a stage's of this step."""
    self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since

  # --- Take and generate ----------------------------------------------------------

  def take(self, batch: int) -> tuple[Prompts, Sequence[str]]:
    """Prompts of batch `batch` on the devices, and their references."""
    prompts, references = self._task.take(batch)
    return self._session.put_rows(prompts), references

  def draw(self, params: Params, batch: int, version: int) -> Drawn:
    """Dispatches the generation of responses to batch `batch`."""
    prompts, references = self.take(batch)
    rollout = self._sample(self._hand_over(params, version), prompts, jnp.asarray(batch, jnp.int32),
                           jnp.asarray(version, jnp.int32))
    return Drawn(batch, prompts, references, rollout)

  def put_rollout(self, rollout: Rollout) -> Rollout:
    """A rollout on the host → the devices, its groups split as the prompts are."""
    tokens, mask, logp = self._session.put_rows(_rows(rollout))
    return Rollout(tokens, mask, logp, jnp.asarray(rollout.version, jnp.int32))

  def drawn(self, batch: int, rollout: Rollout) -> Drawn:
    """Batch `batch` whose responses a checkpoint has kept."""
    return Drawn(batch, *self.take(batch), rollout)

  # --- Verify -----------------------------------------------------------------------

  def submit(self, drawn: Drawn) -> Ticket | _Ready:
    """Hands responses to the verifier, waiting for them if it is on the host."""
    match self._task.judge:
      case OnDevice():
        return _Ready(self._verify(drawn.prompts, drawn.rollout))
      case OnHost(submit):
        started = time.perf_counter()
        rollout = on_host(drawn.rollout)
        self.clock('generate', started)
        return submit(rollout, drawn.references)
      case InStep():
        raise UserError('RPT.reward = @cfg.InformationGain() is judged inside its step, which has '
                        'no halves to run alone.')

  def judge(self, ticket: Ticket | _Ready) -> Verdict:
    """Waits for the verdict.

    Raises:
      UserError: nothing was judged.
    """
    started = time.perf_counter()
    if isinstance(ticket, _Ready):
      verdict = ticket.verdict
    else:
      verdict = self._session.put_rows(settled(ticket))
      self._parsed = ticket.parsed()
    self.clock('verify', started)
    return verdict

  def wait(self, drawn: Drawn) -> None:
    """Waits for responses that were being drawn beside the verifier."""
    started = time.perf_counter()
    jax.block_until_ready(drawn.rollout)
    self.clock('generate', started)

  def collect(self, params: Params, batch: int, version: int) -> tuple[Drawn, Verdict, int]:
    """Draws and judges until every group has right and wrong responses (DAPO 2503.14476).

    Returns:
      The groups that have, filled up with others after the last round; their verdict; and the
      number of batches taken.
    """
    assert isinstance(self._rollouts.selection, cfg.DynamicSampling)
    good: list[Any] = []
    rest: list[Any] = []
    most = self._rollouts.selection.max_rounds
    for taken in range(1, most + 1):
      drawn = self.draw(params, batch + taken - 1, version)
      verdict = self.judge(self.submit(drawn))
      rows = on_host((drawn.prompts, _rows(drawn.rollout), verdict))
      _, _, judged = rows
      informative = np.asarray(selection.informative_groups(judged.correct, judged.valid)) > 0
      for n, keep in enumerate(informative):
        row = jax.tree.map(lambda x, n=n: x[n], rows), drawn.references[n:n + 1]
        (good if keep else rest).append(row)
      if len(good) >= self._rollouts.num_prompts:
        break
    chosen = [*good, *rest][:self._rollouts.num_prompts]
    prompts, (tokens, mask, logp), verdict = self._session.put_rows(
        jax.tree.map(lambda *x: np.stack(x), *(row for row, _ in chosen)))
    references = tuple(r for _, one in chosen for r in one)
    drawn = Drawn(batch, prompts, references,
                  Rollout(tokens, mask, logp, drawn.rollout.version))
    return drawn, verdict, taken

  # --- Advantage and update ---------------------------------------------------------

  def learn(self, state: TrainState, drawn: Drawn, verdict: Verdict, measure: bool
            ) -> tuple[TrainState, Judged]:
    """Dispatches advantages and updates; the state is donated.

    Args:
      measure: whether the distance to the start policy is to be measured even if the
        algorithm does not read it.
    """
    reference = jnp.zeros_like(drawn.rollout.logp)
    reads = rl_step.reads_reference(self._algorithm)
    if measure or reads:
      reference = self._reference(self._start, drawn.prompts, drawn.rollout)
    state, values = self._learn(state, Experience(drawn.prompts, drawn.rollout, verdict,
                                                  reference))
    if measure or reads:
      values = {**values, 'kl': _kl(drawn.rollout, reference)}
    by_token = values.pop(BY_TOKEN, None)
    return state, Judged(drawn, verdict, values, by_token)

  # --- All in one -------------------------------------------------------------------

  def step(self, state: TrainState, batch: int, measure: bool) -> tuple[TrainState, Judged]:
    """Dispatches the one program of a verifier on the device; the state is donated."""
    prompts, references = self.take(batch)
    state, values, rollout, verdict = self._fused_step(state, self._start, prompts)
    if measure:
      reference = self._reference(self._start, prompts, rollout)
      values = {**values, 'kl': _kl(rollout, reference)}
    by_token = values.pop(BY_TOKEN, None)
    return state, Judged(Drawn(batch, prompts, references, rollout), verdict, values, by_token)

  def _check_beginning(self, done: Judged) -> None:
    """Says where the first batches state hardly an answer. Waits for these steps."""
    if self._beginning.is_over:
      return
    found = done.values.get('reward/parsed')  # of a verifier on the device
    share = self._parsed if found is None else float(found.mean())
    line = None if share is None else self._beginning.note(share)
    if line is not None and jax.process_index() == 0:
      print(line, file=sys.stderr, flush=True)

  def finish(self, state: TrainState, done: Judged) -> dict[str, float]:
    """Seconds and speeds of the stages of the step just dispatched, which is waited for.

    Nothing where the stages are one program: the next step may be dispatched at once.
    """
    self._check_beginning(done)
    if not isinstance(self._task.judge, OnHost):
      return {}
    started, drawn = time.perf_counter(), done.drawn
    jax.block_until_ready(state.step)
    self.clock('update', started)
    seconds, self.seconds = self.seconds, {}
    responses = float(np.sum(on_host(drawn.rollout.mask)))
    tokens = responses + float(np.sum(on_host(drawn.prompts.lengths)))
    speeds = {'generate_tokens_per_second': responses / max(seconds.get('generate', 0.0), 1e-9),
              'update_tokens_per_second': tokens / max(seconds['update'], 1e-9)}
    return {**{f'{name}_seconds': value for name, value in seconds.items()}, **speeds}


def _rows(rollout: Rollout) -> tuple[Array, Array, Array]:
  """The arrays of a rollout that have a row for each group."""
  return rollout.tokens, rollout.mask, rollout.logp


@jax.jit
def _kl(rollout: Rollout, reference: Array) -> Weighted:
  u = jnp.where(rollout.mask > 0, reference, 0.0)
  return Weighted.of(kl.k3(rollout.logp, u), rollout.mask)
