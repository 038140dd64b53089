"""Responses to bodies and chunks: echo, log-probabilities, the best of many, tool calls."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from jaxrl_pt.sampling.engine import Response
from jaxrl_pt.sampling.prompt_scores import Scored
from jaxrl_pt.serving import protocol
from jaxrl_pt.serving.answers import Answer
from jaxrl_pt.serving.protocol import Service
from tests.serving.conftest import SIZES, TOKENIZER

EOS = TOKENIZER.eos_id
SERVICE = Service('tiny', TOKENIZER, SIZES, 257)
CLOCK = {'type': 'function', 'function': {'name': 'clock'}}


def ask(**body: Any) -> protocol.Ask:
  understand = protocol.chat if 'messages' in body else protocol.completion
  return understand(body, SERVICE, protocol.Ids())


def respond(asked: protocol.Ask, tokens: list[int], finish: str = 'stop', *, sample: int = 0,
            logp: float = -0.5) -> Response:
  """A response of these tokens. At place i, token t has the log-probability −t − i / 4."""
  request, num = asked.requests[0], len(tokens)
  of = lambda t, i: -t - i / 4
  def top(places: range, own: list[int]) -> tuple[np.ndarray, np.ndarray]:
    best = [[*range(request.top_logprobs)] for _ in own]
    return (np.array(best, np.int32).reshape(len(own), -1),
            np.array([[of(t, i) for t in row] for i, row in zip(places, best)], np.float32
                     ).reshape(len(own), -1))
  fields: dict[str, Any] = {}
  if request.top_logprobs:
    fields['top_tokens'], fields['top_logp'] = top(range(num), tokens)
  if request.prompt_logprobs:
    prompt = list(request.prompt)
    scores = [0, *(of(t, i + 1) for i, t in enumerate(prompt[1:]))]
    fields['prompt'] = Scored(np.array(scores, np.float32), *top(range(len(prompt)), prompt))
  return Response(request.id, sample, np.array(tokens, np.int32),
                  np.full(num, logp, np.float32), np.ones(num, np.float32), finish, 0, **fields)


def choice_of(asked: protocol.Ask, *responses: Response) -> dict[str, Any]:
  """The only choice of the body; the responses are states of one that grows."""
  answer = Answer(SERVICE, asked)
  body = answer.body([answer.update(0, response) for response in responses])
  json.dumps(body, allow_nan=False)
  return body['choices'][0]


# --- Completions ----------------------------------------------------------------------


def test_echo_with_log_probabilities():
  """As OpenAI has it: the prompt's tokens come first, and nothing is known of the first one."""
  asked = ask(prompt=[EOS, 3, 1], echo=True, logprobs=2, max_tokens=1)
  assert asked.requests[0].prompt_logprobs and asked.requests[0].top_logprobs == 2
  choice = choice_of(asked, respond(asked, [5], 'length'))
  assert choice['text'] == '\x03\x01\x05' and choice['finish_reason'] == 'length'
  assert choice['logprobs'] == {
      'tokens': ['<|endoftext|>', '\x03', '\x01', '\x05'],
      # That of a token among the most probable ones is exactly theirs.
      'token_logprobs': [None, -3.25, -1.5, -0.5],
      'top_logprobs': [None, {'\x00': -0.25, '\x01': -1.25, '\x03': -3.25},
                       {'\x00': -0.5, '\x01': -1.5}, {'\x00': 0.0, '\x01': -1.0, '\x05': -0.5}],
      'text_offset': [0, 0, 1, 2]}


def test_a_prompt_that_is_only_scored():
  asked = ask(prompt='ab', echo=True, logprobs=0, max_tokens=0)
  assert asked.requests[0].max_tokens == 0
  choice = choice_of(asked, respond(asked, [], 'length'))
  assert choice['text'] == 'ab' and choice['logprobs']['tokens'] == ['<|endoftext|>', 'a', 'b']
  assert choice['logprobs']['top_logprobs'] is None
  # Without log-probabilities nothing needs to be drawn either.
  plain = ask(prompt='ab', echo=True, max_tokens=0)
  assert plain.requests[0].prompt_logprobs
  choice = choice_of(plain, respond(plain, [], 'length'))
  assert choice['text'] == 'ab' and choice['logprobs'] is None


def test_echo_of_characters_of_several_bytes():
  asked = ask(prompt='é€', echo=True, logprobs=0)
  choice = choice_of(asked, respond(asked, [*'ü'.encode(), EOS]))
  assert choice['text'] == 'é€ü' and choice['finish_reason'] == 'stop'
  assert choice['logprobs']['text_offset'] == [0, 0, 0, 1, 1, 1, 2, 2, 3]
  assert choice['logprobs']['tokens'][1:3] == ['bytes:\\xc3', 'bytes:\\xa9']


def test_each_prompt_is_echoed_before_its_own_choice():
  asked = ask(prompt=['ab', [99]], echo=True, n=2)
  answer = Answer(SERVICE, asked)
  deltas = [answer.update(n, respond(asked, [65 + n, 70 + g], 'length', sample=g))
            for n, g in itertools.product((1, 0), (1, 0))]
  assert [c['text'] for c in answer.body(deltas)['choices']] == ['abAF', 'abAG', 'cBF', 'cBG']


@pytest.mark.parametrize('cuts', [[1, 2, 3], [3], [2, 3]], ids=str)
def test_chunks_join_to_the_body(cuts: list[int]):
  asked = ask(prompt='ab', echo=True, logprobs=1, stream=True)
  tokens = [*b'xy', EOS]
  states = [respond(asked, tokens[:n], 'stop' if n == 3 else '') for n in cuts]
  whole, answer = choice_of(asked, states[-1]), Answer(SERVICE, asked)
  chunks = [answer.chunk(answer.update(0, state))['choices'][0] for state in states]
  assert ''.join(c['text'] for c in chunks) == whole['text'] == 'abxy'
  for name, values in whole['logprobs'].items():
    assert sum((c['logprobs'][name] for c in chunks), []) == values, name
  assert [c['finish_reason'] for c in chunks] == [None] * (len(cuts) - 1) + ['stop']


def test_what_cannot_come_has_a_finite_log_probability():
  asked = ask(prompt='a', logprobs=2)
  response = respond(asked, [0], 'length', logp=0.0)
  response.top_logp[:] = [[0, -np.inf]]
  choice = choice_of(asked, response)
  assert choice['logprobs']['top_logprobs'] == [{'\x00': 0.0, '\x01': -9999.0}]


def test_two_tokens_of_one_text_keep_the_more_probable():
  asked = ask(prompt='a', logprobs=2)
  response = respond(asked, [EOS], 'stop')
  response.top_tokens[:] = [[EOS, 258]]  # Neither adds bytes; 258 has no name.
  top = choice_of(asked, response)['logprobs']['top_logprobs']
  assert top == [{'<|endoftext|>': 0.0, '': -1.0}]
  response.top_tokens[:] = [[300, 258]]
  assert choice_of(asked, response)['logprobs']['top_logprobs'] == [
      {'': 0.0, '<|endoftext|>': -0.5}]


def test_the_best_of_many_are_those_of_the_largest_mean():
  asked = ask(prompt='a', n=2, best_of=4)
  assert asked.requests[0].num_samples == 4
  answer = Answer(SERVICE, asked)
  # Of lengths 1 to 4, so that the order of sums is another one than that of means.
  means = [-0.9, -0.5, -0.8, -0.4]
  deltas = [answer.update(0, respond(asked, [65 + g] * (g + 1), 'length', sample=g, logp=m))
            for g, m in enumerate(means)]
  body = answer.body(deltas)
  assert [(c['index'], c['text']) for c in body['choices']] == [(0, 'DDDD'), (1, 'BB')]
  assert body['usage']['completion_tokens'] == 10


def test_forced_tokens_have_no_part_in_the_mean():
  asked = ask(prompt='a', best_of=2)
  answer = Answer(SERVICE, asked)
  half = respond(asked, [65] * 4, 'length', logp=-1.0)
  half.logp[2:], half.sampled[2:] = 0, 0  # Its mean is −1, that of all its tokens −0.5.
  deltas = [answer.update(0, half),
            answer.update(0, respond(asked, [66], 'length', sample=1, logp=-0.7))]
  assert [c['text'] for c in answer.body(deltas)['choices']] == ['B']


# --- Chats ----------------------------------------------------------------------------


HI = [{'role': 'user', 'content': 'hi'}]
CALLED = 'Hm. <tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>'


def said(text: str) -> list[int]:
  return [*text.encode(), EOS]


def test_a_chats_log_probabilities():
  asked = ask(messages=HI, logprobs=True, top_logprobs=1)
  choice = choice_of(asked, respond(asked, said('\x00\x02')))
  assert choice['logprobs'] == {'refusal': None, 'content': [
      {'token': '\x00', 'logprob': 0.0, 'bytes': [0],
       'top_logprobs': [{'token': '\x00', 'logprob': 0.0, 'bytes': [0]}]},
      {'token': '\x02', 'logprob': -0.5, 'bytes': [2],
       'top_logprobs': [{'token': '\x00', 'logprob': -0.25, 'bytes': [0]}]}]}


def test_tool_calls_are_apart():
  asked = ask(messages=HI, tools=[CLOCK])
  choice = choice_of(asked, respond(asked, said(CALLED)))
  (call,) = choice['message']['tool_calls']
  assert choice['finish_reason'] == 'tool_calls' and choice['message']['content'] == 'Hm.'
  assert call.pop('id').startswith('call_')
  assert call == {'type': 'function',
                  'function': {'name': 'clock', 'arguments': '{"zone": "CET"}'}}
  alone = choice_of(asked, respond(asked, said(CALLED[4:])))['message']
  assert alone['content'] is None and len(alone['tool_calls']) == 1


@pytest.mark.parametrize('fields', [{}, {'tools': [CLOCK], 'tool_choice': 'none'}], ids=str)
def test_without_tools_a_call_is_text(fields: dict):
  asked = ask(messages=HI, **fields)
  choice = choice_of(asked, respond(asked, said(CALLED)))
  assert choice['message'] == {'role': 'assistant', 'content': CALLED}
  assert choice['finish_reason'] == 'stop'


def test_a_call_that_is_broken_off_is_text():
  asked = ask(messages=HI, tools=[CLOCK])
  choice = choice_of(asked, respond(asked, said(CALLED)[:30], 'length'))
  assert choice['message']['content'] == CALLED[:30] and choice['finish_reason'] == 'length'


def test_calls_in_chunks():
  asked = ask(messages=HI, tools=[CLOCK], stream=True)
  tokens = said(CALLED * 2)
  answer, content, calls, finish = Answer(SERVICE, asked), '', [], None
  for n in range(1, len(tokens) + 1):
    chunk = answer.chunk(answer.update(0, respond(
        asked, tokens[:n], 'stop' if n == len(tokens) else '')))
    if chunk is not None:
      delta, finish = chunk['choices'][0]['delta'], chunk['choices'][0]['finish_reason']
      content += delta.get('content', '')
      calls += delta.get('tool_calls', [])
  assert content == 'Hm.Hm.' and finish == 'tool_calls'
  assert [(c['index'], c['function']['name']) for c in calls] == [(0, 'clock'), (1, 'clock')]
  assert calls[0]['id'] != calls[1]['id']


def test_a_call_and_its_result_come_back():
  asked = ask(messages=HI, tools=[CLOCK])
  message = choice_of(asked, respond(asked, said(CALLED)))['message']
  result = {'role': 'tool', 'tool_call_id': message['tool_calls'][0]['id'], 'content': '12:00'}
  again = TOKENIZER.decode(ask(messages=[*HI, message, result]).requests[0].prompt)
  assert again == ('User: hi\n\nAssistant: ' + CALLED.replace('Hm. ', 'Hm.\n') +
                   '\n\nTool: <tool_response>\n12:00\n</tool_response>\n\nAssistant:')


def test_a_thought_may_speak_of_calls():
  asked = ask(messages=HI, tools=[CLOCK])
  message = choice_of(asked, respond(asked, said(f'<think>{CALLED}</think>No.')))['message']
  assert message == {'role': 'assistant', 'content': 'No.', 'reasoning_content': CALLED}


def test_a_response_that_does_not_meet_its_format_has_not_stopped():
  """It may be cut where following the format has become too costly."""
  asked = ask(messages=HI, guided_regex='[ab]{3}', max_thought=4)
  assert asked.constraint is asked.requests[0].constraint is not None
  for text, expected in (('aba', 'stop'), ('ab', 'length')):
    response = respond(asked, said(f'<think>hm?!</think>{text}'))
    response.sampled[:7] = response.sampled[11:19] = 0  # the forced markers
    assert choice_of(asked, response)['finish_reason'] == expected
