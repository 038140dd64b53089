"""What the devices can hold, and what a run will at least ask of them.

The numbers are lower bounds, made of the few arrays that every step needs whole: a run that is
refused here cannot run, one that is let through may still be too large (`preflight` compiles it
and knows).
"""

import os
from typing import Any

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt import params
from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer

_FLOAT32 = 4


def available_bytes() -> int:
  """Memory of all devices of all processes; of a CPU that of its machine."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if limit is not None:
    return int(limit) * jax.device_count()
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * jax.process_count()


def check_arrays(arrays: Any, what: str, mend: str) -> None:
  """Refuses abstract arrays that no device here can hold, before they are made.

  Args:
    arrays: a tree of anything with a shape and a dtype.
    what: the subject of the sentence.
    mend: what to do, as its end.

  Raises:
    UserError: they take more than `available_bytes`.
  """
  needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
  if needed > available_bytes():
    raise UserError(f'{what} would take {checks.memory(needed)} and the devices here have '
                    f'{checks.memory(available_bytes())}: {mend}.')


def least_bytes(run: cfg.Run) -> dict[str, int]:
  """What a step holds at the same time, at least, by the setting that decides it most.

  Parameters with AdamW's two moments; the residual stream of each row (every layer's with
  remat, which keeps the least); in reinforcement learning the reference policy too, and the keys
  and values of a batch's prompts and responses while they are drawn, or the residual stream of
  the part that is learned from, whichever is more.
  """
  model, width = run.model, 2 if run.compute.dtype == 'bfloat16' else _FLOAT32
  weights = _FLOAT32 * params.count(transformer.build(model).specs)
  stream = width * model.d_model * model.num_layers
  rollouts, algorithm = run.objective.rollouts, run.objective.algorithm
  if rollouts is None or algorithm is None:
    rows = run.train.batch_size // run.train.accumulation
    return {'Model': 3 * weights, 'Train.batch_size': rows * run.data.seq_len * stream}
  documents_len = rollouts.prompt_len // run.objective.positions_per_document
  tokens = rollouts.num_prompts * (documents_len + rollouts.group_size * rollouts.response_tokens)
  cache = width * 2 * model.num_kv_heads * model.head_dim * model.num_layers
  parts = algorithm.minibatches * run.train.accumulation
  return {'Model': 4 * weights, 'Rollouts': max(tokens * cache, tokens // parts * stream)}


def check_fits(run: cfg.Run) -> None:
  """Refuses a run whose step cannot fit the devices here.

  Raises:
    UserError: what takes how much, and what there is.
  """
  needed, there = least_bytes(run), available_bytes()
  if sum(needed.values()) <= there:
    return
  largest = max(needed, key=lambda name: needed[name])
  sizes = {
      'Model': 'its weights, gradients\' moments and copies',
      'Train.batch_size': 'its rows times Data.seq_len, by Train.accumulation',
      'Rollouts': 'num_prompts × (prompt_len + group_size × response_tokens)'}
  parts = ', '.join(f'{name} at least {checks.memory(size)}' for name, size in needed.items())
  raise UserError(f'A step of this run does not fit: {parts}, and the devices here have '
                  f'{checks.memory(there)}. Make {largest} smaller ({sizes[largest]}), or take '
                  'more devices.')
