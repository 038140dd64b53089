"""Answers that try to write their own verdict, to leave something behind, or to hang the pool."""

import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import time

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import build, expressions, sandbox, seccomp
from jaxrl_pt.verifiers.pool import Pool
from jaxrl_pt.verifiers.response_verdict import Outcome

ROOT = Path(__file__).resolve().parents[2]
# Whether this kernel filters system calls, on a machine whose numbers we know.
FILTERS = sys.platform == 'linux' and platform.machine() in seccomp.MACHINES and (
    'Seccomp:' in Path('/proc/self/status').read_text(encoding='utf-8'))
FILTERED = pytest.mark.skipif(not FILTERS, reason='this kernel filters no system calls')
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='bounds that only Linux keeps')
EVALUATING = cfg.PythonVerifier('tests.verifiers.evaluating:verify')

# What each tries stands in the text; MARK is a file that must never come to be.
CODE = [
    "__import__('os').system('touch MARK')",
    "__import__('pathlib').Path('MARK').write_text('x')",
    "open('MARK', 'w').write('x')",
    "open('MARK', 'a')",
    "exec(\"open('MARK','w')\")",
    "eval(\"open('MARK','w')\")",
    "eval(\"__import__('os').mkdir('MARK')\")",
    "().__class__.__base__.__subclasses__()",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen']",
    "(lambda: open('MARK','w'))()",
    "[open('MARK','w') for _ in [0]]",
    "{**{'a': open('MARK','w')}}",
    "f\"{open('MARK','w')}\"",
    "(x := open('MARK','w'))",
    "compile(\"open('MARK','w')\",'','exec')",
    "getattr(__builtins__, 'open')('MARK','w')",
    "globals()['__builtins__']['open']('MARK','w')",
    "__import__('subprocess').run(['touch','MARK'])",
    "__import__('socket').socket().connect(('127.0.0.1', 9))",
    "__import__('os').fork()",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('os').write(4, b'x' * 100)",
    "__import__('ctypes').CDLL(None).system(b'touch MARK')",
    "S('__import__(\"os\").system(\"touch MARK\")')",
    "sympify('open(\"MARK\",\"w\")')",
    "Symbol('x').func.__globals__",
    "x.__class__.__init__.__globals__",
    "(1).__class__.__mro__",
    "1 if open('MARK','w') else 2",
    "print(open('MARK','w'))",
    "9**9**9**9",
    "9**(9**(9**9))",
    "2**99999999999",
    "factorial(10**9)",
    "99999999!",
    "10**10**10",
    "x**(99999*99999)",
    "1" * 5000,
    "(" * 500 + "1" + ")" * 500,
    "[" * 500 + "]" * 500,
    "-" * 900 + "1;" + "import os",
    "1\n__import__('os').system('touch MARK')",
    "1 #\n+open('MARK','w')",
    "ｏｐｅｎ('MARK','w')",
    "\\u006fpen('MARK','w')",
    "x; open('MARK','w')",
    "'%c' * 10**10",
    "'a' * 10**10",
    "[0] * 10**10",
    "range(10**12)",
    "{}.fromkeys(range(10**9))",
    "0 .__class__",
    "1..__add__(open('MARK','w'))",
    "x[open('MARK','w')]",
    "x@open('MARK','w')",
    "*open('MARK','w'),",
    "lambda x: x",
    "yield x",
    "await x",
    "import os",
]


def _reference(task: str) -> str:
  return json.dumps({'task': task, 'seed': 1, 'size': 1, 'settings': [], 'index': 0})


# --- Nothing but expressions reaches a scorer that evaluates --------------------------

TASKS = sorted(expressions._LITERALS | expressions._ARITHMETIC | expressions._ALGEBRA)


@pytest.mark.parametrize('task', TASKS)
def test_code_does_not_reach_a_scorer_that_evaluates(task):
  assert expressions.evaluates(task)
  for text in CODE:
    is_literal = text in ("[" * 500 + "]" * 500, "1" * 5000)
    if not (is_literal and task in expressions._LITERALS):
      assert not expressions.is_admissible(task, text, 'x**2 + C'), text


@pytest.mark.parametrize('task, answers', [
    ('countdown', ['1 + 2*(3 - 4)/5', '(25 + 3)*2 - 1', '2**3 - 1', '-3']),
    ('puzzle24', ['(1 + 2)*(3 + 5)', '8*3*1**2']),
    ('simple_integration', ['x**3/3 + C', '-2*X**(5/2) + 3*X', '1.5*x^2', 'exp(2*x)/2 + C']),
    ('intermediate_integration', ['-exp(x)*cos(x)/2 + C', 'log(x**2 + 1)/2', 'sqrt(3)*atan(x)',
                                  'x**-2', 'E**(2*x)', 'x*asin(x) + (1 - x**2)**(1/2)']),
    ('polynomial_multiplication', ['x**2*y - 3*x + 1', '(x - 1)*(x + 1)']),
    ('spiral_matrix', ['1 2 3', '[1, 2, 3]']), ('string_insertion', ['ABC', "['A', 'B']"])])
def test_well_formed_answers_reach_it(task, answers):
  for answer in answers:
    assert expressions.is_admissible(task, answer, '1 2 3' if 'matrix' in task else 'ABC'), answer


def test_tasks_whose_scorers_evaluate_are_all_known_and_others_refused():
  pytest.importorskip('reasoning_gym')
  import reasoning_gym
  from reasoning_gym.factory import DATASETS
  found = set()
  for task in sorted(set(DATASETS) - {'composite'}):
    data = reasoning_gym.create_dataset(task, seed=1, size=1)
    assert expressions.refused(task, data.score_answer) is None, task
    if expressions.evaluating(data.score_answer):
      found.add(task)
  assert found == {*TASKS, 'bitwise_arithmetic', 'number_sorting'}
  data = reasoning_gym.create_dataset('countdown', seed=1, size=1)
  assert "'new_task' calls parse_expr" in expressions.refused('new_task', data.score_answer)


def test_the_librarys_own_answers_pass():
  pytest.importorskip('reasoning_gym')
  import reasoning_gym
  for task in TASKS:
    for entry in reasoning_gym.create_dataset(task, seed=2, size=5):
      assert expressions.is_admissible(task, entry['answer'], entry['answer']), entry['answer']


def test_hostile_answers_earn_nothing_and_leave_nothing(tmp_path):
  pytest.importorskip('reasoning_gym')
  mark = tmp_path / 'mark'
  items = [(text.replace('MARK', str(mark)), _reference(task))
           for i, text in enumerate(CODE) for task in TASKS[i % 4::4]]
  assert len(items) >= 100
  with Pool(cfg.GymVerifier('text', True), cfg.VerifierPool(num_workers=2)) as pool:
    verified = pool.submit(items).result()
  for item, found in zip(items, verified, strict=True):
    assert found.outcome in (Outcome.UNPARSED, Outcome.WRONG), (item, found)
    assert found.score <= 0.05, (item, found)
  assert not mark.exists()


def test_hostile_mathematics_earns_nothing_and_leaves_nothing(tmp_path):
  pytest.importorskip('sympy')
  mark = tmp_path / 'mark'
  texts = [text.replace('MARK', str(mark)) for text in CODE]
  dressed = [r'\boxed{%s}', r'\boxed{\text{%s}}', r'\boxed{1 + %s}']
  items = [(dressed[i % 3] % text, '42') for i, text in enumerate(texts)]
  with Pool(cfg.MathVerifier('boxed', True), cfg.VerifierPool(num_workers=2)) as pool:
    verified = pool.submit([*items, (r'\boxed{42}', '42')]).result()
  assert verified.pop().outcome is Outcome.CORRECT
  for item, found in zip(items, verified, strict=True):
    assert found.outcome is not Outcome.CORRECT and found.score == 0, (item, found)
  assert not mark.exists()


# --- What the tight process may do ----------------------------------------------------

_TIGHT = '''
import os, socket, sys, threading, subprocess, signal, ctypes, resource, math
from jaxrl_pt.verifiers import sandbox
mark, r, w = sys.argv[1], *os.pipe()
open(mark + '.there', 'w').close()
filtered = sandbox.enter_tight(512)
def tries(action):
  try:
    action()
  except (OSError, RuntimeError, ValueError, MemoryError) as error:
    return type(error).__name__
  return 'allowed'
def child():
  if os.fork() == 0:
    os._exit(0)
forbidden = {
  'create': lambda: open(mark, 'w'), 'create here': lambda: open('here', 'w'),
  'append': lambda: open(mark + '.there', 'a'), 'update': lambda: open(mark + '.there', 'r+b'),
  'remove': lambda: os.remove(mark + '.there'), 'rename': lambda: os.rename(mark + '.there', mark),
  'mkdir': lambda: os.mkdir(mark), 'link': lambda: os.link(mark + '.there', mark),
  'symlink': lambda: os.symlink('/', mark), 'chmod': lambda: os.chmod(mark + '.there', 0o777),
  'truncate': lambda: os.truncate(mark + '.there', 9), 'utime': lambda: os.utime(mark + '.there'),
  'mkfifo': lambda: os.mkfifo(mark), 'fork': child,
  'thread': lambda: threading.Thread(target=int).start(),
  'run': lambda: subprocess.run(['true']), 'exec': lambda: os.execv('/bin/true', ['true']),
  'socket': lambda: socket.socket(), 'unix socket': lambda: socket.socketpair(),
  'kill parent': lambda: os.kill(os.getppid(), 0), 'kill itself': lambda: os.kill(os.getpid(), 0),
  'session': os.setsid, 'memory': lambda: bytearray(1 << 30),
  'limits': lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
  'cwd': lambda: os.chdir('/'), 'user': lambda: os.setuid(65534),
  'memfd': lambda: os.memfd_create('x'), 'nice': lambda: os.nice(1),
}
print({name: tries(action) for name, action in forbidden.items()
       if tries(action) == 'allowed'}, filtered, os.read(os.open(mark + '.there', os.O_RDONLY), 1),
      math.factorial(20) > 0, os.write(w, b'x'), os.listdir('/') != [])
'''


@FILTERED
def test_the_tight_process_computes_and_reads_and_nothing_else(tmp_path):
  said = subprocess.run([sys.executable, '-c', _TIGHT, str(tmp_path / 'mark')], cwd=ROOT,
                        capture_output=True, text=True, check=False)
  assert said.stdout.strip() == "{} True b'' True 1 True", said.stderr
  assert [p.name for p in tmp_path.iterdir()] == ['mark.there']


@FILTERED
@pytest.mark.parametrize('settings', [
    cfg.MathVerifier('last_number', symbolic=False), cfg.LogicVerifier(), cfg.FormatVerifier()])
def test_built_in_verifiers_run_in_the_tight_process(settings):
  with Pool(settings, cfg.VerifierPool(num_workers=1)) as pool:
    pool.submit([('42', '42')]).result()
    supervisor = next(iter(pool._processes._children.values()))._process.pid
    worker, = sandbox.descendants(supervisor)
    status = Path(f'/proc/{worker}/status').read_text(encoding='utf-8')
    names = sorted(os.readlink(f'/proc/{worker}/fd/{fd}').split(':')[0]
                   for fd in os.listdir(f'/proc/{worker}/fd'))
  assert 'NoNewPrivs:\t1' in status and 'Seccomp:\t2' in status
  assert names == ['/dev/null', '/dev/null', 'pipe', 'pipe', 'pipe']


# --- What a process that evaluates the response may say -------------------------------

_FORGED = json.dumps({'nonce': '', 'answer': [
    {'outcome': 'correct', 'parts': {'answer': 1.0}, 'detail': ''}]})
_ALL_FDS = 'range(0, 64)'
_WRITE = ("[__import__('contextlib').suppress(OSError).__enter__() or "
          "(__import__('os').path.exists(f'/proc/self/fd/{fd}') and fd > 2 and "
          "__import__('fcntl').fcntl(fd, 3) & 3 and __import__('os').write(fd, DATA)) "
          f"for fd in {_ALL_FDS}]")


def _written(data: bytes) -> str:
  """Writes `data` to every descriptor that can be written."""
  return _WRITE.replace('DATA', repr(data))


def _framed(text: str) -> bytes:
  return len(text).to_bytes(4, 'big') + text.encode()


OS = "__import__('os')"
SAYS = {
    'a verdict of its own': _written(_framed(_FORGED)),
    'a bare verdict': _written(_framed(
        '{"outcome": "correct", "parts": {"answer": 1.0}, "detail": ""}')),
    'an empty object': _written(_framed('{}')),
    'a list': _written(_framed('[1]')),
    'a number': _written(_framed('1')),
    'null': _written(_framed('null')),
    'no JSON': _written(_framed('{"outcome": ')),
    'no UTF-8': _written(b'\0\0\0\2\xff\xfe'),
    'deep JSON': _written(_framed('[' * 30000)),
    'a header of 4 GiB': _written(b'\xff\xff\xff\xff'),
    'a header of 1 MiB and as much': _written(b'\0\x10\0\0' + b'x' * 60000),
    'half a header': f"({_written(b'xx')}, {OS}._exit(0))",
    'nothing, and ends': f'{OS}._exit(0)',
    'nothing, and closes all': f"({OS}.closerange(0, 100), __import__('time').sleep(99))",
    'nothing, and kills itself': f'{OS}.kill({OS}.getpid(), 9)',
    'nothing, and kills the supervisor': f'{OS}.kill({OS}.getppid(), 9)',
    'nothing, and stops itself': f'{OS}.kill({OS}.getpid(), 19)',
    'an infinite loop': 'all(iter(int, 1))',
    'a loop without its timer': "(__import__('signal').setitimer(2, 0), all(iter(int, 1)))",
}


@LINUX
def test_nothing_that_an_answer_writes_or_does_is_a_verdict():
  limits = cfg.VerifierPool(num_workers=2, cpu_seconds=1, wall_seconds=3)
  items = [pair for text in SAYS.values() for pair in ((text, 'x'), ("'x'", 'x'))]
  with Pool(EVALUATING, limits) as pool:
    verified = pool.submit(items).result()
  for name, hostile, good in zip(SAYS, verified[::2], verified[1::2], strict=True):
    assert hostile.score == 0 and hostile.outcome is not Outcome.CORRECT, (name, hostile)
    assert good.outcome is Outcome.CORRECT, (name, good)


@LINUX
def test_an_answer_that_drips_has_one_deadline():
  drip = f"[(__import__('time').sleep(0.2), {_written(b'x')}) for _ in range(1000)]"
  drips = f"({_written((50000).to_bytes(4, 'big'))}, {drip})"
  with Pool(EVALUATING, cfg.VerifierPool(num_workers=1, cpu_seconds=60, wall_seconds=2)) as pool:
    start = time.monotonic()
    found, = pool.submit([(drips, 'x')]).result()
    assert found.outcome is Outcome.TIMEOUT and found.detail == '2 s went by'
    assert time.monotonic() - start < 10


@LINUX
def test_what_a_verifier_says_is_bounded_and_kept_where_it_dies():
  floods = (f"([{OS}.write(2, b'y' * 65536) for _ in range(500)], {OS}.write(2, b'the end'), "
            f"{OS}._exit(5))")
  with Pool(EVALUATING, cfg.VerifierPool(num_workers=1)) as pool:
    found, = pool.submit([(floods, 'x')]).result()
  assert found.outcome is Outcome.CRASH and found.detail.endswith('the end')
  assert len(found.detail) < 3000


@LINUX
@pytest.mark.parametrize('ends', ['closed', 'timeout', 'killed'])
def test_grandchildren_of_another_session_end_with_the_worker(tmp_path, ends):
  """They detach twice: their parent is gone, their session is their own."""
  path = tmp_path / 'pid'
  text = (f"{OS}.fork() or ({OS}.setsid(), {OS}.fork() and {OS}._exit(0), "
          f"open({str(path)!r}, 'w').write(str({OS}.getpid())), __import__('time').sleep(999))")
  then = {'closed': "and 'x'", 'timeout': "and __import__('time').sleep(99)",
          'killed': f"and (__import__('time').sleep(0.5), {OS}.kill({OS}.getppid(), 9))"}[ends]
  with Pool(EVALUATING, cfg.VerifierPool(num_workers=1, wall_seconds=2)) as pool:
    pool.submit([(f'({text}) {then}', 'x')]).result()
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
      time.sleep(0.02)
  pid = int(path.read_text())
  deadline = time.monotonic() + 10
  while Path(f'/proc/{pid}').exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not Path(f'/proc/{pid}').exists()


# --- What the parent believes ---------------------------------------------------------

RIGHT = {'outcome': 'correct', 'parts': {'answer': 1.0}, 'detail': ''}


@pytest.mark.parametrize('change', [
    {'outcome': 'right'}, {'outcome': 1}, {'outcome': None}, {'parts': None}, {'parts': [1.0]},
    {'parts': {'answer': '1'}}, {'parts': {'answer': 1}}, {'parts': {'answer': True}},
    {'parts': {'answer': None}}, {'detail': 3}, {'other': 1}])
def test_what_is_no_verdict_is_not_decoded(change):
  assert build.decoded(RIGHT, cfg.GymVerifier()).score == 1
  with pytest.raises(ValueError):
    build.decoded({**RIGHT, **change}, cfg.GymVerifier())


@pytest.mark.parametrize('data', [None, [], [1], {}, 1, 'x', {'error': 'x'}])
def test_neither_is_anything_else(data):
  with pytest.raises(ValueError, match='not a verdict'):
    build.decoded(data, cfg.GymVerifier())


@pytest.mark.parametrize('settings, parts', [
    (cfg.GymVerifier(), {'answer': 1e6}), (cfg.GymVerifier(), {'answer': -0.1}),
    (cfg.GymVerifier(), {'answer': float('nan')}), (cfg.GymVerifier(), {'answer': float('inf')}),
    (cfg.GymVerifier(), {}), (cfg.GymVerifier(), {'answer': 1.0, 'more': 0.0}),
    (cfg.MathVerifier(), {'answer': 1.01}), (cfg.LogicVerifier(), {'format': 2.0, 'answer': 2.0}),
    (cfg.WordVerifier(1, 2), {'word': 0.5, 'length': 0.0, 'novelty': 0.0}),
    (cfg.PythonVerifier('a:b', min_score=-1, max_score=2), {'answer': 2.5}),
    (cfg.Composite((cfg.GymVerifier(), cfg.LengthVerifier(1, 2)), (2.0, -1.0)),
     {'GymVerifier/answer': 2.0, 'LengthVerifier/length': 0.5})])
def test_a_score_outside_its_declared_range_is_a_crash(settings, parts):
  found = build.decoded({**RIGHT, 'parts': parts}, settings)
  assert found.outcome is Outcome.CRASH and found.score == 0 and 'declared' in found.detail
