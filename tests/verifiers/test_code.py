"""Programs are verified by what they compute, in a process that they cannot leave or fool."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import problems
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import code, interpreter, isolation, sandbox, trial
from jaxrl_pt.verifiers.pool import Pool
from jaxrl_pt.verifiers.response_verdict import Outcome

ROOT = Path(__file__).resolve().parents[2]
MBPP = ROOT.parent / 'shared' / 'data' / 'code-mbpp' / 'mbpp.jsonl'
LIMITS = cfg.Interpreter(cpu_seconds=1, wall_seconds=3.0)


def _isolates() -> bool:
  """Whether the kernel lets this user isolate programs; what else is missing is our defect."""
  try:
    isolation.probe()
  except isolation.NotIsolatedError as error:
    return not re.search('not permitted|denied|needs Linux', str(error))
  return True


ISOLATED = pytest.mark.skipif(not _isolates(), reason='this machine does not isolate programs')
SHARED = pytest.mark.skipif(not MBPP.exists(), reason=f'{MBPP} is not here')


def _reference(*tests: tuple[str, str], setup: str = '') -> str:
  return json.dumps({'setup': setup, 'tests': tests})


@pytest.fixture(scope='module')
def pool():
  settings = cfg.CodeVerifier('text', LIMITS)
  with Pool(settings, cfg.VerifierPool(num_workers=2)) as pool:
    yield pool


def _verified(pool, programs, *tests):
  return pool.submit([(program, _reference(*tests)) for program in programs]).result()


# --- What is right --------------------------------------------------------------------

DOUBLE = (('double(3)', '6'), ('double([1])', '[1, 1]'))
RIGHT = {
    'plain': 'def double(x): return 2 * x',
    'prints': 'print("x" * 10**6)\ndef double(x):\n  print(x)\n  return x + x',
    'a subclass': 'class Mine(int): pass\ndef double(x): return x * Mine(2)',
    'a module': 'import operator\ndef double(x): return operator.mul(x, 2)',
    'a dataclass': ('from dataclasses import dataclass\n@dataclass\nclass Two:\n  n: int = 2\n'
                    'def double(x): return Two().n * x'),
    'a file of its own': ('open("/tmp/n", "w").write("2")\n'
                          'def double(x): return int(open("/tmp/n").read()) * x'),
}
# None of these computes what is asked; each tries to pass all the same.
HOSTILE = {
    'wrong': 'def double(x): return 2 * x + 1 if x == 3 else 2 * x',
    'half right': 'def double(x): return 6',
    'raises': 'def double(x): raise ValueError',
    'ends at once': 'import os; os._exit(0)',
    'ends with sys.exit': 'import sys; sys.exit(0)',
    'ends in the call': 'import os\ndef double(x): os._exit(0)',
    'exits in the call': 'def double(x): raise SystemExit(0)',
    'no syntax': 'def double(x: return',
    'equal to everything': ('class All:\n  def __eq__(self, other): return True\n'
                            '  __hash__ = None\ndef double(x): return All()'),
    'an equal list': ('class All(list):\n  def __eq__(self, other): return True\n'
                      '  def __len__(self): return 1\ndef double(x): return All()'),
    'an equal number': ('class All(int):\n  def __eq__(self, other): return True\n'
                        'def double(x): return All(7)'),
    'other builtins': ('import builtins\nbuiltins.AssertionError = ValueError\n'
                       'builtins.eval = lambda *_: 6\nbuiltins.all = builtins.any\n'
                       'def double(x): return 6'),
    'another json': 'import json\njson.dumps = lambda _: "[true, true]"\ndef double(x): return 1',
    'prints results': ('import os\nfor fd in range(3, 64):\n  try: os.write(fd, b\'[{"value": '
                       '["int", "0x6"]}, {"value": ["list", [["int", "0x1"]]]}]\')\n'
                       '  except OSError: pass\nos._exit(0)'),
    'prints success': 'print("all tests passed")\nimport os; os._exit(0)',
    'reads the tests': ('import sys, gc\n'
                        'def double(x):\n'
                        '  text = open("/main.py").read() + open("/input.json").read()\n'
                        '  text += repr([sys._getframe(i).f_locals for i in range(1, 5)])\n'
                        '  return [1, 1] if "[1, 1]" in text else 6 if x == 3 else None'),
    'loops in the call': 'def double(x):\n  while True: pass',
    'sleeps': 'import time; time.sleep(1000)',
    'eats memory': 'x = [0] * 10**10\ndef double(x): return 2 * x',
    'eats memory by and by': 'x = []\nwhile True: x.append(bytearray(1 << 20))',
    'a huge value': 'def double(x): return "x" * 10**8',
    'a deep value': 'def double(x):\n  y = []\n  for _ in range(10**5): y = [y]\n  return y',
    'forks': 'import os\nwhile True: os.fork()',
    'starts threads': ('import threading, time\nwhile True: threading.Thread(target=time.sleep, '
                       'args=(1000,)).start()'),
    'kills': 'import os\nos.kill(1, 9); os.kill(-1, 9); os.kill(0, 9)',
    'crashes': 'import ctypes; ctypes.string_at(0)',
}


@ISOLATED
def test_programs_that_compute_what_is_asked_are_right(pool):
  for name, found in zip(RIGHT, _verified(pool, RIGHT.values(), *DOUBLE), strict=True):
    assert found.outcome is Outcome.CORRECT and found.score == 1, (name, found)


@ISOLATED
def test_no_other_program_passes_and_none_disturbs_the_next(pool):
  programs = [p for hostile in HOSTILE.values() for p in (hostile, RIGHT['plain'])]
  found = _verified(pool, programs, *DOUBLE)
  for name, hostile, good in zip(HOSTILE, found[::2], found[1::2], strict=True):
    assert hostile.outcome is Outcome.WRONG and hostile.score == 0, (name, hostile)
    assert good.outcome is Outcome.CORRECT, (name, good)


@ISOLATED
def test_a_program_that_is_asked_for_nothing_and_answers_all_is_right():
  """What no verifier can tell from a solution: the answers to the inputs that are shown."""
  shown = 'def double(x): return {3: 6}.get(x) if x == 3 else [1, 1]'
  verify = code.verifier(cfg.CodeVerifier('text', LIMITS))
  assert verify(shown, _reference(*DOUBLE)).outcome is Outcome.CORRECT
  assert verify(shown, _reference(*DOUBLE, ('double(4)', '8'))).outcome is Outcome.WRONG


@ISOLATED
@pytest.mark.parametrize('literal', [
    'None', 'True', '-7', '(1+5j)', '0.1', '1e300', "'猫\\ud800'", "b'\\x00'", '[1, [2]]',
    '(1, (2,))', '{1, 2}', '{"a": {1: (2.5, None)}}', '12345678901234567890', '()', '{}', '[]'])
def test_every_plain_value_comes_back_as_it_was(literal):
  found = interpreter.evaluate(f'x = {literal}', '', ['x', 'x', 'y'], LIMITS)
  want = eval(literal)
  assert list(found.values) == [want] * 2 and type(found.values[0]) is type(want)
  assert found.detail.startswith('NameError')


@ISOLATED
def test_a_value_of_no_plain_type_equals_nothing():
  found = interpreter.evaluate('class A: pass\nx = A()', '', ['x', '[x]', 'iter([])'], LIMITS)
  assert not any(value == value for value in (found.values[0], found.values[2]))
  assert found.values[1] != [found.values[0]] or found.values[0] is not found.values[1][0]


@pytest.mark.parametrize('data', [
    1, 1.5, {}, [], ['int'], ['int', 3], ['int', 'x'], ['list', 'x'], ['dict', [[1]]],
    ['eval', '1'], ['set', [['list', []]]], ['bytes', 'x'], ['complex', ['1']], ['type', []],
    ['other', 3]])
def test_what_is_no_value_is_not_decoded(data):
  with pytest.raises((ValueError, TypeError, KeyError)):
    interpreter.decoded(data)


# --- What a program reaches -----------------------------------------------------------

REACHES = {
    'passwords': 'print(open("/etc/passwd").read())',
    'home': 'import os; print(os.listdir("/root/.ssh"))',
    'the working tree': f'import os; print(os.listdir({str(ROOT)!r}))',
    'processes': 'import os; print(os.listdir("/proc"))',
    'a write to its library': 'import os; open(os.__file__, "a")',
    'a write to the root': 'open("/x", "w")',
    'a socket': 'import socket; socket.socket()',
    'an address': 'import socket; print(socket.create_connection(("127.0.0.1", 80), 1))',
    'a fork': 'import os\nif os.fork() == 0: os._exit(0)',
    'a process': 'import subprocess; subprocess.run(["/bin/true"])',
    'another program': 'import os; os.execv("/bin/sh", ["sh", "-c", "echo got it"])',
    'another user': 'import os; os.setuid(0)',
    'a namespace': ('import ctypes, os\nif ctypes.CDLL(None, use_errno=True).unshare(0x10000000):\n'
                    '  raise OSError(ctypes.get_errno(), "unshare")'),
    'a mount': ('import ctypes\nif ctypes.CDLL(None, use_errno=True).mount(b"none", b"/tmp", '
                'b"tmpfs", 0, None):\n  raise OSError(ctypes.get_errno(), "mount")'),
    'more memory': 'import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))',
    'more disk': 'with open("/tmp/x", "wb") as f:\n  while True: f.write(bytes(1 << 20))',
    'many files': 'for i in range(10**5): open(f"/tmp/{i}", "w").close()',
    'an executable': ('import os, shutil, sys\nshutil.copy(sys.executable, "/tmp/p")\n'
                      'os.chmod("/tmp/p", 0o777)\nos.execv("/tmp/p", ["p", "-c", "print(1)"])'),
}


@ISOLATED
@pytest.mark.parametrize('name', REACHES)
def test_a_program_reaches_nothing(name):
  said = interpreter.run(REACHES[name] + '\nprint("got it")', LIMITS)
  assert 'Error' in said and 'got it\n' not in f'{said}\n', said


@ISOLATED
def test_a_program_is_a_user_of_its_own_and_finds_nothing_of_the_caller():
  said = interpreter.run('import os\nprint(os.getuid(), os.getgroups(), sorted(os.environ), '
                         'os.listdir("/tmp"), os.uname().nodename, os.getcwd())\n'
                         'for fd in range(64):\n  try: print(fd, os.fstat(fd).st_mode >> 12)\n'
                         '  except OSError: pass', LIMITS)
  first, *descriptors = said.splitlines()
  user, rest = first.split(' ', 1)
  assert int(user) not in (0, 65534) or os.geteuid() == 65534
  assert rest == "[] ['HOME', 'LANG', 'PYTHONHASHSEED'] [] sandbox /tmp" or os.geteuid() != 0
  assert descriptors == ['0 2', '1 1', '2 1']  # /dev/null and the pipe that is read


@ISOLATED
@pytest.mark.skipif(os.geteuid() != 0 or not Path('/usr/bin/python3').exists(),
                    reason='only root may become another user')
def test_a_plain_user_isolates_programs_too():
  script = ('import sys; sys.path.insert(0, sys.argv[1])\n'
            'from jaxrl_pt import config as cfg\n'
            'from jaxrl_pt.verifiers import interpreter\n'
            'run = lambda text: interpreter.run(text, cfg.Interpreter())\n'
            'print(run("import os; print(os.getuid(), os.listdir())"))\n'
            'print(run("open(\'/etc/passwd\')").splitlines()[-1])\n'
            'print(run("open(\'/x\', \'w\')").splitlines()[-1])')
  said = subprocess.run(['/usr/bin/python3', '-B', '-c', script, str(ROOT)], user=65534,
                        group=65534, extra_groups=[], capture_output=True, text=True, check=False)
  if 'SyntaxError' in said.stderr or 'ImportError' in said.stderr:
    pytest.skip('the system has another Python')
  assert said.stdout.splitlines() == [
      '65534 []', "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'",
      "OSError: [Errno 30] Read-only file system: '/x'"], said


@pytest.mark.skipif(sys.platform != 'linux', reason='this machine isolates nothing anyway')
def test_where_there_is_no_isolation_nothing_runs(monkeypatch):
  monkeypatch.setattr(isolation, '_NEW_NAMESPACES', 0xffffff00)
  with pytest.raises(UserError, match='CodeVerifier runs programs only in isolation, which is not '
                                      r'to be had here: the kernel refuses new namespaces \('):
    code.verifier(cfg.CodeVerifier())


@ISOLATED
def test_a_part_of_the_isolation_that_is_missing_is_named(monkeypatch):
  monkeypatch.setattr(isolation.isolated, '_MOUNT_SETATTR', 10_000)
  with pytest.raises(isolation.NotIsolatedError, match='Function not implemented'):
    isolation.probe()


@ISOLATED
def test_nothing_is_left_behind():
  descriptors, below = len(os.listdir('/proc/self/fd')), sandbox.descendants(os.getpid())
  for program in ('print(1)', 'import os; os._exit(3)', 'print("x" * 10**6)'):
    interpreter.run(program, LIMITS)
  assert len(os.listdir('/proc/self/fd')) == descriptors
  assert sandbox.descendants(os.getpid()) == below


# --- The tool's output ----------------------------------------------------------------


@ISOLATED
@pytest.mark.parametrize('program, said', [
    ('print(6 * 7)', '42'), ('', ''), ('import sys; sys.exit(3)', '[ended with code 3]'),
    ('print("x" * 99)', 'x' * 20 + '\n[only the first 20 bytes of the output are shown]'),
    ('while True: pass', '[ended after 1 s of processor time or 3 s of the clock]'),
    ('import sys; sys.stdout.buffer.write(b"\\xff")', '\ufffd'),
    ('import ctypes; ctypes.string_at(0)', '[ended by signal 11]')])
def test_what_a_program_prints_is_what_the_tool_says(program, said):
  limits = cfg.Interpreter(cpu_seconds=1, wall_seconds=3.0, output_bytes=20)
  assert interpreter.run(program, limits) == said


# --- From a response and a file -------------------------------------------------------


@pytest.mark.parametrize('response, program', [
    ('so\n```python\nx = 1\n```\n', 'x = 1\n'), ('```\nx = 1\n```', 'x = 1\n'),
    ('```python\nx = 1\n```\nor\n```py\nx = 2\n```', 'x = 2\n'), ('x = 1', None), ('', None),
    ('```python\n\n```', None), ('```python\nx = 1', None)])
def test_the_last_block_is_the_program(response, program):
  assert code.extract(response, 'fence') == program
  assert code.extract(response, 'text') == (response or None)


@SHARED
@ISOLATED
def test_solutions_of_mbpp_are_right_and_broken_ones_wrong(capfd):
  training, held_out = problems.load(cfg.Problems(cfg.CodeProblems(str(MBPP)), held_out=0.1))
  assert len(training) + len(held_out) == 973
  assert '1 of 974 problems are left out' in capfd.readouterr().err
  chosen = training[::150]
  settings = cfg.CodeVerifier(interpreter=LIMITS)
  items = [trial.tried(settings, p.answer, p.demonstration, p.place) for p in chosen]
  assert all(item.is_right for item in items)
  broken = [p.demonstration.replace('return', 'return None #') for p in chosen]
  with Pool(settings, cfg.VerifierPool(num_workers=2)) as pool:
    found = pool.submit([*((item.response, item.reference) for item in items),
                         *zip(broken, (p.answer for p in chosen))]).result()
  assert {v.outcome for v in found[:len(chosen)]} == {Outcome.CORRECT}
  assert Outcome.CORRECT not in {v.outcome for v in found[len(chosen):]}


@SHARED
@ISOLATED
@pytest.mark.slow
def test_all_solutions_of_mbpp_are_right_but_one_that_is_too_slow():
  training, _ = problems.load(cfg.Problems(cfg.CodeProblems(str(MBPP)), held_out=0.0))
  with Pool(cfg.CodeVerifier(), cfg.VerifierPool(num_workers=2)) as pool:
    found = pool.submit([(p.demonstration, p.answer) for p in training]).result()
  wrong = [p.place for p, v in zip(training, found) if v.outcome is not Outcome.CORRECT]
  assert [place.rsplit(':', 1)[1] for place in wrong] == ['123']


def _rows(path: Path, *rows: dict) -> cfg.Problems:
  path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
  return cfg.Problems(cfg.CodeProblems(str(path), shown_tests=1), held_out=0.0)


ROW = {'text': 'Double.\r\n', 'code': 'def f(x):\r\n  return 2 * x',
       'test_list': ['assert f(1) == 2', 'assert  f([0]) ==  [0, 0]'],
       'challenge_test_list': ['assert f("a") == "aa"'], 'test_setup_code': 'y = 1\r\n'}


def test_a_row_becomes_a_prompt_and_expressions_with_literals(tmp_path):
  problem, = problems.load(_rows(tmp_path / 'rows.jsonl', ROW))[0]
  assert problem.prompt == 'Double.\nYour program should pass:\nassert f(1) == 2\n'
  assert problem.demonstration == '```python\ndef f(x):\n  return 2 * x\n```'
  assert json.loads(problem.answer) == {'setup': 'y = 1', 'tests': [
      ['f(1)', '2'], ['f([0])', '[0, 0]'], ["f('a')", "'aa'"]]}


@pytest.mark.parametrize('change, said', [
    ({'text': None}, "has no text in the field 'text'"), ({'test_list': 'x'}, 'has no list'),
    ({'test_list': []}, 'has no asserts'), ({'test_list': [3]}, 'has no text'),
    ({'test_list': ['assert f(1) == g(2)']}, 'No problem of .* can be asked: .*: assert f.1. == g'),
    ({'test_list': ['assert f(1)']}, 'can be asked'), ({'test_list': ['import os']}, 'be asked'),
    ({'test_list': ['assert (']}, 'be asked')])
def test_rows_that_cannot_be_asked_are_named(tmp_path, change, said):
  with pytest.raises(UserError, match=said):
    problems.load(_rows(tmp_path / 'rows.jsonl', {**ROW, **change}))
