"""Real trained weights through Hugging Face's format and back: the same story."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.interop import llama2c
from jaxrl_pt.main import main
from jaxrl_pt.run.policy import load_policy

WEIGHTS = Path(__file__).parents[3] / 'shared' / 'data' / 'weights-stories260k'
PROMPT, NUM_TOKENS = 'Once upon a time, there was a', 96


def known_story() -> str:
  text = (WEIGHTS / 'stories260K.md').read_text(encoding='utf-8')
  return text[text.index('Once upon a time'):].split('```')[0]


def merges_of(tokenizer: llama2c.Tokenizer, names: list[str]) -> list[tuple[str, str]]:
  """Pairs of pieces that make a piece, the best scored piece first."""
  ids = {name: i for i, name in enumerate(names)}
  made = []
  for i, name in enumerate(names[259:], 259):
    pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
    known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    made += [(-tokenizer.scores[i], ids[a], ids[b], a, b) for a, b in known]
  return [(a, b) for *_, a, b in sorted(made)]


def tokenizer_json(tokenizer: llama2c.Tokenizer) -> tokenizers.Tokenizer:
  names = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)),
           *(piece.decode().replace(' ', '▁') for piece in tokenizer.pieces[259:])]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
      {name: i for i, name in enumerate(names)}, merges_of(tokenizer, names), byte_fallback=True,
      unk_token='<unk>'))
  backend.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')])
  steps = tokenizers.decoders
  backend.decoder = steps.Sequence([steps.Replace('▁', ' '), steps.ByteFallback(), steps.Fuse(),
                                    steps.Strip(' ', 1, 0)])
  backend.add_special_tokens(['<unk>', '<s>', '</s>'])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 1)])
  return backend


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  if not WEIGHTS.exists():
    pytest.skip('weights-stories260k is not in ../shared/data: no real weights to carry over')
  path = tmp_path_factory.mktemp('stories') / 'hf'
  config, params = llama2c.load_model(WEIGHTS / 'stories260K.bin')
  tokenizer = llama2c.load_tokenizer(WEIGHTS / 'tok512.bin')
  hf.save_model(path, config, params, bos_id=1, eos_id=2)
  backend = tokenizer_json(tokenizer)
  assert backend.encode(PROMPT).ids == tokenizer.encode(PROMPT)
  backend.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(json.dumps({
      'eos_token': '</s>', 'bos_token': '<s>', 'tokenizer_class': 'PreTrainedTokenizerFast'}))
  return path


def test_import_tells_and_export_keeps_the_known_story(folder: Path, tmp_path, capsys):
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert main(['import', str(folder), '--workdir', str(run)]) == 0
  capsys.readouterr()
  assert main(['sample', '--workdir', str(run), '--prompt', PROMPT, '--temperature', '0',
               '--num_tokens', str(NUM_TOKENS), '--json']) == 0
  sample = json.loads(capsys.readouterr().out)[0]
  assert sample['num_tokens'] == NUM_TOKENS
  assert known_story().startswith(PROMPT + sample['text'])
  assert main(['export', '--workdir', str(run), str(out)]) == 0
  config, params = llama2c.load_model(WEIGHTS / 'stories260K.bin')
  again, exported = hf.load_model(out)
  assert again == config == load_policy(run).model.config
  jax.tree.map(np.testing.assert_array_equal, exported, params)


@pytest.mark.parity
def test_transformers_tells_the_known_story(folder: Path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer(PROMPT, return_tensors='pt')
  drawn = model.generate(**ids, do_sample=False, max_new_tokens=NUM_TOKENS)
  assert known_story().startswith(tokenizer.decode(drawn[0], skip_special_tokens=True))
