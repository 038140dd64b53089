"""RPT's environment as a run opens it: positions of which split train and measure the policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import next_token
from jaxrl_pt.environments import next_token as environments
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import session as sessions

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=257, tied_head=False)
NUM_CONTEXT, PROMPT_LEN = 8, 16  # fewest and most tokens of a context


@pytest.fixture(scope='module')
def session(tmp_path_factory) -> sessions.Session:
  """Training documents hold the letter a alone, validation documents the letter b; there are more
  of the first."""
  directory = tmp_path_factory.mktemp('rpt')
  for name, letter, lengths in (('train', 'a', range(20, 60)), ('held', 'b', range(20, 26))):
    (directory / name).mkdir()
    for length in lengths:
      (directory / name / f'{length}.txt').write_text(letter * length)
  method = cfg.RPT('unused', rollouts=cfg.Rollouts(4, 2, PROMPT_LEN, 1), scored_examples=1000,
                   eval_positions=1000)
  run = cfg.Run(
      seed=1, model=MODEL, objective=method,
      data=cfg.Data(cfg.TextFiles(str(directory / 'train' / '*.txt')), cfg.Bytes(), 32,
                    validation_fraction=0.0,
                    validation_glob=str(directory / 'held' / '*.txt')),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)), train=cfg.Train(9, batch_size=4))
  return sessions.open_session(run, directory / 'work', '')


def always_b(scale: float):
  """Parameters that predict b everywhere, with e^(16 · scale) to 1 against any other byte."""
  model = models.build(MODEL, cfg.Compute(), make_mesh(cfg.Mesh()))
  zeros = jax.tree.map(jnp.zeros_like, P.init(model.specs, jax.random.key(0)))
  ones = jax.tree_util.tree_map_with_path(
      lambda path, x: x + 1 if 'norm' in str(path[-1]) or 'embed' in str(path[-1]) else x, zeros)
  return model, {**ones, 'head': ones['head'].at[:, ord('b')].set(scale)}


def open_environment(session, tmp_path, model, params, **changed):
  method = dataclasses.replace(session.run.objective, **changed)
  session = dataclasses.replace(session, workdir=tmp_path)
  environment = environments.make_environment(session, method, model, params)
  tables = {}
  for split in ('train', 'validation'):
    with np.load(tmp_path / f'positions-{split}.npz') as arrays:
      tables[split] = next_token.Positions(arrays['example'], arrays['t'], arrays['entropy'])
  return environment, tables


def contexts(packed) -> list[tuple[int, ...]]:
  """Of every position with enough context whose target has bytes, one by one."""
  found = []
  for i in range(len(packed)):
    batch = packed.example(i)
    tokens, segments, targets = (np.asarray(x)[0] for x in (
        batch.tokens, batch.segments, batch.targets))
    for t, segment in enumerate(segments):
      first = int(np.argmax(segments == segment))
      if segment > 0 and t - first + 1 >= NUM_CONTEXT and targets[t] < 256:
        found.append(tuple(tokens[max(first, t - PROMPT_LEN + 1):t + 1].tolist()))
  return found


def test_what_is_measured_is_the_validation_split_and_can_be_predicted(session, tmp_path):
  """A policy that always says b is right at every position of the validation split, and at none
  of the training split. No position asks for the end of a text, which has no bytes."""
  model, params = always_b(0.05)
  environment, tables = open_environment(session, tmp_path, model, params)
  found = environment.score(params)
  for split in ('easy', 'medium', 'hard'):  # The entropy is that of ln 16 nearly everywhere.
    assert found[f'validation/{split}_argmax'] == 1.0
    assert found[f'validation/{split}_count'] == len(set(contexts(session.data.validation)))
  assert len(tables['validation']) == len(contexts(session.data.validation)) > 20
  assert len(tables['train']) == len(contexts(session.data.train)) > 500
  for split, letter in (('train', 'a'), ('validation', 'b')):
    packed = getattr(session.data, split)
    targets = np.asarray(packed.batch(range(len(packed))).targets)
    assert set(targets[tables[split].example, tables[split].t]) == {ord(letter)}
  prompts, _ = environment.take(0)
  assert (prompts.extras['continuation'][:, 0] == ord('a')).all()


def test_training_and_evaluation_have_their_own_thresholds(session, tmp_path):
  model = session.model(MODEL)
  params = P.init(model.specs, jax.random.key(3))
  params = {**params, 'head': params['head'] * 8}
  _, every = open_environment(session, tmp_path / 'every', model, params, min_entropy=0.0,
                       difficulty=(0.0, 1.0, 1.5))
  minimum = float(np.quantile(every['train'].entropy, 0.6))
  lowest = float(np.quantile(every['validation'].entropy, 0.2))
  _, tables = open_environment(session, tmp_path / 'some', model, params, min_entropy=minimum,
                        difficulty=(lowest, 90.0, 91.0))
  for split, own, other in (('train', minimum, lowest), ('validation', lowest, minimum)):
    entropy = every[split].entropy
    assert (entropy >= own).sum() != (entropy >= other).sum()
    np.testing.assert_array_equal(tables[split].entropy, entropy[entropy >= own])
