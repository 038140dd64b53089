"""Over HTTP: prompts that are scored, formats that are kept, tools that are called."""

from collections.abc import Iterator
import itertools
import json
import threading
from typing import Any

import httpx2
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from jaxrl_pt import params as P
from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.sampling.engine import Engine
from tests.serving.conftest import MODEL, SIZES, TOKENIZER, Running, running

EOS = TOKENIZER.eos_id
TEMPLATE = ChatTemplate(
    '<|endoftext|>{% if tools %}F{{ tools[0] | tojson }};{% endif %}{% for m in messages %}'
    '{{ m.role[0] | upper }}{{ m.content }};{% endfor %}A:')
SCHEMA = {'type': 'object', 'additionalProperties': False, 'required': ['a', 'b'],
          'properties': {'a': {'enum': ['x', 'yz']}, 'b': {'type': 'integer', 'minimum': 0,
                                                           'maximum': 99}}}
CLOCK = {'type': 'function', 'function': {'name': 'f'}}
ASK = [{'role': 'user', 'content': 'hi'}]


@pytest.fixture(scope='module')
def server(engine: Engine) -> Iterator[Running]:
  with running(engine, template=TEMPLATE) as it:
    yield it
    counters = it.wait_until_free()
    assert counters['pages_in_use'] == counters['kept_pages']


def post(server: Running, path: str = 'v1/completions', status: int = 200, **body: Any) -> dict:
  answer = httpx2.post(f'{server.url}/{path}', json=body, timeout=60)
  assert answer.status_code == status, answer.text
  return answer.json()


def chat(server: Running, status: int = 200, **body: Any) -> dict:
  return post(server, 'v1/chat/completions', status, **{'messages': ASK, **body})


@pytest.fixture(scope='module')
def logits() -> Any:
  """(tokens) → f32[T, V], by whole forward passes and nothing of the engine."""
  params = P.init(MODEL.specs, jax.random.key(0))
  params = {**params, 'embed': params['embed'] * 6}  # as `make_engine` has them

  def of(tokens: list[int]) -> np.ndarray:
    row = jnp.zeros((1, 64), jnp.int32).at[0, :len(tokens)].set(jnp.array(tokens))
    hidden = MODEL.apply(params, row, jnp.arange(64)[None], jnp.ones_like(row))
    return np.asarray(jax.nn.log_softmax(hidden[0, :len(tokens)] @ MODEL.head(params)))

  return of


# --- Scores ---------------------------------------------------------------------------


def loglikelihood(answer: dict, num_context: list[int]) -> list[tuple[float, bool]]:
  """What lm-eval's `local-completions` reads of an answer (`LocalCompletionsAPI.parse_logprobs`):
  the continuation's log-probability, and whether greedy decoding would have written it."""
  found = []
  for choice, first in zip(sorted(answer['choices'], key=lambda c: c['index']), num_context):
    own = choice['logprobs']['token_logprobs'][first:-1]
    top = choice['logprobs']['top_logprobs'][first:-1]
    found.append((sum(own), all(a == max(t.values()) for a, t in zip(own, top, strict=True))))
  return found


def test_lm_evals_requests_are_answered_by_the_models_own_scores(server: Running, logits: Any):
  context = [EOS, *b'to be or']
  greedy = list(context)
  for _ in range(3):
    greedy.append(int(logits(greedy)[-1].argmax()))
  prompts = [greedy, [*context, *b' not'], [*context[:4], 200]]
  # The body is that of `LocalCompletionsAPI._create_payload`.
  answer = post(server, model='tiny', prompt=prompts, temperature=0, max_tokens=1, logprobs=1,
                seed=1234, echo=True)
  starts = [len(context), len(context), 4]
  found = loglikelihood(answer, starts)
  for prompt, start, (logp, is_greedy) in zip(prompts, starts, found):
    scores = logits(prompt)
    expected = sum(scores[i - 1, prompt[i]] for i in range(start, len(prompt)))
    assert logp == pytest.approx(expected, abs=1e-3)
    assert is_greedy == all(scores[i - 1].argmax() == prompt[i]
                            for i in range(start, len(prompt)))
  assert [is_greedy for _, is_greedy in found] == [True, False, False]
  assert all(len(c['logprobs']['tokens']) == len(p) + 1
             for c, p in zip(answer['choices'], prompts))


def test_what_is_drawn_has_the_score_of_a_prompt(server: Running):
  drawn = post(server, prompt=[EOS, 65], max_tokens=9, logprobs=3, seed=2)['choices'][0]
  ids = [EOS if t == '<|endoftext|>' else int(t[-2:], 16) if t.startswith('bytes:') else ord(t)
         for t in drawn['logprobs']['tokens']]
  scored = post(server, prompt=[EOS, 65, *ids], max_tokens=0, logprobs=3, echo=True)
  again = scored['choices'][0]['logprobs']
  assert scored['usage']['completion_tokens'] == 0
  assert again['token_logprobs'][:1] == [None] and again['top_logprobs'][:1] == [None]
  np.testing.assert_allclose(again['token_logprobs'][2:], drawn['logprobs']['token_logprobs'],
                             atol=1e-4)
  for a, b in zip(again['top_logprobs'][2:], drawn['logprobs']['top_logprobs'], strict=True):
    assert a == pytest.approx(b, abs=1e-4) and list(a) == list(b)
    assert len(a) in (3, 4) and list(a.values())[:3] == sorted(a.values(), reverse=True)[:3]


def test_greedy_decoding_has_finite_log_probabilities(server: Running):
  choice = post(server, prompt='x', temperature=0, max_tokens=2, logprobs=2)['choices'][0]
  for top in choice['logprobs']['top_logprobs']:
    assert sorted(top.values()) == [-9999.0, 0.0]


def test_the_best_of_four(server: Running):
  four = post(server, prompt='x', n=4, seed=9, logprobs=0, max_tokens=7)['choices']
  means = [np.mean(c['logprobs']['token_logprobs']) for c in four]
  best = post(server, prompt='x', n=2, best_of=4, seed=9, max_tokens=7)
  assert [c['text'] for c in best['choices']] == [four[i]['text'] for i in np.argsort(means)[:1:-1]]
  assert best['usage']['completion_tokens'] == sum(
      len(c['logprobs']['tokens']) for c in four)


def test_a_chats_likeliest_tokens(server: Running):
  client = server.client()
  answer = client.chat.completions.create(model='tiny', messages=ASK, max_tokens=3, seed=1,
                                          logprobs=True, top_logprobs=2)
  for token in answer.choices[0].logprobs.content:
    assert [t.logprob for t in token.top_logprobs] == sorted(
        (t.logprob for t in token.top_logprobs), reverse=True)
    assert len(token.top_logprobs) == 2 and bytes(token.bytes) != b''


# --- Formats --------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1, 2])
def test_every_answer_is_json_of_the_schema(server: Running, temperature: float):
  answer = chat(server, n=4, temperature=temperature, seed=3, response_format={
      'type': 'json_schema', 'json_schema': {'name': 'pair', 'schema': SCHEMA, 'strict': True}})
  for choice in answer['choices']:
    assert choice['finish_reason'] == 'stop'
    jsonschema.validate(json.loads(choice['message']['content']), SCHEMA)
  assert len({c['message']['content'] for c in answer['choices']}) > 1


def test_the_mask_counts_in_the_log_probability(server: Running):
  choice = post(server, prompt='x', guided_regex='ab[cd]', logprobs=3, seed=4)['choices'][0]
  assert choice['text'] in ('abc', 'abd') and choice['finish_reason'] == 'stop'
  own, top = choice['logprobs']['token_logprobs'], choice['logprobs']['top_logprobs']
  assert own[:2] == [0, 0] and own[3] == 0 and own[2] < 0  # With no choice it is certain.
  assert np.exp([top[2]['c'], top[2]['d']]).sum() == pytest.approx(1, abs=1e-5)


def test_a_format_after_a_thought(server: Running):
  for seed in range(3):
    message = chat(server, max_thought=5, seed=seed, response_format={
        'type': 'regex', 'pattern': '[0-9]{2}'})['choices'][0]['message']
    assert message['content'].isdecimal() and len(message['content']) == 2


def test_a_budget_that_is_too_small_ends_that_response_alone(server: Running):
  free = {'prompt': 'x', 'seed': 5, 'max_tokens': 40}
  alone = post(server, **free)['choices'][0]
  answers: dict[str, dict] = {}
  def ask(name: str, **body: Any) -> None:
    answers[name] = post(server, **body)['choices'][0]
  threads = [threading.Thread(target=ask, args=(name,), kwargs=body) for name, body in (
      ('free', free), ('short', {'prompt': 'x', 'guided_json': SCHEMA, 'max_tokens': 5}),
      ('whole', {'prompt': 'x', 'guided_json': json.dumps(SCHEMA), 'max_tokens': 90}))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert answers['short']['finish_reason'] == 'length' and len(answers['short']['text']) == 5
  assert answers['whole']['finish_reason'] == 'stop'
  jsonschema.validate(json.loads(answers['whole']['text']), SCHEMA)
  assert answers['free'] == alone


def test_a_format_in_a_stream(server: Running):
  chunks = list(server.client().completions.create(
      model='tiny', prompt='x', stream=True, seed=1, max_tokens=30, extra_body={
          'response_format': {'type': 'json_object'}, 'guided_regex': None,
          'temperature': 0.01, 'stop': ['}']}))
  text = ''.join(c.choices[0].text for c in chunks)
  assert text.startswith('{') and '}' not in text


def test_broken_requests_leave_nothing_behind(server: Running):
  """Formats that cannot be met, budgets that are too small, calls that are none."""
  post(server, prompt='x', max_tokens=1)
  bodies = itertools.cycle([
      ({'prompt': 'x', 'guided_regex': '('}, 400),
      ({'prompt': 'x', 'guided_json': {'$ref': '#'}}, 400),
      ({'prompt': 'x', 'guided_json': SCHEMA, 'max_tokens': 1}, 200),
      ({'prompt': 'x' * 99}, 400), ({'prompt': 'x', 'guided_regex': 'a' * 99, 'n': 4,
                                     'max_tokens': 1}, 200)])
  with httpx2.Client(timeout=60) as client:
    for body, status in itertools.islice(bodies, 200):
      assert client.post(f'{server.url}/v1/completions', json=body).status_code == status
  counters = server.wait_until_free()
  assert counters['pages_in_use'] == counters['kept_pages']
  assert (server.worker._room, server.worker._masks) == (SIZES.queue, SIZES.constrained)


# --- Tools ----------------------------------------------------------------------------


def test_a_required_call(server: Running):
  answer = chat(server, tools=[CLOCK], tool_choice='required', seed=2)
  (choice,) = answer['choices']
  (call,) = choice['message']['tool_calls']
  assert choice['finish_reason'] == 'tool_calls' and choice['message']['content'] is None
  assert call['function'] == {'name': 'f', 'arguments': '{}'}


def test_a_call_in_a_stream(server: Running):
  fields = {'tools': [CLOCK], 'tool_choice': {'type': 'function', 'function': {'name': 'f'}},
            'seed': 2, 'max_tokens': 96}
  (whole,) = chat(server, **fields)['choices'][0]['message']['tool_calls']
  deltas = [c.choices[0] for c in server.client().chat.completions.create(
      model='tiny', messages=ASK, stream=True, **fields)]
  (call,) = [call for d in deltas for call in d.delta.tool_calls or []]
  assert call.index == 0 and call.function.arguments == whole['function']['arguments']
  assert deltas[-1].finish_reason == 'tool_calls'
  assert not any(d.delta.content for d in deltas)


def test_tools_are_told_in_the_prompt(server: Running):
  plain, told = (chat(server, max_tokens=1, **f)['usage']['prompt_tokens']
                 for f in ({}, {'tools': [{'type': 'function', 'function': {'name': 'g'}}]}))
  assert told == plain + len('F;') + len('{"type": "function", "function": {"name": "g"}}')


# --- Around it ------------------------------------------------------------------------


def test_too_many_constrained_responses(server: Running):
  body = {'prompt': ['x'] * 7, 'guided_regex': 'a'}
  said = post(server, status=400, **body)['error']['message']
  assert said == '7 responses of a format are asked for at once and at most 6 are taken.'
  said = post(server, status=400, prompt='x', n=7, guided_regex='a')['error']['message']
  assert '7 constrained responses at once; at most 6 are taken' in said


def test_found_prefixes_are_counted(server: Running):
  read = lambda: {line.split(' ')[0]: float(line.split(' ')[1])
                  for line in httpx2.get(f'{server.url}/metrics').text.splitlines()
                  if not line.startswith('#')}
  ask = {'prompt': [EOS, *b'a prefix that nobody else has'], 'max_tokens': 1}
  before = read()
  post(server, **ask)
  middle = read()
  post(server, **ask)
  after = read()
  name = 'jaxrl_pt_prefix_cache_hit_tokens_total'
  assert after[name] - middle[name] == 29 and middle[name] - before[name] < 29
  hits = 'jaxrl_pt_prefix_cache_hits_total'
  assert after[hits] == middle[hits] + 1
  assert after['jaxrl_pt_prefilled_tokens_total'] == middle['jaxrl_pt_prefilled_tokens_total']
  assert after['jaxrl_pt_cache_pages_kept'] == after['jaxrl_pt_cache_pages_in_use'] > 0


def test_the_tokenizer_for_clients(server: Running):
  """As lm-eval's remote tokenizer asks for it."""
  assert httpx2.get(f'{server.url}/tokenizer_info').json() == {
      'eos_token': '<|endoftext|>', 'bos_token': '<|endoftext|>', 'pad_token': None,
      'chat_template': None, 'model_max_length': 64 + 96}
  bare = lambda text: post(server, 'tokenize', prompt=text, add_special_tokens=False)['tokens']
  assert bare('hé') == [104, 195, 169] and bare('') == [] and bare('<|endoftext|>') == [EOS]
  assert EOS not in bare('a<|endoftext|>')
  assert post(server, 'tokenize', prompt='h', model='tiny') == {
      'tokens': [EOS, 104], 'count': 2, 'max_model_len': 160}
  assert post(server, 'detokenize', tokens=[104, 195, 169, EOS]) == {'prompt': 'hé'}
  for path, body, expected in (
      ('tokenize', {}, 'prompt is missing'), ('tokenize', {'prompt': 3}, 'prompt = 3'),
      ('tokenize', {'prompt': 'a', 'x': 1}, "Unknown field 'x'"),
      ('detokenize', {'tokens': [257]}, 'tokens = [257]: expected a list of token ids below 257'),
      ('detokenize', {'tokens': 'a'}, "tokens = 'a'")):
    assert expected in post(server, path, 400, **body)['error']['message']
  assert post(server, 'tokenize', 404, prompt='a', model='huge')['error']['param'] == 'model'
