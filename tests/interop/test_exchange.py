"""`import` and `export` as a user calls them, on a tiny random model with a trained tokenizer."""

import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxrl_pt import config as cfg
from jaxrl_pt import exchange
from jaxrl_pt import params as P
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.main import main
from jaxrl_pt.models import transformer
from jaxrl_pt.run.policy import load_policy

MODEL = cfg.Model(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=320, tied_head=False, norm_epsilon=1e-6, qkv_bias=True)
BITNET = dataclasses.replace(MODEL, qkv_bias=False, activation='relu2', sub_norm=True,
                             quant=cfg.Quant('ternary', 'int8'))


@functools.cache
def draw(config):
  specs = transformer.build(config).specs
  return jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))


def make_source(folder: Path, config: cfg.Model = MODEL) -> Path:
  """A Hugging Face folder whose tokenizer puts <s> before a text."""
  hf.save_model(folder, config, draw(config), eos_id=1, longest=4321)
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(['the model and the text of it'] * 9, tokenizers.trainers.BpeTrainer(
      vocab_size=300, special_tokens=['<s>', '</s>'], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)])
  backend.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': '</s>'}}))
  (folder / 'generation_config.json').write_text('{"eos_token_id": 1}')
  return folder


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return make_source(tmp_path_factory.mktemp('source') / 'model')


@pytest.fixture(scope='module')
def workdir(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp('imported') / 'deep' / 'run'
  assert main(['import', str(source), '--workdir', str(path)]) == 0
  return path


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
  """The one line on stderr of a call that ends with exit code 2."""
  capsys.readouterr()
  assert main(args) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1, (out, err)
  return err


def test_an_imported_model_is_a_policy(workdir: Path):
  trained = load_policy(workdir)
  assert (trained.step, trained.model.config) == (0, MODEL)
  assert_same(trained.params, draw(MODEL))
  tokenizer = trained.session.data.tokenizer
  assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
  assert tokenizer.decode(tokenizer.encode('the text')) == 'the text'
  assert sorted(p.name for p in workdir.parent.iterdir()) == ['run']


def test_it_samples_and_exports_to_the_same_weights(workdir: Path, source: Path, tmp_path, capsys):
  flags = ('--prompt', 'the ', '--num_tokens', '8', '--temperature', '0', '--json')
  assert main(['sample', '--workdir', str(workdir), *flags]) == 0
  first = json.loads(capsys.readouterr().out)
  assert first[0]['num_tokens'] >= 1
  assert main(['export', '--workdir', str(workdir), str(tmp_path / 'out')]) == 0
  assert 'Exported step 0' in capsys.readouterr().out
  config, params = hf.load_model(tmp_path / 'out')
  assert config == MODEL
  assert_same(params, draw(MODEL))
  settings = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert settings['max_position_embeddings'] == 4321
  for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
    assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_it_evaluates_and_is_no_run_to_resume(workdir: Path, tmp_path, capsys):
  (tmp_path / 'a.txt').write_text('the model and the text of it ' * 40)
  (tmp_path / 'held.txt').write_text('the text of the model ' * 20)
  text = (f"cfg.Data.source = @cfg.TextFiles()\ncfg.TextFiles.glob = '{tmp_path}/a.txt'\n"
          f"cfg.Data.validation_glob = '{tmp_path}/held.txt'\ncfg.Data.seq_len = 32\n")
  moved = tmp_path / 'moved'
  shutil.copytree(workdir, moved)
  assert main(['eval', '--workdir', str(moved), '--json', '--gin_bindings', text, '--gin_bindings',
               "cfg.HuggingFaceTokenizer.path = 'gone'"]) == 0
  assert 0 < json.loads(capsys.readouterr().out)['loss'] < 12
  assert 'holds a run of Imported' in mistake(
      capsys, 'train', '--gin_file', str(workdir / 'config.gin'), '--workdir', str(workdir),
      '--gin_bindings', text)


@pytest.mark.parametrize('config', [BITNET, dataclasses.replace(MODEL, param_dtype='bfloat16')],
                         ids=['bitnet', 'bfloat16'])
def test_other_models_there_and_back(tmp_path, config):
  source, workdir, out = make_source(tmp_path / 'a', config), tmp_path / 'b', tmp_path / 'c'
  assert main(['import', str(source), '--workdir', str(workdir)]) == 0
  trained = load_policy(workdir)
  assert trained.model.config == config
  assert {x.dtype for x in jax.tree.leaves(trained.params)} == {jnp.dtype(config.param_dtype)}
  kind = 'hf-packed' if config == BITNET else 'hf'
  assert main(['export', '--workdir', str(workdir), str(out), '--format', kind]) == 0
  again, params = hf.load_model(out)
  assert again == config
  if kind == 'hf':
    assert_same(params, trained.params)


def test_a_packed_model_there_and_back_to_the_last_bit(tmp_path):
  safetensors = pytest.importorskip('safetensors.numpy')
  source, workdir, out = make_source(tmp_path / 'a', BITNET), tmp_path / 'b', tmp_path / 'c'
  hf.save_model(source, BITNET, draw(BITNET), packed=True, eos_id=1)
  stored = safetensors.load_file(source / 'model.safetensors')
  random = np.random.default_rng(0)
  for name in stored:
    if name.endswith('_scale'):  # of the queries, keys and values of each layer, too
      stored[name][:] = random.uniform(0.01, 3)
  safetensors.save_file(stored, source / 'model.safetensors')
  assert main(['import', str(source), '--workdir', str(workdir)]) == 0
  assert main(['export', '--workdir', str(workdir), str(out), '--format', 'hf-packed']) == 0
  again = safetensors.load_file(out / 'model.safetensors')
  assert stored.keys() == again.keys()
  assert all(np.array_equal(again[name], value) for name, value in stored.items())
  assert not (out / 'ternary_scales.json').exists()


def test_what_exists_is_refused(workdir: Path, source: Path, tmp_path, capsys):
  assert f'{tmp_path} exists already' in mistake(
      capsys, 'import', str(source), '--workdir', str(tmp_path))
  assert f'{tmp_path} exists already' in mistake(
      capsys, 'export', '--workdir', str(workdir), str(tmp_path))
  assert list(tmp_path.iterdir()) == []


def without(folder: Path, name: str) -> None:
  (folder / name).unlink()


def set_keys(folder: Path, **changes) -> None:
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensor(folder: Path, name: str, change) -> None:
  """Puts another array in a tensor's place, or none."""
  safetensors = pytest.importorskip('safetensors.numpy')
  path = folder / 'model.safetensors'
  stored = safetensors.load_file(path)
  value = change(stored.pop(name, np.zeros(3, np.float32)))
  safetensors.save_file(stored | ({} if value is None else {name: value}), path)


def twice_in_the_header(folder: Path) -> None:
  path = folder / 'model.safetensors'
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = data[8:8 + length].rstrip()
  again = header.replace(b'{', b'{"model.norm.weight": {"dtype": "F32", "shape": [0], '
                         b'"data_offsets": [0, 0]}, ', 1)
  path.write_bytes(len(again).to_bytes(8, 'little') + again + data[8 + length:])


def index(folder: Path, file: str) -> None:
  (folder / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': {'model.norm.weight': file}}))


QUANTISED = {'quant_method': 'bitnet', 'linear_class': 'rowlinear'}
Q_PROJ = 'model.layers.1.self_attn.q_proj'


@pytest.mark.parametrize('change, words', [
  (lambda f: without(f, 'config.json'), 'config.json cannot be read'),
  (lambda f: without(f, 'model.safetensors'), 'model.safetensors is missing'),
  (lambda f: without(f, 'tokenizer.json'), 'neither tokenizer.json nor tokenizer.model'),
  (lambda f: (f / 'tokenizer.json').write_text('{}'), 'not a usable tokenizer.json'),
  (lambda f: (f / 'tokenizer_config.json').write_text('[]'), 'holds no JSON object'),
  (lambda f: (f / 'tokenizer_config.json').write_text('{"eos_token": "</x>"}'), "no token '</x>'"),
  (lambda f: os.truncate(f / 'model.safetensors', 5000), 'truncated'),
  (lambda f: set_tensor(f, f'{Q_PROJ}.bias', lambda x: None), f'has no tensor {Q_PROJ}.bias'),
  (lambda f: set_tensor(f, 'model.extra', lambda x: x), '1 tensors that a model'),
  (lambda f: set_tensor(f, f'{Q_PROJ}.weight', lambda x: x[1:]), f'{Q_PROJ}.weight in'),
  (lambda f: set_tensor(f, f'{Q_PROJ}.weight', lambda x: x * np.nan), 'holds NaN'),
  (lambda f: set_tensor(f, f'{Q_PROJ}.weight', lambda x: x.astype(np.int32)), 'is int32'),
  (twice_in_the_header, 'names model.norm.weight twice'),
  (lambda f: index(f, '../model.safetensors'), 'no file of its own folder'),
  (lambda f: index(f, 'gone.safetensors'), 'gone.safetensors cannot be read'),
  (lambda f: index(f, 'model.safetensors'), 'does not name'),
  (lambda f: set_keys(f, num_experts=8), 'num_experts = 8 is not covered'),
  (lambda f: set_keys(f, use_sliding_window=True), 'use_sliding_window = True is not covered'),
  (lambda f: set_keys(f, rope_scaling={'rope_type': 'yarn', 'factor': 4.0}), "type 'yarn'"),
  (lambda f: set_keys(f, quantization_config=QUANTISED), "linear_class 'rowlinear' is not covered"),
  (lambda f: set_keys(f, quantization_config=QUANTISED | {'linear_class': 'bitlinear'}),
   'has no tensor model.layers.0.mlp.down_proj.weight_scale'),
  (lambda f: set_keys(f, a_new_key=1.5), 'sets a_new_key = 1.5'),
  (lambda f: set_keys(f, **{'on two\nlines': 1}), 'sets on two lines = 1'),
  (lambda f: (f / 'generation_config.json').write_text(
      json.dumps({'eos_token_id': list(range(1, 20))})), 'names 18 tokens that end a response'),
])
def test_a_bad_folder_leaves_nothing_behind(source: Path, tmp_path, capsys, change, words):
  shutil.copytree(source, tmp_path / 'a')
  change(tmp_path / 'a')
  assert words in mistake(capsys, 'import', str(tmp_path / 'a'), '--workdir',
                          str(tmp_path / 'b' / 'run'))
  assert not (tmp_path / 'b' / 'run').exists()
  assert not (tmp_path / 'b').exists() or list((tmp_path / 'b').iterdir()) == []


@contextlib.contextmanager
def no_file_above(num_bytes: int):
  """As on a full disk, a write beyond so many bytes of a file fails."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('num_bytes', [3000, 20_000])
def test_a_full_disk_leaves_nothing_behind(source: Path, workdir: Path, tmp_path, capsys,
                                           num_bytes):
  path = tmp_path / 'new' / 'place'
  with no_file_above(num_bytes):
    for flags in (('import', str(source), '--workdir', str(path)),
                  ('export', '--workdir', str(workdir), str(path))):
      error = mistake(capsys, *flags)
      assert f'{path} cannot be written (' in error and 'free some space' in error
  assert list(path.parent.iterdir()) == []


def test_no_folder_and_a_tokenizer_of_another_model(tmp_path, capsys):
  assert 'is no folder' in mistake(capsys, 'import', str(tmp_path / 'x'), '--workdir',
                                   str(tmp_path / 'y'))
  small = dataclasses.replace(MODEL, vocab_size=100)
  make_source(tmp_path / 'a', small)
  assert 'the files are not of one model' in mistake(
      capsys, 'import', str(tmp_path / 'a'), '--workdir', str(tmp_path / 'y'))
  assert not (tmp_path / 'y').exists()


def test_which_tokens_begin_and_end_a_text(source: Path):
  path = source / 'tokenizer.json'
  for described, begin in (({}, '<s>'), ({'add_bos_token': None}, '<s>'),
                           ({'add_bos_token': True}, '<s>'), ({'add_bos_token': False}, ''),
                           ({'add_bos_token': True, 'bos_token': {'content': '</s>'}}, '</s>')):
    assert exchange._begin_of_text(path, described) == begin
  assert exchange._end_of_text(path, {}, {'eos_token_id': [1, 0]}) == '</s>'
  with pytest.raises(exchange.UserError, match='names a token'):
    exchange._end_of_text(path, {}, {'eos_token_id': 100_000})


def test_what_a_killed_import_leaves_is_removed_by_the_next(source: Path, tmp_path):
  home = tmp_path / 'runs'
  code = ('import os, signal, sys\nfrom jaxrl_pt import exchange, main\n'
          'exchange._carry = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n'
          'main.main(sys.argv[1:])')
  flags = ('import', str(source), '--workdir', str(home / 'run'))
  done = subprocess.run([sys.executable, '-c', code, *flags], check=False, capture_output=True)
  assert done.returncode == -signal.SIGKILL
  left, lock = sorted(path.name for path in home.iterdir())
  assert left.startswith('.run-') and lock == f'{left}.lock'
  assert main(flags) == 0
  assert [p.name for p in home.iterdir()] == ['run']


def test_a_damaged_file_that_was_carried_along_is_named(workdir: Path, tmp_path, capsys):
  moved = tmp_path / 'moved'
  shutil.copytree(workdir, moved)
  for name, content, advice in (('config.json', '[]', 'copy it again'),
                                ('ternary_scales.json', '[]', 'import the model again'),
                                ('ternary_scales.json', '{"a": "b"}', 'import the model again')):
    kept = moved / 'huggingface' / name
    before = kept.read_bytes() if kept.exists() else None
    kept.write_text(content)
    error = mistake(capsys, 'export', '--workdir', str(moved), str(tmp_path / 'out'))
    assert str(kept) in error and advice in error
    kept.unlink() if before is None else kept.write_bytes(before)
  assert [path.name for path in tmp_path.iterdir()] == ['moved']


def test_an_export_that_fails_or_is_stopped_leaves_nothing(workdir: Path, tmp_path, capsys,
                                                           monkeypatch):
  flags = ('export', '--workdir', str(workdir), str(tmp_path / 'out'), '--verify')
  monkeypatch.setitem(sys.modules, 'transformers', None)
  assert "pip install 'jaxrl_pt[hf]'" in mistake(capsys, *flags)

  def interrupt(*arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr(exchange, '_write_tokenizer', interrupt)
  assert main(flags) == 130
  assert list(tmp_path.iterdir()) == []
