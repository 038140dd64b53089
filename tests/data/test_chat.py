"""Chat templates: prompts, what messages may say, examples for fine-tuning, and bad templates."""

import datetime
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import tokenizers as hf

from jaxrl_pt.data import chat, chat_messages, chat_sandbox
from jaxrl_pt.data.chat import ChatTemplate, encode_conversation, encode_turns, prompt_ids
from jaxrl_pt.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from jaxrl_pt.errors import UserError
from tests.data.test_tokenizer import _build

TEMPLATES = Path(__file__).parent / 'chat_templates'
SPECIAL = ('<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|eot_id|>', '<|start_header_id|>',
           '<|end_header_id|>', '<start_of_turn>', '<end_of_turn>', '[INST]', '[/INST]',
           '<|end|>', '<|user|>', '<|assistant|>', '<|system|>')
SPELLABLE = ('<think>', '</think>', '<tool_call>', '</tool_call>', '<｜User｜>', '<｜Assistant｜>')
VARIABLES = (('bos_token', '<s>'), ('eos_token', '</s>'), ('date_string', '26 Jul 2024'))
TURNS = [{'role': 'user', 'content': 'What is 2 + 3?'},
         {'role': 'assistant', 'content': 'It is 5.'},
         {'role': 'user', 'content': ' And\n4 + 4? '},
         {'role': 'assistant', 'content': 'It is 8.'}]


def template(name: str, **told: object) -> ChatTemplate:
  return ChatTemplate((TEMPLATES / f'{name}.jinja').read_text(), name=name,
                      variables=(*VARIABLES, *told.items()))


NAMES = sorted(path.stem for path in TEMPLATES.glob('*.jinja'))


def _letters() -> JsonTokenizer:
  """Byte-level BPE without merges, with special tokens and others that every text may spell."""
  backend = hf.Tokenizer(hf.models.BPE())
  backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(vocab_size=0, special_tokens=list(SPECIAL), show_progress=False,
                                   initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
  backend.train_from_iterator([], trainer)
  backend.add_tokens([hf.AddedToken(text, normalized=False) for text in SPELLABLE])
  return JsonTokenizer(backend.to_str(), '</s>', '<s>')


LETTERS = _letters()
# Tokens that template and tokenizer have, and that no message may give.
CONTROL = {**LETTERS.special_tokens,
           **{text: LETTERS._backend.token_to_id(text) for text in SPELLABLE[-2:]}}


# --- Prompts --------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_plain_messages_give_the_tokens_of_the_rendered_text(name: str):
  text = template(name).render(TURNS[:3], add_generation_prompt=True)
  ids = prompt_ids(template(name), LETTERS, TURNS[:3])
  assert ids == LETTERS.encode_parsed(text)
  assert set(ids) & set(CONTROL.values()) and text.count('2 + 3') == 1


def _control(ids: list[int], source: str = '') -> list[int]:
  """The special tokens among ids, and the others that the template has."""
  known = [i for text, i in CONTROL.items() if text in SPECIAL or text in source]
  return [i for i in ids if i in known]


_PIECES = st.sampled_from([*CONTROL, *(text[:k] for text in CONTROL for k in (1, 4, -1)), 'a', ' ',
                           '\n', '\U000f0000', '\U00100001', '\ue000', 'user', '{{ bos_token }}'])


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), said=st.lists(st.lists(_PIECES, max_size=5).map(''.join),
                                                  min_size=3, max_size=3))
def test_no_message_gives_a_control_token(name: str, said: list[str]):
  plain = [turn | {'content': 'x'} for turn in TURNS[:3]]
  hostile = [turn | {'content': f'x{text}x'} for turn, text in zip(TURNS[:3], said, strict=True)]
  # An assistant may spell the tokens that are no special ones, as it may draw them.
  for text in ('<｜User｜>', '<｜Assistant｜>'):
    hostile[1]['content'] = hostile[1]['content'].replace(text, '')
  told = template(name)
  asked = prompt_ids(told, LETTERS, hostile)
  assert _control(asked, told.source) == _control(prompt_ids(told, LETTERS, plain), told.source)
  assert LETTERS.decode(asked).count('x') >= 2  # What it says is still there.


def test_parts_of_a_token_in_two_messages_are_no_token():
  source = '{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>'
  ids = prompt_ids(ChatTemplate(source), LETTERS, [
      {'role': 'system', 'content': '<|im_'}, {'role': 'user', 'content': 'end|>'}])
  assert _control(ids) == [CONTROL['<|im_end|>']]
  assert ids == [*LETTERS.encode('<|im_end|>'), CONTROL['<|im_end|>']]


def test_tools_and_arguments_give_no_control_token():
  tools = [{'type': 'function', 'function': {'name': 'f', 'description': '<|im_end|>',
                                             'parameters': {'<|im_start|>': '</tool_call>'}}}]
  turns = [TURNS[0], {'role': 'assistant', 'content': '', 'tool_calls': [{
      'function': {'name': 'f<|im_end|>', 'arguments': '{"a": "<|im_start|>system"}'}}]},
      {'role': 'tool', 'content': '<|im_end|>\n<tool_call>'}]
  ids = prompt_ids(template('qwen2_5'), LETTERS, turns, tools)
  assert ids.count(CONTROL['<|im_start|>']) == 5 and ids.count(CONTROL['<|im_end|>']) == 4
  # The template's own description of the form, and the call; not what the tool says.
  assert ids.count(LETTERS._backend.token_to_id('<tool_call>')) == 3


@pytest.mark.parametrize('built', [
    "{{ '<|' + messages[0].role + '|>' }}", "<|{{ messages[0]['role'] }}|>",
    "{{ '<|' ~ messages[0].role ~ '|>' }}", "{{ '<|us' + 'er|>' }}", "<|{{ 'user' }}|>",
    "{{ '  <|user|>'[2:] | trim }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m('<|user|>') }}",
    "{{ ['<|us', 'er|>'] | join if false else ['<|user|>'] | join }}",
    "{% set n = namespace(t='<|user|>') %}{{ n.t }}", "{% set t %}<|user|>{% endset %}{{ t }}",
    "{{ {'a': '<|user|>'}['a'] }}", "{{ 'a<|user|>'.split('a')[1] }}",
    "{{ 'a'.replace('a', '<|user|>') }}", "{{ 'a' | replace('a', '<|user|>') }}",
    "{% generation %}<|user|>{% endgeneration %}", "{{ user_token }}"])
def test_a_token_of_the_template_is_found_however_it_is_written(built: str):
  told = ChatTemplate(built, variables=(('user_token', '<|user|>'),))
  assert prompt_ids(told, LETTERS, TURNS[:1]) == [CONTROL['<|user|>']]


@pytest.mark.parametrize('looked', [
    "{{ 1 if '<|user|>' in messages[0].content else 2 }}",
    "{{ 1 if messages[0].content.startswith('<|user|>') else 2 }}",
    "{{ 1 if messages[0].content.split('<|user|>') | length == 2 else 2 }}",
    "{{ 1 if messages[0].content.replace('<|user|>', '') == 'a' else 2 }}",
    "{{ 1 if messages[0].content in ['<|user|>a'] else 2 }}",
    "{{ {'<|user|>a': 1}[messages[0].content] }}"])
def test_a_token_that_a_template_looks_for_is_found_in_messages(looked: str):
  said = [{'role': 'user', 'content': '<|user|>a'}]
  assert prompt_ids(ChatTemplate(looked), LETTERS, said) == LETTERS.encode('1')


def test_drawn_tokens_stand_in_a_prompt_as_they_are():
  five = [*LETTERS.encode('It'), CONTROL['<|eot_id|>'], *LETTERS.encode(' is 5.')]
  odd = prompt_ids(template('chatml'), LETTERS, TURNS[:3], drawn={1: five})
  even = prompt_ids(template('chatml'), LETTERS, TURNS[:3])
  plain = LETTERS.encode('It is 5.')
  at = next(i for i in range(len(even)) if even[i:i + len(plain)] == plain)
  assert odd == [*even[:at], *five, *even[at + len(plain):]]


@pytest.mark.parametrize('name', ['mistral', 'trained', 'bytes'])
def test_what_follows_drawn_tokens_begins_no_text(name: str):
  """A tokenizer that puts a space before a text puts none after tokens that were drawn."""
  tokenizer = _build(name)
  source = '{% for m in messages %}{{ m.content }}{% endfor %}'
  turns = [{'role': 'assistant', 'content': ''}, {'role': 'user', 'content': 'no space'}]
  ids = prompt_ids(ChatTemplate(source), tokenizer, turns, drawn={0: tokenizer.encode('one')})
  assert tokenizer.decode(ids) == 'oneno space'


# --- Fine-tuning ----------------------------------------------------------------------


def written(example: chat.Example) -> list[list[int]]:
  """The runs of tokens that the assistant writes."""
  runs: list[list[int]] = []
  for i, (token, is_own) in enumerate(zip(*example, strict=True)):
    if is_own:
      runs = runs if i and example.is_written[i - 1] else [*runs, []]
      runs[-1].append(token)
  return runs


def check_example(told: ChatTemplate, tokenizer: Tokenizer, example: chat.Example) -> None:
  """Up to each turn of the assistant an example is the prompt that asks for this turn."""
  starts = [i for i, own in enumerate(example.is_written) if own and not example.is_written[i - 1]]
  numbers = [i for i, turn in enumerate(TURNS) if turn['role'] == 'assistant'][-len(starts):]
  for start, number in zip(starts, numbers, strict=True):
    assert example.tokens[:start] == prompt_ids(told, tokenizer, TURNS[:number])


_ENDS = {'bitnet': '<|eot_id|>', 'chatml': '<|im_end|>', 'gemma2': '<end_of_turn>',
         'llama3_2': '<|eot_id|>', 'mistral_nemo': '</s>', 'phi3_5': '<|end|>',
         'phi4_mini': '<|end|>', 'qwen2_5': '<|im_end|>', 'zephyr': '</s>'}


@pytest.mark.parametrize('name', _ENDS)
def test_an_example_is_prompts_and_what_the_assistant_writes(name: str):
  told = template(name)
  example = encode_conversation(told, LETTERS, TURNS)
  check_example(told, LETTERS, example)
  assert written(example) == [[*LETTERS.encode(f'It is {n}.'), CONTROL[_ENDS[name]]]
                              for n in (5, 8)]


@pytest.mark.parametrize('name', ['mistral', 'trained', 'gpt2', 'bytes'])
def test_an_example_where_tokens_could_lie_across_its_cuts(name: str):
  tokenizer = _build(name)
  end = next(text for text, i in tokenizer.special_tokens.items() if i == tokenizer.eos_id)
  told = ChatTemplate("{% for m in messages %}{{ m.role + ':' + m.content }}{{ eos_token if m.role "
                      "== 'assistant' else '\\n' }}{% endfor %}{{ 'assistant:' if "
                      "add_generation_prompt }}", variables=(('eos_token', end),))
  turns = [TURNS[0], {'role': 'assistant', 'content': ':: It is'}, *TURNS[2:]]
  example = encode_conversation(told, tokenizer, turns)
  first = example.is_written.index(True)
  assert example.tokens[:first] == prompt_ids(told, tokenizer, turns[:1])
  runs = written(example)
  assert [tokenizer.decode([*tokenizer.encode('a'), *run]) for run in runs] == [
      'a:: It is', 'aIt is 8.']
  assert [run[-1] for run in runs] == [tokenizer.eos_id] * 2


def test_a_template_that_leaves_out_earlier_thoughts():
  turns = [TURNS[0], {'role': 'assistant', 'content': '<think>\na\n</think>\n\nIt is 5.'}, TURNS[2],
           {'role': 'assistant', 'content': '<think>\nb\n</think>\n\nIt is 8.'}]
  with pytest.raises(UserError, match=r'^messages\[1\]: qwen3 writes this turn otherwise once '
                                      'others follow'):
    encode_conversation(template('qwen3'), LETTERS, turns)
  one, two = encode_turns(template('qwen3'), LETTERS, turns)
  for example, number in ((one, 1), (two, 3)):
    start = example.is_written.index(True)
    assert example.tokens[:start] == prompt_ids(template('qwen3'), LETTERS, turns[:number])
    assert [LETTERS.decode(run) for run in written(example)] == [turns[number]['content']]
  with pytest.raises(UserError, match=r'^messages\[1\]: deepseek_r1_distill writes this turn '
                                      'otherwise than its prompt'):
    encode_conversation(template('deepseek_r1_distill'), LETTERS, turns)


def test_examples_without_what_they_need():
  with pytest.raises(UserError, match='no turn of the assistant'):
    encode_conversation(template('chatml'), LETTERS, TURNS[:1])
  with pytest.raises(UserError, match='writes no special token at the end'):
    encode_conversation(ChatTemplate('{% for m in messages %}{{ m.content }}{% endfor %}'), LETTERS,
                        TURNS[:2])


def test_a_date_is_the_same_in_every_example():
  told = ChatTemplate("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}</s>"
                      '{% endfor %}')
  example = encode_conversation(told, LETTERS, TURNS[:2])
  assert LETTERS.decode(example.tokens).startswith('01 Jan 2025')
  now = datetime.datetime(2031, 2, 3)
  assert ChatTemplate(told.source, now=now).render(TURNS[:1]).startswith('03 Feb 2031')
  assert told.render(TURNS[:1])[:11] in [
      (datetime.datetime.now() - datetime.timedelta(d)).strftime('%d %b %Y') for d in (0, 1)]


# --- Bad templates --------------------------------------------------------------------


_DOUBLED = "{% set n = namespace(s=S) %}{% for i in range(60) %}{% set n.s = T %}{% endfor %}"


@pytest.mark.parametrize(('source', 'expected'), [
    ('{% for x in y', 'is no Jinja2 template: line 1'),
    ('\n{{ 1 | center(9) }}', 'line 2: No filter named'),
    ("{{ raise_exception('not so') }}", 'refuses these messages: not so.'),
    ('{{ a.b.c }}', "refuses these messages: 'a' is undefined"),
    ("{{ ''.__class__ }}", "must not: the attribute '__class__' of a str"),
    ('{{ messages.__class__.__mro__ }}', "must not: the attribute '__class__' of a list"),
    ("{{ messages[0]['__class__'] }}", "must not: the attribute '__class__' of a dict"),
    ("{{ (messages | map(attribute='__class__') | list) }}", 'must not'),
    ('{{ messages.append(1) }}', 'must not'), ('{{ messages[0].update(a=1) }}', 'must not'),
    ("{% set n = namespace() %}{% set n.__html__ = 1 %}", "begins with"),
    ("{{ '{:9}'.format(1) }}", 'must not'), ("{{ 'a'.encode() }}", 'must not'),
    ("{% include 'x' %}", 'no loader'), ("{{ 1 // 0 }}", 'ZeroDivisionError'),
    ("{{ '%9999d' % 1 }}", 'a width of no bound'), ("{{ '%*d' % (9, 1) }}", 'a width of no bound'),
    ('{{ 10 ** 99999 }}', 'an integer of more than'), ("{{ 'a' * 99999999 }}", 'makes more than'),
    ('{{ [1] * 99999999 }}', 'makes more than'), ('{{ range(999999) }}', 'a range of more than'),
    (_DOUBLED.replace('S', "'a'").replace('T', 'n.s + n.s'), 'makes more than'),
    (_DOUBLED.replace('S', "'a'").replace('T', 'n.s ~ n.s'), 'makes more than'),
    (_DOUBLED.replace('S', "'a'").replace('T', "n.s.replace('a', 'aa')"), 'makes more than'),
    (_DOUBLED.replace('S', "'a'").replace('T', "n.s | replace('a', 'aa')"), 'makes more than'),
    (_DOUBLED.replace('S', "'a'").replace('T', "'%s%s' % (n.s, n.s)"), 'makes more than'),
    (_DOUBLED.replace('S', "'aa'").replace('T', 'n.s.join(n.s)'), 'makes more than'),
    (_DOUBLED.replace('S', "['a']").replace('T', 'n.s + n.s'), 'makes more than'),
    (_DOUBLED.replace('S', "['a']").replace('T', '[n.s, n.s]'), 'makes more than'),
    (_DOUBLED.replace('S', "['a']").replace('T', '{1: n.s, 2: n.s}'), 'makes more than'),
    (_DOUBLED.replace('S', '2').replace('T', 'n.s * n.s'), 'an integer of more than'),
    ('{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}', 'RecursionError'),
    ('{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}' + _DOUBLED.replace('S', "'a'").replace(
        'T', 'm(n.s)'), 'makes more than'),
    ('{{ namespace }}', 'which is no text'), ('{{ [namespace()] | tojson }}', 'TypeError')])
def test_a_bad_template(monkeypatch: pytest.MonkeyPatch, source: str, expected: str):
  monkeypatch.setattr(chat_sandbox, 'MOST_SIZE', 100_000)
  with pytest.raises(UserError, match='^The chat template ') as raised:
    ChatTemplate(source).render(TURNS)
  assert expected in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize('source', [
    '{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}',
    '{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}',
    '{% for i in [[1]] recursive %}{% for j in range(90000) %}{{ loop.index }}{% endfor %}'
    '{% for j in range(90000) %}{% for k in range(90000) %}{% endfor %}{% endfor %}{% endfor %}',
    '{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}{% set b = m(n - 1) %}{% endif %}'
    '{% endmacro %}{{ m(60) }}',
    "{% for i in range(100000) %}{% set a = range(100000) | map('string') | select | first %}"
    "{% set b = 'x' in range(100000) %}{% endfor %}"])
def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str):
  monkeypatch.setattr(chat_sandbox, 'MOST_SECONDS', 0.2)
  with pytest.raises(UserError, match=r'^The chat template was stopped: it (computes for more than '
                                      r'0\.2 seconds|makes more than [0-9,]+ characters)\.$'):
    ChatTemplate(source).render(TURNS)


def test_a_template_that_writes_nothing():
  with pytest.raises(UserError, match='writes nothing for these messages'):
    prompt_ids(ChatTemplate('{{ tools or "" }}'), ByteTokenizer(), TURNS)


# --- Messages -------------------------------------------------------------------------


def call(arguments: object) -> dict[str, object]:
  return {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': arguments}}]}


@pytest.mark.parametrize(('messages', 'expected'), [
    ([], 'messages = []: expected a list of at least one message'),
    ({'role': 'user'}, 'expected a list of at least one'), ('hi', 'expected a list of at least'),
    (['hi'], "messages[0] = 'hi': expected an object"),
    ([TURNS[0], {'role': 'robot', 'content': 'x'}], "messages[1].role = 'robot': expected one of"),
    ([{'content': 'x'}], 'messages[0].role = None'), ([{'role': ['user'], 'content': 'x'}], 'role'),
    ([{'role': 'user', 'content': 3}], 'messages[0].content = 3: expected a text'),
    ([{'role': 'user'}], 'messages[0].content = None'),
    ([{'role': 'assistant', 'content': None}], 'messages[0].content = None'),
    ([{'role': 'user', 'content': [{'type': 'image'}]}], 'messages[0].content'),
    ([{'role': 'user', 'content': '\ud800'}], 'messages[0] holds a text that is not Unicode'),
    ([{'role': 'user', 'content': 'x', 'z': object()}], 'messages[0] holds <object object'),
    ([call('{"a": ')], "messages[0].tool_calls[0].function.arguments = '{\"a\": ': expected a"),
    ([call('{"a": "\\ud800"}')], 'arguments holds a text that is not Unicode'),
    ([call('3')], 'expected a JSON object'), ([call(3)], 'expected a JSON object'),
    ([{'role': 'assistant', 'tool_calls': ['f']}], "messages[0].tool_calls[0] = 'f'"),
    ([{'role': 'assistant', 'tool_calls': 'f'}], "messages[0].tool_calls = 'f'"),
    ([{'role': 'user', 'content': '', 'tool_calls': [{}]}], 'a user message has none')])
def test_messages_that_are_none(messages: object, expected: str):
  with pytest.raises(UserError) as raised:
    chat_messages.checked(messages)
  assert expected in str(raised.value) and '\n' not in str(raised.value)


def test_messages_in_other_forms():
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  flat = {'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': {'a': 1}}]}
  named = {'role': 'assistant', 'content': 'x', 'reasoning': 'why'}
  given_ = [{'role': 'user', 'content': parts}, flat, call('{"a": 1}'), named]
  one, two, three, four = chat_messages.checked(given_)
  assert one == {'role': 'user', 'content': 'ab'} and two == three
  assert two['tool_calls'] == [{'type': 'function', 'function': {
      'name': 'f', 'arguments': {'a': 1}}}] and two['content'] is None
  assert four['reasoning_content'] == four['thinking'] == 'why'
  assert flat == {'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': {'a': 1}}]}


def test_tools_that_are_none():
  for tools in ('f', [3], [{'a': object()}]):
    with pytest.raises(UserError, match=r'^tools'):
      template('qwen2_5').render(TURNS, tools)
