"""Rollouts on disk: arrays for programs and text for people. Nothing is pickled.

    WORKDIR/rollouts/<step>.npz    arrays of prompts, rollout and verdict
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
from jaxrl_pt.train.stages import Judged
from jaxrl_pt.types import Prompts, Rollout, Verdict

FOLDER = 'rollouts'


def dump(directory: Path, step: int, judged: Judged, tokenizer: Tokenizer) -> None:
  """Writes the batch of `step`, arrays and text; process 0 does.

  Raises:
    Unwritable: the disk does not take them.
  """
  drawn = judged.drawn
  trees = on_host({'prompts': drawn.prompts, 'rollout': drawn.rollout, 'verdict': judged.verdict})
  if jax.process_index() != 0:
    return
  arrays = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
  files.write_bytes(directory / f'{step}.npz', files.npz_bytes(arrays))
  page = {'step': step, 'batch': drawn.batch, 'groups': as_text(trees, drawn.references, tokenizer)}
  files.write_text(directory / f'{step}.json', json.dumps(page, ensure_ascii=False, indent=1))


def as_text(trees: dict[str, Any], references: Any, tokenizer: Tokenizer) -> list[dict[str, Any]]:
  """Each group's prompt, reference and judged responses."""
  prompts, rollout, verdict = trees['prompts'], trees['rollout'], trees['verdict']
  groups, per_document = [], len(prompts.lengths) // len(prompts.tokens)
  for n, length in enumerate(prompts.lengths):
    document = prompts.tokens[n // per_document]
    responses = [
        {'text': tokenizer.decode(tokens[mask > 0].tolist()), 'reward': float(reward),
         'correct': bool(correct), 'judged': bool(valid)}
        for tokens, mask, reward, correct, valid in zip(
            rollout.tokens[n], rollout.mask[n], verdict.reward[n], verdict.correct[n],
            verdict.valid[n], strict=True)]
    groups.append({'prompt': tokenizer.decode(document[:length].tolist()),
                   'reference': references[n] if references else None, 'responses': responses})
  return groups


def load(path: Path) -> tuple[Prompts, Rollout, Verdict]:
  """What `dump` has written, as numpy arrays.

  Raises:
    UserError: the file is missing or damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      values = {name: arrays[name] for name in arrays.files}
    part = lambda name: {k.split('/', 1)[1]: v for k, v in values.items()
                         if k.startswith(f'{name}/')}
    verdict = part('verdict')
    parts = {k.split('/', 1)[1]: verdict.pop(k) for k in list(verdict) if k.startswith('parts/')}
    return (Prompts(**part('prompts')), Rollout(**part('rollout')),
            Verdict(**verdict, parts=parts))
  except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'{path} holds no rollouts ({type(error).__name__}): train with '
                    'Rollouts.dump_every = 1 to keep them.') from error
