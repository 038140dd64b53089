"""The two halves of a step run apart from each other, for debugging.

`learner` learns from kept rollouts without drawing any; `sampler` draws the next batch of a
checkpoint without learning. Where a kept step is the very next one, both must repeat what the
run did, so that a difference says which half it is in.
"""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.train import evaluate, optim, places, rl, rollouts
from jaxrl_pt.train.stages import Drawn, Stages
from jaxrl_pt.types import TrainState

# --- The halves -----------------------------------------------------------------


@contextlib.contextmanager
def _opened(workdir: Path, step: int | None) -> Iterator[tuple[Stages, TrainState, int, Any]]:
  """Stages and state of a checkpoint, the number of its next batch, and its session."""
  session, restored = evaluate.load_run(workdir, step)
  run, method = session.run, session.run.objective
  if isinstance(method, cfg.NextToken):
    raise UserError(f'{workdir} holds a pretraining run, which draws nothing: give the --workdir '
                    'of a run of reinforcement learning.')
  start = evaluate.load_policy(places.policy(method.start_from, workdir, 'start_from'))
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps * method.algorithm.updates)
  with rl.open_task(session, method, session.model(run.model), start.params) as task:
    stages = Stages(session, task, start.params, optimizer, method.rollouts, method.algorithm)
    yield stages, restored.state, restored.extras['loader']['batches'], session


def learner(workdir: Path, step: int | None = None) -> list[dict[str, float]]:
  """Learns from the kept rollouts of the steps after a checkpoint, as long as there are some.

  Returns:
    One row of metrics a step, with `recorded_loss` as the run itself had it.

  Raises:
    UserError: no checkpoint, or no rollouts of the step after it.
  """
  recorded = {r['step']: r for r in metrics.read_rows(workdir / metrics.FILE)}
  rows: list[dict[str, float]] = []
  with _opened(workdir, step) as (stages, state, batch, session):
    path = workdir / rollouts.FOLDER / f'{int(state.step) + 1}.npz'
    while path.is_file() or not rows:
      prompts, rollout, verdict = rollouts.load(path)
      drawn = Drawn(batch, session.put_rows(prompts), (), stages.put_rollout(rollout))
      state, judged = stages.learn(state, drawn, session.put_rows(verdict), measure=True)
      now = int(state.step)
      rows.append({'step': now, **metrics.host_values(judged.values),
                   'recorded_loss': recorded.get(now, {}).get('loss', float('nan'))})
      batch, path = batch + 1, workdir / rollouts.FOLDER / f'{now + 1}.npz'
  return rows


def sampler(workdir: Path, step: int | None = None) -> dict[str, Any]:
  """Draws and judges the batch after a checkpoint.

  Returns:
    The groups as text, the mean reward, and (where the run has kept that step's rollouts)
    `same_tokens` and `largest_difference` of log-probabilities, nats.

  Raises:
    UserError: no checkpoint.
  """
  with _opened(workdir, step) as (stages, state, batch, session):
    drawn = stages.draw(state.params, batch, int(state.step))
    verdict = stages.judge(stages.submit(drawn))
    trees = on_host({'prompts': drawn.prompts, 'rollout': drawn.rollout, 'verdict': verdict})
    found = {'step': int(state.step), 'batch': batch,
             'reward': float((trees['verdict'].reward * trees['verdict'].valid).sum()
                             / max(trees['verdict'].valid.sum(), 1)),
             'groups': rollouts.as_text(trees, drawn.references, session.data.tokenizer)}
    path = workdir / rollouts.FOLDER / f'{int(state.step) + 1}.npz'
    if path.is_file():
      _, kept, _ = rollouts.load(path)
      rollout = trees['rollout']
      found['same_tokens'] = bool((rollout.tokens == kept.tokens).all())
      found['largest_difference'] = float(np.abs(rollout.logp - kept.logp).max())
    return found


def text(found: list[dict[str, float]] | dict[str, Any]) -> str:
  """What either half found, to be read by people."""
  if isinstance(found, list):
    names = ('loss', 'recorded_loss', 'reward', 'grad_norm', 'gap', 'clip_fraction')
    return '\n'.join(f'step {row["step"]:g}  ' + '  '.join(
        f'{name} {row[name]:.6g}' for name in names if name in row) for row in found)
  lines = [f'{group["prompt"]!r} → {response["text"]!r}  reward {response["reward"]:g}'
           for group in found['groups'] for response in group['responses']]
  lines.append(f'checkpoint {found["step"]}, batch {found["batch"]}: reward {found["reward"]:.4f}')
  if 'same_tokens' in found:
    same = 'the same tokens as' if found['same_tokens'] else 'OTHER tokens than'
    lines.append(f'{same} the run kept; log-probabilities within {found["largest_difference"]:.2g} '
                 'nats')
  return '\n'.join(lines)
