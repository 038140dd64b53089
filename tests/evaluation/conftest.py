"""A tiny random model with opinions, imported into a work directory, and tasks beside it."""

from collections.abc import Callable
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import exchange
from jaxrl_pt import params as P
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.models import transformer
from jaxrl_pt.run.policy import Policy, load_policy
from tests.evaluation.local_tasks import tokenizer_of, write_task

MODEL = cfg.Model(num_layers=1, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=300, tied_head=False, norm_epsilon=1e-6)
TEXT = ('A pale horse stood by the river and watched the boats. ',
        'Nobody asked the miller why the wheel had stopped. ')


@pytest.fixture(scope='session', autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
  datasets = pytest.importorskip('datasets')
  datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp('datasets')
  datasets.disable_progress_bars()


@pytest.fixture(scope='session')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp('evaluation')
  source = folder / 'source'
  params = P.init(transformer.build(MODEL).specs, jax.random.key(0))
  hf.save_model(source, MODEL, {**params, 'embed': params['embed'] * 20}, eos_id=1)
  tokenizer_of(TEXT, begins=True).save(str(source / 'tokenizer.json'))
  (source / 'tokenizer_config.json').write_text(
      json.dumps({'bos_token': '<s>', 'eos_token': '</s>'}))
  exchange.import_model(source, folder / 'work')
  return folder / 'work'


@pytest.fixture(scope='session')
def policy(workdir: Path) -> Policy:
  return load_policy(workdir)


@pytest.fixture(scope='session')
def logp(policy: Policy) -> Callable[[list[int]], np.ndarray]:
  """f32[T, V]: of all that may follow each token of a text, by one plain forward pass."""
  model = policy.model

  def of(tokens: list[int]) -> np.ndarray:
    row = jnp.asarray([tokens])
    hidden = model.apply(policy.params, row, jnp.arange(len(tokens))[None], jnp.ones_like(row))
    return np.asarray(jax.nn.log_softmax(hidden[0] @ model.head(policy.params)))

  return of


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
  """A folder with the task `choices` over four rows."""
  folder = tmp_path / 'tasks'
  folder.mkdir()
  rows = [{'question': TEXT[i % 2][:9 + i], 'choices': [' horse', ' asked', ' by the'],
           'answer': i % 3, 'text': TEXT[i % 2] * (1 + i)} for i in range(4)]
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  write_task(folder, 'choices', 'output_type: multiple_choice\ndoc_to_text: question\n'
             'doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc, '
             'aggregation: mean, higher_is_better: true}]')
  return folder
