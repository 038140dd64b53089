"""The supervisor of an environment's processes: `python -m jaxrl_pt.environments.child FD`."""

import socket
import sys

from jaxrl_pt.environments.playing import Playing
from jaxrl_pt.verifiers import child

if __name__ == '__main__':
  child.main(socket.socket(fileno=int(sys.argv[1])), Playing)
