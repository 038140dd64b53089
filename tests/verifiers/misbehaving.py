"""Verifiers that do what the pool must survive; the response says what."""

import os
import re
import signal
import subprocess
import sys
import time

from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict, answer


def verify(response: str, reference: str) -> ResponseVerdict:
  action, _, argument = response.partition(' ')
  match action:
    case 'spin':
      while True:
        pass
    case 'sleep':
      time.sleep(float(argument))
    case 'ignore_signals':
      for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
      time.sleep(1000)
    case 'backtrack':
      re.fullmatch(r'(a+)+b', 'a' * 200)
    case 'exit':
      os._exit(3)
    case 'kill_itself':
      with open(argument, 'a', encoding='utf-8') as f:
        f.write('x')
      os.kill(os.getpid(), signal.SIGKILL)
    case 'abort':
      os.abort()
    case 'raise':
      raise ValueError('broken')
    case 'recurse':
      verify(response, reference)
    case 'memory':
      bytearray(8 << 30)
    case 'nan':
      return ResponseVerdict(Outcome.CORRECT, {'answer': float('nan')})
    case 'infinite':
      return ResponseVerdict(Outcome.CORRECT, {'answer': float('inf')})
    case 'part':
      return ResponseVerdict(Outcome.CORRECT, {'other': 1.0})
    case 'print':
      print('x' * 1_000_000)
      sys.stderr.write('y' * 1_000_000)
    case 'jax':
      return answer(Outcome.WRONG if 'jax' in sys.modules else Outcome.CORRECT)
    case 'pid':
      return ResponseVerdict(Outcome.CORRECT, {'answer': float(os.getpid())})
    case 'grandchild':
      process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])
      with open(argument, 'w', encoding='utf-8') as f:
        f.write(f'{os.getpid()} {process.pid}')
      time.sleep(1000)
    case 'hash':
      return ResponseVerdict(Outcome.CORRECT, {'answer': float(hash('text') % 1_000_000)})
  return answer(Outcome.CORRECT if response == reference else Outcome.WRONG)
