"""Rollouts of several turns against a plain loop, the sampler of one turn, and hostile episodes."""

import dataclasses
import functools
from pathlib import Path
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.problems import Problem
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments import interactive, multi_turn, turns
from jaxrl_pt.environments.base import Task
from jaxrl_pt.environments.episodes import EpisodePool, Outcome
from jaxrl_pt.environments.transcript import make_transcript
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import open as opening
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.rollouts import stages
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling import engine, groups
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, TrainState

TOKENIZER = ByteTokenizer()
MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=260)
MODULE = transformer.build(MODEL)
PARAMS = P.init(MODULE.specs, jax.random.key(0))
PARAMS = {**PARAMS, 'embed': PARAMS['embed'] * 8}  # A random model has no opinions.
# A text ends after 5 tokens, or with a `t`.
TEMPLATE = cfg.ChatTemplate('{content}|', 'U{content}|', 'A', '|', ('t',))
SETTINGS = cfg.Interactive(cfg.PythonEnvironment('tests.environments.talking:Talking'), max_turns=5,
                           turn_tokens=5, observation_tokens=16, template=TEMPLATE)
LIMITS = cfg.VerifierPool(num_workers=2, cpu_seconds=0.5, wall_seconds=2.0)
ROLLOUTS = cfg.Rollouts(4, 2, 24, 80, slots=cfg.Slots(page_size=8, prefill_chunk=16),
                        sampler=cfg.Sampler(banned=(257, 258, 259)))
BATCH, VERSION, SEED = 3, 11, 5


@pytest.fixture(scope='module')
def pool():
  with EpisodePool(SETTINGS, LIMITS) as pool:
    yield pool


@functools.cache
def engine_of(sizes):
  """One engine for all tests: a program is compiled for a minute's worth of them."""
  return engine.Engine(MODULE, PARAMS, sizes, seed=SEED, unused_ids=ROLLOUTS.sampler.banned,
                       token_bytes=[*TOKENIZER.token_bytes(), *[b''] * 3])


SIZES = multi_turn.engine_config(ROLLOUTS, SETTINGS, 1)


def make_player(pool, texts, settings=SETTINGS, rollouts=ROLLOUTS, sizes=SIZES):
  problems = [Problem(100 + i, text, '', text) for i, text in enumerate(texts)]
  method = cfg.RL('somewhere', cfg.Problems(cfg.NumberedGames(9)), settings, rollouts=rollouts,
                  algorithm=cfg.Algorithm(advantage=cfg.OPOBatch()))
  run = cfg.Run(seed=SEED, model=MODEL, objective=method,
                data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
                optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)), train=cfg.Train(9))
  session = sessions.Session(run, Path('unused'), '', make_mesh(cfg.Mesh()),
                             types.SimpleNamespace(tokenizer=TOKENIZER))
  player = multi_turn.Player(session, method, pool, make_transcript(settings, TOKENIZER), problems)
  player._engines = [engine_of(sizes)]
  return player, problems


@functools.cache
def _one_turn(width, num_tokens, sampler):
  return jax.jit(functools.partial(groups.generate, MODULE, sampler=sampler, num_samples=1,
                                   num_tokens=num_tokens, stop_ids=(TOKENIZER.eos_id,)))


def by_hand(pool, problem, sample, rollouts=ROLLOUTS, settings=SETTINGS):
  """One row by a plain loop: each turn is drawn from the whole sequence, nothing is kept."""
  transcript = make_transcript(settings, TOKENIZER)
  start, = pool.start([interactive.Problem(problem.prompt)])
  prompt = transcript.opening(start.messages)
  tokens, sampled, turn, logp, episode = list(prompt), [], [], [], start.episode
  key = jax.random.fold_in(jax.random.key(SEED), BATCH)
  width = rollouts.prompt_len + rollouts.response_tokens
  while True:
    row = np.zeros((1, width), np.int32)
    row[0, :len(tokens)] = tokens
    prompts = Prompts(jnp.asarray(row), jnp.array([len(tokens)]), jnp.array([problem.id]))
    drawn = _one_turn(width, settings.turn_tokens, rollouts.sampler)(
        PARAMS, prompts, key, first_samples=jnp.array([sample]))
    new = np.asarray(drawn.tokens)[0, 0][np.asarray(drawn.in_response)[0, 0] > 0].tolist()
    stop = next((i + 1 for i, t in enumerate(new) if t == ord('t')), len(new))
    new = new[:min(stop, rollouts.response_tokens + len(prompt) - len(tokens))]
    finish = ('stop' if new[-1] == TOKENIZER.eos_id else
              'stop_string' if new[-1] == ord('t') else 'length')
    tokens += new
    sampled += [1] * len(new)
    logp += np.asarray(drawn.logp)[0, 0, :len(new)].tolist()
    turn += [episode.num_turns] * len(new)
    seen, = pool.step([(episode, transcript.said(new, finish))])
    if seen.done:
      return prompt, tokens[len(prompt):], sampled, turn, logp, seen.episode.reward
    answer = transcript.answer(new, finish, seen.text).tokens
    if len(sampled) + len(answer) >= rollouts.response_tokens:
      return prompt, tokens[len(prompt):], sampled, turn, logp, seen.episode.reward
    tokens += answer
    sampled += [0] * len(answer)
    logp += [0.0] * len(answer)
    turn += [episode.num_turns] * len(answer)
    episode = seen.episode


# --- Rows of several turns --------------------------------------------------------------


FEW = {'slots': 3, 'page_size': 4, 'prefill_chunk': 5}
TEXTS = ['end 1', 'slow 3', 'end 2', 'never 9']


def drawn(pool, texts=TEXTS, **changes):
  player, problems = make_player(pool, texts, sizes=dataclasses.replace(SIZES, **changes))
  prompts, _ = player.take(problems)
  rollouts, played = player.draw(PARAMS, prompts, BATCH, VERSION)
  return player, prompts, rollouts, played.verdict


@pytest.fixture(scope='module')
def whole(pool):
  return drawn(pool)


def test_rows_of_one_and_of_several_turns_equal_a_plain_loop(pool, whole):
  player, prompts, rollouts, verdict = whole
  problems = [Problem(100 + i, text, '', text) for i, text in enumerate(TEXTS)]
  for n, problem in enumerate(problems):
    for g in range(2):
      prompt, tokens, sampled, turn, logp, reward = by_hand(pool, problem, g)
      num = len(tokens)
      assert prompts.tokens[n, :prompts.lengths[n]].tolist() == prompt
      assert rollouts.tokens[n, g].tolist() == tokens + [TOKENIZER.eos_id] * (80 - num)
      for name, values in (('in_response', [1] * num), ('sampled', sampled), ('turn', turn)):
        assert getattr(rollouts, name)[n, g].tolist() == values + [0] * (80 - num), name
      np.testing.assert_allclose(rollouts.logp[n, g, :num], logp, atol=1e-5)
      assert verdict.reward[n, g] == reward
  assert (rollouts.version == VERSION).all()
  assert verdict.measures['turns'].tolist()[:3] == [[1, 1], [3, 3], [2, 2]]
  assert verdict.measures['turns'][3].min() >= 3
  assert (verdict.valid == 1).all() and (verdict.correct == 1).all()
  assert rollouts.sampled[0].sum() == rollouts.in_response[0].sum()  # One turn alone.


def test_slots_and_pages_change_no_token(pool, whole):
  _, _, other, verdict = drawn(pool, **FEW)
  np.testing.assert_array_equal(other.tokens, whole[2].tokens)
  np.testing.assert_array_equal(other.sampled, whole[2].sampled)
  np.testing.assert_array_equal(verdict.reward, whole[3].reward)


def test_a_batch_is_repeated_to_the_bit(pool, whole):
  player, prompts, rollouts, _ = whole
  other, _ = player.draw(PARAMS, prompts, BATCH + 1, VERSION)
  assert (other.tokens != rollouts.tokens).any()
  again, _ = player.draw(PARAMS, prompts, BATCH, VERSION)
  np.testing.assert_array_equal(again.tokens, rollouts.tokens)
  np.testing.assert_array_equal(again.logp, rollouts.logp)


def test_a_turn_prefills_the_observation_and_one_token_alone(pool):
  player, problems = make_player(pool, ['end 4'])
  prompts, _ = player.take(problems)
  engine, = player._engines
  before = engine.counters()['prefilled']
  rollouts, _ = player.draw(PARAMS, prompts, BATCH, VERSION)
  # The prompt but its last token goes through the model once for both samples. Of each later turn
  # it is the last drawn token and the observation, but for its own last token.
  observed = rollouts.in_response.sum() - rollouts.sampled.sum()
  assert observed >= 6 * 12
  assert engine.counters()['prefilled'] - before == prompts.lengths[0] - 1 + observed


def test_responses_of_one_turn_are_those_of_the_sampler(pool):
  """The same seed, batch, ids and samples; a prompt that comes twice has four samples."""
  rollouts = dataclasses.replace(ROLLOUTS, response_tokens=5)
  settings = dataclasses.replace(SETTINGS, template=dataclasses.replace(TEMPLATE, stop=()))
  player, problems = make_player(pool, ['end 1', 'end 1 b'], settings, rollouts)
  prompts, _ = player.take([problems[0], problems[1], problems[0], problems[1]])
  drawn, _ = player.draw(PARAMS, prompts, BATCH, VERSION)
  sample = jax.jit(groups.make_sampler(MODULE, SEED, rollouts, TOKENIZER.stop_ids))
  wanted = sample(PARAMS, jax.tree.map(jnp.asarray, prompts), BATCH, VERSION)
  np.testing.assert_array_equal(drawn.tokens, wanted.tokens)
  np.testing.assert_allclose(drawn.logp, wanted.logp, atol=1e-5)
  for name in ('in_response', 'sampled', 'version', 'turn'):
    np.testing.assert_array_equal(getattr(drawn, name), getattr(wanted, name))
  assert len({row.tobytes() for row in drawn.tokens.reshape(8, -1)}) == 8


# --- Several engines --------------------------------------------------------------------


class FakeEngine:
  """Takes one row at a time and ends its text in the next call, which waits for `before`.

  The call that ends a text of the row `last` sets `after`.
  """

  def __init__(self, before, after, last):
    self.config = types.SimpleNamespace(queue=1)
    self._before, self._after, self._last, self._handle = before, after, last, None

  def room(self):
    return self._handle is None

  def submit(self, request):
    self._handle = request.id
    return request.id

  def cancel(self, handle):
    pass

  def advance(self, max_steps=None):
    assert self._before.wait(20), 'an engine waited for another one'
    handle, self._handle = self._handle, None
    if handle == self._last:
      self._after.set()
    text = np.array([ord('t')])
    return [(handle, engine.Response(handle, 0, text, text * 0.0, text * 1.0, 'stop_string', 0))]


def test_no_engine_waits_for_another(pool):
  """The first engine's first call ends when the second one has drawn a turn of its last row."""
  free, over = threading.Event(), threading.Event()
  free.set()
  openings = [[turns.Opening((65,), id, 0, start.episode) for id, start in zip(ids, pool.start(
      [interactive.Problem('end 3')] * len(ids)), strict=True)] for ids in ([0], [1, 2])]
  rows = turns.draw_turns([FakeEngine(over, free, 0), FakeEngine(free, over, 2)], pool,
                          make_transcript(SETTINGS, TOKENIZER), openings, turns.Bounds(80, 5),
                          ROLLOUTS.sampler)
  assert [(row.opening.id, row.episode.num_turns) for row in rows] == [(0, 3), (1, 3), (2, 3)]


def test_groups_are_shared_out_in_stretches():
  rows = lambda groups: [(n, g) for n in groups for g in range(2)]
  for num_groups, num_shards, wanted in (
      (4, 2, [[0, 1], [2, 3]]), (3, 2, [[0], [1, 2]]), (2, 4, [[], [0], [], [1]])):
    shared = multi_turn.stretches(rows(range(num_groups)), 2, num_shards)
    assert shared == [rows(groups) for groups in wanted]


# --- Learning ---------------------------------------------------------------------------


def test_a_step_learns_from_what_was_drawn_and_from_nothing_else(pool, whole):
  player, prompts, _, _ = whole
  session, method = player._session, player._session.run.objective
  optimizer = optim.make_optimizer(session.run.optimizer, 9, MODULE.specs)
  new_method = states.new_method(method.rollouts, method.algorithm, MODEL.d_model)
  staged = stages.Stages(session, Task(lambda batch: (prompts, ()), player, lambda params: {}, ''),
                         PARAMS, optimizer, method)

  def learn(change):
    start = jax.tree.map(jnp.copy, PARAMS)
    state = TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start), new_method)
    taken, references = staged.take(BATCH)
    rollouts, pending = staged.draw_verified(start, taken, references, BATCH, VERSION)
    verdict = staged.settle(pending)
    return staged.learn(state, taken, references, change(rollouts), verdict, False)

  state, done = learn(lambda rollouts: rollouts)
  values = {name: float(value.mean()) for name, value in done.metrics.items()}
  assert 1 <= values['mismatch'] <= 1 + 1e-5
  # The learner's forward pass is over whole sequences.
  later = whole[2].sampled * (whole[2].turn > 0) > 0
  gap = np.abs(np.asarray(done.by_token.sum) - whole[2].logp)
  assert later.sum() > 20 and np.exp(gap[later]).mean() <= 1 + 1e-5
  np.testing.assert_array_equal(done.by_token.count, whole[2].sampled)
  assert values['verified'] == 1 and values['outcome/ok'] == 0.75
  assert values['turns'] == np.asarray(whole[3].measures['turns']).mean() > 2
  observed = lambda r: r.in_response * (1 - r.sampled)
  assert values['observation_tokens'] == observed(whole[2]).sum() / 8
  assert not (np.asarray(state.params['embed']) == np.asarray(PARAMS['embed'])).all()
  # Log-probabilities of tokens that nobody has drawn are read by nobody.
  other, _ = learn(lambda r: dataclasses.replace(r, logp=r.logp + 9.0 * (1 - r.sampled)))
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_preflight_compiles_the_program_that_the_run_draws_with(pool):
  player, _ = make_player(pool, TEXTS)
  run, mesh = player._session.run, player._session.mesh
  first, *others = opening.kind(run.objective).programs(run, mesh)
  assert first.name == 'engine: prefill and decode of turns'
  assert [p.name for p in others][0] == 'learner: advantages and updates'
  shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  params, _, _, queue, slots, _ = first.args
  made, = player._engines
  assert shapes(params) == shapes(PARAMS) and shapes(slots.cache) == shapes(made._slots.cache)
  assert shapes(queue) == shapes(jax.tree.map(np.asarray, made._queue))
  assert shapes(first.run.eval_shape(*first.args)) == shapes(slots)


def test_what_several_turns_do_not_have_is_refused(pool):
  method = make_player(pool, TEXTS)[0]._session.run.objective
  changed = lambda **rollouts: dataclasses.replace(
      method, rollouts=dataclasses.replace(method.rollouts, **rollouts),
      algorithm=dataclasses.replace(method.algorithm, correction=cfg.TokenTIS()))
  with pytest.raises(UserError, match='choose Rollouts.mode = @cfg.OnPolicy'):
    changed(mode=cfg.OneStepOff())
  with pytest.raises(UserError, match='draws by dense attention'):
    changed(sparse=cfg.ReSA())
  hosts = [types.SimpleNamespace(process_index=host) for host in (0, 0, 1, 1)]
  with pytest.raises(UserError, match='on one host, and the devices belong to 2'):
    multi_turn.check_hosts(types.SimpleNamespace(devices=np.array(hosts)))


# --- Hostile environments ---------------------------------------------------------------


HOSTILE = {'exit 2': Outcome.CRASH, 'raise 1': Outcome.RAISED, 'large 2': Outcome.TOO_LARGE,
           'surrogate 1': Outcome.NOT_TEXT, 'unborn 1': Outcome.RAISED,
           'wordy 1': Outcome.LONG_PROMPT, 'odd 1': Outcome.RAISED, 'never 1': None,
           'long 1': Outcome.OK, 'end 2': Outcome.OK}


def check_hostile(pool, whole, num_prompts):
  """Draws twice; nothing is left behind, and rows beside hostile ones are what they would be."""
  texts = [list(HOSTILE)[i % len(HOSTILE)] for i in range(num_prompts)]
  texts[2] = 'end 2'  # As in `whole`: the same id.
  player, problems = make_player(pool, texts)
  prompts, _ = player.take(problems)
  drawn, played = player.draw(PARAMS, prompts, BATCH, VERSION)
  processes = len(psutil.Process().children(recursive=True))
  for n, text in enumerate(texts):
    wanted = HOSTILE[text]
    outcomes = [o for o in Outcome for g in range(2)
                if played.verdict.measures[f'outcome/{o.value}'][n, g]]
    if wanted is None:
      assert set(outcomes) <= {Outcome.TURN_LIMIT, Outcome.OUT_OF_TOKENS}
    else:
      assert outcomes == [wanted] * 2, text
    assert (played.verdict.valid[n] == outcomes[0].is_valid).all()
    assert outcomes[0].is_valid or (played.verdict.reward[n] == 0).all()
  np.testing.assert_array_equal(drawn.tokens[2], whole[2].tokens[2])
  is_long = np.array([text.startswith('long') for text in texts])
  assert (played.verdict.measures['cut_observations'][is_long] == 1).all()
  assert TOKENIZER.decode(drawn.tokens[8, 0].tolist()).count('é' * 8 + ' [cut]|A') == 1
  again, _ = player.draw(PARAMS, prompts, BATCH, VERSION)
  np.testing.assert_array_equal(drawn.tokens, again.tokens)
  engine, = player._engines
  assert engine.room() == SIZES.queue
  now = engine.counters()
  assert now['pages_in_use'] == now['kept_pages']  # No row holds any.
  engine.load(PARAMS, VERSION)
  engine.advance(0)
  assert engine.counters()['pages_in_use'] == 0
  assert len(psutil.Process().children(recursive=True)) == processes


def test_hostile_episodes_end_alone_and_leave_nothing(pool, whole):
  check_hostile(pool, whole, 20)


@pytest.mark.slow
def test_a_thousand_hostile_episodes_leave_nothing(pool, whole):
  check_hostile(pool, whole, 500)


def test_after_an_error_the_engine_goes_on(pool, whole, monkeypatch):
  """With three slots, rows are under way, queued and just ended when it happens."""
  player, prompts, _, _ = drawn(pool, **FEW)

  def broken(*_):
    raise KeyboardInterrupt

  for function in ('_take', '_goes_on'):
    with monkeypatch.context() as patch:
      patch.setattr(turns, function, broken)
      with pytest.raises(KeyboardInterrupt):
        player.draw(PARAMS, prompts, BATCH, VERSION)
    assert player._engines[0].room() == SIZES.queue
  again, _ = player.draw(PARAMS, prompts, BATCH, VERSION)
  np.testing.assert_array_equal(again.tokens, whole[2].tokens)
