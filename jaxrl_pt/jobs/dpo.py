"""Direct preference optimisation on pairs of a chosen and a rejected completion (2305.18290).

    L = −log σ(β · [log π(y_c | x) / π_ref(y_c | x) − log π(y_r | x) / π_ref(y_r | x)])

The reference policy is the one that the run starts from. What it says of each completion is
computed before the first step and kept beside the data (`jobs.reference`), so that its parameters
take no memory while the policy learns. `train.preferences` has the losses.
"""

from collections.abc import Callable
import contextlib
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import packed, pairs, reference, reinforce, sft
from jaxrl_pt.jobs.kind import OTHER_START, Kind, Program
from jaxrl_pt.parallel import hosts, rules
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import optim, preferences
from jaxrl_pt.train import state as states
from jaxrl_pt.train import step as steps
from jaxrl_pt.types import Batch, Params


def _method(run: cfg.Run) -> cfg.DPO:
  assert isinstance(run.objective, cfg.DPO)
  return run.objective


def _loss_of(run: cfg.Run, mesh: Mesh) -> pairs.LossOf:
  return lambda model, segments: preferences.dpo(
      _method(run), models.build(model, run.compute, mesh), run.compute.loss_chunk, segments)


class _Reference:
  """The reference policy's log-probabilities of some splits, on the devices."""

  def __init__(self, session: sessions.Session, params: Callable[[], Params], digest: str,
               splits: tuple[str, ...]) -> None:
    """Computes what no earlier run has kept.

    Args:
      session: the run's session.
      params: gives the reference policy's parameters.
      digest: names them.
      splits: 'train', 'validation' or both.
    """
    segments = pairs.num_segments(session.data)
    self._rows = rules.row_sharding(session.mesh)
    data = {'train': session.data.train, 'validation': session.data.validation}
    self._tables = {name: hosts.from_whole(
        reference.completions(session, data[name], params, digest, segments),
        rules.replicated(session.mesh)) for name in splits}
    self._take = jax.jit(lambda table, ids: table[ids], out_shardings=self._rows)

  def pairs(self, split: str, batch: Batch) -> preferences.Pairs:
    """A batch of a split with its log-probabilities; a row of padding takes any."""
    return preferences.Pairs(batch, self._take(self._tables[split], batch.ids))


def _stage(session: sessions.Session, start: packed.Start) -> packed.Stage:
  known = _Reference(session, lambda: start.params, start.digest, ('train', 'validation'))
  return pairs.stage(session, _loss_of(session.run, session.mesh), known.pairs,
                     steps.Optimizers, lambda state: state.params, states.no_method)


def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> contextlib.AbstractContextManager[packed.PackedTraining]:
  return sft.opened(run, _method(run).start_from, workdir, resolved_text, allow, _stage)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  """The step, and the pass in which the reference policy reads the pairs."""
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  step = pairs.program(run, mesh, 'DPO step', _loss_of(run, mesh),
                       steps.Optimizers(optimizer), states.no_method)
  state, (batch, _) = step.args
  read = jax.jit(preferences.completions(model, run.compute.loss_chunk, pairs.ASSUMED_SEGMENTS))
  return [step, Program('reference policy', read, (state.params, batch), share=0.0)]


def _evaluate(session: sessions.Session, step: int) -> dict[str, float]:
  """Loss, accuracy and margin against the reference policy that the run started from."""
  restored = policy.restore(session, step, 'params')
  digest = restored.extras['loader']['start']

  def start() -> Params:
    path = places.policy(_method(session.run).start_from, session.workdir, 'start_from')
    params = policy.load_policy(path).params
    if reinforce.digest(params) != digest:
      raise UserError(OTHER_START)
    return params

  known = _Reference(session, start, digest, ('validation',))
  return pairs.evaluated(session, _loss_of(session.run, session.mesh), restored.state, known.pairs)


KIND = Kind(_open, _programs, packed.num_tokens, packed.model_flops, packed.keeps_nothing,
            evaluate=_evaluate)
