"""Rollouts on disk, as arrays for programs and as text for people. Nothing is pickled.

    WORKDIR/rollouts/<step>.npz    arrays of prompts, rollouts and verdict
    WORKDIR/rollouts/<step>.json   the same as text
"""

import json
from pathlib import Path
from typing import Any
import zipfile

import jax
import numpy as np

from jaxrl_pt import files
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.rollouts.stages import Step
from jaxrl_pt.types import Prompts, RolloutBatch, Verdict

FOLDER = 'rollouts'


def dump(directory: Path, step: int, batch: int, done: Step, tokenizer: Tokenizer) -> None:
  """Writes the rollouts of a step from process 0.

  Args:
    directory: the folder of rollouts in the work directory.
    step: the step's number, from 1.
    batch: the number of the step's batch of prompts.
    done: the step.
    tokenizer: the run's tokenizer.

  Raises:
    Unwritable: the disk does not take the files.
  """
  trees = on_host({'prompts': done.prompts, 'rollouts': done.rollouts, 'verdict': done.verdict})
  if jax.process_index() != 0:
    return
  arrays = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
  files.write_bytes(directory / f'{step}.npz', files.npz_bytes(arrays))
  page = {'step': step, 'batch': batch, 'groups': as_text(trees, done.references, tokenizer)}
  files.write_text(directory / f'{step}.json', json.dumps(page, ensure_ascii=False, indent=1))


def as_text(trees: dict[str, Any], references: Any, tokenizer: Tokenizer) -> list[dict[str, Any]]:
  """The groups of a batch as JSON objects with prompt, reference answer and responses.

  Args:
    trees: Prompts, RolloutBatch and Verdict of numpy arrays by 'prompts', 'rollouts', 'verdict'.
    references: N reference answers as text, or () where the prompts carry them.
    tokenizer: the run's tokenizer.
  """
  prompts, rollouts, verdict = trees['prompts'], trees['rollouts'], trees['verdict']
  groups, per_document = [], len(prompts.lengths) // len(prompts.tokens)
  for n, length in enumerate(prompts.lengths):
    document = prompts.tokens[n // per_document]
    responses = [
        {'text': tokenizer.decode(tokens[mask > 0].tolist()), 'reward': float(reward),
         'correct': bool(correct), 'verified': bool(valid)}
        for tokens, mask, reward, correct, valid in zip(
            rollouts.tokens[n], rollouts.in_response[n], verdict.reward[n], verdict.correct[n],
            verdict.valid[n], strict=True)]
    groups.append({'prompt': tokenizer.decode(document[:length].tolist()),
                   'reference': references[n] if references else None, 'responses': responses})
  return groups


def load(path: Path) -> tuple[Prompts, RolloutBatch, Verdict]:
  """The numpy arrays of a .npz file that `dump` has written.

  Raises:
    UserError: the file is missing or damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      values = {name: arrays[name] for name in arrays.files}
    prompts, verdict = _below(values, 'prompts/'), _below(values, 'verdict/')
    extras, parts = _below(prompts, 'extras/'), _below(verdict, 'parts/')
    measures = _below(verdict, 'measures/')
    return (Prompts(**_flat(prompts), extras=extras), RolloutBatch(**_below(values, 'rollouts/')),
            Verdict(**_flat(verdict), parts=parts, measures=measures))
  except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'{path} holds no rollouts ({type(error).__name__}): train with '
                    'Rollouts.dump_every = 1 to keep them.') from error


def _below(values: dict[str, Any], folder: str) -> dict[str, Any]:
  """The arrays whose names begin with `folder`, under their names without it."""
  return {name.removeprefix(folder): x for name, x in values.items() if name.startswith(folder)}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
  """The arrays whose names have no folder."""
  return {name: x for name, x in values.items() if '/' not in name}
