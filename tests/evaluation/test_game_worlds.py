"""Evaluations of models of games: segments, edits, results, reports, and going on after a stop."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import main as cli
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import game_report, game_rollouts, game_worlds
from jaxrl_pt.game import base, dream, games, history, measures, noise, renderers, trajectories
from jaxrl_pt.jobs import trained_worlds

TRAJECTORIES = cfg.Trajectories(cfg.Traveler(num_cells=64), 'out_and_back', 13, size=100)
SETTINGS = cfg.GameEvaluation(TRAJECTORIES, model='weak', episodes=8, batch_size=8, at_frame=12)


def _with(**fields):
  return dataclasses.replace(SETTINGS, **fields)


@pytest.mark.parametrize('settings, expected', [
    (SETTINGS, [12]), (_with(checkpoint_every=5), [5, 10, 12]),
    (_with(checkpoint_every=6, edit=cfg.AddToLedger(5)), [5, 6, 12]),
    (_with(edit=cfg.PaintCells(7)), [7, 12])])
def test_a_rollout_is_cut_at_edits_and_where_it_is_saved(settings, expected):
  assert game_rollouts.ends(settings) == expected


def test_what_is_painted_is_in_view_free_and_something_else():
  game = games.open_game(TRAJECTORIES.game)
  rng = np.random.default_rng(0)
  cells = rng.integers(0, 8, (50, 1, 1, 8)).astype(np.int32)
  zero = np.zeros((50, 1), np.int32)
  readings = base.Reading(zero[..., None], cells, np.array([0, 3]) + zero[..., None, None],
                          zero, zero, zero == 0)
  claims = history.Claims(*[zero] * 5, origin=np.array([0, 100]) + zero[..., None],
                          due=zero, bare=zero, cells=zero, away=zero, returned=zero)
  played = measures.Played(readings, claims, zero, zero, zero, zero)
  painted = game_rollouts.choose(game, played, 0, SETTINGS, range(50))
  places = painted.cells[:, 1] - 100
  assert set(places.tolist()) == {0, 1, 2, 4, 5, 6, 7} and not painted.cells[:, 0].any()
  shown = cells[np.arange(50), 0, 0, places]
  assert (shown != 7).all() and (shown != painted.contents).all()
  assert set(painted.contents.tolist()) == set(range(1, 7))
  again = game_rollouts.choose(game, played, 0, SETTINGS, range(50))
  assert (again.cells == painted.cells).all() and (again.contents == painted.contents).all()


def test_a_measure_is_the_ratio_of_its_sums_with_an_interval_over_games():
  share = measures.Share(np.array([1.0, 0, 9]), np.array([1.0, 0, 19]))
  found = game_worlds._estimate(share, SETTINGS)
  assert found['value'] == 0.5 and found['asked'] == 20
  low, high = found['interval']
  assert low < 0.5 <= high <= 1
  nothing = measures.Share(np.zeros(3), np.zeros(3))
  assert game_worlds._estimate(nothing, SETTINGS) == {
      'value': None, 'interval': [None, None], 'asked': 0}


@pytest.mark.parametrize('asked, drawn', [
    (cfg.Pong(), cfg.Traveler()), (cfg.Traveler('64x64'), cfg.Traveler())])
def test_a_checkpoint_of_another_game_is_refused(asked, drawn, tmp_path):
  with pytest.raises(UserError, match='draws Traveler in frames of 24x32, and'):
    trained_worlds.check_game(asked, drawn, tmp_path)
  trained_worlds.check_game(cfg.Traveler(num_colours=1), cfg.Traveler(), tmp_path)


def test_a_map_where_there_is_none_is_refused(tmp_path, capfd):
  code = cli.main(['eval', '--workdir', str(tmp_path), '--gin_file', 'gin/eval/maag_pong.gin',
                   '--gin_bindings', 'cfg.MaaG.map = @cfg.MapMemory()'])
  assert code == 2 and 'Pong has no map: choose MaaG.map = @cfg.NoMap()' in capfd.readouterr().err


# --- Whole evaluations ------------------------------------------------------------


def _evaluate(tmp_path, settings):
  return game_worlds.evaluate(tmp_path, settings, step=None, say=lambda line: None)


@pytest.mark.slow
def test_modules_and_edits_show_in_the_results(tmp_path):
  found = _evaluate(tmp_path, _with(edit=cfg.AddToLedger(6))).results
  assert {name: x['value'] for name, x in found['measures'].items()
          if name in ('score_exact', 'digit_acc', 'spa_con_reentry', 'unreadable')} == {
              'score_exact': 1, 'digit_acc': 1, 'spa_con_reentry': 1, 'unreadable': 0}
  # The display goes up by 37 at once: that is no event, and the one false change of each game.
  num_con = found['measures']['num_con']
  assert 0.8 < num_con['value'] < 1 and found['after_edit']['digit_acc']['value'] == 1
  assert sum(p['asked'] for p in found['by_delay']) == found['measures']['spa_con_reentry']['asked']
  assert found['frame_time']['8']['ratio'] > 0 and json.dumps(found)
  off = cfg.MaaG(shows_counters=False, map=cfg.NoMap())
  found = _evaluate(tmp_path, _with(modules=off)).results['measures']
  assert found['digit_acc']['value'] is None and found['spa_con_reentry']['value'] < 0.6
  found = _evaluate(tmp_path, _with(edit=cfg.PaintCells(6), episodes=12)).results
  assert found['after_edit']['painted']['value'] == 1 and found['episodes'] == 12


@pytest.mark.slow
@pytest.mark.parametrize('game, policy, modules', [
    (cfg.Traveler(num_cells=64), 'out_and_back', cfg.MaaG()),
    (cfg.Pong(), 'follow', cfg.MaaG(map=cfg.NoMap()))], ids=['traveler', 'pong'])
def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(game, policy, modules, tmp_path,
                                                               monkeypatch):
  settings = _with(trajectories=cfg.Trajectories(game, policy, 13), modules=modules,
                   checkpoint_every=4,
                   edit=cfg.PaintCells(6) if game == TRAJECTORIES.game else cfg.AddToLedger(6))
  expected = _evaluate(tmp_path / 'whole', settings).results
  save, times = game_rollouts.save, []

  def save_and_stop(directory, progress):
    save(directory, progress)
    times.append(progress.frames.shape[1])
    if len(times) == 3:
      raise KeyboardInterrupt
  monkeypatch.setattr(game_rollouts, 'save', save_and_stop)
  with pytest.raises(KeyboardInterrupt):
    _evaluate(tmp_path / 'parts', settings)
  found = _evaluate(tmp_path / 'parts', settings).results
  assert len(times) == len(game_rollouts.ends(settings)) > 3
  for name in ('measures', 'by_delay', 'after_edit'):
    assert found.get(name) == expected.get(name)
  assert not list((tmp_path / 'parts' / 'evaluations').glob('rollouts*'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['maag', 'maag_pacman', 'maag_pong'])
def test_the_command_writes_a_report_of_every_game(name, tmp_path, capfd):
  arguments = ['eval', '--workdir', str(tmp_path), '--gin_file', f'gin/eval/{name}.gin', '--json',
               *(part for binding in (
                   "cfg.GameEvaluation.model = 'true'", 'cfg.Trajectories.num_frames = 9',
                   'cfg.GameEvaluation.at_frame = 8', 'cfg.GameEvaluation.episodes = 3')
                 for part in ('--gin_bindings', binding))]
  assert cli.main(arguments) == 0
  found = json.loads(capfd.readouterr().out)
  assert found['measures']['score_exact']['value'] == 1 and found['step'] is None
  folder = tmp_path / 'evaluations'
  assert json.loads((folder / 'game_true.json').read_text()) == found
  assert {p.name for p in folder.iterdir()} == {
      'game_true.json', 'game_true.html', 'game_true.png', 'game_true.gif',
      'game_true_film_1.png', 'game_true_film_2.png'}
  page = (folder / 'game_true.html').read_text()
  assert page.count('<img') == 4 and 'image/gif' in page and 'score_exact' in page
  assert 'score_exact' in game_report.text(found)


@pytest.mark.slow
def test_captions_say_what_is_wrong():
  game = games.open_game(TRAJECTORIES.game)
  source = trajectories.Source(TRAJECTORIES, True)
  off = cfg.MaaG(shows_counters=False, map=cfg.NoMap())
  for kind, words in (('true', set()), ('wrong_digits', {'/'}), ('shifted', {'unreadable'}),
                      ('redraws', {'cells'})):
    world = dream.World(game, renderers.world_model(game, kind), cfg.NoMap())
    rollouts = game_rollouts.Rollouts(
        world, jax.vmap(lambda key: game.init(noise.fold(key, 0))), source, _with(modules=off))
    batch = game_rollouts.Player(rollouts).play(range(2), None)
    frames, captions = game_report.pair(game, batch, 0)
    assert frames.shape == (13, 50, 32, 3) and captions[0] == '0'
    marks = {word for word in ('/', 'unreadable', 'cells') if any(word in c for c in captions)}
    assert marks == words, (kind, captions)
