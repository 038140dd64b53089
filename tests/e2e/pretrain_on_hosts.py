"""Child of test_pretraining_on_hosts.py: one of several hosts with a device each.

  python -m tests.e2e.pretrain_on_hosts HOST COUNT PORT GIN_FILE WORKDIR MESH …

For each MESH, written data×fsdp×tensor×context, it trains in WORKDIR/MESH; host 0 keeps there the
first batches as the devices have got them, with the part that each host has read of them.
"""

from pathlib import Path
import sys

import jax
import numpy as np

from jaxrl_pt import gin_bindings
from jaxrl_pt.data import loader
from jaxrl_pt.jobs import open as jobs
from jaxrl_pt.parallel import hosts
from jaxrl_pt.run import session as sessions

BATCHES = 3


def main(gin_file: str, workdir: Path, mesh: str) -> None:
  sizes = zip(('data', 'fsdp', 'tensor', 'context'), mesh.split('x'), strict=True)
  run, text = gin_bindings.load([gin_file], [f'cfg.Mesh.{axis} = {n}' for axis, n in sizes])
  jobs.train(run, workdir, text)
  session = sessions.open_session(run, workdir, text)
  rows, tokens = session.owned()
  batches = loader.train_iterator(session.data.train, seed=run.seed, rows=rows, tokens=tokens,
                                  batch_size=run.train.batch_size)
  whole = [hosts.on_host(session.put(next(batches))) for _ in range(BATCHES)]
  if jax.process_index() == 0:
    np.savez(workdir / 'batches.npz', num_rows=len(rows), num_tokens=len(tokens), **{
        f'{name}_{step}': x for step, batch in enumerate(whole)
        for name, x in vars(batch).items()})


if __name__ == '__main__':
  host, count = map(int, sys.argv[1:3])
  if count > 1:
    jax.distributed.initialize(f'127.0.0.1:{sys.argv[3]}', count, host)
  for one in sys.argv[6:]:
    main(sys.argv[4], Path(sys.argv[5]) / one, one)
