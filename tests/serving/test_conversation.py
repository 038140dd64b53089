"""Turns to prompts: the plain template, and what is left out when a conversation is too long."""

import pytest

from jaxrl_pt.data.chat_files import plain
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.serving.conversation import fit

BYTES = ByteTokenizer()
TEMPLATE = plain(BYTES)
TURNS = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'hi'},
         {'role': 'assistant', 'content': 'hello'}, {'role': 'user', 'content': 'and {{ 1 }}?'}]
WHOLE = ('<|endoftext|>Be kind.\n\nUser: hi\n\nAssistant: hello<|endoftext|>\n\n'
         'User: and {{ 1 }}?\n\nAssistant:')


def test_the_plain_template():
  assert TEMPLATE.render(TURNS, add_generation_prompt=True) == WHOLE
  again = TEMPLATE.render([*TURNS, TURNS[0]])
  assert again == WHOLE.removesuffix('Assistant:') + 'Be kind.\n\n'


def test_the_oldest_turns_are_left_out_and_the_system_stays():
  ids = BYTES.encode_parsed(WHOLE)
  assert fit(TEMPLATE, BYTES, TURNS, len(ids), {}) == (ids, 0)
  tokens, num_cut = fit(TEMPLATE, BYTES, TURNS, len(ids) - 1, {})
  assert num_cut == 2  # The question and its answer: what is kept starts with the user.
  assert BYTES.decode(tokens) == 'Be kind.\n\nUser: and {{ 1 }}?\n\nAssistant:'
  with pytest.raises(UserError, match='41 tokens with its frame and the model takes 40'):
    fit(TEMPLATE, BYTES, TURNS, len(tokens) - 1, {})


def test_drawn_tokens_stay_with_their_turn_when_others_are_left_out():
  turns = [*TURNS, {'role': 'assistant', 'content': 'so'}, {'role': 'user', 'content': 'then'}]
  drawn = {2: [255], 4: [0, 254]}
  tokens, _ = fit(TEMPLATE, BYTES, turns, 1000, drawn)
  assert tokens.index(255) < tokens.index(254) and BYTES.encode('Assistant:')[-1:] == [
      tokens[tokens.index(255) - 1]]
  cut, num_cut = fit(TEMPLATE, BYTES, turns, len(tokens) - 1, drawn)
  assert num_cut == 2 and 255 not in cut and cut[cut.index(254) - 1] == 0
