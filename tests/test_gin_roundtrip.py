"""load(dump(run)) == run, whatever the run holds."""

import dataclasses

from hypothesis import given, reject, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.errors import UserError
from tests import random_config
from tests.test_config import ALL, RUN

# Arguments of functions, which no run holds.
ELSEWHERE = {cfg.Engine, cfg.ReSA, cfg.RefreshEvery, cfg.RefreshNever}


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


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(random_config.values(cfg.Part), min_size=1, max_size=5))
def test_verifiers_of_one_type_with_other_settings_load_again(verifiers):
  weights = tuple((-0.5) ** i for i in range(len(verifiers)))
  assert_loads_equal(random_config.holding(cfg.Composite(tuple(verifiers), weights)))


def composite(*verifiers: cfg.Part) -> cfg.Run:
  return random_config.holding(cfg.Composite(verifiers, (1.0,) * len(verifiers)))


def test_values_of_one_type_are_told_apart_by_a_scope():
  run = composite(cfg.MathVerifier('gsm8k'), cfg.FormatVerifier(), cfg.MathVerifier('boxed', False),
                  cfg.MathVerifier('gsm8k'))
  text = gin_bindings.dump(run)
  assert ('cfg.Composite.verifiers = (@cfg.MathVerifier(), @cfg.FormatVerifier(), '
          '@MathVerifier2/cfg.MathVerifier(), @cfg.MathVerifier())') in text.splitlines()
  assert "MathVerifier2/cfg.MathVerifier.answer = 'boxed'" in text.splitlines()
  assert_loads_equal(run)


def test_one_source_in_the_data_and_another_in_the_problems():
  run = random_config.holding(cfg.Problems(cfg.Arithmetic(7, num_terms=2)))
  data = dataclasses.replace(run.data, source=cfg.Demonstrations(cfg.Arithmetic(9, seed=3)))
  assert_loads_equal(dataclasses.replace(run, data=data))


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
])
def test_a_scope_that_leads_nowhere(binding, expected):
  text = gin_bindings.dump(composite(cfg.MathVerifier()))
  with pytest.raises(UserError) as caught:
    gin_bindings.load([], [text, binding])
  assert expected in str(caught.value)


def test_numbers_of_numpy_are_written_as_plain_ones():
  run = dataclasses.replace(
      cfg.Run(**RUN), optimizer=cfg.AdamW(cfg.ConstantRate(np.float64(0.125))))
  assert 'cfg.ConstantRate.learning_rate = 0.125' in gin_bindings.dump(run).splitlines()
  assert_loads_equal(run)
