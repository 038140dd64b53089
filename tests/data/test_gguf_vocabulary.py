"""The tokenizer in a GGUF file encodes like the one that it was made of."""

import gzip
import io
import json
from pathlib import Path

import pytest
import tokenizers

from jaxrl_pt.data import gguf_vocabulary
from jaxrl_pt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxrl_pt.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxrl_pt.interop import llama2c

SHARED = Path(__file__).parents[3] / 'shared' / 'data'
TEXTS = ['Hello  world', 'naïve café, 123 4567', "it's\n\n\tdef f(x):\n    return x", 'é①ﬁ 🧿']


def shared(name: str) -> bytes:
  path = SHARED / name
  if not path.exists():
    pytest.skip(f'{name} is not in ../shared/data')
  return gzip.decompress(path.read_bytes()) if name.endswith('.gz') else path.read_bytes()


def rebuilt(keys: dict, pattern: str) -> tokenizers.Tokenizer:
  """Byte-level BPE of the metadata alone, with a rule that splits the text first."""
  merges = [tuple(m.split(' ')) for m in keys['tokenizer.ggml.merges']]
  vocabulary = {token: i for i, token in enumerate(keys['tokenizer.ggml.tokens'])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  split = tokenizers.pre_tokenizers
  backend.pre_tokenizer = split.Sequence([
      split.Split(tokenizers.Regex(pattern), 'isolated'), split.ByteLevel(False, use_regex=False)])
  return backend


GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def test_byte_level_bpe_by_its_metadata_alone():
  own = JsonTokenizer(shared('tok-gpt2/gpt2.tokenizer.json.gz').decode(), '<|endoftext|>', '')
  keys = gguf_vocabulary.metadata(own, own.vocab_size + 3, (7, own.eos_id, 9))
  assert keys['tokenizer.ggml.pre'] == 'gpt-2'
  backend = rebuilt(keys, GPT2)
  for text in TEXTS:
    assert backend.encode(text).ids == own.encode(text)
  assert keys['tokenizer.ggml.token_type'][own.eos_id] == 3  # control
  assert keys['tokenizer.ggml.tokens'][-3:] == ['[PAD50257]', '[PAD50258]', '[PAD50259]']
  assert keys['tokenizer.ggml.token_type'][-4:] == [3, 5, 5, 5]
  assert keys['tokenizer.ggml.eos_token_id'] == own.eos_id
  assert (keys['tokenizer.ggml.eot_token_id'], keys['tokenizer.ggml.eom_token_id']) == (7, 9)
  assert keys['tokenizer.ggml.add_bos_token'] is False
  assert 'tokenizer.ggml.bos_token_id' not in keys


def test_sentencepiece_by_its_metadata_alone():
  pytest.importorskip('sentencepiece')
  own = SentencePieceTokenizer(shared('tok-mistral/tokenizer.model.v1'))
  keys = gguf_vocabulary.metadata(own, own.vocab_size, ())
  assert keys['tokenizer.ggml.model'] == 'llama' and keys['tokenizer.ggml.add_space_prefix']
  assert keys['tokenizer.ggml.token_type'][:4] == [2, 3, 3, 6]
  pieces = tuple(bytes([int(t[3:5], 16)]) if kind == 6 else t.replace('▁', ' ').encode()
                 for t, kind in zip(keys['tokenizer.ggml.tokens'],
                                    keys['tokenizer.ggml.token_type'], strict=True))
  ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if i > 258}
  theirs = llama2c.Tokenizer(pieces, tuple(keys['tokenizer.ggml.scores']), ids)
  for text in TEXTS:
    assert theirs.encode(text, bos=False) == own.encode(text)
  assert keys['tokenizer.ggml.bos_token_id'] == own.bos_id == 1


def test_a_tokenizer_that_llama_cpp_would_not_follow_has_no_metadata():
  assert gguf_vocabulary.metadata(ByteTokenizer(), 257, ()) == {}
  text = shared('tok-gpt2/gpt2.tokenizer.json.gz').decode()
  for change in ({'pre_tokenizer': {'type': 'Whitespace'}}, {'normalizer': {'type': 'Lowercase'}},
                 {'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True,
                                    'trim_offsets': True}}, split_by(r'\w+')):
    own = JsonTokenizer(json.dumps(json.loads(text) | change), '<|endoftext|>', '')
    assert gguf_vocabulary.metadata(own, own.vocab_size, ()) == {}
  r1 = JsonTokenizer(shared('tok-deepseek-r1/tokenizer.json.gz').decode(),
                     '<｜end▁of▁sentence｜>', '')
  assert gguf_vocabulary.metadata(r1, r1.vocab_size, ()) == {}


def split_by(pattern: str) -> dict:
  return {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
      {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False},
      {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}]}}


def pattern_of(name: str) -> str:
  """As the files of Qwen2.5 and Llama 3 have it."""
  digits = {'qwen2': '', 'llama-bpe': '{1,3}'}[name]
  return (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
          + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')


@pytest.mark.parametrize('name', ['qwen2', 'llama-bpe'])
def test_known_splits_have_their_names(name):
  pattern = pattern_of(name)
  text = shared('tok-gpt2/gpt2.tokenizer.json.gz').decode()
  own = JsonTokenizer(json.dumps(json.loads(text) | split_by(pattern)), '<|endoftext|>', '')
  keys = gguf_vocabulary.metadata(own, own.vocab_size, ())
  assert keys['tokenizer.ggml.pre'] == name
  backend = rebuilt(keys, pattern)
  assert all(backend.encode(text).ids == own.encode(text) for text in TEXTS)


def test_a_model_that_normalises_or_spells_nothing_in_bytes_has_no_metadata():
  sentencepiece = pytest.importorskip('sentencepiece')
  for options in ({'byte_fallback': True}, {'normalization_rule_name': 'identity',
                                            'remove_extra_whitespaces': False}):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the model and the text of it'] * 9), model_writer=written,
        model_type='bpe', vocab_size=290 if 'byte_fallback' in options else 24,
        hard_vocab_limit=False, minloglevel=9, **options)
    own = SentencePieceTokenizer(written.getvalue())
    assert gguf_vocabulary.metadata(own, own.vocab_size, ()) == {}


def test_a_unigram_model_has_no_metadata():
  pytest.importorskip('sentencepiece')
  folder = SHARED / 'tok-t5-nanodo'
  found = sorted(folder.glob('*.model')) if folder.exists() else []
  if not found:
    pytest.skip('tok-t5-nanodo is not in ../shared/data')
  assert gguf_vocabulary.metadata(SentencePieceTokenizer(found[0].read_bytes()), 10**6, ()) == {}
