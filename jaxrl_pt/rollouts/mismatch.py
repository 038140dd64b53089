"""The gate on the sampler–trainer mismatch: a run whose two halves disagree does not go on.

The sampler draws and the trainer learns by one policy, computed in two ways. Where they differ by
more than rounding (a filter that only one of them has, a kernel, a dtype, weights that arrived
damaged), every gradient is that of another policy, and nothing else in the metrics says so.
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

FOLDER = 'mismatch'
WORST = 16


def gate(session: Session, rollouts: cfg.Rollouts, step: int, done: Step) -> Check:
  """check(metrics of the step on the host, last good checkpoint): raises where the gate stops
  the run.

  Raises (the check):
    UserError: the mismatch is above `Rollouts.mismatch_gate`; the worst responses have been
      written to WORKDIR/mismatch/STEP.json.
  """
  def check(values: dict[str, float], good: int | None) -> None:
    if not rollouts.is_gated or values['mismatch'] <= rollouts.mismatch_gate:
      return
    path = session.workdir / FOLDER / f'{step}.json'
    page = {'step': step, 'mismatch': values['mismatch'], 'gate': rollouts.mismatch_gate,
            'responses': worst(done, session.data.tokenizer)}
    where = _write(path, page)
    last = 'is none' if good is None else f'is step {good}'
    raise UserError(
        f'Sampler and trainer disagree at step {step}: their mismatch is {values["mismatch"]:.6g}, '
        f'above Rollouts.mismatch_gate = {rollouts.mismatch_gate:g}; {where}, and the last good '
        f'checkpoint {last}: find what only one of them does (filters, dtype, kernels), or raise '
        'the gate (0 switches it off).')

  return check


def worst(done: Step, tokenizer: Tokenizer) -> list[dict[str, Any]]:
  """The responses of the largest mismatch, falling, each with both log-probabilities of its tokens.

  Of several updates of a batch, those of the first are looked at: the later ones move away from
  the sampler on purpose.
  """
  assert done.by_token is not None
  prompts, drawn, trainer = on_host((done.prompts, done.rollouts, done.by_token))
  seen = trainer.count > 0
  difference = np.where(seen, trainer.sum - drawn.logp, 0.0)
  power = np.exp(np.minimum(np.abs(difference), ratios.LOG_BOUND)) * seen
  mean_NG = power.sum(-1) / np.maximum(seen.sum(-1), 1)
  per_document = len(prompts.lengths) // len(prompts.tokens)
  rows = []
  for place in np.argsort(-mean_NG, axis=None, kind='stable')[:WORST]:
    n, g = (int(x) for x in np.unravel_index(place, mean_NG.shape))
    counted = seen[n, g]
    if not counted.any():
      continue
    tokens = drawn.tokens[n, g][counted].tolist()
    prompt = prompts.tokens[n // per_document][:prompts.lengths[n]].tolist()
    rows.append({
        'mismatch': float(mean_NG[n, g]), 'prompt_id': int(prompts.ids[n]), 'row': n, 'sample': g,
        'prompt': tokenizer.decode(prompt), 'response': tokenizer.decode(tokens), 'tokens': tokens,
        'sampler_logp': drawn.logp[n, g][counted].tolist(),
        'trainer_logp': trainer.sum[n, g][counted].tolist()})
  return rows


def _write(path: Path, page: dict[str, Any]) -> str:
  """Says where the page is; process 0 writes it."""
  try:
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(page, ensure_ascii=False, indent=1), encoding='utf-8')
  except OSError as error:
    return f'its worst responses could not be written to {path} ({error.strerror})'
  return f'its worst responses are in {path}'
