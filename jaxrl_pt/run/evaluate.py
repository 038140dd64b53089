"""The loss of a policy on packed text, during training and from a work directory."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.data import loader
from jaxrl_pt.errors import UserError
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import losses
from jaxrl_pt.types import Batch, Params, TrainState, Weighted


def evaluate_packed(session: sessions.Session, model: cfg.Model, params: Params,
                    packed: loader.Packed, limit: int) -> dict[str, float]:
  """Loss in nats per target, bits per byte of text, and accuracy of the argmax.

    bits per byte = loss / ln 2 · targets / bytes

  Targets and UTF-8 bytes are those of the whole split, so bits per byte are exact only if `limit`
  is 0.

  Args:
    session: the run's session.
    model: the model's settings, whose activations may differ from `run.model`'s.
    params: the policy's parameters.
    packed: the split.
    limit: the number of batches to take; 0 takes all.

  Returns:
    'loss', 'accuracy' and, where the targets spell any text, 'bits_per_byte'.
  """
  evaluate = _compiled_evaluation(session, model)
  results = totals(session, packed, limit, lambda batch: evaluate(params, batch))
  if packed.num_bytes:
    results['bits_per_byte'] = (results['loss'] / math.log(2) * packed.num_targets
                                / packed.num_bytes)
  return results


def totals(session: sessions.Session, packed: loader.Packed, limit: int,
           evaluate: Callable[[Batch], dict[str, Weighted]]) -> dict[str, float]:
  """The metrics of a split, added up over its batches before they are divided.

  Args:
    session: the run's session.
    packed: the split.
    limit: the number of batches to take; 0 takes all.
    evaluate: a global batch → its metrics.
  """
  run, added = session.run, dict[str, Weighted]()
  rows = run.train.batch_size  # RL leaves it at 0.
  if not rows and run.objective.rollouts is not None:
    rows = run.objective.rollouts.num_prompts
  for batch in loader.eval_batches(packed, rows, limit):
    values = evaluate(session.put_global(batch))
    added = {k: Weighted(added[k].sum + v.sum, added[k].count + v.count) if added else v
             for k, v in values.items()}
  return metrics.host_values(added)


def validation(session: sessions.Session, state: TrainState, step: int) -> dict[str, float]:
  """validation/{loss,accuracy,bits_per_byte} of a run's state after `step` steps.

  The activations are quantised as in the step just taken.
  """
  run = session.run
  results = evaluate_packed(session, cfg.model_at(run, max(step - 1, 0)), state.params,
                            session.data.validation, limit=run.train.eval_batches)
  return {f'validation/{name}': value for name, value in results.items()}


@functools.lru_cache(maxsize=4)
def _compiled_evaluation(session: sessions.Session, model: cfg.Model) -> Any:
  chunk = session.run.compute.loss_chunk
  return jax.jit(losses.evaluation(session.model(model), chunk))


def with_data(session: sessions.Session, data: cfg.Data | None) -> sessions.Session:
  """The session of a checkpoint with the data that its policy is to be measured on.

  Args:
    session: from `policy.open_run`.
    data: the settings of data of the same kind of example; None takes the run's own.

  Raises:
    UserError: data of another kind or tokenizer, or an empty validation split.
  """
  if type(data or session.run.data) is not type(session.run.data):
    raise UserError(f'{session.workdir} was trained on @cfg.{type(session.run.data).__name__}(), '
                    f'not on @cfg.{type(data).__name__}(): leave Run.data as it is.')
  if session.prepared is None:
    run = session.run if data is None else dataclasses.replace(session.run, data=data)
    return dataclasses.replace(session, run=run)
  opened = session.data
  if data is not None:
    ours = places.with_own_tokenizer(data, session.workdir)
    making = sessions.making(session.run, ours, session.workdir, opened.tokenizer)
    opened = loader.prepare(ours, session.workdir / 'data', making)
    sessions.check_tokenizer(opened, session.data.tokenizer.fingerprint, session.workdir)
  if len(opened.validation) == 0:
    raise UserError(f'{opened.directory} has no validation documents: set '
                    'Data.validation_fraction above 0.')
  return dataclasses.replace(session, prepared=opened)


def evaluate_text(session: sessions.Session, step: int) -> dict[str, float]:
  """The loss of a checkpoint's policy on the whole validation split of its session.

  Args:
    session: from `with_data`.
    step: the checkpoint's step.
  """
  packed = session.data.validation
  params = policy.restore(session, step, 'params').state
  results = evaluate_packed(session, cfg.model_at(session.run, step), params, packed, limit=0)
  return {'num_targets': packed.num_targets, 'num_bytes': packed.num_bytes, **results}
