"""The stages of a step, dispatched one by one: draw, submit, settle, compare, learn.

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
from jaxrl_pt.environments.base import Environment, settled
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.rl import kl, selection
from jaxrl_pt.rollouts.unparsed import FirstBatches
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import fused, programs
from jaxrl_pt.train.update import BY_TOKEN
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, TrainState, Verdict, Weighted
from jaxrl_pt.verifiers.base import DeviceVerifier, PendingVerdict


class Step(NamedTuple):
  """What a step has drawn, what became of it, and what the update measured."""

  prompts: Prompts
  references: Sequence[str]
  rollouts: RolloutBatch
  verdict: Verdict
  metrics: dict[str, Weighted]
  by_token: Weighted | None  # `update.BY_TOKEN`, where a mismatch can stop the run


def is_fused(verifier: Any, rollouts: cfg.Rollouts, num_devices: int) -> bool:
  """Whether a step is one program: the one rule for the loop and for preflight.

  A verifier that reads the policy can be had in no other way. On a mesh the sampler has a layout
  of its own, which one program would not let it have.
  """
  if isinstance(verifier, fused.PolicyVerifier):
    return True
  return (isinstance(verifier, DeviceVerifier) and rollouts.mode == cfg.OnPolicy()
          and num_devices == 1)


def resamples(rollouts: cfg.Rollouts, step: int) -> bool:
  """Whether groups of a step are drawn again until they teach something."""
  return isinstance(rollouts.selection, cfg.DynamicSampling) and (
      step >= rollouts.selection.from_step)


class Stages:
  """The compiled programs of one run and the clock of their stages. Final."""

  def __init__(self, session: sessions.Session, environment: Environment, start: Params,
               optimizer: optax.GradientTransformation, method: cfg.Reinforced) -> None:
    """Compiles nothing yet.

    Args:
      session, environment: of the run.
      start: the reference policy's parameters.
      optimizer: of the state.
      method: the run's objective.
    """
    run, mesh, stop_id = session.run, session.mesh, session.data.tokenizer.eos_id
    self._session, self._environment, self._start = session, environment, start
    self._method, self._rollouts = method, method.rollouts
    self._sample = programs.sampler(run, mesh, method.rollouts, stop_id)
    self._sync_weights = programs.weight_sync(run, mesh)
    self._learn = programs.learner_step(run, mesh, optimizer, method.rollouts, method.algorithm)
    self._reference = programs.reference(run, mesh, method.rollouts)
    verifier: Any = environment.verifier
    self.fused = is_fused(verifier, method.rollouts, mesh.size)
    if self.fused:
      self._fused_step = programs.fused_step(run, mesh, method, optimizer, verifier, stop_id)
    self.seconds: dict[str, float] = {}
    self._parsed: float | None = None  # of the batch that the host verified last
    self._beginning = FirstBatches()

  def clock(self, stage: str, since: float) -> None:
    """Adds the time since `since` to a stage's of this step."""
    self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since

  # --- Take and generate ----------------------------------------------------------

  def take(self, batch: int) -> tuple[Prompts, Sequence[str]]:
    """Prompts of batch `batch` on the devices, and their references."""
    prompts, references = self._environment.take(batch)
    return self._session.put_rows(prompts), references

  def draw(self, params: Params, prompts: Prompts, batch: int, version: int) -> RolloutBatch:
    """Dispatches the generation of responses to the prompts of batch `batch`."""
    synced = self._sync_weights(params, version)
    drawn: RolloutBatch = self._sample(synced, prompts, jnp.asarray(batch, jnp.int32),
                                       jnp.asarray(version, jnp.int32))
    return drawn

  # --- Verify -----------------------------------------------------------------------

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]
             ) -> PendingVerdict:
    """Hands responses to the verifier, waiting for them if it is on the host."""
    verifier = self._environment.verifier
    if isinstance(verifier, fused.PolicyVerifier):
      raise UserError('RPT.reward = @cfg.InformationGain() is verified inside its step, which has '
                      'no halves to run alone.')
    if not isinstance(verifier, DeviceVerifier):
      started = time.perf_counter()
      rollouts = on_host(rollouts)
      self.clock('generate', started)
    return verifier.submit(prompts, rollouts, references)

  def settle(self, pending: PendingVerdict) -> Verdict:
    """Waits for the verdict of a verifier on the host.

    Raises:
      UserError: nothing was verified.
    """
    started = time.perf_counter()
    if isinstance(self._environment.verifier, DeviceVerifier):
      verdict = pending.result()
    else:
      verdict = self._session.put_rows(settled(pending))
      self._parsed = pending.parsed()
    self.clock('verify', started)
    return verdict

  def wait(self, rollouts: RolloutBatch) -> None:
    """Waits for responses that were being drawn beside the verifier."""
    started = time.perf_counter()
    jax.block_until_ready(rollouts)
    self.clock('generate', started)

  def collect(self, params: Params, batch: int, version: int
              ) -> tuple[tuple[Prompts, Sequence[str], RolloutBatch, Verdict], int]:
    """Draws and verifies until every group has right and wrong responses (DAPO 2503.14476).

    Returns:
      The groups that have, filled up with others after the last round; and the number of batches
      taken.
    """
    assert isinstance(self._rollouts.selection, cfg.DynamicSampling)
    good: list[Any] = []
    rest: list[Any] = []
    most = self._rollouts.selection.max_rounds
    for taken in range(1, most + 1):
      prompts, references = self.take(batch + taken - 1)
      drawn = self.draw(params, prompts, batch + taken - 1, version)
      verdict = self.settle(self.submit(prompts, drawn, references))
      rows = on_host((prompts, drawn, verdict))
      verified = rows[2]
      informative = np.asarray(selection.informative_groups(verified.correct, verified.valid)) > 0
      for n, keep in enumerate(informative):
        row = jax.tree.map(lambda x, n=n: x[n], rows), references[n:n + 1]
        (good if keep else rest).append(row)
      if len(good) >= self._rollouts.num_prompts:
        break
    chosen = [*good, *rest][:self._rollouts.num_prompts]
    prompts, drawn, verdict = self._session.put_rows(
        jax.tree.map(lambda *x: np.stack(x), *(row for row, _ in chosen)))
    references = tuple(r for _, one in chosen for r in one)
    return (prompts, references, drawn, verdict), taken

  # --- Advantage and update ---------------------------------------------------------

  def learn(self, state: TrainState, prompts: Prompts, references: Sequence[str],
            rollouts: RolloutBatch, verdict: Verdict, measure: bool) -> tuple[TrainState, Step]:
    """Dispatches advantages and updates; the state is donated.

    Args:
      measure: whether the distance to the reference policy is to be measured even if the
        algorithm does not read it.
    """
    reference = jnp.zeros_like(rollouts.logp)
    reads = fused.reads_reference(self._method.algorithm)
    if measure or reads:
      reference = self._reference(self._start, prompts, rollouts)
    state, values = self._learn(state, prompts, rollouts, verdict, reference)
    if measure or reads:
      values = {**values, 'kl': _kl(rollouts, reference)}
    by_token = values.pop(BY_TOKEN, None)
    return state, Step(prompts, references, rollouts, verdict, values, by_token)

  # --- All in one -------------------------------------------------------------------

  def step(self, state: TrainState, batch: int, measure: bool) -> tuple[TrainState, Step]:
    """Dispatches the one program of a verifier on the device; the state is donated."""
    prompts, references = self.take(batch)
    state, values, rollouts, verdict = self._fused_step(state, self._start, prompts)
    if measure:
      reference = self._reference(self._start, prompts, rollouts)
      values = {**values, 'kl': _kl(rollouts, reference)}
    by_token = values.pop(BY_TOKEN, None)
    return state, Step(prompts, references, rollouts, verdict, values, by_token)

  def _check_beginning(self, done: Step) -> None:
    """Says where the first batches state hardly an answer. Waits for these steps."""
    if self._beginning.is_over:
      return
    found = done.metrics.get('reward/parsed')  # of a verifier on the device
    share = self._parsed if found is None else float(found.mean())
    line = None if share is None else self._beginning.note(share)
    if line is not None and jax.process_index() == 0:
      print(line, file=sys.stderr, flush=True)

  def finish(self, state: TrainState, done: Step) -> dict[str, float]:
    """Seconds and speeds of the stages of the step just dispatched, which is waited for.

    Nothing where the verifier is on the device: the next step may be dispatched at once.
    """
    self._check_beginning(done)
    if isinstance(self._environment.verifier, DeviceVerifier | fused.PolicyVerifier):
      return {}
    started = time.perf_counter()
    jax.block_until_ready(state.step)
    self.clock('update', started)
    seconds, self.seconds = self.seconds, {}
    responses = float(np.sum(on_host(done.rollouts.in_response)))
    tokens = responses + float(np.sum(on_host(done.prompts.lengths)))
    speeds = {'generate_tokens_per_second': responses / max(seconds.get('generate', 0.0), 1e-9),
              'update_tokens_per_second': tokens / max(seconds['update'], 1e-9)}
    return {**{f'{name}_seconds': value for name, value in seconds.items()}, **speeds}


@jax.jit
def _kl(rollouts: RolloutBatch, reference: Array) -> Weighted:
  u = jnp.where(rollouts.sampled > 0, reference, 0.0)
  return Weighted.of(kl.k3(rollouts.logp, u), rollouts.sampled)
