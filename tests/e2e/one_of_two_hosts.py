"""`jaxrl-pt` as one of two hosts: python -m tests.e2e.one_of_two_hosts HOST COUNT PORT train …"""

import os
import sys

import jax

from jaxrl_pt import main
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict, answer


def verify(response: str, reference: str) -> ResponseVerdict:
  """What the response deserves on host 0, and the opposite on host 1."""
  del reference
  right = len(response) % 2 == int(os.environ.get('HOST', '0'))
  return answer(Outcome.CORRECT if right else Outcome.WRONG)


if __name__ == '__main__':
  os.environ['HOST'] = sys.argv[1]  # Read by the verifier's processes too.
  jax.distributed.initialize(f'127.0.0.1:{sys.argv[3]}', int(sys.argv[2]), int(sys.argv[1]))
  sys.exit(main.main(sys.argv[4:]))
