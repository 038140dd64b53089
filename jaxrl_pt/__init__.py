"""Pretrain low-bit transformers with next-token prediction and with reinforcement learning."""

import os
from pathlib import Path

# A virtual host, so that libtpu does not look for a real one.
VIRTUAL_HOST = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
                'TPU_WORKER_HOSTNAMES': 'localhost'}


def _quiet_libtpu() -> None:
  """Where libtpu is installed only to compile, it need not complain that no TPU is there.

  It reads these when JAX first looks for devices, so that they must be set before whatever uses
  the package has done that. On a machine with a TPU, and where they are set, nothing changes.
  """
  if not any(Path('/dev').glob('accel*')) and not any(Path('/dev').glob('vfio/*')):
    for name, value in VIRTUAL_HOST.items():
      os.environ.setdefault(name, value)


_quiet_libtpu()
