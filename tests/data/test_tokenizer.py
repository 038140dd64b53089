"""Tokenizers: exact round trips, the byte table, saving, and refusals."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import tokenizers as hf

from jaxrl_pt import config
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.errors import UserError

SHARED = Path('../shared/data')
TEXT = 'The naïve café — 日本語, 🙂👩‍👩‍👧! def f(x):\n\treturn x ** 2  # two  spaces\n'
NAMES = ['bytes', 'trained', 'gpt2', 'deepseek', 'mistral', 'mistral_v3', 'spm_1k', 'seqio_tiny',
         't5']
LOSSLESS = ['bytes', 'trained', 'gpt2', 'deepseek', 'mistral', 'mistral_v3']


def _shared(path: str) -> str:
  if not (SHARED / path).exists():
    pytest.skip(f'{SHARED / path} is not on this machine')
  return str(SHARED / path)


def _build(name: str) -> tokenizers.Tokenizer:
  documents = [TEXT * 3, 'for i in range(10): print(i)\n' * 5]
  match name:
    case 'bytes':
      choice = config.Bytes()
    case 'trained':
      choice = config.TrainedBPE(320)
    case 'gpt2':
      choice = config.HuggingFaceTokenizer(_shared('tok-gpt2/gpt2.tokenizer.json.gz'),
                                           '<|endoftext|>', '<|endoftext|>')
    case 'deepseek':
      choice = config.HuggingFaceTokenizer(_shared('tok-deepseek-r1/tokenizer.json.gz'),
                                           '<｜end▁of▁sentence｜>', '<｜begin▁of▁sentence｜>')
    case _:
      pytest.importorskip('sentencepiece', reason='the extra `sentencepiece` is not installed')
      choice = config.SentencePiece(_shared({
          'mistral': 'tok-mistral/tokenizer.model.v1',
          'mistral_v3': 'tok-mistral/mistral_instruct_tokenizer_240323.model.v3',
          'spm_1k': 'tok-sentencepiece-1k/test_model.model',
          'seqio_tiny': 'tok-seqio-tiny/sentencepiece.model',
          't5': 'tok-t5-nanodo/sentencepiece_cc_all.32000.100extra.model'}[name]))
  return tokenizers.train_or_load(choice, documents)


@pytest.fixture(scope='module', params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
  return _build(request.param)


@pytest.fixture(scope='module', params=LOSSLESS)
def lossless(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
  return _build(request.param)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0▁'),
                    max_size=60))
def test_round_trip_of_any_text(lossless: tokenizers.Tokenizer, text: str) -> None:
  assert lossless.decode(lossless.encode(text)) == text


def test_round_trip_of_mixed_scripts(lossless: tokenizers.Tokenizer) -> None:
  assert lossless.decode(lossless.encode(TEXT)) == TEXT
  assert lossless.decode_bytes(lossless.encode(TEXT)) == TEXT.encode()


def test_end_of_text_written_in_a_document_stays_text(lossless: tokenizers.Tokenizer) -> None:
  text = 'a <|endoftext|> </s> <｜end▁of▁sentence｜> b'
  assert lossless.eos_id not in lossless.encode(text)
  assert '<|endoftext|>' in lossless.decode(lossless.encode(text))


@pytest.mark.parametrize('name', ['mistral', 'mistral_v3', 'spm_1k', 'seqio_tiny', 't5'])
def test_sentencepiece_decodes_as_the_library_does(name: str) -> None:
  ours = _build(name)
  import sentencepiece
  theirs = sentencepiece.SentencePieceProcessor(model_proto=ours.definition)  # type: ignore[attr-defined]
  for text in ('This is a test', 'some words  here', TEXT, 'test\n🙂'):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    # The library writes an unknown piece as ' ⁇ ', we as U+FFFD.
    assert ours.decode(ids) == theirs.decode(ids).replace(' \u2047 ', '\ufffd')


def test_hugging_face_bytes_agree_with_the_library_decoder() -> None:
  ours = _build('gpt2')
  theirs = hf.Tokenizer.from_str(ours.definition)  # type: ignore[attr-defined]
  table = ours.token_bytes()
  for i in range(0, ours.vocab_size, 97):
    assert table[i].decode('utf-8', 'replace') == theirs.decode([i])


def test_metaspace_json_with_byte_fallback() -> None:
  vocabulary = {'</s>': 0, '▁': 1, 'a': 2, 'b': 3, '▁a': 4}
  vocabulary |= {f'<0x{b:02X}>': 5 + b for b in range(256)}
  backend = hf.Tokenizer(hf.models.BPE(vocabulary, [('▁', 'a')], byte_fallback=True))
  backend.normalizer = hf.normalizers.Sequence(
      [hf.normalizers.Prepend('▁'), hf.normalizers.Replace(' ', '▁')])
  backend.decoder = hf.decoders.Sequence(
      [hf.decoders.Replace('▁', ' '), hf.decoders.ByteFallback(), hf.decoders.Fuse()])
  backend.add_special_tokens(['</s>'])
  ours = tokenizers.JsonTokenizer(backend.to_str(), '</s>', '')
  assert ours.encode('a') == [4]
  assert ours.decode(ours.encode('ab aé🙂')) == 'ab aé🙂'
  assert ours.token_bytes()[4] == b' a' and ours.token_bytes()[5 + 0xC3] == b'\xc3'


def test_batch_equals_one_by_one(tokenizer: tokenizers.Tokenizer) -> None:
  texts = [TEXT, 'a test', '', 'x' * 50]
  assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_table_covers_the_vocabulary(tokenizer: tokenizers.Tokenizer) -> None:
  table = tokenizer.token_bytes()
  assert len(table) == tokenizer.vocab_size
  assert table[tokenizer.eos_id] == b''
  ids = tokenizer.encode(TEXT)
  assert max(ids) < tokenizer.vocab_size
  joined = b''.join(table[i] for i in ids)
  assert joined in (tokenizer.decode_bytes(ids), b' ' + tokenizer.decode_bytes(ids))


def test_decode_never_raises(tokenizer: tokenizers.Tokenizer) -> None:
  ids = list(range(tokenizer.vocab_size - 1, -1, -max(1, tokenizer.vocab_size // 500)))
  assert isinstance(tokenizer.decode([*ids, tokenizer.vocab_size + 7, -1]), str)


def test_cut_characters_are_replaced() -> None:
  assert tokenizers.ByteTokenizer().decode('é'.encode()[:1]) == '\ufffd'


def test_save_and_load(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
  tokenizer.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.eos_id == tokenizer.eos_id
  assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
  assert loaded.token_bytes() == tokenizer.token_bytes()


def test_training_is_deterministic_and_reaches_its_size() -> None:
  documents = [Path(__file__).read_text(), TEXT * 20, Path(tokenizers.__file__).read_text()]
  first, second = (tokenizers.train_or_load(config.TrainedBPE(600), iter(documents))
                   for _ in range(2))
  assert first.vocab_size == 600
  assert first.fingerprint == second.fingerprint
  other = tokenizers.train_or_load(config.TrainedBPE(600), documents[1:])
  assert other.fingerprint != first.fingerprint


def test_trained_bpe_has_all_bytes_even_of_ascii_text() -> None:
  trained = tokenizers.train_or_load(config.TrainedBPE(300), ['plain ascii ' * 30])
  assert {bytes([b]) for b in range(256)} <= set(trained.token_bytes())


# --- Refusals -------------------------------------------------------------------


def test_missing_file_is_named(tmp_path: Path) -> None:
  for choice in (config.HuggingFaceTokenizer(str(tmp_path / 'no.json'), '</s>', ''),
                 config.SentencePiece(str(tmp_path / 'no.model'))):
    with pytest.raises(UserError, match=r'no\.(json|model)'):
      tokenizers.train_or_load(choice, ())


@pytest.mark.parametrize('content', [b'{}', b'not json', b'\xff\xfe', b''])
def test_garbage_is_named(tmp_path: Path, content: bytes) -> None:
  path = tmp_path / 'bad.json'
  path.write_bytes(content)
  with pytest.raises(UserError, match=r'bad\.json'):
    tokenizers.train_or_load(config.HuggingFaceTokenizer(str(path), '</s>', ''), ())
  pytest.importorskip('sentencepiece')
  with pytest.raises(UserError, match=r'bad\.json'):
    tokenizers.train_or_load(config.SentencePiece(str(path)), ())


def test_corrupt_gzip_is_named(tmp_path: Path) -> None:
  path = tmp_path / 'bad.json.gz'
  path.write_bytes(b'\x1f\x8bnonsense')
  with pytest.raises(UserError, match=r'bad\.json\.gz'):
    tokenizers.train_or_load(config.HuggingFaceTokenizer(str(path), '</s>', ''), ())


def test_unknown_end_of_text_is_refused() -> None:
  path = _shared('tok-gpt2/gpt2.tokenizer.json.gz')
  with pytest.raises(UserError, match='end_of_text'):
    tokenizers.train_or_load(config.HuggingFaceTokenizer(path, '</s>', ''), ())


def test_changed_or_missing_saved_tokenizer_is_refused(tmp_path: Path) -> None:
  with pytest.raises(UserError, match='No readable tokenizer'):
    tokenizers.load(tmp_path)
  _build('trained').save(tmp_path)
  tokenizers.train_or_load(config.TrainedBPE(300), [TEXT]).save(tmp_path / 'other')
  (tmp_path / 'tokenizer.json').write_bytes((tmp_path / 'other' / 'tokenizer.json').read_bytes())
  with pytest.raises(UserError, match='fingerprints differ'):
    tokenizers.load(tmp_path)


# --- The beginning of a document, and ids without a token --------------------------


def test_what_begins_a_document(tmp_path: Path) -> None:
  """End of text where the tokenizer is trained here, the model's own where it is read."""
  assert _build('bytes').bos_id == 256
  trained = _build('trained')
  assert trained.bos_id == trained.eos_id
  for name, bos in (('gpt2', 50256), ('deepseek', 0), ('mistral', 1), ('t5', 2), ('seqio_tiny', 1)):
    assert _build(name).bos_id == bos
  for choice in (config.SentencePiece(_shared('tok-mistral/tokenizer.model.v1'), has_begin=False),
                 config.HuggingFaceTokenizer(_shared('tok-gpt2/gpt2.tokenizer.json.gz'),
                                             '<|endoftext|>', '')):
    assert tokenizers.train_or_load(choice, ()).bos_id is None


def test_the_beginning_is_saved_and_part_of_the_fingerprint(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
  tokenizer.save(tmp_path)
  assert tokenizers.load(tmp_path).bos_id == tokenizer.bos_id
  assert tokenizers.ByteTokenizer(None).fingerprint != tokenizers.ByteTokenizer().fingerprint


def test_a_tokenizer_saved_without_a_beginning_goes_on_without(tmp_path: Path) -> None:
  tokenizers.ByteTokenizer(None).save(tmp_path)
  path = tmp_path / 'tokenizer_config.json'
  description = json.loads(path.read_text())
  del description['bos_id']
  path.write_text(json.dumps(description))
  assert tokenizers.load(tmp_path).bos_id is None


def test_begun_puts_the_beginning_once() -> None:
  tokenizer = tokenizers.ByteTokenizer()
  assert tokenizers.begun(tokenizer, [1, 2]) == [256, 1, 2]
  assert tokenizers.begun(tokenizer, [256, 1]) == [256, 1]  # A template had it already.
  assert tokenizers.begun(tokenizer, []) == [256]
  without = tokenizers.ByteTokenizer(None)
  assert tokenizers.begun(without, [1, 2]) == [1, 2]
  with pytest.raises(UserError, match='empty prompt'):
    tokenizers.begun(without, [])


def test_unknown_begin_of_text_is_refused() -> None:
  path = _shared('tok-gpt2/gpt2.tokenizer.json.gz')
  with pytest.raises(UserError, match='begin_of_text'):
    tokenizers.train_or_load(config.HuggingFaceTokenizer(path, '<|endoftext|>', '<s>'), ())


def test_ids_without_a_token_are_banned() -> None:
  backend = hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 3, '</s>': 5}, unk_token='a'))
  tokenizer = tokenizers.JsonTokenizer(backend.to_str(), '</s>', '')
  assert tokenizer.unused_ids == (1, 2, 4)
  sampler = tokenizers.drawable(config.Sampler(banned=(3,)), tokenizer, 8)
  assert sampler.banned == (1, 2, 3, 4, 6, 7)
  assert tokenizers.drawable(config.Sampler(), tokenizers.ByteTokenizer(), 257) == config.Sampler()
