"""Episodes: typed outcomes for every misdeed, no row disturbs another, nothing is left behind."""

import json
import os
import signal
import time

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.episodes import Episode, EpisodePool, Observation, Outcome
from jaxrl_pt.environments.interactive import Message, NotDeterministicError, Problem, replayed
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import sandbox, settings_json
from tests.environments.misbehaving import Misbehaving

SETTINGS = cfg.Interactive(cfg.PythonEnvironment('tests.environments.misbehaving:Misbehaving'),
                           max_turns=4)
LIMITS = cfg.VerifierPool(num_workers=2, cpu_seconds=0.3, wall_seconds=1.0)

# What each text becomes, and a piece of the reason.
MISDEEDS = {
    'raise': (Outcome.RAISED, 'ValueError: broken (misbehaving.py:'),
    'exit': (Outcome.CRASH, 'the environment process ended with code 3'),
    'abort': (Outcome.CRASH, f'ended with code {-signal.SIGABRT}'),
    'kill': (Outcome.CRASH, f'ended with code {-signal.SIGSEGV}'),
    'spin': (Outcome.TIMEOUT, ' s '),  # of the processor, or of the clock of a busy machine
    'sleep': (Outcome.TIMEOUT, '1 s went by'),
    'memory': (Outcome.RAISED, 'MemoryError'),
    'large': (Outcome.TOO_LARGE, 'said 1,048,576 bytes, where 65,536 are the most'),
    'enormous': (Outcome.TOO_LARGE, 'said 16,777,216 bytes'),
    'surrogate': (Outcome.NOT_TEXT, 'character 0'),
    'bytes': (Outcome.NOT_TEXT, 'said bytes, which is no text'),
    'no step': (Outcome.RAISED, 'step must return a Step, not str'),
    'nan': (Outcome.RAISED, 'the reward nan is no number'),
    'forge': (Outcome.CRASH, 'the environment process sent'),
    'child': (Outcome.CRASH, 'ended with code 1'),
}
FAST = [name for name in MISDEEDS if name not in ('spin', 'sleep', 'enormous')]


@pytest.fixture(scope='module')
def pool():
  with EpisodePool(SETTINGS, LIMITS) as pool:
    yield pool


def _begun(pool, *prompts: str) -> list[Episode]:
  return [start.episode for start in pool.start([Problem(p) for p in prompts])]


# --- An episode -----------------------------------------------------------------------


def test_an_episode_begins_with_messages_and_goes_on_from_turn_to_turn(pool):
  start, = pool.start([Problem('add', 'ref')])
  assert start.outcome is Outcome.OK and not start.episode.done
  assert start.messages == (Message('system', 'be good'), Message('user', 'add'))
  episode, said = start.episode, []
  for text in ('a', 'b', 'end'):
    seen, = pool.step([(episode, text)])
    episode = seen.episode
    said.append((seen.text, seen.reward, seen.done, seen.outcome, seen.counts))
  assert said == [('1: a', 0.5, False, Outcome.OK, {'steps': 1.0}),
                  ('2: b', 0.5, False, Outcome.OK, {'steps': 1.0}),
                  ('3: end', 0.5, True, Outcome.OK, {'steps': 1.0})]
  assert (episode.num_turns, episode.reward, episode.done) == (3, 1.5, True)


def test_one_that_never_ends_is_ended_at_the_turn_limit(pool):
  episode, = _begun(pool, 'x')
  for turn in range(1, 5):
    seen, = pool.step([(episode, 'on')])
    episode = seen.episode
    assert seen.done == (turn == 4)
  assert seen.outcome is Outcome.TURN_LIMIT and seen.outcome.is_valid
  assert seen.text == '4: on' and episode.reward == 2.0
  assert seen.detail == 'the episode did not end in 4 turns'
  with pytest.raises(ValueError, match='has ended'):
    pool.step([(episode, 'more')])


def test_rows_of_one_batch_are_at_different_turns_and_in_order(pool):
  first, second, third = _begun(pool, 'x', 'y', 'z')
  seen, = pool.step([(second, 'a')])
  rows = pool.step([(first, 'p'), (seen.episode, 'q'), (third, 'end')])
  assert [row.text for row in rows] == ['1: p', '2: q', '1: end']
  assert [row.done for row in rows] == [False, False, True]


def test_a_step_may_be_taken_twice_and_from_saved_json(pool):
  episode, = _begun(pool, 'x')
  after = pool.step([(episode, 'a')])[0].episode
  saved = Episode.from_json(json.loads(json.dumps(after.to_json())))
  assert saved == after
  one, two = pool.step([(after, 'b'), (saved, 'b')])
  assert one == two and one.text == '2: b'


def test_submitting_returns_at_once_and_gives_each_row_by_itself(pool):
  start = time.monotonic()
  slow, quick = _begun(pool, 'x', 'y')
  pending = pool.submit_step([(slow, 'sleep'), (quick, 'a')])
  assert not pending.done()
  assert pending.futures[1].result().text == '1: a' and not pending.futures[0].done()
  assert pending.result()[0].outcome is Outcome.TIMEOUT and time.monotonic() - start < 30


# --- Misdeeds -------------------------------------------------------------------------


def test_every_misdeed_has_its_outcome_and_disturbs_no_other_row(pool):
  episodes = _begun(pool, *['x'] * (2 * len(MISDEEDS)))
  texts = [text for misdeed in MISDEEDS for text in (misdeed, 'good')]
  rows = pool.step(list(zip(episodes, texts, strict=True)))
  for (name, (outcome, reason)), bad, good in zip(MISDEEDS.items(), rows[::2], rows[1::2],
                                                  strict=True):
    assert bad.outcome is outcome and reason in bad.detail, (name, bad)
    assert bad.done and not bad.outcome.is_valid and bad.reward == 0 and bad.text == ''
    assert good == Observation(good.episode, '1: good', 0.5, counts={'steps': 1.0}), name


@pytest.mark.parametrize('prompt, outcome', [
    ('raise', Outcome.RAISED), ('exit', Outcome.CRASH), ('large', Outcome.TOO_LARGE),
    ('nothing', Outcome.RAISED), ('surrogate', Outcome.NOT_TEXT)])
def test_an_episode_that_cannot_begin_says_why(pool, prompt, outcome):
  bad, good = pool.start([Problem(prompt), Problem('x')])
  assert bad.outcome is outcome and bad.episode.done and bad.messages == () and bad.detail
  assert good.outcome is Outcome.OK and len(good.messages) == 2


def test_a_process_killed_between_turns_costs_nothing(pool):
  episodes = _begun(pool, 'x', 'y')
  episodes = [row.episode for row in pool.step([(e, 'a') for e in episodes])]
  for supervisor in list(pool._processes._children.values()):
    for pid in sandbox.descendants(supervisor._process.pid):
      os.kill(pid, signal.SIGKILL)
    os.kill(supervisor._process.pid, signal.SIGKILL)
  assert [row.text for row in pool.step([(e, 'b') for e in episodes])] == ['2: b', '2: b']


def test_one_that_answers_otherwise_when_played_again_is_refused(pool):
  episode, = _begun(pool, 'x')
  after = pool.step([(episode, 'random')])[0].episode
  seen, = pool.step([(after, 'a')])
  assert seen.outcome is Outcome.RAISED and 'answers the text of turn 1 otherwise' in seen.detail
  seeded = pool.step([(episode, 'seeded')])[0].episode
  assert pool.step([(seeded, 'a')])[0].text == '2: a'


def test_processes_start_without_jax_and_their_prints_go_nowhere(pool):
  episode, = _begun(pool, 'x')
  assert pool.step([(episode, 'jax')])[0].text == 'False'
  assert pool.step([(episode, 'print')])[0].text == '1: print'


def test_text_of_any_kind_and_length_arrives_whole(pool):
  episode, = _begun(pool, 'x')
  for text in ('ü 猫 \0\n', '', 'x' * 60_000, '\ud800'):
    seen, = pool.step([(episode, text)])
    if text == '\ud800':  # It is echoed, and an observation must be UTF-8.
      assert seen.outcome is Outcome.NOT_TEXT
    else:
      assert seen.text == f'1: {text}'


# --- Nothing is left behind -----------------------------------------------------------


def _resources(pool) -> tuple[int, list[int]]:
  """Open descriptors of this process, and how many processes each supervisor has."""
  below = [len(sandbox.descendants(child._process.pid))
           for child in pool._processes._children.values()]
  return len(os.listdir('/proc/self/fd')), below


def _supervisor_descriptors(pool) -> list[int]:
  return [len(os.listdir(f'/proc/{child._process.pid}/fd'))
          for child in pool._processes._children.values()]


def _leaves_nothing(num_rows: int) -> None:
  before = len(os.listdir('/proc/self/fd')), sandbox.descendants(os.getpid())
  with EpisodePool(SETTINGS, LIMITS) as pool:
    episodes = _begun(pool, *['x'] * num_rows)
    pool.step([(episodes[0], 'good')])
    resources, descriptors = _resources(pool), _supervisor_descriptors(pool)
    texts = [FAST[i % len(FAST)] for i in range(num_rows)]
    rows = pool.step(list(zip(episodes, texts, strict=True)))
    assert [row.outcome for row in rows] == [MISDEEDS[text][0] for text in texts]
    assert pool.step([(episodes[0], 'good')])[0].text == '1: good'
    deadline = time.monotonic() + 10
    while _resources(pool) != resources and time.monotonic() < deadline:
      time.sleep(0.05)
    assert _resources(pool) == resources and _supervisor_descriptors(pool) == descriptors
  assert (len(os.listdir('/proc/self/fd')), sandbox.descendants(os.getpid())) == before


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='reads /proc')
def test_bad_rows_leave_no_process_and_no_descriptor():
  _leaves_nothing(2 * len(FAST))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='reads /proc')
def test_a_thousand_bad_rows_leave_no_process_and_no_descriptor():
  _leaves_nothing(1000)


# --- Settings -------------------------------------------------------------------------


@pytest.mark.parametrize('target', ['no_such_module:Class', 'math:NoSuchClass'])
def test_a_class_that_cannot_be_imported_is_the_users_mistake(target):
  settings = cfg.Interactive(cfg.PythonEnvironment(target))
  with pytest.raises(UserError, match=f"target = '{target}' cannot be imported"):
    EpisodePool(settings, LIMITS)


def test_settings_travel_whole():
  for environment in (cfg.GuessNumber(3, 9, 2), cfg.TextArena('a'), cfg.PythonEnvironment('a:b'),
                      cfg.ToolUse((cfg.Calculator(), cfg.PythonTool(cfg.Interpreter(7))),
                                  cfg.Composite((cfg.MathVerifier(), cfg.FormatVerifier(('a',))),
                                                (1.0, 0.5)))):
    settings = cfg.Interactive(environment, 9, 10, 11, 12)
    again = settings_json.decoded(json.loads(json.dumps(settings_json.encoded(settings))))
    assert again == settings


def test_a_replayed_game_equals_the_class_itself():
  game, direct, state = replayed(Misbehaving), Misbehaving(), None
  problem = Problem('x')
  assert game.start(problem) == direct.reset(problem)
  for text in ('a', 'b', 'seeded'):
    step, state = game.advance(problem, state, text, ())
    if text != 'seeded':
      assert step == direct.step(text)
  state[0][1] += 1
  with pytest.raises(NotDeterministicError, match='turn 1'):
    game.advance(problem, state, 'c', ())
