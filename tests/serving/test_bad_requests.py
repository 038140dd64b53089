"""What is wrong with a request is said in OpenAI's shape to its sender, and the others go on."""

from collections.abc import Iterator
import json
import os
import socket
import threading
import time

import httpx2
import psutil
import pytest

from jaxrl_pt.sampling.engine import Engine
from tests.serving.conftest import SIZES, Running, running


@pytest.fixture(scope='module')
def server(engine: Engine) -> Iterator[Running]:
  with running(engine) as it:
    yield it


COMPLETIONS, CHAT = '/v1/completions', '/v1/chat/completions'
HI = [{'role': 'user', 'content': 'hi'}]
CLOCK = {'type': 'function', 'function': {'name': 'clock'}}


def refused(server: Running, path: str, status: int = 400, **request: object) -> dict:
  answer = httpx2.post(f'{server.url}{path}', timeout=30, **request)
  assert answer.status_code == status, answer.text
  assert answer.headers['content-type'] == 'application/json'
  error = answer.json()['error']
  assert set(error) == {'message', 'type', 'param', 'code'} and error['message'].endswith('.')
  return error


@pytest.mark.parametrize(('fields', 'expected'), [
    ({}, 'prompt is missing'),
    ({'prompt': ''}, 'none of them empty'),
    ({'prompt': []}, 'none of them empty'),
    ({'prompt': ['a', '']}, 'none of them empty'),
    ({'prompt': ['a'] * 17}, 'at most 16'),
    ({'prompt': {'text': 'a'}}, "prompt = {'text': 'a'}: expected a text"),
    ({'prompt': [1, 'a']}, 'expected a text'),
    ({'prompt': [1, True]}, 'expected a text'),
    ({'prompt': [65, 257]}, 'token 257, outside the vocabulary of 257'),
    ({'prompt': [-1]}, 'token -1, outside the vocabulary'),
    ({'prompt': [10**30]}, 'outside the vocabulary'),
    ({'prompt': 'x' * (SIZES.prompt_len + 1)}, '66 tokens and the cache takes 64'),
    ({'prompt': 'x' * 900_000}, '900001 tokens and the cache takes 64'),
    ({'prompt': 'a\ud800'}, 'expected a text'),
    ({'stop': ''}, 'stop = \'\': expected a text or a list of texts, none of them empty'),
    ({'stop': ['a', '']}, 'none of them empty'),
    ({'stop': 3}, 'stop = 3'),
    ({'stop': ['a', 'b', 'c', 'd', 'e']}, 'stop holds 5 texts: expected at most 4'),
    ({'stop': 'x' * 33}, 'write 1 to 32 bytes'),
    ({'top_p': 0}, 'top_p = 0: expected a number above 0 and at most 1'),
    ({'top_p': 1.01}, 'top_p = 1.01'),
    ({'top_p': '1'}, "top_p = '1'"),
    ({'temperature': -0.1}, 'temperature = -0.1: expected a number of at least 0'),
    ({'temperature': True}, 'temperature = True'),
    ({'temperature': 10**400}, 'temperature = 1'),
    ({'temperature': 1e-30}, 'temperature = 1e-30: expected 0 for the likeliest token, or a'),
    ({'temperature': 1e29}, 'temperature = 1e+29: expected 0'),
    ({'min_p': 2}, 'min_p = 2'),
    ({'top_k': -1}, 'top_k = -1'),
    ({'top_k': 2**40}, 'top_k = '),
    ({'n': 0}, 'n = 0: expected a whole number from 1 to 16'),
    ({'n': 17}, 'n = 17'),
    ({'n': 9}, 'num_samples = 9; write 1 to 8'),
    ({'n': 3, 'prompt': ['a', 'b', 'c']}, '9 responses are asked for at once and at most 8'),
    ({'max_tokens': 0}, 'max_tokens = 0: expected a whole number from 1 to 96'),
    ({'max_tokens': 97}, 'max_tokens = 97'),
    ({'max_tokens': 2.5}, 'max_tokens = 2.5'),
    ({'seed': 2**63}, 'seed = 9223372036854775808'),
    ({'stream': 'yes'}, 'stream = \'yes\': expected true or false'),
    ({'stream_options': 1}, 'stream_options = 1'),
    ({'stream_options': {'every': 1}}, "Unknown field 'stream_options.every'"),
    ({'logprobs': 21}, 'logprobs = 21: expected a whole number from 0 to 20'),
    ({'logprobs': True}, 'logprobs = True'),
    ({'echo': 1}, 'echo = 1: expected true or false'),
    ({'echo': True, 'max_tokens': -1}, 'max_tokens = -1: expected a whole number from 0 to 96'),
    ({'suffix': 'x'}, "suffix = 'x': this server does not support it"),
    ({'best_of': 0}, 'best_of = 0'),
    ({'best_of': 2, 'n': 3}, 'best_of = 2: expected at least n = 3'),
    ({'best_of': 2, 'stream': True}, 'best_of = 2: expected n = 1 with a stream'),
    ({'guided_regex': '('}, 'guided_regex cannot be met: unclosed group'),
    ({'guided_regex': 'a\\'}, 'guided_regex cannot be met: a single backslash at its end'),
    ({'guided_regex': '(a{1000}){1000}'}, 'guided_regex cannot be met: lexer error: too many'),
    ({'guided_regex': 3}, 'guided_regex = 3: expected a regular expression'),
    ({'guided_json': '{'}, "guided_json = '{': expected a JSON schema"),
    ({'guided_json': {'type': 3}}, 'guided_json cannot be met: '),
    ({'guided_json': {}, 'guided_regex': 'a'}, 'guided_regex cannot be combined with guided_json'),
    ({'guided_choice': ['a']}, 'guided_choice'),
    ({'tools': []}, "Unknown field 'tools'"),
    ({'logit_bias': {'3': 1}}, 'logit_bias'),
    ({'frequency_penalty': 0.5}, 'frequency_penalty = 0.5'),
    ({'temprature': 1}, "Unknown field 'temprature'"),
    ({'a\ud800': 1}, "Unknown field 'a\\ud800'"),
    ({'max_thought': -1}, 'max_thought = -1'),
    ({'user': 3}, 'user = 3'),
])
def test_a_wrong_field(server: Running, fields: dict, expected: str):
  body = ({'prompt': 'x'} if 'prompt' not in fields and fields else {}) | fields
  error = refused(server, COMPLETIONS, content=json.dumps(body),
                  headers={'Content-Type': 'application/json'})
  assert expected in error['message'] and error['type'] == 'invalid_request_error'
  assert len(error['message']) < 300 and 'Request ' not in error['message']


@pytest.mark.parametrize(('fields', 'expected'), [
    ({}, 'messages is missing'),
    ({'messages': []}, 'at least one message'),
    ({'messages': 'hi'}, 'at least one message'),
    ({'messages': ['hi']}, 'messages[0] must be an object'),
    ({'messages': [*HI, {'role': 'user'}]}, 'messages[1] must be an object with a role'),
    ({'messages': [{'role': 'tools', 'content': ''}]}, "messages[0].role = 'tools'"),
    ({'messages': [{'role': 'tool'}]}, 'messages[0] must be an object with a role'),
    ({'messages': [{'role': 'tool', 'content': '', 'tool_call_id': 3}]}, 'tool_call_id = 3'),
    ({'messages': [{'role': [], 'content': ''}]}, 'role = []'),
    ({'messages': [{'role': 'assistant', 'tool_calls': [{}]}]},
     'messages[0].tool_calls[0].function is missing'),
    ({'messages': [{'role': 'assistant', 'tool_calls': [
        {'function': {'name': 'f', 'arguments': '{"a": "\\ud800"}'}}]}]},
     'messages[0].tool_calls[0].function.arguments holds a text that is not Unicode'),
    ({'messages': [{'role': 'assistant', 'tool_calls': {}}]}, 'messages[0].tool_calls = {}'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'text parts'),
    ({'messages': [{'role': 'user', 'content': 'a\udc00'}]}, 'content = '),
    ({'messages': [{**HI[0], 'tool_calls': [1]}]}, 'tool_calls = [1]: this server does not'),
    ({'messages': [{**HI[0], 'tool_call_id': 'a'}]}, "Unknown field 'messages[0].tool_call_id'"),
    ({'messages': [{'role': 'assistant'}]}, 'messages[0] must be an object with a role'),
    ({'messages': [{'role': 'user', 'content': None}]}, 'messages[0] must be an object'),
    ({'messages': [{'role': 'user', 'content': 'x' * 64}]}, 'the cache takes 64'),
    ({'messages': HI, 'tools': [{}]}, 'tools[0].type is missing: expected "function".'),
    ({'messages': HI, 'tool_choice': 'required'}, 'expected tools to choose from'),
    ({'messages': HI, 'top_logprobs': 3}, 'top_logprobs = 3: expected logprobs = true'),
    ({'messages': HI, 'logprobs': True, 'top_logprobs': 21}, 'top_logprobs = 21'),
    ({'messages': HI, 'logprobs': 1}, 'logprobs = 1: expected true or false'),
    ({'messages': HI, 'response_format': 'json'}, "response_format = 'json': expected an object"),
    ({'messages': HI, 'response_format': {}}, 'response_format.type is missing'),
    ({'messages': HI, 'response_format': {'type': 'xml'}}, "response_format.type = 'xml'"),
    ({'messages': HI, 'response_format': {'type': 'json_object', 'a': 1}},
     "Unknown field 'response_format.a'"),
    ({'messages': HI, 'response_format': {'type': 'json_schema'}},
     'response_format.json_schema is missing'),
    ({'messages': HI, 'response_format': {'type': 'json_schema', 'json_schema': {'name': 'a'}}},
     'response_format.json_schema.schema is missing'),
    ({'messages': HI, 'response_format': {
        'type': 'json_schema', 'json_schema': {'schema': {'type': 'text'}}}},
     'response_format.json_schema.schema cannot be met: Invalid type: text.'),
    ({'messages': HI, 'response_format': {'type': 'regex'}}, 'response_format.pattern is missing'),
    ({'messages': HI, 'response_format': {'type': 'regex', 'pattern': '[^'}},
     'response_format.pattern cannot be met: unclosed character class.'),
    ({'messages': HI, 'response_format': {'type': 'json_object'}, 'guided_regex': 'a'},
     'guided_regex cannot be combined with response_format'),
    ({'messages': HI, 'response_format': {'type': 'json_object'}, 'tools': [CLOCK]},
     'response_format cannot be combined with tools'),
    ({'messages': HI, 'tool_choice': 'required', 'tools': [{'type': 'function', 'function': {
        'name': 'f', 'parameters': {'type': 'text'}}}]}, 'tools cannot be met: '),
    ({'messages': HI, 'max_completion_tokens': 97}, 'max_completion_tokens = 97'),
    ({'messages': HI, 'stop': ['a', 'b', 'c', 'd', 'e']}, 'stop holds 5 texts: expected at most 4'),
    ({'messages': HI, 'prompt': 'x'}, "Unknown field 'prompt'"),
])
def test_a_wrong_chat(server: Running, fields: dict, expected: str):
  error = refused(server, CHAT, content=json.dumps(fields),
                  headers={'Content-Type': 'application/json'})
  assert expected in error['message']


@pytest.mark.parametrize(('body', 'expected'), [
    (b'{"prompt": "\xff"}', 'not UTF-8 text (byte 12)'),
    (b'', 'not JSON'),
    (b'{"prompt": "x"', 'not JSON'),
    (b'["x"]', 'must be a JSON object'),
    (b'{"prompt": "x", "temperature": NaN}', 'NaN is no number'),
    (b'{"prompt": "x", "temperature": 1e999}', 'temperature = inf'),
    (b'{"prompt": "x", "seed": ' + b'9' * 5000 + b'}', 'not JSON'),
    (b'[' * 500_000, 'nested too deeply'),
])
def test_a_body_of_the_wrong_shape(server: Running, body: bytes, expected: str):
  error = refused(server, COMPLETIONS, content=body,
                  headers={'Content-Type': 'application/json'})
  assert expected in error['message']


def test_another_model(server: Running):
  error = refused(server, COMPLETIONS, 404, json={'model': 'huge', 'prompt': 'x'})
  assert error['code'] == 'model_not_found' and error['param'] == 'model'


@pytest.mark.parametrize('chunked', [False, True])
def test_a_body_of_10_mb(server: Running, chunked: bool):
  body = json.dumps({'prompt': 'x' * 10_000_000}).encode()
  content = (body[i:i + 2**16] for i in range(0, len(body), 2**16)) if chunked else body
  error = refused(server, COMPLETIONS, 413, content=content,
                  headers={'Content-Type': 'application/json'})
  assert 'larger than 1000000 bytes' in error['message']


def test_a_body_of_a_gigabyte_is_refused_by_its_length(server: Running):
  host, port = server.url.removeprefix('http://').split(':')
  with socket.create_connection((host, int(port)), timeout=30) as connection:
    connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n'
                       b'Content-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n{')
    assert b'413' in connection.recv(100)


def test_wrong_paths_and_methods(server: Running):
  assert httpx2.get(f'{server.url}/v1/embeddings').json()['error']['message'] == (
      'GET /v1/embeddings: Not Found.')
  assert httpx2.get(f'{server.url}{COMPLETIONS}').status_code == 405


def test_the_others_go_on(server: Running):
  """Wrong requests among right ones: each right one gets what it gets alone."""
  right = {'prompt': 'hello', 'max_tokens': 60}
  post = lambda body: httpx2.post(f'{server.url}{COMPLETIONS}', json=body, timeout=60)
  alone = [post(right | {'seed': s}).json()['choices'][0]['text'] for s in range(3)]
  bodies = [right | {'seed': s} for s in range(3)] + [
      {'prompt': 'x' * 65}, {'prompt': [999]}, {'prompt': 'x', 'stop': ''},
      {'prompt': 'x', 'top_p': 7}]
  answers: dict[int, httpx2.Response] = {}
  threads = [threading.Thread(target=lambda i=i, b=b: answers.update({i: post(b)}))
             for i, b in enumerate(bodies)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [answers[i].json()['choices'][0]['text'] for i in range(3)] == alone
  assert [answers[i].status_code for i in range(3, 7)] == [400] * 4


def of_schema(schema: object) -> dict[str, object]:
  return {'prompt': 'x', 'max_tokens': 2, 'response_format': {
      'type': 'json_schema', 'json_schema': {'name': 'it', 'schema': schema}}}


MIXED = ({'prompt': 'hello', 'max_tokens': 4}, {'prompt': 'x' * 65}, {'prompt': [999]},
         {'prompt': 'x', 'stop': ''}, {'prompt': 'x', 'max_tokens': 6, 'stream': True},
         of_schema({'type': 'unheard of'}), of_schema({'type': 'string', 'minLength': 50}))


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='reads /proc')
@pytest.mark.slow
def test_a_thousand_mixed_requests_leave_nothing(server: Running):
  """Right ones, wrong ones, and schemas that do not exist or that no budget can meet."""
  def left() -> tuple[int, int, int, float]:
    counters = server.wait_until_free()
    return (len(os.listdir('/proc/self/fd')), threading.active_count(),
            len(psutil.Process().children(recursive=True)),
            counters['pages_in_use'] - counters['kept_pages'])

  def ask(times: int) -> set[int]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
      return {client.post(COMPLETIONS, json=MIXED[i % len(MIXED)]).status_code
              for i in range(times)}

  assert ask(2 * len(MIXED)) == {200, 400}  # What is opened once is open from here on.
  before = left()
  ask(1000)
  deadline = time.monotonic() + 10  # The server notices a closed connection a little later.
  while (after := left()) != before and time.monotonic() < deadline:
    time.sleep(0.1)
  assert after == before
