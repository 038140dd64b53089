"""load(dump(run)) == run, whatever the run holds."""

import dataclasses
from pathlib import Path
import re
from typing import get_args

from hypothesis import given, reject, settings
from hypothesis import strategies as st
import numpy as np
import pytest

import gin
from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.errors import UserError
from tests import random_config
from tests.test_config import ALL, RUN

# Arguments of functions and commands, which no run holds.
ELSEWHERE = {cfg.Engine, cfg.HybridAccuracy, cfg.GameEvaluation, cfg.NoEdit, cfg.AddToLedger,
             cfg.PaintCells, cfg.VisionTower, *get_args(cfg.PatchPositions),
             *get_args(cfg.Pooling)}
SHIPPED = sorted((Path(__file__).resolve().parents[1] / 'gin' / 'environment').glob('*.gin'))


def assert_loads_equal(run: cfg.Run) -> None:
  text = gin_bindings.dump(run)
  again, void = gin_bindings.resolve([], [text])
  assert again == run and void == ()
  assert gin_bindings.dump(again) == text


def test_every_type_is_held_by_some_run():
  assert set(ALL) - ELSEWHERE - {cfg.Run} == set(random_config.OWNERS)


@pytest.mark.parametrize('kind', sorted(random_config.OWNERS, key=lambda kind: kind.__name__))
@settings(max_examples=2, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_run_with_any_value_of_each_type_loads_again(kind, data):
  value = data.draw(random_config.instances(kind))
  try:
    run = random_config.holding(value)
  except UserError:  # Valid alone, but not beside the rest of a small run.
    reject()
  assert_loads_equal(run)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(run=random_config.instances(cfg.Run))
def test_any_run_loads_again(run):
  assert_loads_equal(run)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tower=random_config.instances(cfg.VisionTower))
def test_any_vision_tower_loads_again(tower):
  assert gin_bindings.load_value(cfg.VisionTower, [], [gin_bindings.dump(tower)]) == tower


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(random_config.values(cfg.Part), min_size=1, max_size=5))
def test_verifiers_of_one_type_with_other_settings_load_again(verifiers):
  weights = tuple((-0.5) ** i for i in range(len(verifiers)))
  assert_loads_equal(random_config.holding(cfg.Composite(tuple(verifiers), weights)))


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_environments_load_alone_and_beside_other_settings(path):
  settings = gin_bindings.load_value(cfg.Interactive, [str(path)], [])
  assert isinstance(settings, cfg.Interactive)
  longer = ['cfg.Interactive.max_turns = 99']
  changed = gin_bindings.load_value(cfg.Interactive, [str(path)], longer)
  assert changed == dataclasses.replace(settings, max_turns=99)
  with pytest.raises(UserError, match='Nothing reads cfg.Run.seed'):
    gin_bindings.load_value(cfg.Interactive, [str(path)], ['cfg.Run.seed = 1'])


def composite(*verifiers: cfg.Part) -> cfg.Run:
  return random_config.holding(cfg.Composite(verifiers, (1.0,) * len(verifiers)))


def test_values_of_one_type_are_told_apart_by_a_scope():
  run = composite(cfg.MathVerifier('gsm8k'), cfg.FormatVerifier(), cfg.MathVerifier('boxed', False),
                  cfg.MathVerifier('gsm8k'))
  text = gin_bindings.dump(run)
  assert ('cfg.Composite.verifiers = (@cfg.MathVerifier(), @cfg.FormatVerifier(), '
          '@verifiers_3/cfg.MathVerifier(), @cfg.MathVerifier())') in text.splitlines()
  assert "verifiers_3/cfg.MathVerifier.answer = 'boxed'" in text.splitlines()
  assert_loads_equal(run)


def test_one_source_in_the_data_and_another_in_the_problems():
  run = random_config.holding(cfg.Problems(cfg.Arithmetic(7, num_terms=2)))
  data = dataclasses.replace(run.data, source=cfg.Demonstrations(cfg.Arithmetic(9, seed=3)))
  run = dataclasses.replace(run, data=data)
  assert 'cfg.Problems.source = @source/cfg.Arithmetic()' in gin_bindings.dump(run).splitlines()
  assert_loads_equal(run)


# --- Two of everything --------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duel(cfg.NextToken):
  """Two models, samplers in tuples of tuples, sources by name: more than any shipped type."""

  policy: cfg.Model
  judge: cfg.Model
  samplers: tuple[tuple[cfg.Sampler, ...], ...] = ()
  sources: dict[str, cfg.Source] = dataclasses.field(default_factory=dict)


gin.register(Duel, module='cfg')
POLICY = RUN['model']
JUDGE = dataclasses.replace(POLICY, num_layers=7, quant=cfg.Quant('ternary'))


def duel(monkeypatch: pytest.MonkeyPatch, **fields) -> cfg.Run:
  monkeypatch.setitem(gin_bindings._TYPES, 'Duel', Duel)
  return cfg.Run(**{**RUN, 'objective': Duel(**{'policy': POLICY, 'judge': JUDGE, **fields})})


def test_two_models_two_samplers_and_two_sources(monkeypatch):
  run = duel(
      monkeypatch, samplers=((cfg.Sampler(), cfg.Sampler(0.5)), (cfg.Sampler(0.0),), ()),
      sources={'web': cfg.Jsonl('web/*'), 'code': cfg.Jsonl('code/*'),
               'sums': cfg.Demonstrations(cfg.Arithmetic(9))})
  lines = gin_bindings.dump(run).splitlines()
  assert lines[lines.index('cfg.Duel.policy = @cfg.Model()'):][:4] == [
      'cfg.Duel.policy = @cfg.Model()',
      'cfg.Duel.judge = @judge/cfg.Model()',
      'cfg.Duel.samplers = ((@cfg.Sampler(), @samplers_1_2/cfg.Sampler()), '
      '(@samplers_2_1/cfg.Sampler(),), ())',
      "cfg.Duel.sources = {'web': @cfg.Jsonl(), 'code': @sources_2/cfg.Jsonl(), "
      "'sums': @cfg.Demonstrations()}"]
  assert 'judge/cfg.Model.quant = @quant/cfg.Quant()' in lines
  assert "quant/cfg.Quant.weights = 'ternary'" in lines
  assert_loads_equal(run)


def test_a_scope_belongs_to_one_value_even_where_fields_share_a_name(monkeypatch):
  sources = {str(i): cfg.Demonstrations(cfg.Arithmetic(i)) for i in range(1, 5)}
  run = duel(monkeypatch, sources={**sources, 'source': cfg.Demonstrations(cfg.Arithmetic(4, 2))})
  run = dataclasses.replace(run, data=dataclasses.replace(
      run.data, source=cfg.Demonstrations(cfg.Arithmetic(7))))
  scopes = re.findall(r'@(\w+)/', gin_bindings.dump(run))
  assert len(scopes) == len(set(scopes)) and {'source', 'source_2'} < set(scopes)
  assert_loads_equal(run)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(models=st.tuples(*[random_config.instances(cfg.Model)] * 2),
       samplers=st.lists(st.lists(random_config.instances(cfg.Sampler), max_size=3), max_size=3),
       sources=st.dictionaries(random_config.TEXTS, st.one_of(
           random_config.instances(cfg.Demonstrations), random_config.instances(cfg.Jsonl)),
           max_size=4))
def test_any_two_of_everything_load_again(models, samplers, sources):
  with pytest.MonkeyPatch.context() as monkeypatch:
    assert_loads_equal(duel(monkeypatch, policy=models[0], judge=models[1], sources=sources,
                            samplers=tuple(map(tuple, samplers))))


# --- Scopes of a user ---------------------------------------------------------------


def test_the_example_of_the_settings_page(tmp_path):
  page = Path(__file__).resolve().parents[1] / 'docs' / 'settings.md'
  path = tmp_path / 'mine.gin'
  path.write_text(re.findall(r'```gin\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL)[0])
  bindings = re.findall(r'`--gin_bindings "(.*?)"`', page.read_text(encoding='utf-8'))
  for added, symbolic in ((), False), (bindings, True):
    run, text = gin_bindings.load([str(path)], added)
    assert run.objective.verifier == cfg.Composite(
        (cfg.MathVerifier('gsm8k', False), cfg.MathVerifier('last_number', symbolic)), (1.0, 0.2))
    assert "verifiers_2/cfg.MathVerifier.answer = 'last_number'" in text.splitlines()
    assert_loads_equal(run)


def test_names_of_scopes_are_written_anew_and_the_value_stays():
  text = gin_bindings.dump(composite(cfg.MathVerifier(), cfg.MathVerifier('gsm8k', False)))
  mine = text.replace('verifiers_2/', 'lenient/')
  assert mine != text and gin_bindings.load([], [mine]) == gin_bindings.load([], [text])
  assert gin_bindings.load([], [mine])[1] == text


def test_a_scope_overrides_what_it_names_and_takes_the_rest():
  text = gin_bindings.dump(composite(cfg.MathVerifier('gsm8k', False)))
  bindings = ['cfg.Composite.verifiers = [@cfg.MathVerifier(), @strict/cfg.MathVerifier()]',
              'cfg.Composite.weights = [1, -0.5]', "strict/cfg.MathVerifier.answer = 'boxed'"]
  run, _ = gin_bindings.load([], [text, *bindings])
  assert run.objective.verifier == cfg.Composite(
      (cfg.MathVerifier('gsm8k', False), cfg.MathVerifier('boxed', False)), (1, -0.5))


@pytest.mark.parametrize('binding, expected', [
    ("big/cfg.MathVerifier.answer = 'boxed'",
     'Nothing reads big/cfg.MathVerifier.answer (--gin_bindings): choose @big/cfg.MathVerifier()'),
    ('cfg.Run.model = @a/b/cfg.Model()', 'has a scope in a scope'),
    ('a/steps = 3', 'a/steps is a macro with a scope: write steps = value'),
    ('cfg.Run.model = @a/cfg.Modle()', 'did you mean cfg.Model?'),
    ("verifiers_2/cfg.MathVerifier.answr = 'boxed'", 'did you mean answer?'),
    ("verifiers_2/cfg.MathVerifier.answer = 'box'",
     "--gin_bindings: MathVerifier.answer = 'box': expected one of 'boxed', 'gsm8k'"),
    ("verifiers_3/cfg.MathVerifier.answer = 'boxed'",
     'Nothing reads verifiers_3/cfg.MathVerifier.answer (--gin_bindings): choose '
     '@verifiers_3/cfg.MathVerifier()'),
])
def test_a_mistake_with_a_scope_is_named_in_one_sentence(binding, expected, tmp_path):
  text = gin_bindings.dump(composite(cfg.MathVerifier(), cfg.MathVerifier('gsm8k')))
  path = tmp_path / 'run.gin'
  path.write_text(text, encoding='utf-8')
  with pytest.raises(UserError) as caught:
    gin_bindings.load([str(path)], [binding])
  message = str(caught.value)
  assert expected in message and '\n' not in message and 'run.gin' not in message
  assert message.count('--gin_bindings') == 1


def test_numbers_of_numpy_are_written_as_plain_ones():
  run = dataclasses.replace(
      cfg.Run(**RUN), optimizer=cfg.AdamW(cfg.ConstantRate(np.float64(0.125))))
  assert 'cfg.ConstantRate.learning_rate = 0.125' in gin_bindings.dump(run).splitlines()
  assert_loads_equal(run)
