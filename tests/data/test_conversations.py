"""Conversations: the assistant's tokens alone are learned, and no prompt is on both sides."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import build, chat_files, loader
from jaxrl_pt.errors import UserError

MAKING = build.Making('conversations')
BOS = EOS = 256


def write(path: Path, rows: list[dict]) -> cfg.Conversations:
  path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
  return cfg.Conversations(str(path))


def asked(number: int, size: int = 40) -> list[dict]:
  return [{'prompt': f'Frage {number}.{i}?', 'completion': f'{"ä" * (i % 7)}Antwort {i}'}
          for i in range(size)]


def prepare(directory: Path, source: cfg.Source, seq_len: int = 64, fraction: float = 0.25,
            long: str = 'cut', glob: str = '') -> loader.Prepared:
  data = cfg.Data(source, cfg.Bytes(), seq_len, fraction, glob, long)
  return loader.prepare(data, directory, MAKING)


def segments_of(packed: loader.Packed) -> list[tuple[bytes, bytes, set[float]]]:
  """(all inputs, learned targets, their weights) of each segment, by a walk over the tokens."""
  batch = packed.batch(range(len(packed)))
  found = []
  for row in range(len(packed)):
    segments = np.asarray(batch.segments[row])
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      inputs, targets, weights = (np.asarray(x[row])[here] for x in (
          batch.tokens, batch.targets, batch.weights))
      assert inputs[0] == BOS and (inputs[1:] == targets[:-1]).all()
      assert (np.asarray(batch.positions[row])[here] == np.arange(here.sum())).all()
      text = bytes(int(i) for i in inputs[1:])
      learned = targets[weights > 0]
      assert learned[-1] == EOS and (weights[-len(learned):] > 0).all()
      found.append((text, bytes(int(i) for i in learned[:-1]), set(weights[weights > 0])))
    assert not np.asarray(batch.weights[row])[segments == 0].any()
  return found


def test_only_the_completion_and_its_end_are_learned(tmp_path: Path):
  rows = asked(0)
  prepared = prepare(tmp_path, write(tmp_path / 'a.jsonl', rows), fraction=0)
  expected = [((r['prompt'] + r['completion']).encode(), r['completion'].encode(), {1.0})
              for r in rows]
  assert sorted(segments_of(prepared.train)) == sorted(expected)
  assert prepared.train.num_examples < len(rows)  # Several share a row.
  completions = [r['completion'].encode() for r in rows]
  assert prepared.train.num_bytes == sum(map(len, completions))
  assert prepared.train.num_targets == sum(len(c) + 1 for c in completions)


def test_the_weight_of_a_source_is_that_of_its_tokens(tmp_path: Path):
  first, second = asked(1, 9), asked(2, 5)
  source = cfg.WeightedConversations(
      (write(tmp_path / 'a.jsonl', first), write(tmp_path / 'b.jsonl', second)), (0.5, 3.0))
  found = segments_of(prepare(tmp_path, source, fraction=0).train)
  for rows, weight in ((first, 0.5), (second, 3.0)):
    texts = {(r['prompt'] + r['completion']).encode() for r in rows}
    assert {w for text, _, weights in found if text in texts for w in weights} == {weight}
  assert len(found) == len(first) + len(second)
  # Which file is whose source decides the examples, though the files are the same.
  swapped = cfg.WeightedConversations(source.sources[::-1], source.weights)
  assert prepare(tmp_path, swapped, fraction=0).train.digest != prepare(
      tmp_path, source, fraction=0).train.digest


def test_the_same_files_in_other_sources_are_prepared_again(tmp_path: Path):
  for i in range(3):
    write(tmp_path / f'{i}.jsonl', asked(i, 5))
  one, other = (prepare(tmp_path / 'data', cfg.WeightedConversations(
      tuple(cfg.Conversations(f'{tmp_path}/{names}.jsonl') for names in globs), (0.5, 3.0)),
                        fraction=0) for globs in (('[01]', '2'), ('0', '[12]')))
  assert sorted(segments_of(one.train)) != sorted(segments_of(other.train))


def test_conversations_with_one_prompt_are_held_out_together(tmp_path: Path):
  rows = [{'prompt': f'{i % 20}?', 'completion': f'{i}'} for i in range(200)]
  prepared = prepare(tmp_path, write(tmp_path / 'a.jsonl', rows))
  sides = [{text.partition(b'?')[0] for text, _, _ in segments_of(split)}
           for split in (prepared.train, prepared.validation)]
  assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20 and sides[1]


def test_prompts_in_both_files_are_refused(tmp_path: Path):
  source = write(tmp_path / 'a.jsonl', asked(0, 9))
  held_out = write(tmp_path / 'b.jsonl', [*asked(1, 3), {'prompt': 'Frage 0.4?',
                                                        'completion': 'other'}])
  with pytest.raises(UserError, match=r"1 of the 4 distinct held-out prompts.*'Frage 0.4\?'"):
    prepare(tmp_path, source, glob=held_out.glob)
  held_out = write(tmp_path / 'b.jsonl', asked(1, 3))
  assert len(segments_of(prepare(tmp_path, source, glob=held_out.glob).validation)) == 3


def test_long_conversations_are_cut_or_left_out_and_counted(tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]):
  rows = [{'prompt': 'p', 'completion': 'c' * 5}, {'prompt': 'p', 'completion': 'c' * 50},
          {'prompt': 'p' * 40, 'completion': 'c'}]
  source = write(tmp_path / 'a.jsonl', rows)
  prepared = prepare(tmp_path, source, seq_len=16, fraction=0)
  assert ('of 3 conversations, 2 were longer than Data.seq_len = 16 and cut; 1 have been left out'
          in capsys.readouterr().out)
  batch = prepared.train.batch(range(len(prepared.train)))
  # 5 and the end; of the long one what follows bos and p within 16 pairs.
  assert np.asarray(batch.weights).sum() == 6 + 15
  with pytest.raises(UserError, match=r"a.jsonl:2 has 53 tokens, Data.seq_len is 16"):
    prepare(tmp_path, source, seq_len=16, fraction=0, long='error')
  with pytest.raises(UserError, match='The prompts of all 1 conversations .* are as long as'):
    prepare(tmp_path, write(tmp_path / 'b.jsonl', rows[2:]), seq_len=16, fraction=0)


@pytest.mark.parametrize('line, expected', [
    ('{', 'is not JSON'),
    ('[1]', 'is not a JSON object'),
    ('{"prompt": "a"}', "has no field 'completion', only 'prompt'"),
    ('{"prompt": "a", "completion": 3}', "'completion' is no text"),
    ('{"prompt": "a", "completion": " "}', "'completion' is empty"),
    ('{"prompt": "a\\ud800", "completion": "b"}', "half of a surrogate pair"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, expected: str):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + '\n')
  with pytest.raises(UserError) as caught:
    prepare(tmp_path, cfg.Conversations(str(path)), fraction=0)
  assert str(caught.value).startswith(f'{path}:3') and expected in str(caught.value)


def test_one_row_cannot_be_split(tmp_path: Path):
  source = write(tmp_path / 'a.jsonl', asked(0, 1))
  with pytest.raises(UserError, match='of the 1 conversations|All 1 conversations'):
    prepare(tmp_path, source)
  assert len(prepare(tmp_path, source, fraction=0).train) == 1


# --- Messages -----------------------------------------------------------------------


def turns(*texts: str, system: str = '') -> list[dict]:
  first = [{'role': 'system', 'content': system}] if system else []
  return first + [{'role': ('user', 'assistant')[i % 2], 'content': text}
                  for i, text in enumerate(texts)]


def walk(packed: loader.Packed) -> list[tuple[str, str]]:
  """(whole text, what is learned with # for the rest) of each segment, ends written as $."""
  batch = packed.batch(range(len(packed)))
  found = []
  for row in range(len(packed)):
    for segment in range(1, int(batch.segments[row].max()) + 1):
      here = np.asarray(batch.segments[row]) == segment
      targets, weights = (np.asarray(x[row])[here] for x in (batch.targets, batch.weights))
      letters = ['$' if t == EOS else chr(t) for t in targets]
      found.append((''.join(letters), ''.join(
          letter if weight else '#' for letter, weight in zip(letters, weights, strict=True))))
  return found


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path: Path):
  rows = [{'messages': turns('a?', 'b', 'c?', 'd', 'bye', system='S')}]
  [(text, learned)] = walk(prepare(tmp_path, write(tmp_path / 'a.jsonl', rows), 128, 0).train)
  assert text == 'S\n\nUser: a?\n\nAssistant: b$\n\nUser: c?\n\nAssistant: d$'
  assert learned == '#' * text.index(' b$') + ' b$' + '#' * (
      text.index(' d$') - text.index(' b$') - 3) + ' d$'


def test_messages_of_one_first_question_are_held_out_together(tmp_path: Path):
  rows = [{'messages': turns(f'{i % 20}?', f'{i}', f'more {i}', 'x', system=f'{i % 3}')}
          for i in range(200)]
  rows += [{'prompt': f'{i}?', 'completion': 'y'} for i in range(20)]
  prepared = prepare(tmp_path, write(tmp_path / 'a.jsonl', rows), 128)
  sides = []
  for split in (prepared.train, prepared.validation):
    sides.append({text.replace('User: ', '').split('\n\n')[-4 if 'User' in text else 0]
                  .partition('?')[0] for text, _ in walk(split)})
  assert sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20


def test_the_template_of_a_model_writes_the_turns_and_decides_the_examples(tmp_path: Path):
  folder = tmp_path / 'huggingface'
  folder.mkdir()
  source = write(tmp_path / 'a.jsonl', [{'messages': turns('a?', 'b')}])
  data = cfg.Data(source, cfg.Bytes(), 64, 0.0, long_documents='cut')
  assert chat_files.read(folder) is None
  (folder / 'tokenizer_config.json').write_text(json.dumps(
      {'chat_template': '{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]'
                        '{% if m.role == "assistant" %}{{ m.content }}{{ eos_token }}{% else %}'
                        '{{ m.content }}{% endif %}{% endfor %}'
                        '{% if add_generation_prompt %}[a]{% endif %}',
       'bos_token': {'content': '<|endoftext|>'}, 'eos_token': '<|endoftext|>'}))
  template = chat_files.read(folder)
  written = loader.prepare(data, tmp_path, MAKING._replace(template=template))
  assert walk(written.train) == [('[u]a?[a]b$', '########b$')]
  plain = loader.prepare(data, tmp_path, MAKING)
  assert plain.directory != written.directory
  # The file of its own goes first, and where it lies decides nothing.
  (folder / 'chat_template.jinja').write_text(template.source)
  again = chat_files.read(folder)
  assert again.name != template.name
  assert loader.prepare(data, tmp_path, MAKING._replace(template=again)).directory == (
      written.directory)


def nested(depth: int) -> list:
  value: list = []
  for _ in range(depth):
    value = [value]
  return value


@pytest.mark.parametrize('messages, expected', [
    ([{'role': 'robot', 'content': 'a'}], "messages[0].role = 'robot': expected one of"),
    ([{'role': 'user'}], 'messages[0].content'),
    ([], 'expected a list of at least one message'),
    ('text', 'expected a list of at least one message'),
    ([{'role': 'user', 'content': 'a'}], 'the assistant says nothing'),
    (turns('a', ' '), 'the assistant says nothing'),
    (turns('a', 'b\ud800'), 'lone surrogate'),
    ([turns('a', 'b')[0] | {'z': nested(150)}, turns('a', 'b')[1]], 'nested more than 100 levels'),
    ([turns('a', 'b')[0] | {'z': nested(600)}, turns('a', 'b')[1]], 'nested '),
])
def test_bad_messages_are_named_by_file_and_line(tmp_path: Path, messages, expected: str):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in (
      {'messages': turns('a', 'b')}, {'messages': messages})))
  with pytest.raises(UserError) as caught:
    prepare(tmp_path, cfg.Conversations(str(path)), fraction=0)
  assert str(caught.value).startswith(f'{path}:2') and expected in str(caught.value)
