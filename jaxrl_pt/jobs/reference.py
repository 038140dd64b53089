"""What the reference policy says of preference pairs, computed once and kept beside the data.

The file is named by the content of the rows and by all that the numbers follow from: the policy's
parameters and the arithmetic. So it is read again by every run on the same pairs with the same
reference policy, whatever its other settings, and another policy gets another file. It appears
whole or not at all.
"""

from collections.abc import Callable
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import files
from jaxrl_pt.data import loader
from jaxrl_pt.errors import Unwritable
from jaxrl_pt.parallel import hosts, rules
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import preferences
from jaxrl_pt.types import Params


def completions(session: sessions.Session, packed: loader.Packed,
                params: Callable[[], Params], digest: str, num_segments: int) -> np.ndarray:
  """f32[N, S]: the reference policy's log-probability of each completion of a split, in nats.

  Args:
    session: the run's session.
    packed: the split, of N rows.
    params: gives the reference policy's parameters; it is called if they have to be asked.
    digest: names those parameters.
    num_segments: S.
  """
  if not len(packed):
    return np.zeros((0, num_segments), np.float32)
  path = session.data.directory / f'reference-{_key(session.run, packed, digest)}.npy'
  shape = packed.num_examples, num_segments
  known = _read(path, shape)
  # The first host decides for all, which have to compute together.
  if bool(hosts.agreed(np.int32(known is not None))):
    found: np.ndarray = hosts.agreed(np.zeros(shape, np.float32) if known is None else known)
    return found
  found = _compute(session, packed, params(), num_segments)
  if jax.process_index() == 0:
    _write(path, found)
  return found


def _key(run: cfg.Run, packed: loader.Packed, digest: str) -> str:
  decides = packed.digest, digest, repr(run.model), run.compute.dtype
  return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
  try:
    found = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError):
    return None
  whole = found.shape == shape and found.dtype == np.float32 and np.isfinite(found).all()
  return found if whole else None


def _write(path: Path, found: np.ndarray) -> None:
  content = io.BytesIO()
  np.save(content, found, allow_pickle=False)
  try:
    files.write_bytes(path, content.getvalue())
  except Unwritable as error:
    print(f'note: {error}; the reference policy is asked again in the next run.', flush=True)


def _compute(session: sessions.Session, packed: loader.Packed, params: Params, num_segments: int
             ) -> np.ndarray:
  run = session.run
  compute = jax.jit(preferences.completions(session.model(run.model), run.compute.loss_chunk,
                                            num_segments),
                    out_shardings=rules.replicated(session.mesh))
  rows: list[Any] = [hosts.on_host(compute(params, session.put_global(batch))[0])
                     for batch in loader.eval_batches(packed, run.train.batch_size)]
  return np.concatenate(rows)[:packed.num_examples]
