"""`jaxrl-pt train …` that kills itself with SIGKILL at the n-th call of one stage of a step.

    python -m tests.e2e.die_in_stage STAGE before|after N train --gin_file …
"""

import os
import signal
import sys

from jaxrl_pt import checkpoint, main
from jaxrl_pt.rollouts import stages


def arm(stage: str, when: str, call: int) -> None:
  """Replaces the stage by one that dies. Saves are waited for, so that it is known what is
  there to resume from, unless it is the save that is to be cut off."""
  if stage != 'save':
    save = checkpoint.Checkpointer.save

    def saved(self, *args):
      save(self, *args)
      self.wait()

    checkpoint.Checkpointer.save = saved
  owner = checkpoint.Checkpointer if stage == 'save' else stages.Stages
  original, calls = getattr(owner, stage), []

  def dying(*args, **kwargs):
    calls.append(stage)
    if when == 'before' and len(calls) == call:
      os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if when == 'after' and len(calls) == call:
      os.kill(os.getpid(), signal.SIGKILL)
    return result

  setattr(owner, stage, dying)


if __name__ == '__main__':
  arm(sys.argv[1], sys.argv[2], int(sys.argv[3]))
  sys.exit(main.main(sys.argv[4:]))
