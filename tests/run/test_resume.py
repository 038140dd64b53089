"""What a resume may change is one table, and every setting has its place in it."""

import dataclasses

import jax
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.transformer import build
from jaxrl_pt.params import map_specs
from jaxrl_pt.run import resume

RUN, TEXT = gin_bindings.load(['gin/run/pretrain_tiny.gin'], [])
NOTHING: frozenset[str] = frozenset()


def changed(*bindings: str) -> list[resume.Difference]:
  return resume.differences(
      TEXT, gin_bindings.load(['gin/run/pretrain_tiny.gin'], bindings)[1])


def refused(found: list[resume.Difference], allowed: frozenset[str] = NOTHING) -> str:
  with pytest.raises(UserError) as error:
    resume.check_settings(found, allowed, 'checkpoint 7 in work')
  return str(error.value)


def test_the_table_names_settings_that_exist_and_each_once():
  tables = resume.FREE, resume.BY_CONTENT, resume.FIXED, resume.SAME_ARRAYS
  assert sum(map(len, tables)) == len(frozenset().union(*tables))
  for name in frozenset().union(*tables):
    owner, field = name.split('.')
    assert field in {f.name for f in dataclasses.fields(getattr(cfg, owner))}, name


def test_the_settings_of_a_model_that_leave_its_arrays_are_those_that_do():
  other = {'activation': 'relu2', 'quant': cfg.Quant(), 'sub_norm': False, 'tied_head': False,
           'rope': cfg.Llama3Rope(), 'param_dtype': 'bfloat16', 'adapter': cfg.LoRA(2)}
  model = RUN.model
  arrays = lambda config: map_specs(lambda spec: (spec.shape, spec.dtype), build(config).specs)
  for field in dataclasses.fields(cfg.Model):
    old = getattr(model, field.name)
    new = other[field.name] if field.name in other else 2 * old
    if old == new:
      new = {'relu2': 'swiglu', False: True}[new]
    stays = arrays(dataclasses.replace(model, **{field.name: new})) == arrays(model)
    assert stays == (f'Model.{field.name}' in resume.SAME_ARRAYS), field.name


def test_equal_settings_do_not_differ():
  assert resume.differences(TEXT, TEXT) == []
  assert resume.differences('cfg.Cosine.end_rate = 0\n', 'cfg.Cosine.end_rate = 0.0\n') == []


@pytest.mark.parametrize('binding, name', [
    ('cfg.AdamW.b1 = 0.8', 'AdamW.b1'),
    ('cfg.AdamW.clip_norm = 0.5', 'AdamW.clip_norm'),
    ('cfg.AdamW.schedule = @cfg.ConstantRate()\ncfg.ConstantRate.learning_rate = 1.0',
     'AdamW.schedule'),
    ('cfg.Model.rope_theta = 5e5', 'Model.rope_theta'),
    ("cfg.Model.activation = 'swiglu'", 'Model.activation'),
    (f'cfg.Quant.hadamard = {not RUN.model.quant.hadamard}', 'Quant.hadamard'),
    ("cfg.Compute.dtype = 'bfloat16'", 'Compute.dtype'),
    ('cfg.NextToken.int4_from = 0.25', 'NextToken.int4_from')])
def test_what_changes_numbers_is_refused_by_name_unless_allowed(binding: str, name: str):
  found = changed(*binding.split('\n'))
  assert [d.name for d in found] == [name]
  message = refused(found)
  assert str(found[0]) in message and f'--allow_changes {name}' in message
  assert refused(found, frozenset(('AdamW.eps',))) == message
  resume.check_settings(found, frozenset((name,)), '')
  resume.check_settings(found, frozenset((resume.ANY,)), '')


RL = """cfg.RL.verifier = @cfg.MathVerifier()
cfg.RL.start_from = '/runs/a'
cfg.Rollouts.group_size = 8
cfg.Sampler.temperature = 1.0
cfg.Arithmetic.size = 1000
cfg.VerifierPool.num_workers = 2
"""


@pytest.mark.parametrize('before, now, name', [
    ('@cfg.MathVerifier()', '@cfg.AnswerMatch()', 'RL.verifier'),
    ('group_size = 8', 'group_size = 4', 'Rollouts.group_size'),
    ('temperature = 1.0', 'temperature = 0.9', 'Sampler.temperature'),
    ('size = 1000', 'size = 77', 'Arithmetic.size')])
def test_what_changes_reinforcement_is_refused(before: str, now: str, name: str):
  found = resume.differences(RL, RL.replace(before, now))
  assert [d.name for d in found] == [name] and name in refused(found)


def test_places_are_free_and_their_content_is_checked_elsewhere():
  found = resume.differences(RL, RL.replace('/runs/a', '/moved/a').replace('workers = 2',
                                                                           'workers = 3'))
  assert [d.name for d in found] == ['RL.start_from', 'VerifierPool.num_workers']
  resume.check_settings(found, NOTHING, '')


def test_what_does_not_is_free():
  found = changed('cfg.Train.num_steps = 7000', 'cfg.Train.log_every = 3', 'cfg.Mesh.data = 2',
                  'cfg.Checkpoint.every = 9', 'cfg.Compute.unroll = 1', 'cfg.Data.num_workers = 1')
  assert len(found) >= 5
  resume.check_settings(found, NOTHING, '')


@pytest.mark.parametrize('binding, what', [('cfg.Model.d_ff = 96', 'another model'),
                                           ('cfg.Run.seed = 77', 'another run'),
                                           ('cfg.Train.batch_size = 2', 'another run')])
def test_what_no_state_outlives_is_refused_whatever_is_allowed(binding: str, what: str):
  found = changed(binding)
  assert what in refused(found, frozenset((resume.ANY,)))
  with pytest.raises(UserError, match='no run goes on with another'):
    resume.check_allowed([found[0].name])


def test_a_setting_that_came_later_differs_only_from_its_default():
  old = TEXT.replace(f'cfg.AdamW.eps = {RUN.optimizer.eps!r}\n', '')
  old = '\n'.join(line for line in old.split('\n') if not line.startswith('cfg.Model.quant'))
  assert old != TEXT
  found = resume.differences(old, TEXT)
  assert [d.name for d in found] in ([], ['Model.quant'])
  now = TEXT.replace('cfg.AdamW.eps = ', 'cfg.AdamW.eps = 1')
  assert ('AdamW.eps', '(unset)') in [(d.name, d.before) for d in resume.differences(old, now)]


def test_a_setting_that_was_renamed_since_does_not_differ():
  old = TEXT.replace('cfg.WSD.peak_rate = ', 'cfg.WSD.peak = ').replace('WSD.end_rate', 'WSD.end')
  assert resume.differences(old, TEXT) != []
  assert resume.differences(gin_bindings.current_names(old), TEXT) == []


def test_names_given_leave_must_exist():
  assert resume.check_allowed([]) == {resume.ANY}
  names = ['Cosine.peak_rate', 'metrics.jsonl']
  assert resume.check_allowed(names) == set(names)
  with pytest.raises(UserError, match='Cosine.peek: there is no such setting'):
    resume.check_allowed(['Cosine.peek'])


def test_other_surroundings_are_one_sentence():
  here = resume.environment(jax.devices())
  assert here['CPU threads'] >= 1 and here['device'] == 'cpu' and here['jax'] == jax.__version__
  assert resume.describe_environment(here, here, 5) is None
  text = resume.describe_environment({**here, 'CPU threads': 96, 'jaxlib': '0.1'}, here, 5)
  assert text is not None and 'CPU threads 96, now' in text and "jaxlib '0.1', now" in text
  assert 'devices' not in text and text.count('\n') == 0
