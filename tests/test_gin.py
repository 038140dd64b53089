"""gin files and bindings: what they build, what they refuse, and how they say so."""

import dataclasses
from pathlib import Path

import pytest

import gin
from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import games, maps
from tests.golden import regenerate

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / 'gin/run/pretrain_tiny.gin')
RPT = ("cfg.Run.objective = @cfg.RPT()", "cfg.RPT.start_from = 'somewhere'")


def _message(*bindings: str, files: tuple[str, ...] = (TINY,)) -> str:
  with pytest.raises(UserError) as caught:
    gin_bindings.load(files, bindings)
  message = str(caught.value)
  assert '\n' not in message and message[-1] in '.?', message
  return message


# --- Shipped files ------------------------------------------------------------------


@pytest.mark.parametrize('name', regenerate.runs())
def test_no_shipped_binding_is_dead_or_void(name):
  path = ROOT / 'gin' / 'run' / f'{name}.gin'
  _, void = gin_bindings.resolve([str(path)], regenerate.REQUIRED.get(name, ()))
  assert void == ()


@pytest.mark.parametrize('path', sorted((ROOT / 'gin').rglob('*.gin')), ids=lambda p: p.stem)
def test_at_most_three_layers_of_include(path):
  def depth(p: Path) -> int:
    lines = p.read_text().splitlines()
    included = [line.split("'")[1] for line in lines if line.startswith('include ')]
    return 1 + max((depth(ROOT / name) for name in included), default=0)
  assert depth(path) <= 3


@pytest.mark.parametrize('name', ['v5e_16', 'v5e_256', 'v6e_2x256', 'v5p_8', 'v5p_128',
                                  'v5p_128_tensor_8', 'v5p_512'])
def test_cluster_files_only_shape_the_mesh(name):
  before, _ = gin_bindings.load([TINY], ())
  after, _ = gin_bindings.load([TINY, f'gin/cluster/{name}.gin'], ())
  assert after.mesh != before.mesh
  assert dataclasses.replace(after, mesh=before.mesh) == before


EVALUATIONS = sorted((ROOT / 'gin' / 'eval').glob('*.gin'))


def test_evaluation_files_of_games_stand_alone():
  found = {path.stem: gin_bindings.load_value(cfg.GameEvaluation, [str(path)], ())
           for path in EVALUATIONS if path.stem.startswith('maag')}
  assert {name: type(value.trajectories.game) for name, value in found.items()} == {
      'maag': cfg.Traveler, 'maag_pong': cfg.Pong, 'maag_pacman': cfg.PacMan}
  assert found['maag'] == cfg.GameEvaluation(
      cfg.Trajectories(cfg.Traveler(), 'out_and_back', 49))
  for value in found.values():
    maps.check(games.open_game(value.trajectories.game), value.modules.map)


@pytest.mark.parametrize('path', [p for p in EVALUATIONS if not p.stem.startswith('maag')],
                         ids=lambda p: p.stem)
def test_evaluation_files_go_with_a_run_file_and_with_a_saved_run(path, tmp_path):
  """A run file says all that is measured; so does the resolved text of a run."""
  first = ['cfg.HybridAccuracy.run = @cfg.Run()']
  run, text = gin_bindings.load([str(ROOT / 'gin/run/hgpo_tiny.gin')], ())
  (tmp_path / 'config.gin').write_text(text, encoding='utf-8')
  starts = ROOT / 'gin/run/hgpo_tiny.gin', tmp_path / 'config.gin'
  by_file, by_text = (gin_bindings.load_value(
      cfg.HybridAccuracy, [str(start), str(path)], (), first) for start in starts)
  assert by_file == by_text and by_file.run == run
  assert by_file.sampler != run.objective.rollouts.sampler


def test_every_folder_of_gin_files_is_installed():
  listed = (ROOT / 'setup.cfg').read_text(encoding='utf-8')
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / 'gin').rglob('*.gin')}
  for folder in map(Path.as_posix, folders):
    assert f'share/jaxrl_pt/{folder} = {folder}/*.gin' in listed, folder


def test_grpo_file_chooses_the_advantage():
  files = (str(ROOT / 'gin/run/rpt_tiny.gin'), 'gin/method/grpo.gin')
  run, _ = gin_bindings.load(files, ())
  assert isinstance(run.objective, cfg.RPT) and run.objective.algorithm.advantage == cfg.GRPO()


def test_gin_folder_does_not_shadow_the_library():
  assert callable(gin.parse_config)
  assert not list((ROOT / 'gin').rglob('*.py'))


# --- Building -----------------------------------------------------------------------


def test_resolved_text_loads_to_an_equal_run(tmp_path):
  for bindings in [(), RPT, ('cfg.AdamW.schedule = @cfg.TwoStage()',
                             'cfg.TwoStage.peak_rate = 1e-3',
                             'cfg.TwoStage.second_peak_rate = 5e-4')]:
    run, text = gin_bindings.load([TINY], bindings)
    saved = tmp_path / 'config.gin'
    saved.write_text(text, encoding='utf-8')
    assert gin_bindings.load([str(saved)], ()) == (run, text)


def test_resolved_text_keeps_awkward_strings(tmp_path):
  glob = 'a \'quoted\' "name" \\ ü %x @y\t*.txt'
  run, text = gin_bindings.load(
      [TINY], ('cfg.Data.source = @cfg.TextFiles()', f'cfg.TextFiles.glob = {glob!r}'))
  assert run.data.source == cfg.TextFiles(glob)
  (tmp_path / 'config.gin').write_text(text, encoding='utf-8')
  assert gin_bindings.load([str(tmp_path / 'config.gin')], ())[0] == run


def test_built_values_are_the_plain_dataclasses_and_gin_is_left_clean():
  run, _ = gin_bindings.load([TINY], ('cfg.Train.num_steps = 7',))
  assert type(run.train) is cfg.Train and run.train.num_steps == 7
  assert hash(run) == hash(dataclasses.replace(run))
  assert gin.config_str().strip() == ''
  with pytest.raises(TypeError):
    cfg.Train()  # type: ignore[call-arg]  # Direct calls stay strict.


def test_gin_is_left_clean_after_a_mistake():
  _message("cfg.Train.num_steps = 'many'")
  assert gin.config_str().strip() == ''


def test_macros_lists_and_blocks():
  run, _ = gin_bindings.load(
      [TINY], ('steps = 11', 'cfg.Train:\n  num_steps = %steps\n  log_every = 2',
               *RPT, 'cfg.RPT.difficulty = [1, 2, 3]'))
  assert (run.train.num_steps, run.train.log_every) == (11, 2)
  assert run.objective.difficulty == (1, 2, 3)


def test_a_replaced_choice_takes_its_bindings_along():
  bindings = ('cfg.AdamW.schedule = @cfg.ConstantRate()', 'cfg.ConstantRate.learning_rate = 0.5')
  run, void = gin_bindings.resolve([TINY], bindings)
  assert run.optimizer.schedule == cfg.ConstantRate(0.5)
  assert void and all(name.startswith('cfg.WSD.') for name in void)


def test_the_text_of_an_earlier_version_gets_the_names_of_today():
  before = ('cfg.Run.seed = 0\ncfg.AdamW.schedule = @cfg.Constant()\ncfg.Constant.peak = 0.1\n'
            'cfg.Constant.warmup_steps = 0\na/cfg.WSD.end = 0.0\n'
            'cfg.Algorithm.aggregation = @cfg.ConstantDivisor()\n')
  now = ('cfg.Run.seed = 0\ncfg.AdamW.schedule = @cfg.ConstantRate()\n'
         'cfg.ConstantRate.learning_rate = 0.1\ncfg.ConstantRate.warmup_steps = 0\n'
         'a/cfg.WSD.end_rate = 0.0\ncfg.Algorithm.aggregation = @cfg.ConstantDivisor()\n')
  assert gin_bindings.current_names(before) == gin_bindings.current_names(now) == now


def test_live_bindings_are_those_that_gin_itself_reports_as_used():
  gin.clear_config()
  try:
    gin.parse_config([line for line in gin_bindings.load([TINY], RPT)[1].splitlines() if line])
    gin.get_configurable(cfg.Run)()
    bound, used = (
        {line.split(' = ')[0] for line in text.splitlines() if ' = ' in line}
        for text in (gin.config_str(), gin.operative_config_str()))
  finally:
    gin.clear_config()
  assert bound and bound <= used


def test_files_are_found_from_another_directory(tmp_path, monkeypatch):
  expected, _ = gin_bindings.load([TINY], ())
  monkeypatch.chdir(tmp_path)
  assert gin_bindings.load([TINY], ())[0] == expected
  assert gin_bindings.load(['gin/run/pretrain_tiny.gin'], ())[0] == expected
  (tmp_path / 'mine.gin').write_text(
      "include 'gin/run/pretrain_tiny.gin'\ncfg.Train.num_steps = 3\n")
  assert gin_bindings.load(['mine.gin'], ())[0].train.num_steps == 3


# --- Mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize('binding, expected', [
    ('cfg.Modell.num_layers = 3', "no setting type 'cfg.Modell': did you mean cfg.Model"),
    ('cfg.Model.num_layerz = 3', "no field 'num_layerz': did you mean num_layers?"),
    ('cfg.Model.xyzzy = 3', 'it has activation, adapter, d_ff, d_model'),
    ('cfg.Model.num_layers = @cfg.Modle()', 'did you mean cfg.Model?'),
    ('cfg.Model.num_layers = %foo', 'uses %foo, which is not set'),
    ('cfg.Model.num_layers = %gin.REQUIRED', 'cfg.Model.num_layers has no value yet'),
    ('cfg.Model.num_layers == 3', 'this is not gin'),
    ('cfg.Model.num_layers =', 'this is not gin'),
    ('cfg.Model.num_layers = (3', 'this is not gin'),
    ('cfg.Model.num_layers = lambda', "Failed to parse token 'lambda'"),
    ('cfg.Model.num_layers = {[1]: 2}', 'this is not gin'),
    ('import os', 'cannot import Python modules'),
    ('big/cfg.Model.num_layers = 3', 'choose @big/cfg.Model() somewhere or remove the binding'),
    ('cfg.Model.num_layers = 2.5', 'Model.num_layers = 2.5: expected a whole number'),
    ("cfg.Train.num_steps = 'x'", "--gin_bindings: Train.num_steps = 'x'"),
    ('cfg.Run.model = @cfg.Quant()', 'expected one of @cfg.Model()'),
    ('cfg.Run.model = @cfg.Model', 'expected one of @cfg.Model()'),
    ('cfg.Model.quant = @cfg.Model()', 'refers to itself'),
    ('cfg.AdamW.schedule = @cfg.Cosine()', 'cfg.Cosine.peak_rate must be set'),
    ('cfg.Cosine.peak_rate = 3.0', 'Nothing reads cfg.Cosine.peak_rate (--gin_bindings)'),
    ('unused = 4', 'Nothing reads unused (--gin_bindings): remove it.'),
    ('cfg.Bytes.size = 4', "cfg.Bytes has no field 'size': it has none."),
    ('cfg.AdamW.schedule = @cfg.Constant()', 'cfg.Constant is called cfg.ConstantRate now'),
    ('cfg.Constant.peak = 1', 'cfg.Constant.peak is called cfg.ConstantRate.learning_rate now'),
    ('a/cfg.Constant.peak = 1', 'cfg.Constant.peak is called cfg.ConstantRate.learning_rate now'),
    ('cfg.WSD.end = 0', 'cfg.WSD.end is called cfg.WSD.end_rate now'),
    ("include 'gin/run/pretain_tiny.gin'", 'did you mean gin/run/pretrain_tiny.gin'),
])
def test_a_mistake_gets_one_sentence(binding, expected):
  assert expected in _message(binding)


def test_a_binding_after_its_type_was_replaced_is_dead():
  assert 'Nothing reads cfg.WSD.peak_rate' in _message(
      'cfg.AdamW.schedule = @cfg.ConstantRate()', 'cfg.ConstantRate.learning_rate = 0.5',
      'cfg.WSD.peak_rate = 1.0')


def test_a_mistake_in_a_file_names_file_and_line(tmp_path):
  path = tmp_path / 'mine.gin'
  path.write_text(f'# A run.\ninclude {TINY!r}\n\ncfg.Train.num_stepz = 3\n')
  assert f'{path} line 4: ' in _message(files=(str(path),))
  path.write_text(f'include {TINY!r}\ncfg.Train.num_steps = @cfg.Trian()\n')
  assert f'{path} line 2: ' in _message(files=(str(path),))
  path.write_text(f'include {TINY!r}\n\ncfg.Train.num_steps = 0\n')
  assert f'{path} line 3: Train.num_steps = 0' in _message(files=(str(path),))
  path.write_text(f'include {TINY!r}\n\n\ncfg.Train.num_steps = =\n')
  assert f'{path} line 4: ' in _message(files=(str(path),))


def test_files_that_cannot_be_read(tmp_path):
  assert 'There is no gin file nowhere.gin' in _message(files=('nowhere.gin',))
  assert 'There is no gin file' in _message(files=(str(tmp_path),))
  binary = tmp_path / 'binary.gin'
  binary.write_bytes(b'cfg.Train.num_steps = 3 # \xff\xfe')
  assert 'is not UTF-8 text (byte 26)' in _message(files=(str(binary),))
  loop = tmp_path / 'loop.gin'
  loop.write_text("include 'loop.gin'\n")
  assert f'{loop} line 1: loop.gin includes itself' in _message(files=(str(loop),))
  assert 'No settings given' in _message(files=())


def test_a_byte_order_mark_is_no_setting(tmp_path):
  path = tmp_path / 'mine.gin'
  path.write_bytes(b'\xef\xbb\xbf' + f"include {TINY!r}\ncfg.Train.num_steps = 3\n".encode())
  assert gin_bindings.load([str(path)], ())[0].train.num_steps == 3


def test_required_values_are_asked_for():
  path = str(ROOT / 'gin/run/pretrain_2b4t.gin')
  assert 'cfg.ArrayRecord.glob has no value yet (gin/data/array_record.gin line 6)' in _message(
      files=(path,))
