"""An environment that does what the pool must survive; the text says what."""

from collections.abc import Sequence
import os
import random
import signal
import subprocess
import sys
import time

from jaxrl_pt.environments.interactive import Message, Problem, Step


class Misbehaving:
  """It counts its steps, and ends after the text 'end'."""

  def reset(self, problem: Problem) -> Sequence[Message]:
    self.num_steps = 0
    match problem.prompt:
      case 'raise':
        raise ValueError('no such problem')
      case 'exit':
        os._exit(3)
      case 'large':
        return [Message('user', 'x' * (1 << 20))]
      case 'nothing':
        return []
      case 'surrogate':
        return [Message('user', '\ud800')]
    return [Message('system', 'be good'), Message('user', problem.prompt)]

  def step(self, text: str) -> Step:
    self.num_steps += 1
    match text:
      case 'raise':
        raise ValueError('broken')
      case 'exit':
        os._exit(3)
      case 'abort':
        os.abort()
      case 'kill':
        os.kill(os.getpid(), signal.SIGSEGV)
      case 'spin':
        while True:
          pass
      case 'sleep':
        time.sleep(1000)
      case 'memory':
        bytearray(8 << 30)
      case 'large':
        return Step('x' * (1 << 20), 1.0, False)
      case 'enormous':
        return Step('x' * (1 << 24), 1.0, False)
      case 'surrogate':
        return Step(b'\xff'.decode(errors='surrogateescape'), 1.0, False)
      case 'bytes':
        return Step(b'\xff', 1.0, False)
      case 'no step':
        return 'text'
      case 'nan':
        return Step('', float('nan'), False)
      case 'random':
        return Step(str(time.monotonic_ns()), 0.0, False)
      case 'seeded':
        return Step(str(random.random()), 0.0, False)
      case 'print':
        print('x' * 1_000_000)
        sys.stderr.write('y' * 1_000_000)
      case 'forge':
        for fd in range(64):
          try:
            os.write(fd, b'\0\0\0\2{}')
          except OSError:
            pass
      case 'child':
        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])
        os._exit(1)
      case 'jax':
        return Step(str('jax' in sys.modules), 0.0, False)
    return Step(f'{self.num_steps}: {text}', 0.5, text == 'end', {'steps': 1.0})
