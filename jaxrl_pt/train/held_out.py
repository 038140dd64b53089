"""A run's held-out side against what its start policy was trained on.

The splits of one run are made by a hash of the content and cannot overlap. A reinforced run has
two sets of settings, its own and those of the policy that it starts from, and what it holds out
may be what that policy has read.
"""

from collections.abc import Iterator

from jaxrl_pt import config as cfg
from jaxrl_pt.data import loader, problems, splits
from jaxrl_pt.errors import UserError


def check(run: cfg.Run, start: cfg.Run) -> None:
  """Refuses to measure a run on what the policy that it starts from was trained on.

  What can be compared: documents with documents, and problems with demonstrations and with the
  problems of an earlier reinforcement. Free text that quotes a problem is not found.

  Args:
    run: with an objective of reinforcement learning.
    start: the settings in the work directory of its start policy.

  Raises:
    UserError: they share documents or prompts. It says how many of how many.
  """
  match run.objective:
    case cfg.RL(problems=asked):
      _check_problems(asked, start)
    case cfg.RPT(start_from=start_from):
      _check_documents(run.data, start.data, start_from)


def _check_problems(asked: cfg.Problems, start: cfg.Run) -> None:
  """Both sides are held out by a hash of the prompt: one that holds out more is no danger."""
  advice = ('hold out as much there as here, by {} = Problems.held_out = '
            f'{asked.held_out:g}, and train the start policy again.')
  if isinstance(start.data.source, cfg.Demonstrations) and (
      start.data.validation_fraction < asked.held_out):
    splits.refuse_overlap(loader.split_keys(start.data, held_out=False),
                          problems.prompts(asked, held_out=True), 'prompts',
                          advice.format('Data.validation_fraction'))
  if isinstance(start.objective, cfg.RL) and start.objective.problems.held_out < asked.held_out:
    splits.refuse_overlap(problems.prompts(start.objective.problems, held_out=False),
                          problems.prompts(asked, held_out=True), 'prompts',
                          advice.format('its Problems.held_out'))


def _check_documents(ours: cfg.Data, theirs: cfg.Data, start_from: str) -> None:
  if _split_of(ours) == _split_of(theirs):
    return
  if isinstance(ours.source, cfg.Seqio) or isinstance(theirs.source, cfg.Seqio):
    return  # Their documents are ids of one vocabulary or another, not texts.
  splits.refuse_overlap(_read(theirs, start_from), loader.split_keys(ours, held_out=True),
                        'documents', f'split Data as the policy in {start_from} did.')


def _split_of(data: cfg.Data) -> tuple[object, ...]:
  """The settings that decide which documents are on which side."""
  return data.source, data.validation_fraction, data.validation_glob


def _read(data: cfg.Data, start_from: str) -> Iterator[str]:
  try:
    yield from loader.split_keys(data, held_out=False)
  except UserError as error:
    print(f'Not checked: whether the policy in {start_from} has read the held-out documents, since '
          f'its corpus cannot be read. {error}', flush=True)
