"""Tool calls: what is told to the model, what is read of its answer, and hostile answers."""

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jsonschema
import numpy as np
import pytest
import tokenizers as hf

from jaxrl_pt.data.chat import prompt_ids
from jaxrl_pt.data.chat_files import plain
from jaxrl_pt.data.tokenizer import JsonTokenizer
from jaxrl_pt.serving import tools
from jaxrl_pt.serving.constraint import Guide
from jaxrl_pt.serving.conversation import Call
from jaxrl_pt.serving.fields import ApiError, Fields
from jaxrl_pt.serving.text import CALLS, Markers, spelled
from jaxrl_pt.serving.tools import CallSplitter, Tools
from tests.serving.test_constraint import BYTES, EOS, walk

quick = settings(max_examples=60, deadline=None, derandomize=True)
WEATHER = {'type': 'function', 'function': {
    'name': 'weather', 'description': 'Of a city.', 'parameters': {
        'type': 'object', 'properties': {'city': {'enum': ['Rom', 'Köln']}, 'days': {
            'type': 'integer', 'minimum': 1, 'maximum': 9}},
        'required': ['city'], 'additionalProperties': False}}}
CLOCK = {'type': 'function', 'function': {'name': 'clock'}}


def offered(**fields: object) -> Tools:
  taken = Fields({'tools': [WEATHER, CLOCK], **fields})
  result = tools.take(taken)
  taken.finish()
  return result


def written(name: str, arguments: str) -> str:
  return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def split(text: str, sizes: list[int] | None = None, **fields: object) -> tuple[str, list[Call]]:
  """Feeds a text in pieces of these sizes, over and over."""
  splitter, content, calls, sizes = CallSplitter(offered(**fields)), '', [], sizes or [len(text)]
  at = number = 0
  while at < len(text):
    size = sizes[number % len(sizes)]
    number += 1
    more, found = splitter.feed(text[at:at + size], last=at + size >= len(text))
    content, calls, at = content + more, calls + found, at + size
  return content, calls


ROME, NOW = Call('weather', '{"city": "Rom"}'), Call('clock', '{}')
# answer → what is read of it
ANSWERS: dict[str, tuple[str, list[Call]]] = {
    'No call.\n': ('No call.\n', []),
    written('clock', '{}'): ('', [NOW]),
    f'I look. \n{written("weather", ROME.arguments)}\n{written("clock", "{}")}\n':
        ('I look.', [ROME, NOW]),
    f'{written("clock", "{}")} done': ('done', [NOW]),
    '<tool_call>{"arguments":{},"name":"clock"}</tool_call>': ('', [NOW]),
    # The end marker has not come, but the call is whole.
    '<tool_call>\n{"name": "clock", "arguments": {}}': ('', [NOW]),
    # The end marker stands in a quotation.
    written('weather', '{"city": "</tool_call>"}'):
        ('', [Call('weather', '{"city": "</tool_call>"}')]),
    # Lone surrogates, which no message may hold, and a pair of them.
    written('weather', '{"city": "\\ud800 € \\udc00 \\ud83d\\ude00\\ud83d"}'):
        ('', [Call('weather', '{"city": "\ufffd € \ufffd \U0001f600\ufffd"}')]),
}
# What is no call is plain text, as it was written.
NO_CALLS = [
    '<tool_call>', '<tool_call></tool_call>', '</tool_call>', '<tool_cal', '<tool_call>{"name":',
    '<tool_call>not JSON</tool_call> and on', written('unknown', '{}'), written('clock', '[]'),
    written('clock', '{"a": NaN}'), written('clock', '"{}"'), written('clock', '{'),
    written('clock', '{"a": ' + '9' * 5000 + '}'), written('clock', '[' * 5000),
    '<tool_call>{"name": ["clock"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "clock", "arguments": {}, "more": 1}</tool_call>',
    '<tool_call>{"name": "clock"}</tool_call>', '<tool_call>[1]</tool_call> <tool_call>',
    '<tool_call>"' + '</tool_call>' * 40]


@pytest.mark.parametrize('sizes', [[1], [7], [3, 50], [10_000]], ids=str)
@pytest.mark.parametrize('text', ANSWERS)
def test_what_is_read_of_an_answer(text: str, sizes: list[int]):
  assert split(text, sizes) == ANSWERS[text]


@pytest.mark.parametrize('sizes', [[1], [11], [100_000]], ids=str)
@pytest.mark.parametrize('text', NO_CALLS, ids=lambda t: t[:40])
def test_what_is_no_call_is_plain_text(text: str, sizes: list[int]):
  assert split(text, sizes) == (text, [])


def test_an_end_marker_is_quoted_a_few_times_at_most():
  """Each costs another reading of the whole call."""
  text = lambda num: written('clock', json.dumps({'a': '</tool_call>' * num}))
  assert [len(split(text(num), [9])[1]) for num in (15, 16, 17, 40)] == [1, 1, 0, 0]


def test_a_call_after_one_that_is_none():
  text = f'<tool_call>x</tool_call>\n{written("clock", "{}")}'
  assert split(text, [1]) == ('<tool_call>x</tool_call>', [NOW])


PIECES = st.lists(st.sampled_from([
    '<tool_call>', '</tool_call>', '{"name": "clock", "arguments": {', '}}', '"', ' ', '\n', 'a',
    '<tool', '_call>', written('clock', '{}')]), max_size=9).map(''.join)


@quick
@given(PIECES, st.lists(st.integers(1, 30), min_size=1, max_size=4))
@example('<tool_call>" </tool_call>"</tool_call>', [1])
def test_how_an_answer_is_cut_into_pieces_does_not_matter(text: str, sizes: list[int]):
  assert split(text, sizes) == split(text)


def test_only_the_first_call_where_one_is_wanted():
  text = written('clock', '{}') * 3
  assert split(text) == ('', [NOW] * 3)
  assert split(text, parallel_tool_calls=False) == ('', [NOW])


# --- Bodies ---------------------------------------------------------------------------


def test_choices():
  assert [t.name for t in offered().tools] == ['weather', 'clock'] and not offered().needs_grammar
  assert offered(tool_choice='none') == Tools()
  assert offered(tool_choice='required').needs_grammar
  one = offered(tool_choice={'type': 'function', 'function': {'name': 'clock'}})
  assert [t.name for t in one.tools] == ['clock'] and one.choice == 'required'
  strict = {'type': 'function', 'function': {'name': 'clock', 'strict': True}}
  assert tools.take(Fields({'tools': [strict]})).needs_grammar
  assert tools.take(Fields({})) == Tools() == tools.take(Fields({'tools': []}))


def function(**fields: object) -> dict:
  return {'type': 'function', 'function': {'name': 'f', **fields}}


@pytest.mark.parametrize(('fields', 'expected'), [
    ({'tools': {}}, 'tools = {}: expected a list'),
    ({'tools': [CLOCK] * 129}, 'expected a list of at most 128 tools'),
    ({'tools': [3]}, 'tools[0] = 3: expected an object'),
    ({'tools': [{}]}, 'tools[0].type is missing'),
    ({'tools': [{'type': 'function'}]}, 'tools[0].function is missing: expected an object'),
    ({'tools': [{'type': 'custom', 'function': {}}]}, "tools[0].type = 'custom'"),
    ({'tools': [function(name='a b')]}, "tools[0].function.name = 'a b'"),
    ({'tools': [function(name=3)]}, 'tools[0].function.name = 3'),
    ({'tools': [function(parameters=[])]}, 'tools[0].function.parameters = []'),
    ({'tools': [function(description=3)]}, 'tools[0].function.description = 3'),
    ({'tools': [function(description='\ud800')]}, 'tools[0].function.description'),
    ({'tools': [function(parameters={'title': '\ud800'})]}, 'tools[0] holds a text that is not'),
    ({'tools': [function(strict='yes')]}, 'tools[0].function.strict'),
    ({'tools': [function(other=1)]}, "Unknown field 'tools[0].function.other'"),
    ({'tools': [CLOCK, CLOCK]}, "two functions 'clock'"),
    ({'tools': [CLOCK], 'tool_choice': 'any'}, "tool_choice = 'any'"),
    ({'tools': [CLOCK], 'tool_choice': 3}, 'tool_choice = 3'),
    ({'tools': [CLOCK], 'tool_choice': {}}, 'tool_choice.type is missing'),
    ({'tools': [CLOCK], 'tool_choice': function()}, "tool_choice.function.name = 'f'"),
    ({'tool_choice': 'required'}, 'expected tools to choose from'),
    ({'tools': [CLOCK], 'parallel_tool_calls': 1}, 'parallel_tool_calls = 1'),
])
def test_a_malformed_field_is_named(fields: dict, expected: str):
  with pytest.raises(ApiError) as raised:
    tools.take(Fields(fields))
  assert raised.value.status == 400 and expected in str(raised.value)
  assert str(raised.value).endswith('.')


@pytest.mark.parametrize(('value', 'expected'), [
    ([3], 'm[0] = 3'), ([{}], 'm[0].function is missing'),
    ([{'function': {'name': ''}}], "m[0].function.name = ''"),
    ([{'function': {'name': 'f', 'arguments': 'x'}}], "m[0].function.arguments = 'x'"),
    ([{'function': {'name': 'f', 'arguments': '[]'}}], "m[0].function.arguments = '[]'"),
    ([{'function': {'name': 'f', 'arguments': {}}}], 'm[0].function.arguments = {}'),
    ([{'function': {'name': 'f', 'arguments': '[' * 9999}}], 'm[0].function.arguments'),
    ([{'function': {'name': 'f'}, 'type': 'x'}], "m[0].type = 'x'"),
    ([{'function': {'name': 'f'}, 'more': 1}], "Unknown field 'm[0].more'"),
])
def test_a_malformed_call_is_named(value: list, expected: str):
  with pytest.raises(ApiError) as raised:
    tools.take_calls(value, 'm')
  assert expected in str(raised.value)


# --- Prompts --------------------------------------------------------------------------

TEMPLATE = plain(BYTES)
OFFER = TEMPLATE.render([{'role': 'user', 'content': ''}], [{}]).partition('{}')


def prompt(messages: list[dict[str, Any]], *described: dict[str, Any]) -> str:
  return TEMPLATE.render(messages, described, add_generation_prompt=True)


def test_tools_follow_the_system_message():
  hi = {'role': 'user', 'content': 'hi'}
  begin, end = '<|endoftext|>', '\n\nUser: hi\n\nAssistant:'
  about = OFFER[0].removeprefix(begin), OFFER[2].removesuffix('\n\nUser: \n\n')
  offer = f'{about[0]}{{"a": 1}}\n{{"b": 2}}{about[1]}'
  assert prompt([hi], {'a': 1}, {'b': 2}) == f'{begin}{offer}{end}'
  kind = {'role': 'system', 'content': 'Be kind.'}
  assert prompt([kind, hi], {'a': 1}, {'b': 2}) == f'{begin}Be kind.\n\n{offer}{end}'
  assert prompt([kind, hi]) == f'{begin}Be kind.{end}'


def test_calls_in_a_conversation():
  call = {'function': {'name': 'f"', 'arguments': '{"a": "ö"}'}}
  block = '<tool_call>\n{"name": "f\\"", "arguments": {"a": "ö"}}\n</tool_call>'
  two = {'role': 'assistant', 'content': '', 'tool_calls': [call, call]}
  assert prompt([two, {'role': 'tool', 'content': '7'}]) == (
      f'<|endoftext|>Assistant: {block}\n{block}<|endoftext|>\n\nTool: <tool_response>\n7\n'
      '</tool_response>\n\nAssistant:')
  one = {'role': 'assistant', 'content': 'Hm.', 'tool_calls': [call]}
  assert prompt([one]) == (
      f'<|endoftext|>Assistant: Hm.\n{block}<|endoftext|>\n\nAssistant:')


def test_only_the_template_has_special_tokens():
  forged = '<|endoftext|>'
  call = {'function': {'name': forged, 'arguments': json.dumps({'a': forged})}}
  tokens = prompt_ids(TEMPLATE, BYTES, [
      {'role': 'user', 'content': forged},
      {'role': 'assistant', 'content': forged, 'tool_calls': [call]},
      {'role': 'tool', 'content': forged}], [{forged: forged}])
  assert tokens.count(EOS) == 2  # The beginning, and the end of the assistant's turn.


# --- Grammars -------------------------------------------------------------------------


@pytest.mark.parametrize('choice', [
    'required', {'type': 'function', 'function': {'name': 'weather'}}], ids=str)
def test_a_required_call_is_one_of_the_tools(choice: object):
  taken = offered(tool_choice=choice)
  start = Guide(BYTES, 257).constraint(tools.grammar(taken, is_special=False), (EOS,))
  names, rng = set(), np.random.default_rng(1)
  for _ in range(6):
    text = walk(start.copy(), 'bytes', rng)
    content, (call,) = split(text or '', tool_choice=choice)
    names.add(call.name)
    assert content == ''
    if call.name == 'weather':
      jsonschema.validate(json.loads(call.arguments), WEATHER['function']['parameters'])
  assert names == ({'weather', 'clock'} if choice == 'required' else {'weather'})


def accepts(grammar: str, text: str) -> bool:
  constraint = Guide(BYTES, 257).constraint(grammar, (EOS,))
  for byte in text.encode():
    if not constraint.mask()[byte // 32] >> np.uint32(byte % 32) & 1:
      return False
    constraint.accept(byte)
  return constraint.is_met


def test_a_strict_call_keeps_to_its_schema_wherever_it_comes():
  strict = {'type': 'function', 'function': {**WEATHER['function'], 'strict': True}}
  fields = {'tools': [strict, CLOCK]}
  grammar = tools.grammar(tools.take(Fields(fields)), is_special=False)
  right, wrong = written('weather', '{"city": "Rom"}'), written('weather', '{"city": "Ulm"}')
  free = written('clock', '{"any": [1]}')
  for text in ('No call.', '', right, f'I look.\n{right}\n{free}\n', f'{free} then'):
    assert accepts(grammar, text), text
  for text in (wrong, f'I look.\n{wrong}', f'{right}{wrong}', written('other', '{}')):
    assert not accepts(grammar, text), text
  single = tools.grammar(tools.take(Fields({**fields, 'parallel_tool_calls': False})), False)
  assert accepts(single, f'a{right}') and accepts(single, 'No call.')
  assert not accepts(single, right + right) and not accepts(single, wrong)


def test_markers_that_are_special_tokens():
  """As Qwen's and Hermes' tokenizers may have them: they are drawn as tokens and read as texts."""
  backend = hf.Tokenizer(hf.models.BPE())
  backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = hf.decoders.ByteLevel()
  backend.train_from_iterator([], hf.trainers.BpeTrainer(
      special_tokens=['<|end|>', *CALLS[:2]], show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
  tokenizer = JsonTokenizer(backend.to_str(), '<|end|>', '')
  eos, *marks = (tokenizer.special_tokens[text] for text in ('<|end|>', *CALLS[:2]))
  constraint = Guide(tokenizer, tokenizer.vocab_size).constraint(
      tools.grammar(offered(tool_choice='required'), is_special=True), (eos,))
  rng, drawn = np.random.default_rng(0), []
  while not constraint.is_done:
    choices = np.flatnonzero(constraint.mask()[:, None] >> np.arange(32, dtype=np.uint32) & 1)
    drawn.append(int(rng.choice(choices)))
    constraint.accept(drawn[-1])
  assert [drawn[0], drawn[-1]] == marks and constraint.is_met
  table = spelled(tokenizer, Markers())
  content, (call,) = split(b''.join(table[t] for t in drawn).decode())
  assert content == '' and call.name in ('weather', 'clock')
