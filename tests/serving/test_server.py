"""The server as the openai client sees it: both shapes, streamed and whole."""

import codecs
from collections.abc import Callable
import threading
import time

import httpx2
import numpy as np
import openai
import pytest

from jaxrl_pt.sampling.engine import Engine, Request
from jaxrl_pt.serving import protocol
from jaxrl_pt.serving.text import Markers
from tests.serving.conftest import SIZES, TOKENIZER, Running, running

EOS = TOKENIZER.eos_id


def ask(server: Running, prompt: object = 'hello', **fields: object) -> openai.types.Completion:
  return server.client().completions.create(
      model='tiny', prompt=prompt, **{'max_tokens': 40, 'seed': 3, **fields})


def streamed(server: Running, **fields: object) -> dict[int, str]:
  texts: dict[int, str] = {}
  for chunk in ask(server, stream=True, **fields):
    for choice in chunk.choices:
      texts[choice.index] = texts.get(choice.index, '') + choice.text
  return texts


def engine_says(engine: Engine, prompt: str, seed: int, **fields: object) -> list[np.ndarray]:
  prompt_ids = TOKENIZER.bos_id, *TOKENIZER.encode(prompt)
  request = Request(prompt_ids, 2**31 + seed, stop=(EOS,), **fields)
  return engine.run([request])[0]


def test_a_completion_is_what_the_engine_draws(engine: Engine):
  expected = engine_says(engine, 'hello', 3, max_tokens=40, num_samples=2)
  with running(engine) as server:
    answer = ask(server, n=2, logprobs=0)
  assert [c.index for c in answer.choices] == [0, 1]
  num = 0
  for choice, response in zip(answer.choices, expected, strict=True):
    ids = response.tokens.tolist()
    num += len(ids)
    assert choice.text == TOKENIZER.decode(ids)
    assert choice.finish_reason == ('stop' if ids[-1] == EOS else 'length')
    np.testing.assert_allclose(choice.logprobs.token_logprobs, response.logp, rtol=1e-6)
    assert choice.logprobs.tokens == [
        '<|endoftext|>' if i == EOS else chr(i) if i < 128 else f'bytes:\\x{i:02x}' for i in ids]
    # Characters that are whole, or will never be, before each token; a byte is a token here.
    whole = codecs.getincrementaldecoder('utf-8')
    assert choice.logprobs.text_offset == [
        len(whole('replace').decode(bytes(ids[:i]))) for i in range(len(ids))]
  assert answer.usage.prompt_tokens == 6 and answer.usage.completion_tokens == num
  assert answer.usage.total_tokens == 6 + num


def test_a_stream_joins_to_the_whole(server: Running):
  whole = ask(server, n=3)
  assert streamed(server, n=3) == {c.index: c.text for c in whole.choices}


def test_a_seed_repeats_and_no_seed_does_not(server: Running):
  texts = [ask(server, seed=seed).choices[0].text for seed in (7, 7, 8, -1, -1, None, None)]
  assert texts[0] == texts[1] and texts[3] == texts[4]
  assert len(set(texts)) == 5


def test_the_policy_is_the_requests_own(server: Running):
  greedy = [ask(server, temperature=0, seed=s).choices[0].text for s in (1, 2)]
  narrow = [ask(server, seed=1, **{k: v}).choices[0].text
            for k, v in (('top_p', 1e-6), ('extra_body', {'top_k': 1}),
                         ('extra_body', {'min_p': 1}))]
  assert {*greedy, *narrow} == {greedy[0]}
  assert ask(server, seed=1).choices[0].text != greedy[0]


def characters(tokens: list[str]) -> str:
  """The text of tokens of a byte each; one that is no text is a character of its own."""
  return ''.join('\ufffd' if t.startswith('bytes:') else t for t in tokens
                 if t != '<|endoftext|>')


@pytest.mark.parametrize('stream', [False, True])
def test_a_stop_string_ends_the_text_and_is_left_out(server: Running, stream: bool):
  # A response whose bytes are a character each, valid or not: tokens can then be counted.
  seed, whole = next((seed, text) for seed in range(40)
                     for text, tokens in [(c.text, characters(c.logprobs.tokens))
                                          for c in ask(server, seed=seed, logprobs=0).choices]
                     if tokens == text and len(text) > 12)
  at = next(i for i in range(4, len(whole) - 1)
            if whole[i:i + 2].isascii() and whole.find(whole[i:i + 2]) == i)
  stop = whole[at:at + 2]
  if stream:
    assert streamed(server, seed=seed, stop=[stop, 'never']) == {0: whole[:at]}
    return
  answer = ask(server, seed=seed, stop=stop, logprobs=0)
  assert answer.choices[0].text == whole[:at] and answer.choices[0].finish_reason == 'stop'
  assert characters(answer.choices[0].logprobs.tokens) == whole[:at]
  assert answer.usage.completion_tokens == at + 2


def test_several_prompts_in_one_body(server: Running):
  alone = [[c.text for c in ask(server, p, n=2).choices] for p in ('one', [EOS, 116, 119, 111])]
  together = ask(server, ['one', 'two'], n=2)
  assert [c.index for c in together.choices] == [0, 1, 2, 3]
  assert [c.text for c in together.choices] == alone[0] + alone[1]
  assert ask(server, [[EOS, 111, 110, 101]], n=2).choices[0].text == alone[0][0]
  assert together.usage.prompt_tokens == 8  # Each begins with the token of a text's beginning.


# --- Chat -----------------------------------------------------------------------------

QUESTION = [{'role': 'system', 'content': 'Kind.'},
            {'role': 'user', 'content': [{'type': 'text', 'text': 'h'},
                                         {'type': 'text', 'text': 'i'}]}]


def chat(server: Running, **fields: object):
  return server.client().chat.completions.create(
      model='tiny', messages=QUESTION, **{'max_completion_tokens': 30, 'seed': 3, **fields})


def test_a_chat_asks_with_the_template(server: Running):
  text = ask(server, 'Kind.\n\nUser: hi\n\nAssistant:', max_tokens=30).choices[0].text
  answer = chat(server, logprobs=True)
  message = answer.choices[0].message
  assert message.role == 'assistant' and message.content == text.lstrip()
  content = answer.choices[0].logprobs.content
  assert bytes(b for t in content for b in t.bytes).decode('utf-8', 'replace') == text
  assert all(t.logprob < 0 and t.top_logprobs == [] for t in content)


def test_a_thought_is_apart_and_keeps_its_budget(server: Running):
  answer = chat(server, n=2, logprobs=True, extra_body={'max_thought': 9, 'max_answer': 11})
  for choice in answer.choices:
    ids = [b for t in choice.logprobs.content for b in t.bytes]
    assert bytes(ids[:7]) == b'<think>' and bytes(ids[16:24]) == b'</think>'
    forced = [t.logprob == 0 for t in choice.logprobs.content]
    assert forced == [True] * 7 + [False] * 9 + [True] * 8 + [False] * (len(ids) - 24)
    assert choice.message.reasoning_content == bytes(ids[7:16]).decode('utf-8', 'replace')
    assert choice.message.content == bytes(ids[24:]).decode('utf-8', 'replace').lstrip()
    assert len(ids) <= 24 + 11


def test_a_request_says_whether_to_think(engine: Engine):
  with running(engine, markers=Markers('<think>', '</think>', '\x03')) as server:
    said = {effort: ask(server, logprobs=0, extra_body={'reasoning_effort': effort})
            for effort in ('none', 'minimal')}
    with pytest.raises(openai.BadRequestError, match='expected one of none'):
      ask(server, extra_body={'reasoning_effort': 'huge'})
  ids = {effort: answer.choices[0].logprobs.tokens for effort, answer in said.items()}
  assert ids['none'][0] == '\x03' and ids['none'][1] != '<'
  assert ids['minimal'][:7] == list('<think>')
  budget = 40 // 10
  assert ids['minimal'][7 + budget:][:8] == list('</think>')


def test_a_chat_stream_joins_to_the_whole(server: Running):
  budget = {'extra_body': {'max_thought': 9}}
  whole = chat(server, n=2, **budget)
  contents, thoughts, roles, finishes = ['', ''], ['', ''], {}, {}
  *chunks, last = list(chat(server, n=2, stream=True, stream_options={'include_usage': True},
                            **budget))
  for choice in (c for chunk in chunks for c in chunk.choices):
    roles.setdefault(choice.index, choice.delta.role)
    contents[choice.index] += choice.delta.content or ''
    thoughts[choice.index] += getattr(choice.delta, 'reasoning_content', '')
    if choice.finish_reason:
      finishes[choice.index] = choice.finish_reason
  assert roles == {0: 'assistant', 1: 'assistant'}
  assert contents == [c.message.content for c in whole.choices]
  assert thoughts == [c.message.reasoning_content for c in whole.choices]
  assert finishes == {c.index: c.finish_reason for c in whole.choices}
  assert last.choices == [] and last.usage == whole.usage


# --- Load -----------------------------------------------------------------------------


@pytest.fixture
def slow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
  """The engine takes its time, so that something can happen meanwhile."""
  advance = engine.advance

  def slowly(max_steps: int | None = None) -> list:
    time.sleep(0.05)
    return advance(max_steps)

  monkeypatch.setattr(engine, 'advance', slowly)


def test_streams_come_in_pieces(slow: None, server: Running):
  chunks = [c for c in ask(server, stream=True) if c.choices[0].text]
  assert len(chunks) >= 5


def test_too_many_get_429_and_the_others_go_on(server: Running, engine: Engine,
                                               monkeypatch: pytest.MonkeyPatch):
  expected = ask(server, n=SIZES.queue, max_tokens=8)
  advance, gate = engine.advance, threading.Event()

  def gated(max_steps: int | None) -> list:
    assert gate.wait(timeout=60)
    return advance(max_steps)

  monkeypatch.setattr(engine, 'advance', gated)
  found: list[openai.types.Completion] = []
  thread = threading.Thread(target=lambda: found.append(ask(server, n=SIZES.queue, max_tokens=8)))
  thread.start()
  while server.worker._room:
    time.sleep(0.01)
  with pytest.raises(openai.RateLimitError) as raised:
    ask(server)
  assert int(raised.value.response.headers['retry-after']) >= 1
  assert raised.value.code == 'queue_full' and 'at most 8' in str(raised.value)
  # The client's own retries wait until there is room.
  threading.Timer(0.3, gate.set).start()
  patient = server.client(max_retries=8).completions.create(model='tiny', prompt='x')
  assert patient.usage.prompt_tokens == 2
  thread.join()
  assert [c.text for c in found[0].choices] == [c.text for c in expected.choices]


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_leaves_frees_slots_and_pages(slow: None, server: Running, stream: bool):
  ask(server, 'hello', max_tokens=1)
  idle = server.wait_until_free()
  body = {'prompt': 'hello', 'max_tokens': SIZES.response_len, 'n': SIZES.queue, 'stream': stream}
  with httpx2.Client(timeout=30) as client:
    if stream:
      with client.stream('POST', f'{server.url}/v1/completions', json=body) as response:
        next(response.iter_lines())
    else:
      with pytest.raises(httpx2.ReadTimeout):
        client.post(f'{server.url}/v1/completions', json=body, timeout=0.3)
  counters = server.wait_until_free()
  # To the end it would be two rounds over the slots, not even one has come to pass.
  assert 0 < counters['steps'] - idle['steps'] < SIZES.response_len
  assert counters['pages_in_use'] == counters['kept_pages']  # for prompts to come
  text = httpx2.get(f'{server.url}/metrics').text
  assert 'jaxrl_pt_disconnects_total 1.0\n' in text and 'jaxrl_pt_responses 0.0\n' in text
  status = 200 if stream else 499
  assert f'jaxrl_pt_requests_total{{path="/v1/completions",status="{status}"}}' in text
  assert 'status="500"' not in text


def test_going_down_ends_what_is_under_way(slow: None, engine: Engine):
  with running(engine) as server:
    expected = streamed(server)
    stream = ask(server, stream=True)
    first = next(iter(stream))
    server.server.should_exit = True
    rest = ''.join(chunk.choices[0].text for chunk in stream)
    assert {0: first.choices[0].text + rest} == expected
    with pytest.raises(openai.APIConnectionError):
      ask(server)


def test_a_broken_engine_tells_all_and_is_unhealthy(slow: None, engine: Engine,
                                                    monkeypatch: pytest.MonkeyPatch):
  with running(engine) as server:
    stream = ask(server, stream=True)
    next(iter(stream))
    whole = engine.advance
    def broken(max_steps: int | None) -> list:
      whole(max_steps)
      raise RuntimeError('out of luck')
    monkeypatch.setattr(engine, 'advance', broken)
    with pytest.raises(openai.APIError, match='out of luck'):
      list(stream)
    with pytest.raises(openai.InternalServerError, match='out of luck'):
      ask(server)
    health = httpx2.get(f'{server.url}/health')
    assert health.status_code == 503 and 'out of luck' in health.text
    assert httpx2.get(f'{server.url}/metrics').status_code == 503
    monkeypatch.setattr(engine, 'advance', whole)
  while engine.room() < SIZES.queue:
    engine.advance()


def test_a_defect_has_a_shape_and_the_others_go_on(server: Running,
                                                   monkeypatch: pytest.MonkeyPatch):
  def broken(*args: object) -> None:
    raise RuntimeError('a secret of the inside')
  with monkeypatch.context() as patch:
    patch.setattr(protocol, 'completion', broken)
    with pytest.raises(openai.InternalServerError) as raised:
      ask(server)
  assert raised.value.type == 'server_error' and 'secret' not in str(raised.value)
  assert ask(server).usage.prompt_tokens == 6


# --- Around it ------------------------------------------------------------------------


def test_models_health_and_metrics(server: Running):
  assert [m.id for m in server.client().models.list()] == ['tiny']
  assert server.client().models.retrieve('tiny').owned_by == 'jaxrl_pt'
  with pytest.raises(openai.NotFoundError):
    server.client().models.retrieve('huge')
  assert httpx2.get(f'{server.url}/health').json() == {'status': 'ok'}
  ask(server, max_tokens=5, n=2, temperature=0)
  lines = httpx2.get(f'{server.url}/metrics').text.splitlines()
  for line in ('jaxrl_pt_requests_total{path="/v1/completions",status="200"} 1.0',
               'jaxrl_pt_requests_total{path="other",status="404"} 1.0',
               'jaxrl_pt_requests_total{path="/v1/models",status="200"} 1.0',
               'jaxrl_pt_prompt_tokens_total 6.0', 'jaxrl_pt_tokens_total 10.0',
               'jaxrl_pt_first_token_seconds_count 1.0',
               'jaxrl_pt_first_token_seconds_bucket{le="+Inf"} 1.0'):
    assert line in lines, line


def test_a_token_keeps_others_out(engine: Engine):
  with running(engine, token='s3cret') as server:
    assert ask_with(server, 's3cret').usage.prompt_tokens == 2
    for key in ('wrong', 's3cre', 's3cret2'):
      with pytest.raises(openai.AuthenticationError, match='Bearer TOKEN'):
        ask_with(server, key)
    assert httpx2.get(f'{server.url}/metrics').status_code == 401
    assert httpx2.get(f'{server.url}/v1/models').headers['www-authenticate'] == 'Bearer'
    assert httpx2.get(f'{server.url}/health').status_code == 200
    headers = {'Authorization': 'Bearer s3cret', 'Host': 'model.example'}
    assert httpx2.get(f'{server.url}/v1/models', headers=headers).status_code == 200


def ask_with(server: Running, key: str) -> openai.types.Completion:
  return server.client(api_key=key).completions.create(model='tiny', prompt='x')


def test_without_a_token_no_web_page_gets_in(server: Running):
  """One whose name resolves to this machine says another Host; one that posts, another type."""
  get: Callable[..., httpx2.Response] = httpx2.get
  for host, status in (('evil.example', 403), ('evil.example:80', 403), ('localhost:1', 200),
                       ('[::1]:8000', 200), ('127.0.0.1.evil.example', 403), ('', 403)):
    answer = get(f'{server.url}/v1/models', headers={'Host': host})
    assert answer.status_code == status or (not host and answer.status_code == 400), host
  answer = httpx2.post(f'{server.url}/v1/completions', content='{"prompt": "x"}',
                       headers={'Content-Type': 'text/plain'})
  assert answer.status_code == 415 and 'application/json' in answer.json()['error']['message']
