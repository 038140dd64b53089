"""Episodes are functions of (seed, index), alone or in a batch, read, replayed or written."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt import main as cli
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import games, noise, records, trajectories
from tests.game.conftest import CONFIGS, NUM_EPISODES, quick, source_of

ROOT = Path(__file__).resolve().parents[2]


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_noise_is_the_hash_of_its_definition():
  def mix(word):
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    return word ^ word >> 16

  seed = (7 + 0x9E3779B9) % 2**32
  key = [mix(seed), mix(seed ^ 0xFFFFFFFF)]
  first = mix(key[0] ^ 5 * 0x9E3779B9 % 2**32)
  key = [first, mix((key[1] + first) % 2**32)]
  words = [mix(mix((i * 0x9E3779B9 + key[0]) % 2**32) ^ key[1]) for i in range(4096)]

  def draws(seed):
    folded = noise.fold(noise.key(seed), 5)
    return (folded, noise.words(folded, (4096,)), noise.whole(folded, -1, 2, (4096,)),
            noise.uniform(folded, (4096,)),
            jax.vmap(lambda n: noise.fold(folded, n))(np.arange(40)))

  folded, found, drawn, uniform, others = (np.asarray(x) for x in quick(draws)(7))
  assert folded.tolist() == key and found.tolist() == words
  # Four values of 1024 each, with a standard deviation of 28.
  assert (abs(np.bincount(drawn + 1) - 1024) < 140).all() and drawn.min() == -1
  assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
  assert len(set(others[:, 0].tolist())) == 40


def test_an_episode_does_not_depend_on_the_batch(played_by_name):
  source, batch = source_of('traveler'), played_by_name('traveler').batch
  ids = (np.arange(NUM_EPISODES) * 5 + 3) % NUM_EPISODES
  _assert_equal(source.batch(ids), jax.tree.map(lambda x: x[ids], batch))
  far = source.batch(np.arange(NUM_EPISODES) + 48)
  assert not (far.frames == batch.frames).all((1, 2, 3, 4)).any()


def test_a_source_is_read_by_the_loader_and_resumes(played_by_name):
  played_by_name('traveler')
  source = source_of('traveler')
  iterator = trajectories.train_iterator(source, seed=1, batch_size=NUM_EPISODES)
  first, second = next(iterator), next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  third = next(iterator)
  iterator.close()
  again = trajectories.train_iterator(source, seed=1, batch_size=NUM_EPISODES)
  again.set_state(state)
  assert (third[0] == next(again)[0]).all() and len(third[0]) == NUM_EPISODES
  again.close()
  again.set_state(state)
  _assert_equal(next(again), third)
  _assert_equal(third[1], source.batch(third[0]))
  again.close()
  assert first[1].frames.dtype == np.uint8
  assert not (first[1].frames == second[1].frames).all()
  other = dataclasses.replace(source.config, seed=4)
  with pytest.raises(UserError, match='digest'):
    trajectories.train_iterator(trajectories.Source(other), seed=1, batch_size=NUM_EPISODES
                                ).set_state(state)
  with pytest.raises(UserError, match='64 examples, fewer than one batch of 65'):
    trajectories.train_iterator(source, seed=1, batch_size=65)
  with pytest.raises(IndexError, match='outside 0 … 63'):
    source.batch([64])


def test_written_episodes_are_those_of_the_source(played_by_name, tmp_path):
  source, batch = source_of('traveler'), played_by_name('traveler').batch
  place = tmp_path / 'traveler'
  records.write(source, NUM_EPISODES, place)
  found = records.open_recorded(place)
  assert found.source == source and found.num_examples == NUM_EPISODES
  _assert_equal(found.batch([3, 0]), jax.tree.map(lambda x: x[[3, 0]], batch))
  reader = trajectories.train_iterator(found, seed=1, batch_size=2)
  assert next(reader)[1].frames.shape == (2, *batch.frames.shape[1:])
  reader.close()
  with pytest.raises(UserError, match='exists already'):
    records.write(source, 1, place)
  with pytest.raises(IndexError):
    found.batch([NUM_EPISODES])
  with pytest.raises(UserError, match='64 episodes .*, not 65'):
    records.write(source, 65, tmp_path / 'more')
  assert not (tmp_path / 'more').exists()
  manifest = json.loads((place / records.MANIFEST).read_text())
  for change, expected in (({'episodes': 5}, '16 episodes instead of 5'),
                           ({'digest': 'x'}, 'other rules'), ({'game': 'Chess'}, 'Chess')):
    (place / records.MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=expected):
      records.open_recorded(place)
  with pytest.raises(UserError, match='--output` has written'):
    records.open_recorded(tmp_path)


def test_splits_and_seeds_have_worlds_of_their_own():
  source = source_of('traveler')
  keys = {tuple(np.asarray(trajectories.key_of(s, 3)).tolist()) for s in (
      source, source._replace(is_validation=True),
      source._replace(config=dataclasses.replace(source.config, seed=4)))}
  assert len(keys) == 3
  assert len({s.digest for s in (source, source._replace(is_validation=True), source_of('pong'))}
             ) == 3
  more = source._replace(config=dataclasses.replace(source.config, size=65))
  assert more.digest == source.digest


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_a_batch_is_a_loop_of_single_games(name, played_by_name):
  """The optimised program against the one without optimisation, and a replay of its actions."""
  source, batch = source_of(name), played_by_name(name).batch
  game = games.open_game(source.config.game)
  for row in range(3):
    single = source.batch([row])
    expected = jax.tree.map(lambda x, row=row: x[row], batch)
    _assert_equal(jax.tree.map(lambda x: x[0], single), expected)
    again = trajectories.replay(game, trajectories.key_of(source, row), expected.actions[1:])
    _assert_equal(again, expected)


@pytest.mark.parametrize('args, expected', [
    ((), 'No game given: add --game traveler'),
    (('--game', 'chess'), 'no gin file gin/game/chess.gin'),
    (('--game', 'pong', '--gin_bindings', "cfg.Pong.frame = '32x32'"), "one of '24x32', '64x64'"),
    (('--game', 'pong', '--gin_bindings', "cfg.Trajectories.policy = 'wander'"),
     "'wander' does not know how to play Pong: choose 'mixed', 'random', 'follow'"),
    (('--game', 'pong', '--film', 'x.jpg'), 'name it *.png or *.gif'),
    (('--game', 'pong', '--episode', '1000000'), 'There are 1000000 episodes'),
    (('--game', 'pong', '--count', '0'), 'at least 1')])
def test_a_mistake_at_the_command_line_is_one_sentence(args, expected, capfd):
  assert cli.main(['trajectories', *args]) == 2
  out, err = capfd.readouterr()
  assert out == '' and err.count('\n') == 1 and expected in err


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['png', 'gif'])
def test_the_command_shows_writes_and_reads_back(kind, tmp_path, capsys):
  from PIL import Image
  film, place = tmp_path / f'film.{kind}', tmp_path / 'episodes'
  assert cli.main(['trajectories', '--game', 'traveler', '--count', '3', '--json', '--film',
                   str(film), '--output', str(place)]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['frames'] == 144 and found['unreadable'] == found['misread'] == 0
  assert len(records.open_recorded(place).batch([0, 1, 2]).actions) == 3
  with Image.open(film) as picture:
    assert picture.width > 100 and getattr(picture, 'n_frames', 1) == (48 if kind == 'gif' else 1)


@pytest.mark.parametrize('path', sorted((ROOT / 'gin' / 'game').glob('*.gin')),
                         ids=lambda path: path.stem)
def test_the_shipped_games_load_and_leave_nothing_open(path):
  settings = gin_bindings.load_value(cfg.Trajectories, [str(path)], ())
  assert settings == cfg.Trajectories(
      cfg.Traveler(num_colours=1) if path.stem == 'repetitive'
      else {'traveler': cfg.Traveler(), 'pong': cfg.Pong(), 'pacman': cfg.PacMan()}[path.stem])
