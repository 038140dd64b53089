"""Random walks under the masks: whatever is drawn comes out as a text of the grammar."""

import functools
import json
from pathlib import Path
import re

import jsonschema
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.serving.constraint import Constraint, Guide, json_grammar, regex_grammar

DATA = Path(__file__).parents[3] / 'shared' / 'data'
MISTRAL = DATA / 'tok-mistral' / 'tokenizer.model.v1'  # with a token for each byte
PIECES = DATA / 'tok-sentencepiece-1k' / 'test_model.model'  # without
BYTES = tokenizers.ByteTokenizer()
EOS = BYTES.eos_id
VOCAB = 300  # of a model whose vocabulary is padded
MOST = 3000


@functools.lru_cache
def tokenizer(kind: str) -> Tokenizer:
  match kind:
    case 'bpe':
      text = json.dumps({'name': 'Ann', 'tags': ['red', 'blue'], 'size': -1.5}) * 3
      return tokenizers.train_or_load(cfg.TrainedBPE(290), [text])
    case 'mistral' | 'pieces':
      path = MISTRAL if kind == 'mistral' else PIECES
      if not path.exists():
        pytest.skip(f'{path.name} is not in ../shared/data: no pieces to draw')
      return tokenizers.train_or_load(cfg.SentencePiece(str(path)), [])
  return BYTES


@functools.lru_cache
def guide(kind: str = 'bytes') -> Guide:
  return Guide(tokenizer(kind), max(VOCAB, tokenizer(kind).vocab_size + 7))


def allowed(constraint: Constraint) -> np.ndarray:
  mask = constraint.mask()
  assert mask.dtype == np.uint32
  return np.flatnonzero(mask[:, None] >> np.arange(32, dtype=np.uint32) & 1)


def walk(constraint: Constraint, kind: str, rng: np.random.Generator) -> str | None:
  """Draws each next token uniformly from those allowed; None where the walk is broken off."""
  drawn: list[int] = []
  for _ in range(MOST):
    choices = allowed(constraint)
    assert choices.size and choices.max() < tokenizer(kind).vocab_size
    token = int(rng.choice(choices))
    was_done, was_met = constraint.is_done, constraint.is_met
    constraint.accept(token)
    if token == tokenizer(kind).eos_id:
      assert was_met and constraint.is_met and constraint.is_done
      return b''.join(tokenizer(kind).token_bytes()[t] for t in drawn).decode()
    assert not was_done
    drawn.append(token)
  return None


SCHEMAS = {
    'flat': {'type': 'object', 'additionalProperties': False, 'required': ['name', 'size'],
             'properties': {'name': {'type': 'string', 'maxLength': 8},
                            'size': {'type': 'integer', 'minimum': -5, 'maximum': 120},
                            'is_red': {'type': 'boolean'}}},
    'nested': {'type': 'object', 'additionalProperties': False, 'required': ['kind', 'tags'],
               'properties': {
                   'kind': {'enum': ['a', 'größe', '"quoted"', '</tool_call>']},
                   'tags': {'type': 'array', 'minItems': 1, 'maxItems': 3,
                            'items': {'$ref': '#/$defs/tag'}}},
               '$defs': {'tag': {'anyOf': [
                   {'type': 'null'}, {'type': 'string', 'pattern': '^[a-z]{1,4}$'},
                   {'type': 'object', 'additionalProperties': False, 'required': ['x'],
                    'properties': {'x': {'type': 'number', 'minimum': 0, 'maximum': 9}}}]}}},
    'constant': {'const': {'a': [1, None]}},
}


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'mistral'])
@pytest.mark.parametrize('name', SCHEMAS)
def test_every_walk_is_json_of_the_schema(kind: str, name: str):
  schema, rng = SCHEMAS[name], np.random.default_rng(3)
  validator = jsonschema.Draft202012Validator(schema)
  start = guide(kind).constraint(json_grammar(schema), (tokenizer(kind).eos_id,))
  texts = {walk(start.copy(), kind, rng) for _ in range(8)}
  for text in texts:
    assert text is not None
    validator.validate(json.loads(text))
  assert len(texts) > (1 if name != 'constant' else 0)


def test_any_object():
  rng, ended = np.random.default_rng(0), 0
  start = guide().constraint(json_grammar({'type': 'object'}), (EOS,))
  for _ in range(8):
    if (text := walk(start.copy(), 'bytes', rng)) is not None:
      assert isinstance(json.loads(text), dict)
      ended += 1
  assert ended >= 5


@pytest.mark.parametrize('pattern', [
    r'[A-Z]{2}-\d{1,3}', r'(yes|no)', r'a/b\n"?', 'größe|€', r'\w{3,5}@\w{2}\.(com|org)'])
@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'mistral'])
def test_every_walk_matches_the_expression(pattern: str, kind: str):
  rng = np.random.default_rng(5)
  start = guide(kind).constraint(regex_grammar(pattern), (tokenizer(kind).eos_id,))
  for _ in range(5):
    text = walk(start.copy(), kind, rng)
    assert text is not None and re.fullmatch(pattern, text)


def test_the_end_is_allowed_when_it_may_come_and_forced_when_it_must():
  stops = (EOS, 7)  # A conversation may end with a token of its own.
  constraint = guide().constraint(regex_grammar('a{1,2}'), stops)
  assert allowed(constraint).tolist() == [ord('a')] and not constraint.is_met
  constraint.accept(ord('a'))
  assert allowed(constraint).tolist() == [7, ord('a'), EOS]
  assert constraint.is_met and not constraint.is_done
  other = constraint.copy()
  constraint.accept(ord('a'))
  assert allowed(constraint).tolist() == [7, EOS] and constraint.is_done
  other.accept(7)
  assert allowed(other).tolist() == [7, EOS] and other.is_done and other.is_met


def test_copies_go_their_own_ways():
  first = guide().constraint(regex_grammar('ab|cd'), (EOS,))
  second = first.copy()
  first.accept(ord('a'))
  assert allowed(second).tolist() == [ord('a'), ord('c')]
  second.accept(ord('c'))
  assert allowed(first).tolist() == [ord('b')] and allowed(second).tolist() == [ord('d')]


def test_a_copy_of_a_thought_goes_on_where_it_was():
  first = guide().constraint(regex_grammar('ok'), (EOS,), (1, 2))
  first.accept(1)
  second = first.copy()
  second.accept(2)
  assert first.is_thinking and not second.is_thinking


def test_what_must_come_comes_in_the_tokenizers_own_pieces():
  """And without the space that SentencePiece puts before a text."""
  table, text = tokenizer('mistral').token_bytes(), 'misunderstanding'  # The longest first: mi|sun…
  constraint = Guide(tokenizer('mistral'), 32000).constraint(regex_grammar(text), (2,))
  drawn = []
  while not constraint.is_done:
    (token,) = allowed(constraint)
    constraint.accept(int(token))
    drawn.append(int(token))
  assert [table[t] for t in drawn] == [b'm', b'is', b'under', b'standing']


def test_special_tokens_and_bytes_that_are_no_text_never_come():
  constraint = guide().constraint(regex_grammar(r'(.|\n){3}'), (EOS,))
  assert set(allowed(constraint).tolist()) == {*range(128), *range(0xC2, 0xF5)}


@pytest.mark.parametrize('thought', [b'<hm>', b'>', b'<<< > h>)'])
def test_a_thought_is_free_and_the_answer_is_not(thought: bytes):
  constraint = guide().constraint(regex_grammar('ok'), (EOS,), tuple(thought[-2:]))
  free = [*range(10 * 32)]  # All bits of the words; the engine draws no ids without a token.
  for byte in thought:
    assert allowed(constraint.copy()).tolist() == free
    assert not constraint.is_met and not constraint.is_done
    constraint.accept(byte)
  assert allowed(constraint).tolist() == [ord('o')]
  for byte in b'ok':
    constraint.accept(byte)
  assert constraint.is_met


@pytest.mark.parametrize(('grammar', 'reason'), [
    (regex_grammar('('), 'unclosed group'), (regex_grammar(r'(a)\1'), 'backreferences'),
    (regex_grammar('[^'), 'unclosed character class'),
    (json_grammar({'type': 'text'}), 'Invalid type: text'),
    (json_grammar({'type': 'integer', 'minimum': 2, 'maximum': 1}), 'Unsatisfiable'),
    (json_grammar({'type': 'array', 'uniqueItems': True}), 'uniqueItems'),
    (json_grammar({'$ref': '#'}), 'no text of this tokenizer meets it'),
    (json_grammar({'$ref': 'http://127.0.0.1/x'}), 'does not fetch resources'),
    (json_grammar({'properties': {f'k{i}': {'type': 'string'} for i in range(2000)}}), 'too big'),
    (regex_grammar('a' * 100_000), 'more than 100000 characters'),
    (regex_grammar('(a{1000}){1000}'), 'too many expressions'),
])
def test_what_cannot_be_met_is_refused_with_its_reason(grammar: str, reason: str):
  with pytest.raises(ValueError, match=reason) as raised:
    guide().constraint(grammar, (EOS,))
  assert '\n' not in str(raised.value) and len(str(raised.value)) <= 200


@pytest.mark.parametrize('pattern', ['\\', 'a' + 3 * '\\'])
def test_an_expression_that_ends_within_an_escape(pattern: str):
  with pytest.raises(ValueError, match='a single backslash at its end'):
    regex_grammar(pattern)
  regex_grammar(pattern + '\\')


def test_a_schema_that_is_nested_too_deeply():
  schema: dict = {'type': 'integer'}
  for _ in range(10_000):
    schema = {'items': schema}
  with pytest.raises(ValueError, match='recursion limit'):
    json_grammar(schema)
  with pytest.raises(ValueError, match='recursion limit'):
    json_grammar(functools.reduce(lambda s, _: {'items': s}, range(200), {}))


def test_white_space_comes_to_an_end():
  constraint = guide().constraint(json_grammar({'type': 'object'}), (EOS,))
  constraint.accept(ord('{'))
  for _ in range(20):
    assert ord('\n') in allowed(constraint)
    constraint.accept(ord('\n'))
  assert ord('\n') not in allowed(constraint) and ord('}') in allowed(constraint)


def test_a_token_outside_the_mask_ends_the_response_and_is_not_met():
  constraint = guide().constraint(regex_grammar('ab'), (EOS,))
  constraint.accept(ord('x'))
  assert allowed(constraint).tolist() == [EOS] and not constraint.is_met


def test_what_no_token_spells():
  with pytest.raises(ValueError, match='no text of this tokenizer meets it'):
    guide('pieces').constraint(json_grammar({'type': 'object'}), (2,))
  start = guide('pieces').constraint(regex_grammar('a[{]|b'), (2, 7))
  spells = tokenizer('pieces').token_bytes().index
  start.accept(spells(b'a'))
  assert allowed(start).tolist() == [2, 7] and not start.is_met
  assert walk(guide('pieces').constraint(regex_grammar('ab|ba'), (2,)), 'pieces',
              np.random.default_rng(0)) in ('ab', 'ba')
