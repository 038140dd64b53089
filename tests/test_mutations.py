"""The mistakes that `tools/mutate.py` makes stand in the code as they are written down."""

import importlib.util
from pathlib import Path
import sys

import pytest

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


def _load(name):
  spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


mutations = _load('mutations')
mutate = _load('mutate')


@pytest.mark.parametrize('mutation', mutations.MUTATIONS, ids=lambda m: m.name)
def test_every_mistake_can_be_made(mutation):
  assert mutate.count(mutation) == 1 and mutation.replace != mutation.find
  for tests in mutation.tests.split():
    path, _, name = tests.partition('::')
    assert f'def {name}' in (mutate.ROOT / path).read_text(encoding='utf-8')


def test_there_are_enough_mistakes_of_distinct_names():
  names = [m.name for m in mutations.MUTATIONS]
  assert len(names) >= 60 and len(set(names)) == len(names)


def test_a_mistake_is_made_in_a_copy_and_killed(tmp_path):
  tree = tmp_path / 'tree'
  mutate.copy_tree(tree)
  mutation, = mutate.chosen('roles_outside_claims')
  before = (mutate.ROOT / mutation.path).read_text(encoding='utf-8')
  result = mutate.run(mutation, tree)
  assert result.outcome == 'killed' and 'test_rewards_by_part' in result.detail
  assert (tree / mutation.path).read_text(encoding='utf-8') == before
  assert (mutate.ROOT / mutation.path).read_text(encoding='utf-8') == before
  assert mutate.run(mutation._replace(find='no such text'), tree).outcome == 'broken'
  harmless = mutation._replace(replace=f'{mutation.find} ')
  assert mutate.run(harmless, tree).outcome == 'survived'
