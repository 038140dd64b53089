"""The two halves of a step, sampler and learner, each run without the other for debugging.

`learner` learns from rollouts that a run has kept; `sampler` draws the batch that follows a
checkpoint. On-policy or in flight, and without dynamic sampling, both must repeat what the run did
in the step after the checkpoint, so that a difference shows which half is wrong.
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
from jaxrl_pt.sampling.in_flight import InFlight
from jaxrl_pt.train.state import MethodState
from jaxrl_pt.types import TrainState

# --- The halves -----------------------------------------------------------------


@contextlib.contextmanager
def _opened(workdir: Path, step: int | None
            ) -> Iterator[tuple[Stages, TrainState, int, sessions.Session]]:
  """A checkpoint's stages, its state, the number of its next batch, and its session."""
  session, restored = opening.load_run(workdir, step)
  run = session.run
  reopen = opening.kind(run.objective).reopen
  if reopen is None:
    raise UserError(f'{workdir} holds a run of {type(run.objective).__name__}, which draws '
                    'nothing: give the --workdir of a run of reinforcement learning.')
  path = places.policies(run, workdir)['start_from']
  reference_policy = policies.load_policy(workdir / path)
  with reopen(session, reference_policy.params) as job:
    yield job.stages, restored.state, restored.extras['loader']['batches'], session


def learner(workdir: Path, step: int | None = None) -> list[dict[str, float]]:
  """Learns from the kept rollouts of the steps after a checkpoint, as long as there are some.

  Args:
    workdir: the run's work directory.
    step: the checkpoint's step; None takes the newest good one.

  Returns:
    One row of metrics for each step; its `recorded_loss` is the loss that the run itself had.

  Raises:
    UserError: no checkpoint, or no rollouts of the step after it.
  """
  recorded = {r['step']: r for r in metrics.read_rows(workdir / metrics.FILE)}
  rows: list[dict[str, float]] = []
  with _opened(workdir, step) as (stages, state, _, session):
    path = workdir / record.FOLDER / f'{int(state.step) + 1}.npz'
    while path.is_file() or not rows:
      prompts, rollouts, verdict = session.put_rows(record.load(path))
      state, done = stages.learn(state, prompts, (), rollouts, verdict, measure=True)
      now = int(state.step)
      rows.append({'step': now, **metrics.host_values(done.metrics),
                   'recorded_loss': recorded.get(now, {}).get('loss', float('nan'))})
      path = workdir / record.FOLDER / f'{now + 1}.npz'
  return rows


def sampler(workdir: Path, step: int | None = None) -> dict[str, Any]:
  """Draws and verifies the batch that follows a checkpoint.

  Args:
    workdir: the run's work directory.
    step: the checkpoint's step; None takes the newest good one.

  Returns:
    The groups as text and their mean reward. If the run has kept that step's rollouts, also
    `same_tokens`, and `largest_difference` of log-probabilities in nats.

  Raises:
    UserError: no checkpoint, no valid response, or a verifier that works only inside its step.
  """
  with _opened(workdir, step) as (stages, state, batch, session):
    prompts, references = stages.take(batch)
    if isinstance(state.method, MethodState) and isinstance(state.method.pending, InFlight):
      rollouts = stages.draw_in_flight(state, batch, int(state.step))[1]
      pending = stages.submit(prompts, rollouts, references)
    else:
      rollouts, pending = stages.draw_verified(state.params, prompts, references, batch,
                                               int(state.step))
    verdict = stages.settle(pending)
    trees = on_host({'prompts': prompts, 'rollouts': rollouts, 'verdict': verdict})
    found = {'step': int(state.step), 'batch': batch,
             'reward': float((trees['verdict'].reward * trees['verdict'].valid).sum()
                             / max(trees['verdict'].valid.sum(), 1)),
             'groups': record.as_text(trees, references, session.data.tokenizer)}
    path = workdir / record.FOLDER / f'{int(state.step) + 1}.npz'
    if path.is_file():
      _, kept, _ = record.load(path)
      drawn = trees['rollouts']
      found['same_tokens'] = bool((drawn.tokens == kept.tokens).all())
      found['largest_difference'] = float(np.abs(drawn.logp - kept.logp).max())
    return found


def text(found: list[dict[str, float]] | dict[str, Any]) -> str:
  """The result of `learner` or of `sampler` as text for people."""
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
