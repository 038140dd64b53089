"""The metadata of a GGUF file that describe a tokenizer, as llama.cpp reads them.

llama.cpp encodes text by code of its own: byte-level BPE after a rule, known to it by a name, that
splits the text first (`gpt2`), and SentencePiece's BPE (`llama`). A tokenizer that it would not
encode alike has no such metadata.
"""

import json
from typing import Any

from jaxrl_pt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxrl_pt.data.tokenizer import JsonTokenizer, Tokenizer

Metadata = dict[str, Any]

# The kinds of tokens in llama.cpp.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# llama.cpp's names of rules that split text, by their patterns in a tokenizer.json.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+': 'llama-bpe',
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+': 'qwen2'}
# Text that Unicode normalisation, the removal of spaces and unknown pieces would change.
_UNUSUAL = 'a  b\t\n①Ａ ﬁ \U0001f9ff'


def metadata(tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> Metadata:
  """The keys of a tokenizer; {} if llama.cpp would encode text otherwise.

  Args:
    tokenizer: a model's tokenizer.
    vocab_size: the model's number of tokens, of which the last may be no token's.
    end_ids: the tokens that end a response, beside the tokenizer's own.
  """
  match tokenizer:
    case JsonTokenizer():
      found = _byte_level(tokenizer, vocab_size)
    case SentencePieceTokenizer():
      found = _sentencepiece(tokenizer, vocab_size)
    case _:
      found = {}
  if not found:
    return {}
  found['tokenizer.ggml.eos_token_id'] = tokenizer.eos_id
  found['tokenizer.ggml.add_bos_token'] = tokenizer.bos_id is not None
  found['tokenizer.ggml.add_eos_token'] = False
  if tokenizer.bos_id is not None:
    found['tokenizer.ggml.bos_token_id'] = tokenizer.bos_id
  # llama.cpp has these two places for further tokens at which it stops.
  others = [i for i in end_ids if i != tokenizer.eos_id]
  return found | dict(zip(('tokenizer.ggml.eot_token_id', 'tokenizer.ggml.eom_token_id'), others,
                          strict=False))


def _padding(tokens: list[str], kinds: list[int], vocab_size: int) -> None:
  """Gives each id of the model beyond the tokenizer's a name of its own, as llama.cpp asks for."""
  for i in range(len(tokens), vocab_size):
    tokens.append(f'[PAD{i}]')
    kinds.append(_UNUSED)


def _byte_level(tokenizer: JsonTokenizer, vocab_size: int) -> Metadata:
  definition = json.loads(tokenizer.definition)
  model, split = definition.get('model') or {}, _split_name(definition)
  if model.get('type') != 'BPE' or model.get('byte_fallback') or not split:
    return {}
  if (definition.get('normalizer') or {'type': 'NFC'})['type'] != 'NFC':
    return {}
  ids = {i: piece for piece, i in model['vocab'].items()}
  added = {token['id']: token for token in definition.get('added_tokens', [])}
  tokens, kinds = [], []
  for i in range(tokenizer.vocab_size):
    if i in added:
      tokens.append(added[i]['content'])
      kinds.append(_CONTROL if added[i].get('special') else _USER_DEFINED)
    else:
      tokens.append(ids.get(i, f'[PAD{i}]'))
      kinds.append(_NORMAL if i in ids else _UNUSED)
  _padding(tokens, kinds, vocab_size)
  merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
  return {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': split,
          'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': kinds,
          'tokenizer.ggml.merges': merges}


def _split_name(definition: dict[str, Any]) -> str:
  """llama.cpp's name of the rule that splits a text before BPE; '' for others than it has."""
  match definition.get('pre_tokenizer'):
    case {'type': 'ByteLevel', 'add_prefix_space': False, **rest} if rest.get('use_regex', True):
      return 'gpt-2'
    case {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Split', 'pattern': {'Regex': str(pattern)}, 'behavior': 'Isolated',
         'invert': False}, {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}]}:
      return _SPLITS.get(pattern, '')
  return ''


def _sentencepiece(tokenizer: SentencePieceTokenizer, vocab_size: int) -> Metadata:
  pieces = tokenizer.pieces()
  # The scores of BPE count its merges, and those of other models are logarithms of probabilities.
  # llama.cpp normalises nothing and spells what is no piece in bytes.
  has_integers = all(piece.score == int(piece.score) for piece in pieces)
  if not has_integers or tokenizer.decode(tokenizer.encode(_UNUSUAL)) != _UNUSUAL:
    return {}
  tokens = [piece.text for piece in pieces]
  kinds = [{'control': _CONTROL, 'unknown': _UNKNOWN, 'byte': _BYTE, 'unused': _UNUSED}.get(
      piece.kind, _NORMAL) for piece in pieces]
  _padding(tokens, kinds, vocab_size)
  scores = [piece.score for piece in pieces] + [-1e4] * (len(tokens) - len(pieces))
  return {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.pre': 'default',
          'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.scores': scores,
          'tokenizer.ggml.token_type': kinds,
          'tokenizer.ggml.add_space_prefix': tokenizer.adds_space}
