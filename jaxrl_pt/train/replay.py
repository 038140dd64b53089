"""Rollouts kept on disk, and the two halves of a step run from them alone.

    DIR/rollouts/<step>.npz    arrays of prompts, rollout and verdict
    DIR/rollouts/<step>.json   the same as text, to be read by people

Nothing is pickled.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.train.stages import Judged
from jaxrl_pt.train.tasks import on_host

FOLDER = 'rollouts'


def dump(directory: Path, step: int, judged: Judged, tokenizer: Tokenizer) -> None:
  """Writes the batch of `step`, arrays and text; process 0 does."""
  drawn = judged.drawn
  trees = on_host({'prompts': drawn.prompts, 'rollout': drawn.rollout, 'verdict': judged.verdict})
  if jax.process_index() != 0:
    return
  directory.mkdir(parents=True, exist_ok=True)
  arrays = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
  np.savez(directory / f'{step}.npz', **arrays)
  page = {'step': step, 'batch': drawn.batch, 'groups': _text(trees, drawn.references, tokenizer)}
  (directory / f'{step}.json').write_text(json.dumps(page, ensure_ascii=False, indent=1))


def _text(trees: dict[str, Any], references: Any, tokenizer: Tokenizer) -> list[dict[str, Any]]:
  prompts, rollout, verdict = trees['prompts'], trees['rollout'], trees['verdict']
  groups = []
  for n, length in enumerate(prompts.lengths):
    responses = [
        {'text': tokenizer.decode(tokens[mask > 0].tolist()), 'reward': float(reward),
         'correct': bool(correct), 'judged': bool(valid)}
        for tokens, mask, reward, correct, valid in zip(
            rollout.tokens[n], rollout.mask[n], verdict.reward[n], verdict.correct[n],
            verdict.valid[n], strict=True)]
    groups.append({'prompt': tokenizer.decode(prompts.tokens[n][:length].tolist()),
                   'reference': references[n] if references else None, 'responses': responses})
  return groups
