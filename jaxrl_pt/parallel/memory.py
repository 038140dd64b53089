"""The memory of the devices, and a lower bound on the memory that a run needs.

The bound counts the few arrays that every step needs. A run that is refused here cannot run; one
that passes may still be too large, which the command `preflight` finds out by compiling it.
"""

from collections.abc import Mapping
import os
from typing import Any

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt import params
from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer

_FLOAT32, _BFLOAT16 = 4, 2


def available_bytes() -> int:
  """Bytes of memory of all devices of all processes; a CPU has the memory of its machine."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if limit is not None:
    return int(limit) * jax.device_count()
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * jax.process_count()


def check_arrays(arrays: Any, what: str, mend: str) -> None:
  """Refuses arrays that the devices cannot hold, before they are made.

  Args:
    arrays: a tree of objects with a size and a dtype.
    what: the subject of the error's sentence.
    mend: what the user can do, as the end of the sentence.

  Raises:
    UserError: the arrays take more than `available_bytes`.
  """
  needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
  if needed > available_bytes():
    raise UserError(f'{what} would take {checks.memory(needed)} and the devices here have '
                    f'{checks.memory(available_bytes())}: {mend}.')


def least_bytes(run: cfg.Run) -> dict[str, int]:
  """Bytes that a step holds at the same time, at least, by the setting that decides them most.

  They are the parameters with AdamW's two moments of those that are trained, and the residual
  stream of each row in every layer, which even remat keeps. In reinforcement learning they are also
  the trained parameters of the reference policy, those of a judge, and the larger of two numbers:
  the keys and values of a batch's prompts and responses while these are drawn, or the residual
  stream of one micro-batch of them.
  """
  model, width = run.model, _BFLOAT16 if run.compute.dtype == 'bfloat16' else _FLOAT32
  specs = transformer.build(model).specs
  trained = params.num_bytes(params.trained(specs, specs))
  weights = params.num_bytes(specs) + 2 * trained
  stream = width * model.d_model * model.num_layers
  rollouts, algorithm = run.objective.rollouts, run.objective.algorithm
  if rollouts is None or algorithm is None:
    rows = run.train.batch_size // run.train.accumulation
    return {'Model': weights, 'Train.batch_size': rows * run.data.seq_len * stream}
  documents_len = rollouts.prompt_len // run.objective.positions_per_document
  tokens = rollouts.num_prompts * (documents_len + rollouts.group_size * rollouts.response_tokens)
  cache = width * 2 * model.num_kv_heads * model.head_dim * model.num_layers
  parts = algorithm.minibatches * run.train.accumulation  # Prompts in several parts count once.
  found = {'Model': weights + trained, 'Rollouts': max(tokens * cache, tokens // parts * stream)}
  for judge in cfg.judge_of(run.objective):
    found['JudgeReward.model'] = params.num_bytes(transformer.build(judge.model).specs)
  return found


def check_fits(run: cfg.Run) -> None:
  """Refuses a run whose step cannot fit the devices here.

  Raises:
    UserError: it cannot; the message says what takes how much, and what the devices have.
  """
  check_needed(least_bytes(run))


def check_needed(needed: Mapping[str, int]) -> None:
  """Refuses a step that needs more than the devices here have.

  Args:
    needed: bytes by the setting that decides them most.

  Raises:
    UserError: as in `check_fits`.
  """
  available = available_bytes()
  if sum(needed.values()) <= available:
    return
  largest = max(needed, key=lambda name: needed[name])
  sizes = {
      'Model': 'its weights, gradients\' moments and copies',
      'DiT': 'its weights and gradients\' moments',
      'VAE': 'its weights and gradients\' moments',
      'GamePolicy': 'its weights and gradients\' moments',
      'GameRL': 'Train.batch_size × GameRL.group_size games of Trajectories.num_frames frames',
      'JudgeReward.model': 'its weights',
      'Train.batch_size': 'its rows times their tokens, by Train.accumulation',
      'Rollouts': 'num_prompts × (prompt_len + group_size × response_tokens)'}
  parts = ', '.join(f'{name} at least {checks.memory(size)}' for name, size in needed.items())
  raise UserError(f'A step of this run does not fit: {parts}, and the devices here have '
                  f'{checks.memory(available)}. Make {largest} smaller ({sizes[largest]}), or take '
                  'more devices.')
