"""Thinking on, off or as the policy likes: by modes, by the template, by markers."""

from pathlib import Path

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data.chat import ChatTemplate, prompt_ids
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.serving import protocol, thinking
from jaxrl_pt.serving.answers import Answer
from jaxrl_pt.serving.fields import ApiError
from jaxrl_pt.serving.protocol import Service
from jaxrl_pt.serving.text import Markers, ThoughtSplitter
from jaxrl_pt.serving.thinking import Steering, Thinker, Wish
from tests.data.test_chat import LETTERS, template
from tests.serving.conftest import SIZES
from tests.serving.test_answers import respond
from tests.test_config import DATA, RUN

BYTES = ByteTokenizer()
MODES, MARKS = Markers('\x01', '\x02', '\x03'), Markers('\x01', '\x02')
HI = [{'role': 'user', 'content': 'hi'}]
THINK, END, NO_THINK = (1,), (2,), (3,)
SPOKEN = {text: LETTERS._backend.token_to_id(text) for text in ('<think>', '</think>')}
TAG = (SPOKEN['<think>'],)
FREE = Steering()
DOCS = Path(__file__).resolve().parents[2] / 'docs' / 'serving.md'


def ask(markers: Markers = MODES, tokenizer=BYTES, layout=None, **body) -> protocol.Ask:
  service = Service('tiny', tokenizer, SIZES, tokenizer.vocab_size, layout, markers)
  if 'prompt' in body:
    return protocol.completion(body, service, protocol.Ids())
  return protocol.chat({'messages': HI, **body}, service, protocol.Ids())


def steered(asked: protocol.Ask) -> Steering:
  request, = asked.requests
  return Steering(request.forced, request.max_thought, request.begins_thinking)


# --- What is forced -------------------------------------------------------------------


@pytest.mark.parametrize(('wish', 'by_modes', 'by_markers'), [
    (Wish(), FREE, FREE),
    (Wish('on'), Steering(THINK, None, True), Steering(THINK, None, True)),
    (Wish('on', 0), Steering(THINK, 0, True), Steering(THINK, 0, True)),
    (Wish('auto', 7), Steering((), 7), Steering((), 7)),
    (Wish('off'), Steering(NO_THINK), Steering((*THINK, *END)))])
def test_modes_and_markers(wish: Wish, by_modes: Steering, by_markers: Steering):
  assert Thinker(BYTES, MODES).steer(wish, (9,)) == by_modes
  assert Thinker(BYTES, MARKS).steer(wish, (9,)) == by_markers


def test_a_template_that_is_told():
  """Qwen3's writes an empty thought where thinking is off."""
  thinker = Thinker(LETTERS, Markers(), template('qwen3'))
  prompts = {mode: prompt_ids(thinker.told(Wish(mode)), LETTERS, HI)
             for mode in ('auto', 'on', 'off')}
  assert prompts['auto'] == prompts['on'] != prompts['off']
  assert prompts['off'] == LETTERS.encode_parsed(template('qwen3', enable_thinking=False).render(
      HI, add_generation_prompt=True))
  assert thinker.steer(Wish('off'), prompts['off']) == FREE
  assert thinker.steer(Wish('on', 5), prompts['on']) == Steering(TAG, 5, True)
  # Where the policy has modes, they come first, and the template stays as it was in training.
  modes = Thinker(LETTERS, Markers('<think>', '</think>', '<s>'), template('qwen3'))
  assert prompt_ids(modes.told(Wish('off')), LETTERS, HI) == prompts['auto']
  assert modes.steer(Wish('off'), prompts['auto']) == Steering((LETTERS.special_tokens['<s>'],))


def test_a_template_that_begins_each_turn_with_a_thought():
  layout = template('deepseek_r1_distill')
  thinker = Thinker(LETTERS, Markers(), layout)
  prompt = prompt_ids(layout, LETTERS, HI)
  assert thinker.is_open(prompt) and not thinker.is_open(prompt[:-2])
  assert thinker.steer(Wish(), prompt) == Steering(begins_thinking=True)
  assert thinker.steer(Wish('on', 3), prompt) == Steering((), 3, True)
  assert thinker.steer(Wish('auto', 3), prompt) == Steering((), 3, True)
  assert thinker.steer(Wish('off'), prompt) == Steering((SPOKEN['</think>'],))
  # A text that is no conversation is its author's alone.
  assert not Thinker(LETTERS, Markers()).is_open(prompt)
  asked = ask(Markers(), LETTERS, layout)
  tokens = [*LETTERS.encode('so'), SPOKEN['</think>'], *LETTERS.encode('5'), LETTERS.eos_id]
  service = Service('tiny', LETTERS, SIZES, LETTERS.vocab_size, layout)
  answer = Answer(service, asked)
  message = answer.body([answer.update(0, respond(asked, tokens))])['choices'][0]['message']
  assert message == {'role': 'assistant', 'content': '5', 'reasoning_content': 'so'}


@pytest.mark.parametrize('wish', [Wish('on'), Wish('off'), Wish('auto', 3)])
def test_a_policy_that_cannot_be_told(wish: Wish):
  with pytest.raises(UserError, match='no modes, its chat template reads no enable_thinking'):
    Thinker(BYTES, Markers()).steer(wish, (9,))
  # That a template speaks of thinking does not mean that it reads a variable of that name.
  speaks = ChatTemplate('{{ messages[0].thinking }}Say what you are thinking')
  with pytest.raises(UserError, match='reads no enable_thinking'):
    Thinker(BYTES, Markers(), speaks).steer(wish, (9,))


def test_the_modes_of_a_run():
  sums = cfg.HybridSums(9, think='a', think_end='b', no_think='c')
  expected = cfg.HybridModes('a', 'c', False, 'b')
  examples = cfg.Demonstrations(sums)
  assert cfg.modes_of(run(examples)) == expected
  assert cfg.modes_of(run(cfg.Mixture(('x', 'y'), (cfg.Conversations('x'), examples),
                                      (1.0, 1.0)))) == expected
  assert cfg.modes_of(run(cfg.HybridConversations('x'))) == cfg.HybridModes(forced=False)
  assert cfg.modes_of(run(cfg.Conversations('x'))) == cfg.SingleMode()


def run(source: cfg.Source) -> cfg.Run:
  return cfg.Run(**{**RUN, 'objective': cfg.SFT(''),
                    'data': cfg.Data(**{**DATA, 'source': source, 'long_documents': 'cut'})})


# --- What a thought looks like --------------------------------------------------------


@pytest.mark.parametrize(('text', 'is_open', 'expected'), [
    ('[why]so', False, ('why', 'so')), ('(so', False, ('', 'so')), (' ( so', False, ('', 'so')),
    ('([so]', False, ('', '[so]')), ('why]so', True, ('why', 'so')), ('so', False, ('', 'so')),
    ('why', True, ('why', '')), ('so(', False, ('', 'so('))])
@pytest.mark.parametrize('size', [1, 9])
def test_a_mode_is_neither_thought_nor_answer(text: str, is_open: bool, expected, size: int):
  splitter = ThoughtSplitter(Markers('[', ']', '('), is_open=is_open)
  pieces = [splitter.feed(text[i:i + size]) for i in range(0, len(text), size)]
  pieces.append(splitter.feed('', last=True))
  assert tuple(map(''.join, zip(*pieces, strict=True))) == expected


# --- The fields of a body -------------------------------------------------------------


def kwargs(**told: object) -> dict[str, object]:
  return {'chat_template_kwargs': told}


@pytest.mark.parametrize(('fields', 'expected'), [
    ({}, FREE), (kwargs(), FREE), (kwargs(enable_thinking=None), FREE),
    (kwargs(enable_thinking=True), Steering(THINK, None, True)),
    (kwargs(thinking=True), Steering(THINK, None, True)),
    (kwargs(enable_thinking=True, thinking=True), Steering(THINK, None, True)),
    (kwargs(enable_thinking=False), Steering(NO_THINK)),
    ({'reasoning_effort': 'none'}, Steering(NO_THINK)),
    ({'reasoning_effort': 'none', **kwargs(enable_thinking=False)}, Steering(NO_THINK)),
    # Shares of the 60 tokens that are asked for.
    *(({'reasoning_effort': effort, 'max_tokens': 60}, Steering(THINK, budget, True))
      for effort, budget in (('minimal', 6), ('low', 12), ('medium', 30), ('high', 48),
                             ('xhigh', 57))),
    ({'reasoning_effort': 'low', **kwargs(enable_thinking=True)}, Steering(THINK, 19, True)),
    ({'thinking_token_budget': 9}, Steering((), 9)),
    ({'thinking_token_budget': 0, **kwargs(enable_thinking=True)}, Steering(THINK, 0, True)),
    ({'max_thought': 9}, Steering(THINK, 9, True))])
def test_what_clients_send(fields: dict, expected: Steering):
  assert steered(ask(**fields)) == expected


def test_a_completion_is_steered_too():
  assert steered(ask(prompt='7402:', reasoning_effort='none')) == Steering(NO_THINK)
  assert steered(ask(prompt='7402:', thinking_token_budget=4)) == Steering((), 4)
  assert ask(prompt='7402:', reasoning_effort='none').requests[0].max_tokens == 16 + 1


@pytest.mark.parametrize(('fields', 'param', 'expected'), [
    (kwargs(enable_thinking=1), 'chat_template_kwargs.enable_thinking', 'expected true or false'),
    (kwargs(budget=3), 'chat_template_kwargs.budget', 'Unknown field'),
    ({'chat_template_kwargs': 3}, 'chat_template_kwargs', 'expected an object'),
    ({'reasoning_effort': 'huge'}, 'reasoning_effort',
     "'huge': expected one of none, minimal, low, medium, high, xhigh"),
    ({'reasoning_effort': 3}, 'reasoning_effort', 'expected one of none'),
    ({'thinking_token_budget': -1}, 'thinking_token_budget', 'from 0 to 96'),
    ({'thinking_token_budget': 97}, 'thinking_token_budget', 'from 0 to 96'),
    (kwargs(enable_thinking=True, thinking=False), 'chat_template_kwargs',
     'chat_template_kwargs.enable_thinking and chat_template_kwargs.thinking contradict'),
    ({'reasoning_effort': 'none', **kwargs(enable_thinking=True)}, 'reasoning_effort',
     'contradict each other: expected one'),
    ({'reasoning_effort': 'low', **kwargs(enable_thinking=False)}, 'reasoning_effort',
     'contradict each other: expected one'),
    ({'thinking_token_budget': 4, **kwargs(enable_thinking=False)}, 'thinking_token_budget',
     'chat_template_kwargs.enable_thinking switches thinking off'),
    ({'thinking_token_budget': 4, 'reasoning_effort': 'none'}, 'thinking_token_budget',
     'reasoning_effort switches thinking off'),
    ({'thinking_token_budget': 4, 'reasoning_effort': 'low'}, 'thinking_token_budget',
     'both say how long'),
    ({'max_thought': 4, 'reasoning_effort': 'low'}, 'max_thought', 'with reasoning_effort'),
    ({'max_thought': 4, **kwargs(thinking=False)}, 'max_thought', 'with chat_template_kwargs')])
def test_values_that_cannot_be_and_contradictions(fields: dict, param: str, expected: str):
  with pytest.raises(ApiError) as raised:
    ask(**fields)
  error = raised.value.body['error']
  assert raised.value.status == 400 and error['param'] == param and expected in error['message']


@pytest.mark.parametrize(('fields', 'param'), [
    (kwargs(enable_thinking=False), 'chat_template_kwargs'),
    ({'reasoning_effort': 'high'}, 'reasoning_effort'),
    ({'thinking_token_budget': 3}, 'thinking_token_budget')])
def test_a_server_of_a_policy_that_cannot_be_told(fields: dict, param: str):
  with pytest.raises(ApiError, match='This policy cannot be told') as raised:
    ask(Markers(), **fields)
  assert raised.value.status == 400 and raised.value.body['error']['param'] == param


def test_the_documentation_lists_every_effort():
  text = DOCS.read_text(encoding='utf-8')
  for effort, share in thinking.EFFORTS.items():
    assert f'| `{effort}` | ' in text and (not share or f'{share:.0%}' in text), effort


def test_no_budget_without_thinking():
  with pytest.raises(UserError, match='A budget of 3 thinking tokens does nothing'):
    Wish('off', 3)


@pytest.mark.parametrize(('fields', 'before'), [
    (kwargs(enable_thinking=False), '\x03'), (kwargs(enable_thinking=True), '\x01hm\x02'),
    ({}, '')])
def test_a_format_holds_for_the_answer_alone(fields: dict, before: str):
  constraint = ask(guided_regex='[ab]{3}', **fields).constraint
  assert constraint is not None
  for token in before.encode():
    constraint.accept(token)
  for token in b'aba':
    assert constraint.mask()[token // 32] >> token % 32 & 1 and not constraint.is_met
    assert not constraint.mask()[ord('c') // 32] >> ord('c') % 32 & 1
    constraint.accept(token)
  assert constraint.is_met
