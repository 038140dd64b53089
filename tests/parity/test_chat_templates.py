"""Chat templates render as in transformers: published ones, with tools, thoughts and odd texts."""

import json
from pathlib import Path

import pytest

from jaxrl_pt.data import chat_messages
from jaxrl_pt.errors import UserError
from tests.data.test_chat import NAMES, TURNS, VARIABLES, template

pytestmark = pytest.mark.parity
chat_template_utils = pytest.importorskip('transformers.utils.chat_template_utils')

SHARED = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'tok-deepseek-r1'
CALL = {'id': 'abcdefghi', 'type': 'function', 'function': {
    'name': 'sum', 'arguments': {'numbers': [1, 2.5], 'unit': 'né "<b>"', 'deep': {'a': None}}}}
TOOLS = [{'type': 'function', 'function': {
    'name': 'sum', 'description': 'Adds “numbers” & <more>.', 'parameters': {
        'type': 'object',
        'properties': {'numbers': {'type': 'array'}, 'unit': {'enum': ['a', 'é']}},
        'required': ['numbers']}}}]
CONVERSATIONS = {
    'one': TURNS[:1], 'three': TURNS[:3], 'four': TURNS,
    'system': [{'role': 'system', 'content': '  Be kind. \n'}, *TURNS],
    'odd': [{'role': 'user', 'content': ' \n a{{ b }}{% c %}</think>é\u2028𝄞 '},
            {'role': 'assistant', 'content': '<think>\nwhy\n</think>\n\nso\n'}, *TURNS[2:]],
    'thought': [TURNS[0], {'role': 'assistant', 'content': 'so', 'reasoning_content': 'why'},
                *TURNS[2:]],
    'calls': [TURNS[0], {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
              {'role': 'tool', 'content': '{"sum": 3.5}', 'tool_call_id': 'abcdefghi'},
              {'role': 'assistant', 'content': 'It is 3.5.'}],
    'calls_alone': [TURNS[0], {'role': 'assistant', 'content': None, 'tool_calls': [CALL, CALL]},
                    {'role': 'tool', 'content': 'a', 'tool_call_id': 'abcdefghi'},
                    {'role': 'tool', 'content': 'b', 'tool_call_id': 'abcdefghi'}]}


def expected(source: str, messages: list[dict], tools: list[dict], prompt: bool) -> str:
  rendered, _ = chat_template_utils.render_jinja_template(
      [messages], tools=tools or None, chat_template=source, add_generation_prompt=prompt,
      **dict(VARIABLES))
  return rendered[0]


@pytest.mark.parametrize('prompt', [True, False])
@pytest.mark.parametrize('tools', [[], TOOLS], ids=['plain', 'tools'])
@pytest.mark.parametrize('name', NAMES)
def test_published_templates(name: str, tools: list[dict], prompt: bool):
  told, num_equal = template(name), 0
  for messages in CONVERSATIONS.values():
    try:
      theirs = expected(told.source, messages, tools, prompt)
    except Exception as e:  # What a template refuses there it refuses here, or takes otherwise.
      try:
        told.render(messages, tools, add_generation_prompt=prompt)
      except UserError as ours:
        assert ' '.join(str(e).split()).rstrip('.')[:20] in str(ours)
      else:
        assert any('tool_calls' in message for message in messages)
      continue
    assert told.render(messages, tools, add_generation_prompt=prompt) == theirs
    num_equal += 1
  assert num_equal >= 4


@pytest.mark.parametrize('name', ['deepseek_r1_distill', 'qwen3'])
def test_calls_in_the_form_that_a_template_takes(name: str):
  """transformers leaves the form to its caller; here either is brought into the right one."""
  source = template(name).source
  texts, empty = chat_messages.other_forms(chat_messages.checked(CONVERSATIONS['calls_alone']))
  right = texts if name == 'deepseek_r1_distill' else empty
  assert template(name).render(CONVERSATIONS['calls_alone'], TOOLS) == expected(
      source, right, TOOLS, False)


def test_the_template_of_a_tokenizer_at_hand():
  path = SHARED / 'tokenizer_config.json'
  if not path.exists():
    pytest.skip(f'{path} is not here')
  source = json.loads(path.read_text())['chat_template']
  told = template('chatml').__class__(source, variables=VARIABLES)
  for messages in (TURNS[:3], CONVERSATIONS['system'], CONVERSATIONS['odd']):
    assert told.render(messages, add_generation_prompt=True) == expected(source, messages, [], True)


@pytest.mark.parametrize('source', [
    "  {% if true %}\n  a\n  {% endif %}\n\n{{ 'b' }}\n",
    "{{ 1.0 }}{{ true }}{{ none }}{{ [1, 'a'] }}",
    "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k ~ v }}{{ loop.last }}{% endfor %}",
    "{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}",
    "{{ messages | map(attribute='role') | unique | join('|') }}{{ missing }}"
    "{{ missing is defined }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% macro m(a, b='x') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}"
    "{% call m(2, b=3) %}in{% endcall %}",
    "{% generation %}{% set a = 1 %}x{% endgeneration %}{{ a is defined }}",
    "{% filter upper %}a{{ messages[0].role }}{% endfilter %}"
    "{% set t %} x {% endset %}{{ t | trim }}",
    "{{ 'a%s' % 'b' }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ 'abc'[::-1] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ range(3) | list }}"
    "{{ '1,2'.split(',')[1] }}{{ 'a' in 'abc' }}{{ messages[0].get('x', 'y') }}{{ ' a '.strip() }}",
    "{{ messages[0].content | replace('2', 'two') | upper | e }}{{ 'x' | default('y') }}"
    "{{ z | d('w') }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ [3, 1] | sort }}{{ [3, 1] | max }}{{ 2.567 | round(1) }}"])
def test_constructions(source: str):
  told = template('chatml').__class__(source, variables=VARIABLES)
  assert told.render(TURNS) == expected(source, TURNS, [], False)
