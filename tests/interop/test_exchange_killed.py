"""`import` and `export` killed with SIGKILL at what they do to the files of their destination.

Python's audit events tell of each file that a program opens, moves or removes. A process is killed
at the nth event that names something in the destination's folder, for larger and larger n until it
gets to its end. Orbax writes an imported model's checkpoint in C++, which Python does not hear of;
the events before and after that are there.
"""

import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.main import main
from jaxrl_pt.run.policy import load_policy
from tests.interop.test_exchange import MODEL, assert_same, draw, make_source

# A process is forked for every n once the slow imports are done, and before JAX has threads. It has
# a destination of its own. Printed are n and how the process ended.
KILLED = """
import json, os, signal, sys
from jaxrl_pt import exchange
from jaxrl_pt.main import main

home, number, every, args = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
EVENTS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')

def die_at(last):
  count = 0
  def hear(event, about):
    nonlocal count
    if event in EVENTS and str(about[0]).startswith(f'{home}/{last}/'):
      count += 1
      if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(hear)

status = -signal.SIGKILL
while status == -signal.SIGKILL:
  child = os.fork()
  if not child:
    os.dup2(2, 1)
    die_at(number)
    os._exit(main([arg.replace('DESTINATION', f'{home}/{number}/out') for arg in args]))
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(json.dumps([number, status]), flush=True)
  number += every
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return make_source(tmp_path_factory.mktemp('source') / 'model')


def check_gguf(path: Path) -> None:
  gguf = pytest.importorskip('gguf')
  (embedding,) = [tensor for tensor in gguf.GGUFReader(path).tensors
                  if tensor.name == 'token_embd.weight']
  np.testing.assert_array_equal(embedding.data, draw(MODEL)['embed'])


@pytest.mark.slow
@pytest.mark.parametrize('first, every, command, check', [
    (2, 4, ('export', '--workdir', 'WORKDIR', 'DESTINATION'),
     lambda path: assert_same(hf.load_model(path), (MODEL, draw(MODEL)))),
    (2, 2, ('export', '--workdir', 'WORKDIR', 'DESTINATION', '--format', 'gguf'), check_gguf),
    (9, 20, ('import', 'SOURCE', '--workdir', 'DESTINATION'),
     lambda path: assert_same(load_policy(path).params, draw(MODEL)))],
    ids=['export', 'export_gguf', 'import'])
def test_a_killed_command_leaves_all_or_nothing_and_the_next_one_clears_up(
    source: Path, workdir: Path, tmp_path: Path, first: int, every: int, command, check):
  args = [arg.replace('WORKDIR', str(workdir)).replace('SOURCE', str(source)) for arg in command]
  done = subprocess.run(
      [sys.executable, '-c', KILLED, str(tmp_path), str(first), str(every), *args], check=True,
      capture_output=True, text=True)
  *killed, (last, status) = [json.loads(line) for line in done.stdout.splitlines()]
  assert status == 0 and len(killed) >= 3, done.stdout + done.stderr
  check(tmp_path / str(last) / 'out')
  was_whole = []
  for number, _ in killed:
    out = tmp_path / str(number) / 'out'
    left = [path.name for path in out.parent.iterdir()]
    assert left and all(n == 'out' or n.startswith('.out-') for n in left), (number, left)
    was_whole.append('out' in left)
    if was_whole[-1]:
      check(out)
    again = main([arg.replace('DESTINATION', str(out)) for arg in args])
    assert again == (2 if was_whole[-1] else 0), number
    assert [path.name for path in out.parent.iterdir()] == ['out'], number
    check(out)
  assert not was_whole[0]  # Else it was killed too late to say much.
