"""What the shipped run files resolve to is what `tests/golden` says, setting by setting."""

import dataclasses

import pytest

from jaxrl_pt import config as cfg
from tests.golden import regenerate

BASE = regenerate.BASE.read_text(encoding='utf-8')
READ = 'run `make golden` and read the diff'


def golden(name: str) -> str:
  return (regenerate.GOLDEN / f'{name}.gin').read_text(encoding='utf-8')


def test_the_base_is_what_the_defaults_and_gin_base_say():
  assert regenerate.base() == BASE, READ


@pytest.mark.parametrize('name', regenerate.runs())
def test_a_run_differs_from_the_base_as_its_golden_says(name):
  # From the base of today: a new default is no difference of any run, and fails the test above.
  assert regenerate.difference(regenerate.resolved(name), regenerate.base()) == golden(name), READ


@pytest.mark.parametrize('name', regenerate.runs())
def test_golden_and_base_together_hold_every_setting_of_the_run(name):
  assert regenerate.whole(golden(name), BASE) == regenerate.settings(regenerate.resolved(name))


def test_no_golden_is_left_over():
  assert sorted(p.stem for p in regenerate.GOLDEN.glob('*.gin')) == regenerate.runs()


# --- What a golden notices ----------------------------------------------------------


@pytest.mark.parametrize('name', ['pretrain_tiny', 'rpt_tiny', 'dapo_tiny', 'short_rl_7b'])
def test_a_change_of_any_one_value_is_noticed(name):
  text = regenerate.resolved(name)
  found = regenerate.settings(text)
  assert len(found) > 50
  for setting, value in found.items():
    changed = text.replace(f'{setting} = {value}\n', f'{setting} = {value}1\n')
    assert changed != text and regenerate.difference(changed, BASE) != golden(name), setting


@pytest.mark.parametrize('binding', [
    'cfg.Train.num_steps = 181',  # written in the run file
    'cfg.Train.log_every = 11',  # a default until now
    'cfg.Train.eval_every = 100',  # a default now
    'cfg.Run.seed = 1',  # written in gin/base.gin
    'cfg.AdamW.schedule = @cfg.Cosine()\ncfg.Cosine.peak_rate = 0.01',  # another type
])
def test_a_binding_that_changes_a_value_is_noticed(binding):
  text = regenerate.resolved('pretrain_tiny', binding)
  assert regenerate.difference(text, BASE) != golden('pretrain_tiny')


def test_a_binding_equal_to_the_default_is_no_difference():
  assert regenerate.resolved('pretrain_tiny', 'cfg.AdamW.b1 = 0.9') == regenerate.resolved(
      'pretrain_tiny')


def test_a_new_setting_with_a_default_changes_the_base_alone(monkeypatch):
  """Every run is written as after the field had come; the goldens are those from before."""
  Train = dataclasses.make_dataclass('Train', [('patience', int, 7)], bases=(cfg.Train,),
                                     frozen=True)
  monkeypatch.setattr(cfg, 'Train', Train)
  base = regenerate.base()
  assert set(base.splitlines()) - set(BASE.splitlines()) == {'cfg.Train.patience = 7'}
  for name in regenerate.runs():
    text = regenerate.resolved(name) + '\ncfg.Train.patience = 7\n'
    assert regenerate.difference(text, base) == golden(name)
    assert regenerate.whole(golden(name), base) == regenerate.settings(text)


# --- Scopes -------------------------------------------------------------------------


def test_a_value_with_a_scope_differs_from_the_defaults_of_its_type():
  text = regenerate.resolved(
      'opo_tiny', 'cfg.RL.verifier = @cfg.Composite()', 'cfg.Composite.weights = [1, 0.5]',
      'cfg.Composite.verifiers = [@cfg.MathVerifier(), @plain/cfg.MathVerifier()]',
      "cfg.MathVerifier.answer = 'gsm8k'", 'plain/cfg.MathVerifier.symbolic = False')
  own = regenerate.difference(text, BASE)
  assert {name: value for name, value in regenerate.settings(own).items() if '/' in name} == {
      'verifiers_2/cfg.MathVerifier.answer': "'gsm8k'",
      'verifiers_2/cfg.MathVerifier.symbolic': 'False'}
  assert regenerate.whole(own, BASE) == regenerate.settings(text)
