"""What clients send of their own accord: echoed answers, fields, stop texts, or no more at all."""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
import socket
import time

import httpx2
import openai
import pytest

from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.sampling.engine import Engine, Request
from jaxrl_pt.serving import connections, protocol
from tests.serving.conftest import Running, running

DOCS = Path(__file__).resolve().parents[2] / 'docs' / 'serving.md'
ASK = {'role': 'user', 'content': 'hi'}


@pytest.fixture(scope='module')
def server(engine: Engine) -> Iterator[Running]:
  with running(engine) as it:
    yield it


def chat(server: Running, messages: list, **fields: object):
  return server.client().chat.completions.create(
      model='tiny', messages=messages, **{'max_completion_tokens': 8, 'seed': 3, **fields})


# --- Answers that come back -----------------------------------------------------------


@pytest.mark.parametrize('budget', [{}, {'max_thought': 4}])
def test_the_servers_own_answer_comes_back_as_input(server: Running, budget: dict):
  # Short, since a byte that is no text comes back as three.
  answer = chat(server, [ASK], max_completion_tokens=3, extra_body=budget).choices[0].message
  if budget:
    assert answer.reasoning_content
  again = chat(server, [{'role': 'user', 'content': 'a'}, answer, ASK])
  plain = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': answer.content}, ASK]
  assert again.choices[0].message.content == chat(server, plain).choices[0].message.content


@pytest.mark.parametrize('said', [
    {'reasoning_content': 'hm'}, {'reasoning_content': None}, {'reasoning': 'hm'},
    {'tool_calls': []}, {'tool_calls': None}, {'annotations': []}, {'function_call': None},
    {'refusal': None}, {'audio': None}, {'name': 'tiny'},
    {'tool_calls': [], 'annotations': [], 'audio': None, 'refusal': None, 'function_call': None}])
def test_an_answer_with_what_servers_add(server: Running, said: dict):
  plain = chat(server, [ASK, {'role': 'assistant', 'content': 'yo'}, ASK])
  again = chat(server, [ASK, {'role': 'assistant', 'content': 'yo', **said}, ASK])
  assert again.choices[0].message.content == plain.choices[0].message.content


def test_an_answer_without_content_is_an_empty_one(server: Running):
  empty = chat(server, [ASK, {'role': 'assistant', 'content': ''}, ASK])
  none = chat(server, [ASK, {'role': 'assistant', 'content': None, 'tool_calls': []}, ASK])
  assert none.choices[0].message.content == empty.choices[0].message.content


@pytest.mark.parametrize('said', [
    {'annotations': [{'type': 'url_citation'}]}, {'refusal': 'No.'}, {'audio': {'id': 'a'}}])
def test_what_an_answer_says_by_other_means_is_refused_by_name(server: Running, said: dict):
  with pytest.raises(openai.BadRequestError) as raised:
    chat(server, [ASK, {'role': 'assistant', 'content': 'yo', **said}, ASK])
  assert raised.value.param == f'messages[1].{next(iter(said))}'
  assert 'does not support' in str(raised.value)


# --- Fields ---------------------------------------------------------------------------

HARMLESS = {
    'metadata': {'a': 'b'}, 'store': True, 'service_tier': 'auto', 'user': 'u',
    'safety_identifier': 's', 'prompt_cache_key': 'k',
    'prompt_cache_retention': '24h', 'parallel_tool_calls': False, 'verbosity': 'low',
    'prediction': {'type': 'content', 'content': 'x'}, 'skip_special_tokens': True}


@pytest.mark.parametrize('path, body', [
    ('/v1/completions', {'prompt': 'hi', 'max_tokens': 8, 'seed': 3}),
    ('/v1/chat/completions', {'messages': [ASK], 'max_tokens': 8, 'seed': 3})])
def test_harmless_fields_change_nothing(server: Running, path: str, body: dict):
  post = lambda **fields: httpx2.post(f'{server.url}{path}', json={**body, **fields}).json()
  plain = post()['choices']
  assert set(HARMLESS) >= set(protocol.IGNORED)
  for name, value in HARMLESS.items():
    assert post(**{name: value}).get('choices') == plain, name
  assert post(**HARMLESS, stream_options={'include_obfuscation': False})['choices'] == plain


def test_every_ignored_field_is_listed_in_the_documentation():
  text = DOCS.read_text(encoding='utf-8')
  for name in (*protocol.IGNORED, *protocol.IGNORED_IN_MESSAGES, 'user'):
    assert f'`{name}`' in text, name


@pytest.mark.parametrize('name, value', [
    ('functions', [{}]), ('logit_bias', {'1': 2}), ('structured_outputs', {'json': {}}),
    ('repetition_penalty', 1.1), ('min_tokens', 3), ('ignore_eos', True), ('stop_token_ids', [3]),
    ('chat_template', '{{ x }}'),
    ('modalities', ['text', 'audio']), ('audio', {'voice': 'x'}), ('web_search_options', {}),
    ('guided_grammar', 'start: "a"'), ('echo', True), ('use_beam_search', True)])
def test_a_field_that_would_change_the_answer_is_refused_by_name(server: Running, name, value):
  answer = httpx2.post(f'{server.url}/v1/chat/completions', json={'messages': [ASK], name: value})
  error = answer.json()['error']
  assert answer.status_code == 400 and error['param'] == name
  assert f'{name} = ' in error['message'] and 'does not support it' in error['message']


def test_four_stop_texts_beside_the_templates_own(server: Running):
  own = server.service.layout.stop_texts
  sent = ['never 1', 'never 2', 'never 3', 'never 4']
  asked = protocol.chat({'messages': [ASK], 'stop': sent}, server.service, protocol.Ids())
  assert own and asked.requests[0].stop_strings == (*own, *sent)
  whole = chat(server, [ASK]).choices[0].message.content
  assert chat(server, [ASK], stop=sent).choices[0].message.content == whole


def test_the_last_of_many_stop_texts_ends_a_response(engine: Engine):
  many = tuple(f'never {n}' for n in range(6))
  for seed in range(40):
    request = Request((65,), 2**31 + seed, 40)
    text = bytes(t for t in engine.run([request])[0][0].tokens.tolist() if t < 256)
    at = next((i for i in range(3, len(text) - 1)
               if text[i:i + 2].isascii() and 0 not in text[i:i + 2]), None)
    if at is not None:
      piece = text[at:at + 2]
      stopped = dataclasses.replace(request, stop_strings=(*many, piece.decode()))
      response = engine.run([stopped])[0][0]
      assert response.finish == 'stop_string'
      assert len(response.tokens) == text.index(piece) + 2
      return
  raise AssertionError('no response holds two characters of ASCII')


def test_large_seeds_do_not_repeat_small_ones():
  ids = protocol.Ids()
  seeds = [0, 1, -1, 2**31, 2**31 + 1, 2**32, 2**32 + 1, -2**63, 2**63 - 1]
  assert len({ids.of(seed) for seed in seeds}) == len(seeds)
  assert [ids.of(seed) for seed in seeds] == [ids.of(seed) for seed in seeds]
  assert ids.of(7) == 2**31 + 7  # as it was


def test_special_tokens_of_the_template_and_of_a_message(engine: Engine):
  """Bytes know one special token, which ends a document."""
  template = ChatTemplate('<|endoftext|>{% for m in messages %}{{ m.content }}<|endoftext|>'
                          '{% endfor %}A:')
  with running(engine, template=template) as server:
    answer = chat(server, [{'role': 'user', 'content': 'ab'}])
    assert answer.usage.prompt_tokens == 1 + 2 + 1 + 2  # The first begins the conversation.
    answer = chat(server, [{'role': 'user', 'content': '<|endoftext|>'}])
    assert answer.usage.prompt_tokens == 1 + 13 + 1 + 2


# --- Connections ----------------------------------------------------------------------


def half_a_header(server: Running) -> socket.socket:
  host, port = server.url.removeprefix('http://').split(':')
  connection = socket.create_connection((host, int(port)), timeout=30)
  connection.sendall(b'GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ')
  return connection


def healthy(server: Running) -> bool:
  return httpx2.get(f'{server.url}/health', timeout=20).status_code == 200


def test_headers_that_never_end_lock_nobody_out(engine: Engine):
  with running(engine, most=8, header_seconds=60) as server:
    held = [half_a_header(server) for _ in range(40)]
    assert healthy(server)
    # The newest are still waited for; the oldest have made room.
    held[-1].sendall(b'x\r\nConnection: close\r\n\r\n')
    assert b' 200 ' in held[-1].recv(4096)
    assert b' 503 ' in held[0].recv(4096)
    for connection in held:
      connection.close()


def test_headers_have_to_arrive_in_time(engine: Engine):
  with running(engine, header_seconds=0.5) as server:
    dripping, began = half_a_header(server), time.monotonic()
    answer = b''
    while not answer:
      with_time = time.monotonic() - began
      assert with_time < 20
      try:
        dripping.sendall(b'x')  # A byte now and then does not set the clock back.
        dripping.settimeout(0.1)
        answer = dripping.recv(4096)
      except TimeoutError:
        continue
    assert b' 408 ' in answer and time.monotonic() - began >= 0.4
    assert healthy(server)


def test_a_slow_second_request_on_a_connection_is_closed_too(engine: Engine):
  with running(engine, header_seconds=0.5) as server:
    connection = half_a_header(server)
    connection.sendall(b'x\r\n\r\n')
    assert b' 200 ' in connection.recv(4096)
    connection.sendall(b'GET /health HTTP/1.1\r\nX-Slow: ')
    connection.settimeout(20)
    rest = b'-'
    while rest:
      rest = connection.recv(4096)
    connection.close()


def test_the_cap_leaves_descriptors_for_everything_else(monkeypatch: pytest.MonkeyPatch):
  for files, expected in ((256, 128), (1024, 512), (10**6, 1024), (-1, 1024), (8, 1)):
    monkeypatch.setattr(connections.resource, 'getrlimit', lambda _, files=files: (files, files))
    assert connections.most_connections() == expected


def test_one_line_a_request_on_request(engine: Engine):
  lines: list[str] = []
  with running(engine, token='s3cret', log=lines.append) as server:
    httpx2.get(f'{server.url}/health')
    httpx2.get(f'{server.url}/v1/models', headers={'Authorization': 'Bearer wrong'})
    httpx2.get(f'{server.url}/a%0Ab%1b', headers={'Authorization': 'Bearer s3cret'})
    server.client(api_key='s3cret').completions.create(model='tiny', prompt='a secret',
                                                       max_tokens=1)
  assert len(lines) == 4
  expected = ('GET /health 200', 'GET /v1/models 401', 'GET /a\\nb\\x1b 404',
              'POST /v1/completions 200')
  for line, request in zip(lines, expected, strict=True):
    stamp, client, rest = line.split(' ', 2)
    assert stamp.endswith('Z') and client == '127.0.0.1' and rest.startswith(request), line
    assert line.endswith(' bytes') and 'secret' not in line and 's3cret' not in line
