"""Examples that think and such that do not: tags, duplicates, n-grams of the evaluation sets."""

import json

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import conversations, hybrid_examples, tokenizer
from jaxrl_pt.errors import UserError

BYTES = tokenizer.ByteTokenizer()
ROWS = [{'prompt': 'What is two plus two?', 'thinking': '2 + 2 = 4', 'answer': 'Four.'},
        {'prompt': 'Hello there, friend', 'thinking': '', 'answer': 'Hi.'},
        {'prompt': ' Hello there, friend ', 'thinking': '', 'answer': 'Hi.'},
        {'prompt': 'Please say: how many LEGS has a horse?', 'thinking': 'x', 'answer': 'Four.'}]
EVALUATED = [{'prompt': 'How many legs has a horse and a half?'}]


def source(folder, rows, **settings) -> cfg.HybridConversations:
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return cfg.HybridConversations(str(folder / 'rows.jsonl'), **settings)


def test_tags_go_round_thinking_and_round_an_answer_without(tmp_path):
  rows = [row for row, _ in conversations.rows(source(tmp_path, ROWS))]
  assert [row.completion for row in rows] == [
      '<think>2 + 2 = 4</think>Four.', '<no_think>Hi.</no_think>', '<think>x</think>Four.']
  open_ended = source(tmp_path, ROWS, think='T', think_end='E', no_think='N', no_think_end='')
  assert [row.completion for row, _ in conversations.rows(open_ended)] == [
      'T2 + 2 = 4EFour.', 'NHi.', 'TxEFour.']


def test_duplicates_and_prompts_of_the_evaluation_sets_are_left_out_and_counted(tmp_path):
  (tmp_path / 'evaluated').write_text(json.dumps(EVALUATED[0]) + '\n')
  for size, prompts in ((6, [0, 1]), (7, [0, 1, 3])):  # They share six words in a row.
    asked = source(tmp_path, ROWS, evaluation_glob=str(tmp_path / 'evaluated'), ngram=size)
    found = [e.prompt for e in hybrid_examples.examples(asked)]
    assert found == [ROWS[i]['prompt'] for i in prompts]
    assert hybrid_examples.counts(asked) == (len(found) - 1, 1, 1, 3 - len(found))


def test_a_prompt_shorter_than_an_n_gram_is_one_by_itself():
  assert hybrid_examples.ngrams('Two, words', 13) == {('two', 'words')}
  assert hybrid_examples.ngrams('a b c', 2) == {('a', 'b'), ('b', 'c')}
  assert hybrid_examples.ngrams('…', 2) == set()


class _Special(tokenizer.ByteTokenizer):
  """Bytes, with two tags that are tokens."""

  special_tokens = {'<think>': 257, '</think>': 258}

  def encode_parsed(self, text):
    for tag, number in self.special_tokens.items():
      before, found, after = text.partition(tag)
      if found:
        return [*self.encode_parsed(before), number, *self.encode_parsed(after)]
    return self.encode(text)


def test_tags_are_special_tokens_and_what_a_row_says_is_not(tmp_path):
  hostile = [{'prompt': 'p', 'thinking': 'a</think>b', 'answer': '<think>c'}]
  row, = (row for row, _ in conversations.rows(source(tmp_path, hostile)))
  ids, learned = conversations.encode(row, _Special(), None)
  plain = lambda text: list(text.encode())
  assert ids.tolist() == [256, *plain('p'), 257, *plain('a</think>b'), 258, *plain('<think>c'), 256]
  assert learned.tolist() == [False] * 2 + [True] * (len(ids) - 2)


@pytest.mark.parametrize('row, expected', [
    ({'prompt': 'a', 'answer': 'b'}, "has no text in 'thinking'"),
    ({'prompt': 'a', 'thinking': 3, 'answer': 'b'}, "has no text in 'thinking'"),
    ({'thinking': '', 'answer': 'b'}, "has no text in 'prompt'"),
    ({'prompt': 'a', 'thinking': 'b', 'answer': ' '}, "'answer' is empty")])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, expected):
  with pytest.raises(UserError, match=r'rows.jsonl:2') as caught:
    list(conversations.rows(source(tmp_path, [ROWS[0], row])))
  assert expected in str(caught.value)


def test_a_bad_row_of_an_evaluation_set_is_told_what_its_rows_look_like(tmp_path):
  (tmp_path / 'evaluated.jsonl').write_text('{"question": "a"}\n')
  asked = source(tmp_path, ROWS, evaluation_glob=str(tmp_path / 'evaluated.jsonl'))
  with pytest.raises(UserError, match=r"evaluated.jsonl:1 has no text in 'prompt': write "
                                      r'\{"prompt": "…"\}\.'):
    list(conversations.rows(asked))
