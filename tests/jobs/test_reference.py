"""The reference policy's log-probabilities: computed once, and again where anything has changed."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.jobs import pairs, reference
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import preferences

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=257)


@pytest.fixture
def opened(tmp_path: Path) -> sessions.Session:
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'{i}', 'chosen': 'a' * (i % 4 + 1),
                                      'rejected': 'b'}) + '\n' for i in range(23)))
  run = cfg.Run(1, MODEL, cfg.Data(cfg.Preferences(str(path)), cfg.Bytes(), 32, 0.0,
                                   long_documents='cut'),
                cfg.RewardModel(''), cfg.AdamW(cfg.ConstantRate(1e-3)), cfg.Train(2, 4))
  return sessions.open_session(run, tmp_path / 'work', '')


def params_of(session: sessions.Session, seed: int):
  return P.init(session.model(MODEL).specs, jax.random.key(seed))


def test_they_are_computed_once_for_a_policy_and_rows(opened, monkeypatch: pytest.MonkeyPatch):
  packed, asked = opened.data.train, []
  compute = reference._compute
  monkeypatch.setattr(reference, '_compute',
                      lambda *given: asked.append(given) or compute(*given))
  segments = pairs.num_segments(opened.data)
  first = reference.completions(opened, packed, lambda: params_of(opened, 0), 'first', segments)
  again = reference.completions(opened, packed, lambda: params_of(opened, 0), 'first', segments)
  np.testing.assert_array_equal(first, again)
  assert len(asked) == 1 and first.shape == (len(packed), segments)
  # The slow definition: the rows one by one, those behind the last whole batch among them.
  assert len(packed) % opened.run.train.batch_size
  score = preferences.completions(opened.model(MODEL), 0, segments)
  for row in range(len(packed)):
    expected = score(params_of(opened, 0), packed.batch([row]))[0][0]
    np.testing.assert_allclose(first[row], expected, rtol=1e-4, atol=1e-4)

  other = reference.completions(opened, packed, lambda: params_of(opened, 1), 'second', segments)
  assert len(asked) == 2 and not np.allclose(first, other)
  rounded = dataclasses.replace(opened, run=dataclasses.replace(
      opened.run, compute=cfg.Compute(dtype='bfloat16')))
  reference.completions(rounded, packed, lambda: params_of(opened, 0), 'first', segments)
  assert len(asked) == 3


def test_a_damaged_file_is_made_again(opened):
  packed, segments = opened.data.train, pairs.num_segments(opened.data)
  first = reference.completions(opened, packed, lambda: params_of(opened, 0), 'first', segments)
  [path] = opened.data.directory.glob('reference-*.npy')
  for damage in (path.read_bytes()[:-5], b'', b'no array'):
    path.write_bytes(damage)
    again = reference.completions(opened, packed, lambda: params_of(opened, 0), 'first', segments)
    np.testing.assert_array_equal(first, again)
    assert np.load(path).shape == first.shape
