"""Adapters from and to PEFT's folders; that the library computes the same is in tests/parity."""

import dataclasses
import json
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.interop import peft, tensor_file
from jaxrl_pt.models import adapters, transformer
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run.policy import load_policy
from tests.interop.test_exchange import BITNET, MODEL, draw, main, make_source, mistake

LORA = cfg.LoRA(4, 10.0, ('q_proj', 'o_proj', 'down_proj'), rank_stabilized=True)


def make_adapter(folder: Path, config: cfg.Model = MODEL, adapter: cfg.LoRA = LORA):
  """A folder of PEFT, and the parameters of the model with its adapters."""
  model = transformer.build(dataclasses.replace(config, adapter=adapter))
  params = adapters.adapt(model.specs, draw(config), jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = jax.tree.map(
      lambda s, x: jax.random.normal(next(keys), x.shape) / 4 if s.role == 'adapter' else x,
      model.specs, params, is_leaf=P.is_spec)
  folder.mkdir()
  peft.save(folder, adapter, model.specs, params)
  return model, params


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return make_source(tmp_path_factory.mktemp('source') / 'model')


def test_a_folder_has_pefts_names_and_is_read_back(tmp_path: Path):
  model, params = make_adapter(tmp_path / 'a')
  entries = tensor_file.open_file(tmp_path / 'a' / peft.TENSORS)
  assert len(entries) == 2 * 2 * 3
  a, b = (entries[f'base_model.model.model.layers.1.self_attn.q_proj.lora_{m}.weight']
          for m in 'AB')
  assert (a.shape, b.shape) == ((4, 32), (32, 4))
  np.testing.assert_array_equal(tensor_file.read(a), params['layers']['wq'].a[1].T)
  assert peft.read_settings(tmp_path / 'a') == LORA
  loaded = peft.load(tmp_path / 'a', model.specs, make_mesh(cfg.Mesh()))
  jax.tree.map(np.testing.assert_array_equal, loaded, P.trained(model.specs, params))


def test_all_linear_means_every_projection(tmp_path: Path):
  make_adapter(tmp_path / 'a')
  edit(tmp_path / 'a', target_modules='all-linear')
  assert peft.read_settings(tmp_path / 'a').projections == cfg.LoRA().projections


def edit(folder: Path, **changes):
  path = folder / peft.CONFIG
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_import_export_and_merge(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  """A model with an adapter is a policy, whose adapter and merged weights leave again."""
  model, params = make_adapter(tmp_path / 'a')
  work = tmp_path / 'work'
  assert main(['import', str(source), '--adapter', str(tmp_path / 'a'), '--workdir',
               str(work)]) == 0
  trained = load_policy(work)
  assert trained.model.config == model.config
  jax.tree.map(np.testing.assert_array_equal, trained.params, params)
  assert main(['sample', '--workdir', str(work), '--prompt', 'the', '--num_tokens', '3']) == 0
  assert main(['export', '--workdir', str(work), str(tmp_path / 'b'), '--format', 'peft']) == 0
  for name in (peft.CONFIG, peft.TENSORS):
    assert (tmp_path / 'b' / name).read_bytes() == (tmp_path / 'a' / name).read_bytes()
  assert main(['export', '--workdir', str(work), str(tmp_path / 'merged')]) == 0
  config, merged = hf.load_model(tmp_path / 'merged')
  assert config == MODEL
  jax.tree.map(np.testing.assert_array_equal, merged, adapters.merged(params))
  err = mistake(capsys, 'export', '--workdir', str(work), str(tmp_path / 'c'), '--format', 'peft',
                '--verify')
  assert '--verify' in err and not (tmp_path / 'c').exists()


def test_an_adapted_ternary_model_exports_its_adapter_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  make_source(tmp_path / 'model', BITNET)
  make_adapter(tmp_path / 'a', BITNET)
  work = str(tmp_path / 'work')
  assert main(['import', str(tmp_path / 'model'), '--adapter', str(tmp_path / 'a'), '--workdir',
               work]) == 0
  for form in ('hf', 'hf-packed'):
    err = mistake(capsys, 'export', '--workdir', work, str(tmp_path / 'b'), '--format', form)
    assert 'no ternary codes: export the adapters with --format peft' in err
    assert not (tmp_path / 'b').exists()
  assert main(['export', '--workdir', work, str(tmp_path / 'b'), '--format', 'peft']) == 0
  assert ((tmp_path / 'b' / peft.TENSORS).read_bytes()
          == (tmp_path / 'a' / peft.TENSORS).read_bytes())


def test_a_model_without_adapters_has_none_to_export(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  work = str(tmp_path / 'work')
  assert main(['import', str(source), '--workdir', work]) == 0
  err = mistake(capsys, 'export', '--workdir', work, str(tmp_path / 'b'), '--format', 'peft')
  assert 'has no adapters; export it with --format hf' in err


@pytest.mark.parametrize('changes, expected', [
    ({'peft_type': 'IA3'}, "does not say peft_type = 'LORA'"),
    ({'use_dora': True}, 'use_dora = True, which would change what the adapter computes'),
    ({'modules_to_save': ['lm_head']}, "modules_to_save = ['lm_head'], which would change"),
    ({'bias': 'lora_only'}, "bias = 'lora_only', which would change"),
    ({'rank_pattern': {'q_proj': 2}}, "rank_pattern = {'q_proj': 2}, which would change"),
    ({'layers_to_transform': [0]}, 'layers_to_transform = [0], which would change'),
    ({'a_key_of_tomorrow': 1}, 'a_key_of_tomorrow = 1, which would change'),
    ({'task_type': 'SEQ_CLS'}, "task_type = 'SEQ_CLS', which would change"),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights = 'pissa', which changed the base too"),
    ({'target_modules': ['q_proj', 'lm_head']}, "target_modules = ['q_proj', 'lm_head']"),
    ({'target_modules': [['q_proj']]}, "target_modules = [['q_proj']]: expected a list of names"),
    ({'target_modules': '.*proj'}, "target_modules = '.*proj': expected a list of names among"),
    ({'r': 0}, 'LoRA.rank = 0: expected a whole number'),
    ({'r': 32}, 'LoRA.rank = 32 is not below 32'),
    ({'r': 3}, 'lora_A.weight in'),
    ({'target_modules': ['q_proj', 'k_proj']}, 'has no tensor base_model.model.model.layers.0'),
    ({'target_modules': ['q_proj']}, 'holds 8 tensors for which the model has no place'),
])
def test_an_adapter_that_is_not_covered_is_refused_by_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes, expected):
  make_adapter(tmp_path / 'a')
  edit(tmp_path / 'a', **changes)
  err = mistake(capsys, 'import', str(source), '--adapter', str(tmp_path / 'a'), '--workdir',
                str(tmp_path / 'work'))
  assert expected in err
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a']


def test_an_adapter_of_another_or_a_damaged_model_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  def refused(folder: Path) -> str:
    return mistake(capsys, 'import', str(source), '--adapter', str(folder), '--workdir',
                   str(tmp_path / 'work'))

  make_adapter(tmp_path / 'wide', dataclasses.replace(MODEL, d_ff=64))
  assert 'float32[4, 64], and the model asks for floating-point numbers [4, 48]' in refused(
      tmp_path / 'wide')
  make_adapter(tmp_path / 'deep', dataclasses.replace(MODEL, num_layers=3))
  assert 'holds 6 tensors for which the model has no place' in refused(tmp_path / 'deep')
  make_adapter(tmp_path / 'short')
  path = tmp_path / 'short' / peft.TENSORS
  path.write_bytes(path.read_bytes()[:-8])
  assert 'is truncated' in refused(tmp_path / 'short')
  shutil.rmtree(tmp_path / 'short')
  error = refused(tmp_path / 'short')
  assert 'adapter_config.json cannot be read' in error
  assert 'give the whole folder of an adapter' in error
