"""Turns to prompts: the template, template files, and what is left out when it is too long."""

import pytest

from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.serving.conversation import Message, Template, fit, read_template

BYTES = ByteTokenizer()
TURNS = [Message('system', 'Be kind.'), Message('user', 'hi'), Message('assistant', 'hello'),
         Message('user', 'and {content}?')]


def text(template: Template, turns: list[Message]) -> str:
  return ''.join(span.text for span in template.spans(turns))


def test_the_plain_template():
  assert text(Template(), TURNS) == ('Be kind.\n\nUser: hi\n\nAssistant: hello\n\n'
                                    'User: and {content}?\n\nAssistant:')


def test_the_oldest_turns_are_left_out_and_the_system_stays():
  whole = len(text(Template(), TURNS)) + 1  # With the token that begins a text.
  assert fit(Template(), BYTES, TURNS, whole) == (
      [BYTES.bos_id, *BYTES.encode(text(Template(), TURNS))], 0)
  tokens, num_cut = fit(Template(), BYTES, TURNS, whole - 1)
  assert num_cut == 2  # The question and its answer: what is kept starts with the user.
  assert BYTES.decode(tokens) == 'Be kind.\n\nUser: and {content}?\n\nAssistant:'
  with pytest.raises(UserError, match='43 tokens with its frame and the model takes 42'):
    fit(Template(), BYTES, TURNS, len(tokens) - 1)


def test_a_template_file(tmp_path):
  path = tmp_path / 'template.json'
  path.write_text('{"user": "<u>{content}</u>", "opening": "<a>", "stop": ["<u>"]}')
  template = read_template(path)
  assert text(template, TURNS[1:2]) == '<u>hi</u><a>' and template.stop == ('<u>',)
  assert template.system == Template().system


@pytest.mark.parametrize(('content', 'expected'), [
    (None, 'Cannot read the chat template'), (b'{"user"', 'Cannot read the chat template'),
    (b'\xff', 'UTF-8'), (b'[]', 'must be a JSON object'), (b'{"usr": ""}', 'fields among system'),
    (b'{"user": "no place"}', '{content} in it'), (b'{"stop": "x"}', 'list of texts'),
    (b'{"stop": [""]}', 'list of texts'), (b'{"stop": 3}', 'not usable'),
    (b'{"opening": 3}', 'Template.opening = 3'), (b'[' * 100_000, 'Cannot read')])
def test_a_template_file_that_is_none(tmp_path, content, expected):
  path = tmp_path / 'template.json'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=r'template') as raised:
    read_template(path)
  assert expected in str(raised.value)
