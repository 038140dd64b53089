"""The stages of a step of reinforcement learning: take, draw, submit, settle, learn.

They are dispatched one by one where a step cannot be one program: for verifiers on the host, on a
mesh, for a sampler that draws a step ahead, and for dynamic sampling. The device works on what has
been dispatched while the host waits for a verdict; `seconds` says where the time of a step went.
"""

from collections.abc import Sequence
import dataclasses
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import modes
from jaxrl_pt.environments.base import Task, settled
from jaxrl_pt.environments.multi_turn import Player
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.rl import kl, selection
from jaxrl_pt.rollouts.balance import Balance, is_balanced
from jaxrl_pt.rollouts.unparsed import FirstBatches
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling import in_flight
from jaxrl_pt.train import fused, programs
from jaxrl_pt.train.policy_update import BY_TOKEN
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, TrainState, Verdict, Weighted
from jaxrl_pt.verifiers.base import DeviceVerifier, PendingVerdict


class Step(NamedTuple):
  """A step's prompts, rollouts and verdict, and the metrics of its update."""

  prompts: Prompts
  references: Sequence[str]  # reference answers as text, or () where the prompts carry them
  rollouts: RolloutBatch
  verdict: Verdict
  metrics: dict[str, Weighted]
  by_token: Weighted | None  # metric `BY_TOKEN` if a mismatch can stop the run, else None


def is_fused(verifier: Any, rollouts: cfg.Rollouts, num_devices: int) -> bool:
  """Whether a step is one program. The run and preflight both ask here.

  A verifier that reads the policy works in no other way. On a mesh the sampler lays out the
  parameters in a way of its own, which one program would not allow.

  Args:
    verifier: the environment's verifier.
    rollouts: how rollouts are drawn.
    num_devices: the number of the mesh's devices.
  """
  if isinstance(verifier, fused.PolicyVerifier):
    return True
  return (isinstance(verifier, DeviceVerifier) and rollouts.mode == cfg.OnPolicy()
          and num_devices == 1)


def resamples(rollouts: cfg.Rollouts, step: int) -> bool:
  """Whether step `step` uses dynamic sampling."""
  return isinstance(rollouts.selection, cfg.DynamicSampling) and (
      step >= rollouts.selection.from_step)


class Stages:
  """The compiled programs of one run and the clock of their stages. Final."""

  def __init__(self, session: sessions.Session, environment: Task, reference: Params,
               optimizer: optax.GradientTransformation, method: cfg.Reinforced) -> None:
    """Compiles nothing yet.

    Args:
      session, environment: the run's session and environment.
      reference: the trained parameters of the reference policy, whose frozen ones are the policy's.
      optimizer: the optimizer whose state is in `state.opt_state`.
      method: the run's objective.
    """
    run, mesh, stop_ids = session.run, session.mesh, session.data.tokenizer.stop_ids
    mode_ids = modes.token_ids(session.data.tokenizer, method.rollouts.modes)
    self._session, self._environment, self._method = session, environment, method
    self._reference = reference
    if isinstance(method.rollouts.mode, cfg.InFlight):
      self._in_flight = programs.in_flight_sampler(run, mesh, method.rollouts, stop_ids,
                                                   mode_ids)
    self._sample = programs.sampler(run, mesh, method.rollouts, stop_ids, mode_ids)
    self._learn = programs.learner_step(run, mesh, optimizer, method.rollouts, method.algorithm)
    self._reference_logp = programs.reference_logp(run, mesh, method.rollouts,
                                                     method.algorithm)
    verifier: Any = environment.verifier
    self.fused = is_fused(verifier, method.rollouts, mesh.size)
    if self.fused:
      self._fused_step = programs.fused_step(run, mesh, method, optimizer, verifier, stop_ids,
                                             mode_ids)
    self.balance = (Balance(rules.num_shards(mesh), method.rollouts.num_prompts)
                    if is_balanced(method, mesh) else None)
    self._drawn_metrics: dict[str, Weighted] = {}  # of the newest draw
    self.seconds: dict[str, float] = {}
    # The share of parsed responses in the batch that the host verified last.
    self._parsed_share: float | None = None
    self._first_batches = FirstBatches()

  def clock(self, stage: str, since: float) -> None:
    """Adds the time since `since` to the seconds of a stage in this step."""
    self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since

  # --- Take and generate ----------------------------------------------------------

  def take(self, batch: int) -> tuple[Prompts, Sequence[str]]:
    """The prompts of batch `batch` on the devices, and their reference answers."""
    prompts, references = self._environment.take(batch)
    return self._session.put_rows(prompts), references

  def draw(self, params: Params, prompts: Prompts, batch: int, version: int) -> RolloutBatch:
    """Dispatches weight sync and sampler: responses to the prompts of batch `batch`.

    Args:
      params: the policy's parameters.
      prompts: from `take`.
      batch: the batch's number, which addresses the sampler's noise.
      version: the number of steps that `params` have taken.
    """
    synced = self._session.sync_weights(params, version)
    numbers = jnp.asarray(batch, jnp.int32), jnp.asarray(version, jnp.int32)
    rollouts: RolloutBatch
    if self.balance is None:
      rollouts = self._sample(synced, prompts, *numbers)
      return rollouts
    ids = on_host(prompts.ids)
    order = self.balance.order(ids)
    rollouts = self._sample(synced, prompts, *numbers, None, jnp.asarray(order))
    self.balance.note(ids, rollouts)
    self._drawn_metrics = {'shard_imbalance': self.balance.imbalance(order, rollouts)}
    return rollouts

  def draw_verified(self, params: Params, prompts: Prompts, references: Sequence[str], batch: int,
                    version: int) -> tuple[RolloutBatch, PendingVerdict]:
    """Draws responses to the prompts of batch `batch`, and hands them to the verifier.

    Episodes of several turns are drawn and rewarded at once, for which this waits.

    Args:
      params, prompts, batch, version: as for `draw`.
      references: the prompts' reference answers.
    """
    verifier: Any = self._environment.verifier
    if not isinstance(verifier, Player):
      rollouts = self.draw(params, prompts, batch, version)
      return rollouts, self.submit(prompts, rollouts, references)
    started = time.perf_counter()
    played, pending = verifier.draw(params, prompts, batch, version)
    self.clock('generate', started)
    return self._session.put_rows(played), pending

  def draw_in_flight(self, state: TrainState, batch: int, version: int
                     ) -> tuple[TrainState, RolloutBatch, dict[str, Weighted]]:
    """Dispatches the sampler that goes on from step to step, until batch `batch` is drawn.

    Args:
      state: the state with the sampler, which is donated.
      batch, version: as for `draw`; batches must be drawn one after the other.

    Returns:
      The state with the sampler as it goes on, the responses, and metrics of the sampler.
    """
    sampler = state.method.pending
    for number in in_flight.entering(self._method.rollouts, batch):
      sampler = self._in_flight.enqueue(sampler, self.take(number)[0], jnp.asarray(number))
    drawn: in_flight.Drawn = self._in_flight.draw(
        self._session.sync_weights(state.params, version), sampler, jnp.asarray(batch),
        jnp.asarray(version))
    method = dataclasses.replace(state.method, pending=drawn.in_flight)
    return dataclasses.replace(state, method=method), drawn.rollouts, drawn.metrics

  # --- Verify -----------------------------------------------------------------------

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]
             ) -> PendingVerdict:
    """Hands responses to the verifier; waits for the responses if the verifier is on the host.

    Raises:
      UserError: the verifier reads the policy, and so works only inside the fused step.
    """
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
    """The verdict on the devices, for which this waits if the verifier is on the host.

    Raises:
      UserError: no response was verified.
    """
    started = time.perf_counter()
    if isinstance(self._environment.verifier, DeviceVerifier):
      verdict = pending.result()
    else:
      verdict = self._session.put_rows(settled(pending))
      self._parsed_share = pending.parsed()
    self.clock('verify', started)
    return verdict

  def wait(self, rollouts: RolloutBatch) -> None:
    """Waits for responses that were drawn while the verifier worked."""
    started = time.perf_counter()
    jax.block_until_ready(rollouts)
    self.clock('generate', started)

  def collect(self, params: Params, batch: int, version: int
              ) -> tuple[tuple[Prompts, Sequence[str], RolloutBatch, Verdict], int]:
    """Dynamic sampling (DAPO 2503.14476): draws batches until enough groups are informative.

    A group is informative if it has right and wrong responses. Enough are `Rollouts.num_prompts`.

    Args:
      params: the policy's parameters.
      batch: the number of the first batch to draw.
      version: the number of steps that `params` have taken.

    Returns:
      (prompts, reference answers, rollouts, verdict) of the informative groups, filled up with
      other groups if the last round left too few; and the number of batches drawn.
    """
    num_prompts, sampling = self._method.rollouts.num_prompts, self._method.rollouts.selection
    assert isinstance(sampling, cfg.DynamicSampling)
    informative: list[Any] = []
    others: list[Any] = []
    for num_batches in range(1, sampling.max_rounds + 1):
      prompts, references = self.take(batch + num_batches - 1)
      rollouts, pending = self.draw_verified(params, prompts, references, batch + num_batches - 1,
                                             version)
      verdict = self.settle(pending)
      rows = on_host((prompts, rollouts, verdict))
      verified = rows[2]
      keep = np.asarray(selection.informative_groups(verified.correct, verified.valid)) > 0
      for n, is_informative in enumerate(keep):
        group = jax.tree.map(lambda x, n=n: x[n], rows), references[n:n + 1]
        (informative if is_informative else others).append(group)
      if len(informative) >= num_prompts:
        break
    chosen = [*informative, *others][:num_prompts]
    prompts, rollouts, verdict = self._session.put_rows(
        jax.tree.map(lambda *x: np.stack(x), *(group for group, _ in chosen)))
    references = tuple(answer for _, answers in chosen for answer in answers)
    return (prompts, references, rollouts, verdict), num_batches

  # --- Advantage and update ---------------------------------------------------------

  def learn(self, state: TrainState, prompts: Prompts, references: Sequence[str],
            rollouts: RolloutBatch, verdict: Verdict, measure: bool) -> tuple[TrainState, Step]:
    """Dispatches advantages and updates; the state is donated.

    Args:
      state: the state before the update.
      prompts, references, rollouts, verdict: the verified batch.
      measure: whether to measure the KL from the reference policy even if the algorithm does not
        read it.
    """
    reference_logp = jnp.zeros_like(rollouts.logp)
    reads = fused.reads_reference(self._method.algorithm)
    if measure or reads:
      reference_logp = self._reference_logp(P.joined(state.params, self._reference), prompts,
                                            rollouts)
    state, values = self._learn(state, prompts, rollouts, verdict, reference_logp)
    values = {**values, **self._drawn_metrics}
    if measure or reads:
      values = {**values, 'kl': _kl(rollouts, reference_logp)}
    by_token = values.pop(BY_TOKEN, None)
    return state, Step(prompts, references, rollouts, verdict, values, by_token)

  # --- All in one -------------------------------------------------------------------

  def step(self, state: TrainState, batch: int, measure: bool) -> tuple[TrainState, Step]:
    """Dispatches the fused step on batch `batch`; the state is donated.

    Args:
      state: the state before the step.
      batch: the batch's number.
      measure: whether to measure the KL from the reference policy.
    """
    prompts, references = self.take(batch)
    state, values, rollouts, verdict = self._fused_step(state, self._reference, prompts)
    if measure:
      reference_logp = self._reference_logp(P.joined(state.params, self._reference), prompts,
                                            rollouts)
      values = {**values, 'kl': _kl(rollouts, reference_logp)}
    by_token = values.pop(BY_TOKEN, None)
    return state, Step(prompts, references, rollouts, verdict, values, by_token)

  def _check_first_batches(self, done: Step) -> None:
    """Warns if the responses of the first batches hardly state an answer; waits for these steps."""
    if self._first_batches.is_over:
      return
    parsed = done.metrics.get('reward/parsed')  # A verifier on the device has it among its parts.
    share = self._parsed_share if parsed is None else float(parsed.mean())
    line = None if share is None else self._first_batches.note(share)
    if line is not None and jax.process_index() == 0:
      print(line, file=sys.stderr, flush=True)

  def finish(self, state: TrainState, done: Step) -> dict[str, float]:
    """Waits for the step just dispatched and measures its stages.

    With a verifier on the device this neither waits nor measures, so that the next step can be
    dispatched at once.

    Args:
      state: the state after the step.
      done: the step.

    Returns:
      Metrics of the stages, in seconds and tokens per second.
    """
    self._check_first_batches(done)
    if isinstance(self._environment.verifier, DeviceVerifier | fused.PolicyVerifier):
      return {}
    started = time.perf_counter()
    jax.block_until_ready(state.step)
    self.clock('update', started)
    seconds, self.seconds = self.seconds, {}
    response_tokens = float(np.sum(on_host(done.rollouts.in_response)))
    tokens = response_tokens + float(np.sum(on_host(done.prompts.lengths)))
    generating = max(seconds.get('generate', 0.0), 1e-9)
    speeds = {'generate_tokens_per_second': response_tokens / generating,
              'update_tokens_per_second': tokens / max(seconds['update'], 1e-9)}
    return {**{f'{name}_seconds': value for name, value in seconds.items()}, **speeds}


@jax.jit
def _kl(rollouts: RolloutBatch, reference_logp: Array) -> Weighted:
  """The KL of the behaviour policy from the reference policy: the mean of k3 over drawn tokens."""
  # Where nothing was drawn the reference policy's log-probabilities are garbage.
  on_sampled = jnp.where(rollouts.sampled > 0, reference_logp, 0.0)
  return Weighted.of(kl.k3(rollouts.logp, on_sampled), rollouts.sampled)
