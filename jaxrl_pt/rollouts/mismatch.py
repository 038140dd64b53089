"""The gate on the sampler–trainer mismatch, which stops a run whose two halves disagree.

Sampler and trainer compute one policy in two ways. If they differ by more than rounding (in a
filter, a kernel or a dtype, or because weights arrived damaged), every gradient is that of another
policy, and no other metric shows it.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.rl import ratios
from jaxrl_pt.rollouts.stages import Step
from jaxrl_pt.run.recorder import Check
from jaxrl_pt.run.session import Session

FOLDER = 'mismatch'  # in the work directory
WORST = 16  # responses that are written


def gate(session: Session, rollouts: cfg.Rollouts, step: int, done: Step) -> Check:
  """check(metrics of the step on the host, step of the last good checkpoint or None) → None.

  The check raises UserError if the mismatch is above `Rollouts.mismatch_gate`, and first writes
  the worst responses to WORKDIR/mismatch/STEP.json.

  Args:
    session: the run's session.
    rollouts: the settings with the gate.
    step: the step's number, from 1.
    done: the step.
  """
  def check(values: dict[str, float], last_good: int | None) -> None:
    if not rollouts.is_gated or values['mismatch'] <= rollouts.mismatch_gate:
      return
    path = session.workdir / FOLDER / f'{step}.json'
    content = {'step': step, 'mismatch': values['mismatch'], 'gate': rollouts.mismatch_gate,
               'responses': worst(done, session.data.tokenizer)}
    where = _write(path, content)
    last = 'is none' if last_good is None else f'is step {last_good}'
    raise UserError(
        f'Sampler and trainer disagree at step {step}: their mismatch is {values["mismatch"]:.6g}, '
        f'above Rollouts.mismatch_gate = {rollouts.mismatch_gate:g}; {where}, and the last good '
        f'checkpoint {last}: find what only one of them does (filters, dtype, kernels), or raise '
        'the gate (0 switches it off).')

  return check


def worst(done: Step, tokenizer: Tokenizer) -> list[dict[str, Any]]:
  """The responses with the largest mismatch, falling, with the log-probabilities of their tokens.

  If the batch got several updates, only responses of the first are compared, because later updates
  move away from the sampler on purpose.

  Args:
    done: a step whose `by_token` is not None.
    tokenizer: the run's tokenizer.

  Returns:
    At most `WORST` JSON objects, each with the log-probabilities under sampler and trainer, nats.
  """
  assert done.by_token is not None
  prompts, rollouts, trainer = on_host((done.prompts, done.rollouts, done.by_token))
  compared = trainer.count > 0
  difference = np.where(compared, trainer.sum - rollouts.logp, 0.0)
  ratio = np.exp(np.minimum(np.abs(difference), ratios.LOG_BOUND)) * compared
  mean_NG = ratio.sum(-1) / np.maximum(compared.sum(-1), 1)
  per_document = len(prompts.lengths) // len(prompts.tokens)
  rows = []
  for index in np.argsort(-mean_NG, axis=None, kind='stable')[:WORST]:
    n, g = (int(x) for x in np.unravel_index(index, mean_NG.shape))
    mask = compared[n, g]
    if not mask.any():
      continue
    tokens = rollouts.tokens[n, g][mask].tolist()
    prompt = prompts.tokens[n // per_document][:prompts.lengths[n]].tolist()
    rows.append({
        'mismatch': float(mean_NG[n, g]), 'prompt_id': int(prompts.ids[n]), 'row': n, 'sample': g,
        'prompt': tokenizer.decode(prompt), 'response': tokenizer.decode(tokens), 'tokens': tokens,
        'sampler_logp': rollouts.logp[n, g][mask].tolist(),
        'trainer_logp': trainer.sum[n, g][mask].tolist()})
  return rows


def _write(path: Path, content: dict[str, Any]) -> str:
  """Writes the worst responses to `path` in process 0; says in every process where they are."""
  try:
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding='utf-8')
  except OSError as error:
    return f'its worst responses could not be written to {path} ({error.strerror})'
  return f'its worst responses are in {path}'
