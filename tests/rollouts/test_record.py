"""Rollouts on disk: what was written comes back, and damage is named."""

import jax
import numpy as np
import pytest

from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.rollouts import record
from jaxrl_pt.rollouts.stages import Step
from jaxrl_pt.types import Prompts, RolloutBatch, Verdict

N, G, S, T = 4, 2, 8, 6


def make_step(suffix=(), mode=()) -> Step:
  """Random arrays, no two fields of which are equal."""
  rng = np.random.default_rng(0)
  reals, ints = (lambda *shape: rng.random(shape).astype(np.float32)), (
      lambda *shape: rng.integers(0, 256, shape).astype(np.int32))
  prompts = Prompts(ints(N, T), np.full(N, 3, np.int32), np.arange(N, dtype=np.int32), suffix,
                    {'answer': ints(N, 2), 'answer_lengths': ints(N)})
  in_response = (np.arange(S) < rng.integers(2, S + 1, (N, G, 1))).astype(np.float32)
  sampled = in_response * (np.arange(S) > 0)
  rollouts = RolloutBatch(ints(N, G, S), in_response, sampled.astype(np.float32), reals(N, G, S),
                          ints(N, G, S), ints(N, G, S), mode)
  reward = reals(N, G)
  verdict = Verdict(reward, np.ones((N, G), np.float32), (reward > 0.5).astype(np.float32),
                    {'answer': reals(N, G)})
  return Step(prompts, ('a', 'b', 'c', 'd'), rollouts, verdict, {}, None)


@pytest.mark.parametrize('optional', [
    {}, {'suffix': np.array([[1, 2]] * N, np.int32), 'mode': np.ones((N, G), np.int32)}],
                         ids=['without', 'with'])
def test_rollouts_on_disk_come_back(tmp_path, optional):
  done = make_step(**optional)
  record.dump(tmp_path, 5, 2, done, ByteTokenizer())
  found = record.load(tmp_path / '5.npz')
  assert [type(tree) for tree in found] == [Prompts, RolloutBatch, Verdict]
  jax.tree.map(np.testing.assert_array_equal, found, (done.prompts, done.rollouts, done.verdict))
  assert [x.dtype for x in jax.tree.leaves(found)] == [
      x.dtype for x in jax.tree.leaves((done.prompts, done.rollouts, done.verdict))]


def test_as_text_a_response_has_its_forced_tokens():
  done = make_step()
  trees = {'prompts': done.prompts, 'rollouts': done.rollouts, 'verdict': done.verdict}
  groups = record.as_text(trees, done.references, ByteTokenizer())
  decode = ByteTokenizer().decode
  for n, group in enumerate(groups):
    assert group['prompt'] == decode(done.prompts.tokens[n, :3].tolist())
    assert group['reference'] == done.references[n]
    for g, response in enumerate(group['responses']):
      length = int(done.rollouts.in_response[n, g].sum())
      assert response['text'] == decode(done.rollouts.tokens[n, g, :length].tolist())
      assert response['reward'] == pytest.approx(float(done.verdict.reward[n, g]))


def test_damage_is_named(tmp_path):
  record.dump(tmp_path, 5, 2, make_step(), ByteTokenizer())
  damaged = tmp_path / '6.npz'
  damaged.write_bytes((tmp_path / '5.npz').read_bytes()[:300])
  for path in (damaged, tmp_path / 'none.npz'):
    with pytest.raises(UserError, match='dump_every = 1'):
      record.load(path)
