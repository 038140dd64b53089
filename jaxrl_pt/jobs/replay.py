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

from jaxrl_pt import metrics
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import open as opening
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.rollouts import record
from jaxrl_pt.rollouts.stages import Stages
from jaxrl_pt.run import places
from jaxrl_pt.run import policy as policies
from jaxrl_pt.run import session as sessions
from jaxrl_pt.types import TrainState

# --- The halves -----------------------------------------------------------------


@contextlib.contextmanager
def _opened(workdir: Path, step: int | None
            ) -> Iterator[tuple[Stages, TrainState, int, sessions.Session]]:
  """Stages and state of a checkpoint, the number of its next batch, and its session."""
  session, restored = opening.load_run(workdir, step)
  run = session.run
  reopen = opening.kind(run.objective).reopen
  if reopen is None:
    raise UserError(f'{workdir} holds a run of {type(run.objective).__name__}, which draws '
                    'nothing: give the --workdir of a run of reinforcement learning.')
  path = places.policies(run, workdir)['start_from']
  start = policies.load_policy(workdir / path)
  with reopen(session, start.params) as job:
    yield job.stages, restored.state, restored.extras['loader']['batches'], session


def learner(workdir: Path, step: int | None = None) -> list[dict[str, float]]:
  """Learns from the kept rollouts of the steps after a checkpoint, as long as there are some.

  Returns:
    One row of metrics a step, with `recorded_loss` as the run itself had it.

  Raises:
    UserError: no checkpoint, or no rollouts of the step after it.
  """
  recorded = {r['step']: r for r in metrics.read_rows(workdir / metrics.FILE)}
  rows: list[dict[str, float]] = []
  with _opened(workdir, step) as (stages, state, _, session):
    path = workdir / record.FOLDER / f'{int(state.step) + 1}.npz'
    while path.is_file() or not rows:
      prompts, drawn, verdict = session.put_rows(record.load(path))
      state, done = stages.learn(state, prompts, (), drawn, verdict, measure=True)
      now = int(state.step)
      rows.append({'step': now, **metrics.host_values(done.metrics),
                   'recorded_loss': recorded.get(now, {}).get('loss', float('nan'))})
      path = workdir / record.FOLDER / f'{now + 1}.npz'
  return rows


def sampler(workdir: Path, step: int | None = None) -> dict[str, Any]:
  """Draws and verifies the batch after a checkpoint.

  Returns:
    The groups as text, the mean reward, and (where the run has kept that step's rollouts)
    `same_tokens` and `largest_difference` of log-probabilities, nats.

  Raises:
    UserError: no checkpoint.
  """
  with _opened(workdir, step) as (stages, state, batch, session):
    prompts, references = stages.take(batch)
    drawn = stages.draw(state.params, prompts, batch, int(state.step))
    verdict = stages.settle(stages.submit(prompts, drawn, references))
    trees = on_host({'prompts': prompts, 'rollouts': drawn, 'verdict': verdict})
    found = {'step': int(state.step), 'batch': batch,
             'reward': float((trees['verdict'].reward * trees['verdict'].valid).sum()
                             / max(trees['verdict'].valid.sum(), 1)),
             'groups': record.as_text(trees, references, session.data.tokenizer)}
    path = workdir / record.FOLDER / f'{int(state.step) + 1}.npz'
    if path.is_file():
      _, kept, _ = record.load(path)
      here = trees['rollouts']
      found['same_tokens'] = bool((here.tokens == kept.tokens).all())
      found['largest_difference'] = float(np.abs(here.logp - kept.logp).max())
    return found


def text(found: list[dict[str, float]] | dict[str, Any]) -> str:
  """What either half found, to be read by people."""
  if isinstance(found, list):
    names = ('loss', 'recorded_loss', 'reward', 'grad_norm', 'mismatch', 'clip_fraction')
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
