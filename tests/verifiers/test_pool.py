"""The pool: typed outcomes, order, deadlines, replacement, and no process left behind."""

from concurrent.futures import CancelledError
import contextlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import RolloutBatch
from jaxrl_pt.verifiers import build, host, sandbox, settings_json
from jaxrl_pt.verifiers.pool import Pool
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

ROOT = Path(__file__).resolve().parents[2]
MISBEHAVING = cfg.PythonVerifier('tests.verifiers.misbehaving:verify')
LIMITS = cfg.VerifierPool(num_workers=2, cpu_seconds=0.5, wall_seconds=3.0)


@pytest.fixture(scope='module')
def pool():
  with Pool(MISBEHAVING, LIMITS) as pool:
    yield pool


def _outcomes(pool, *responses):
  return [j.outcome for j in pool.submit([(r, 'good') for r in responses]).result()]


def test_results_in_order_whatever_becomes_of_others(pool):
  start = time.monotonic()
  verified = _outcomes(pool, 'good', 'spin', 'bad', 'exit', 'good', 'backtrack', 'good')
  assert verified == [Outcome.CORRECT, Outcome.TIMEOUT, Outcome.WRONG, Outcome.CRASH,
                    Outcome.CORRECT, Outcome.TIMEOUT, Outcome.CORRECT]
  assert time.monotonic() - start < 60  # two timeouts of half a second and three new children


def test_one_that_waits_is_ended_by_the_wall_clock():
  limits = cfg.VerifierPool(num_workers=2, cpu_seconds=5, wall_seconds=0.5)
  with Pool(MISBEHAVING, limits) as pool:
    assert _outcomes(pool, 'sleep 1000', 'ignore_signals', 'good') == [
        Outcome.TIMEOUT, Outcome.TIMEOUT, Outcome.CORRECT]


def test_failures_are_crashes_and_say_why(pool):
  names = ['abort', 'raise', 'recurse', 'memory', 'nan', 'infinite', 'part']
  verified = pool.submit([(name, 'good') for name in names]).result()
  assert [j.outcome for j in verified] == [Outcome.CRASH] * len(names)
  assert all(not j.parts and j.score == 0 for j in verified)
  details = dict(zip(names, (j.detail for j in verified), strict=True))
  assert f'code {-signal.SIGABRT}' in details['abort']
  assert details['raise'].startswith('ValueError: broken (misbehaving.py:')
  assert 'RecursionError' in details['recurse'] and 'MemoryError' in details['memory']
  assert _outcomes(pool, 'good') == [Outcome.CORRECT]


def test_what_a_verifier_prints_does_not_disturb_the_answers(pool):
  assert _outcomes(pool, 'print', 'good') == [Outcome.WRONG, Outcome.CORRECT]


def test_children_start_without_jax_and_with_a_fixed_hash(pool):
  assert _outcomes(pool, 'jax') == [Outcome.CORRECT]
  with Pool(MISBEHAVING, LIMITS) as other:
    one, two = (p.submit([('hash', '')]).result()[0].score for p in (pool, other))
  assert one == two


def test_one_mebibyte_and_text_that_is_not_unicode_arrive_whole(pool):
  for text in ('x' * (1 << 20), '\ud800 \0 ü', ''):
    assert pool.submit([(text, text)]).result()[0].outcome is Outcome.CORRECT


def test_submit_returns_before_anything_is_verified(pool):
  start = time.monotonic()
  pending = pool.submit([('sleep 0.5', '')] * 2)
  assert time.monotonic() - start < 0.4 and not pending.done()
  assert [j.outcome for j in pending.result()] == [Outcome.WRONG] * 2
  assert pending.done()


def test_a_child_killed_from_outside_costs_at_most_its_own_item(pool):
  pids = {int(j.score) for j in pool.submit([('pid', '')] * 20).result()}
  for pid in pids:
    os.kill(pid, signal.SIGKILL)
  time.sleep(0.1)
  assert _outcomes(pool, 'good', 'good') == [Outcome.CORRECT] * 2  # idle ones are replaced


def _below(pool) -> list[int]:
  """Process ids of the pool's supervisors and of all below them."""
  supervisors = [child._process.pid for child in pool._processes._children.values()]
  return [pid for each in supervisors for pid in (each, *sandbox.descendants(each))]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_stop_a_run_disturb_no_answer(pool, number):
  """A service manager sends them to every process; only the trainer's are its own."""
  pending = pool.submit([('sleep 0.5', ''), ('sleep 0.5', ''), ('good', 'good')])
  before = _below(pool)
  for pid in before:
    os.kill(pid, number)
  assert [j.outcome for j in pending.result()] == [Outcome.WRONG] * 2 + [Outcome.CORRECT]
  assert _below(pool) == before


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('which', [0, 1], ids=['supervisors', 'workers'])
def test_an_answer_whose_process_is_killed_from_outside_is_verified_again(pool, which):
  pending = pool.submit([('sleep 0.7', 'x'), ('good', 'good')] * 3)
  for _ in range(2):
    time.sleep(0.3)
    for pid in _below(pool)[which::2]:
      with contextlib.suppress(ProcessLookupError):  # a worker dies with its supervisor
        os.kill(pid, signal.SIGKILL)
  assert [j.outcome for j in pending.result()] == [Outcome.WRONG, Outcome.CORRECT] * 3


def test_a_killed_answer_is_verified_a_bounded_number_of_times(pool, tmp_path):
  path = tmp_path / 'tries'
  verified, = pool.submit([(f'kill_itself {path}', '')]).result()
  assert verified.outcome is Outcome.CRASH and path.read_text(encoding='utf-8') == 'xxx'
  assert verified.detail == f'3 times over: the verifier process ended with code {-signal.SIGKILL}'
  assert _outcomes(pool, 'good') == [Outcome.CORRECT]


@pytest.mark.parametrize('failures, outcome', [(2, Outcome.CORRECT), (9, Outcome.CRASH)])
def test_a_replacement_that_fails_is_tried_again(tmp_path, monkeypatch, failures, outcome):
  path = tmp_path / 'fails'
  monkeypatch.setenv('TEST_FAILING_STARTS', str(path))
  settings = cfg.PythonVerifier('tests.verifiers.starts:verify')
  with Pool(settings, cfg.VerifierPool(num_workers=1, wall_seconds=5)) as pool:
    path.write_text('x' * failures, encoding='utf-8')
    crashed, verified = pool.submit([('exit', 'good'), ('good', 'good')]).result()
    assert crashed.outcome is Outcome.CRASH and verified.outcome is outcome
    if outcome is Outcome.CRASH:
      assert 'did not start' in verified.detail and 'no luck this time' in verified.detail


def test_what_is_no_verdict_is_a_crash_that_says_so():
  with Pool(cfg.PythonVerifier('os.path:join'), LIMITS) as pool:
    verified, = pool.submit([('a', 'b')]).result()
  assert verified.outcome is Outcome.CRASH and verified.detail == (
      'the verifier returned str, not a ResponseVerdict')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_composite_runs_each_part_in_its_own_bounds():
  settings = cfg.Composite((MISBEHAVING, cfg.LengthVerifier(1, 101)), (1.0, 2.0))
  with Pool(settings, cfg.VerifierPool(num_workers=1, wall_seconds=3)) as pool:
    good, bad, again = pool.submit([('good', 'good'), ('exit', ''), ('good', 'good')]).result()
    assert good == again and good.outcome is Outcome.CORRECT and bad.outcome is Outcome.CRASH
    assert good.score == pytest.approx(1 + 2 * 0.97)
    supervisor, *workers = _below(pool)
    kept = ['Seccomp:\t2' in Path(f'/proc/{pid}/status').read_text(encoding='utf-8')
            for pid in workers]
  assert sorted(kept) in ([False, True], [False, False])


def test_closing_is_immediate_and_cancels():
  pool = Pool(MISBEHAVING, cfg.VerifierPool(num_workers=1, cpu_seconds=60, wall_seconds=60))
  pid = int(pool.submit([('pid', '')]).result()[0].score)
  pending = pool.submit([('sleep 1000', ''), ('good', 'good')])
  time.sleep(0.2)
  start = time.monotonic()
  pool.close()
  assert time.monotonic() - start < 5 and not _exists(pid)
  with pytest.raises(CancelledError):
    pending.result()
  with pytest.raises(RuntimeError, match='closed'):
    pool.submit([('good', 'good')])
  pool.close()


# --- Starting ---------------------------------------------------------------------


@pytest.mark.parametrize('target', ['no_such_module:verify', 'math:no_such_function'])
def test_a_function_that_cannot_be_imported_is_the_users_mistake(target):
  with pytest.raises(UserError, match=f"target = '{target}' cannot be imported"):
    Pool(cfg.PythonVerifier(target), LIMITS)


def test_a_module_that_kills_the_child_is_named_in_the_error():
  with pytest.raises(RuntimeError, match='did not start'):
    Pool(cfg.PythonVerifier('tests.verifiers.dies:verify'), LIMITS)


@pytest.mark.parametrize('settings', [
    cfg.MathVerifier('gsm8k', symbolic=False), cfg.LogicVerifier(), cfg.FormatVerifier(('a', 'b')),
    cfg.WordVerifier(1, 2), MISBEHAVING,
    cfg.Composite((cfg.LogicVerifier(), cfg.LengthVerifier(1, 2)), (1.0, 0.5))])
def test_settings_travel_whole(settings):
  assert settings_json.decoded(settings_json.encoded(settings)) == settings


# --- No process left --------------------------------------------------------------


def _exists(pid: int) -> bool:
  try:
    state = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rsplit(')', 1)[1].split()[0]
  except (FileNotFoundError, ProcessLookupError):  # before it was opened, or before it was read
    return False
  return state != 'Z'


_PARENT = '''
import sys, time
from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers.pool import Pool
pool = Pool(cfg.PythonVerifier('tests.verifiers.misbehaving:verify'),
            cfg.VerifierPool(num_workers=2, cpu_seconds=500, wall_seconds=500))
pids = [int(j.score) for j in pool.submit([('pid', '')] * 40).result()]
pool.submit([(sys.argv[1], ''), ('good', '')])
print(*sorted(set(pids)), flush=True)
time.sleep(1000)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT], ids=['SIGKILL', 'Ctrl-C'])
def test_children_end_with_their_parent_even_in_the_middle_of_an_item(number):
  parent = subprocess.Popen([sys.executable, '-c', _PARENT, 'spin'], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  pids = [int(pid) for pid in parent.stdout.readline().split()]
  assert pids and all(_exists(pid) for pid in pids)
  parent.send_signal(number)
  parent.wait(60)
  deadline = time.monotonic() + 20
  while any(_exists(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(_exists(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_what_a_verifier_has_started_ends_with_it(tmp_path):
  with Pool(MISBEHAVING, cfg.VerifierPool(num_workers=1, wall_seconds=2)) as pool:
    assert _outcomes(pool, f'grandchild {tmp_path / "pids"}') == [Outcome.TIMEOUT]
  pids = [int(pid) for pid in (tmp_path / 'pids').read_text(encoding='utf-8').split()]
  deadline = time.monotonic() + 10
  while any(_exists(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(_exists(pid) for pid in pids)


# --- From tokens to a verdict -----------------------------------------------------


def test_rollouts_become_a_verdict_with_masked_rows_and_parts():
  texts = [['good', 'spin'], ['bad', 'raise']]
  tokens = np.zeros((2, 2, 6), np.int32)
  mask = np.zeros((2, 2, 6), np.float32)
  for n, g in np.ndindex(2, 2):
    ids = [*texts[n][g].encode(), 256]  # with the token that ends a response
    tokens[n, g, :len(ids)], mask[n, g, :len(ids)] = ids, 1
  rollouts = RolloutBatch.of_one_turn(tokens, mask, mask, 0)
  with Pool(MISBEHAVING, LIMITS) as pool:
    verifier = host.PoolVerifier(pool, ByteTokenizer().decode)
    verdict = verifier.submit(None, rollouts, ['good', 'good']).result()
  np.testing.assert_array_equal(verdict.reward, [[1, 0], [0, 0]])
  np.testing.assert_array_equal(verdict.valid, [[1, 0], [1, 0]])
  np.testing.assert_array_equal(verdict.correct, [[1, 0], [0, 0]])
  np.testing.assert_array_equal(verdict.parts['answer'], [[1, 0], [0, 0]])


def test_composite_weighs_and_names_each_part():
  settings = cfg.Composite((cfg.LogicVerifier(), cfg.LengthVerifier(10, 20)), (2.0, -1.0))
  verified = build.combined(settings, [
      ResponseVerdict(Outcome.WRONG, {'format': 1.0, 'answer': -1.5}),
      ResponseVerdict(Outcome.CORRECT, {'length': 0.5})])
  assert verified == ResponseVerdict(Outcome.WRONG, {
      'LogicVerifier/format': 2.0, 'LogicVerifier/answer': -3.0, 'LengthVerifier/length': -0.5})
  assert verified.score == -1.5
  settings = cfg.Composite((cfg.LogicVerifier(), cfg.LengthVerifier(10, 20)), (1.0, 2.0))
  verified = build.host_verifier(settings)('x' * 15, 'Ann is a knight')
  assert tuple(verified.parts) == build.part_names(settings)
  assert verified.outcome is Outcome.UNPARSED and verified.score == -3 + 2 * 0.5
