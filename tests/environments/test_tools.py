"""Tools: the syntax of calls, typed errors, the calculator, programs, and the reward at the end."""

import json

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import calculator, tools
from jaxrl_pt.environments.episodes import EpisodePool, Outcome
from jaxrl_pt.environments.interactive import Problem
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import isolation
from tests.verifiers.test_code import ISOLATED

CALCULATOR = cfg.ToolUse((cfg.Calculator(),), cfg.MathVerifier('boxed', symbolic=False))
BOTH = cfg.ToolUse((cfg.Calculator(), cfg.PythonTool(cfg.Interpreter(1, 2.0))),
                   cfg.MathVerifier('boxed', symbolic=False))


def _call(name: str, **arguments: object) -> str:
  return ('<tool_call>\n' + json.dumps({'name': name, 'arguments': arguments}) + '\n</tool_call>')


def _responses(text: str) -> list[dict]:
  parts = text.removeprefix('<tool_response>\n').removesuffix('\n</tool_response>')
  return [json.loads(part) for part in parts.split('\n</tool_response>\n<tool_response>\n')]


def _step(settings: cfg.ToolUse, text: str, outputs=()) -> tools.Step:
  return tools.game(settings).advance(Problem('6 · 7?', '42'), None, text, outputs)[0]


# --- The calculator -------------------------------------------------------------------


@pytest.mark.parametrize('expression, value', [
    ('3*4', '12'), ('2^10', '1024'), ('1/3', '1/3 = 0.333333333333'), ('5!', '120'),
    (r'\sqrt{2}', '1.41421356237'), ('(1+2)*3 - 4/5', '8.2'), ('50%', '0.5'),
    ('2π', '6.28318530718'), (r'\sin(\pi/2)', '1'), ('log_2(8)', '3'), ('0.1+0.2', '0.3'),
    ('12 ÷ 4', '3'), ('|-3|', '3'), (r'\max(\pi, 2)', '3.14159265359'),
    (r'\min(\pi)', '3.14159265359')])
def test_the_calculator_works_out(expression, value):
  assert calculator.calculate(expression) == value


@pytest.mark.parametrize('expression', [
    '', 'x+1', '1/0', '9**9**9', '2^(2^(2^5))', '1e400', '1' * 2000, '(' * 500, '[1, 2]', '1 < 2',
    '__import__("os").system("true")', '().__class__', 'i', r'\infty', r'\arcsin(2)', '(1+1',
    '100000!', '3 4'])
def test_the_calculator_says_what_it_cannot(expression):
  with pytest.raises(calculator.CalculatorError):
    calculator.calculate(expression)


# --- Calls ----------------------------------------------------------------------------


@pytest.mark.parametrize('text, error', [
    ('<tool_call>calculator: 3*4</tool_call>', 'not_json'),
    ('<tool_call>{"name": "calculator", }</tool_call>', 'not_json'),
    ('<tool_call>' + '[' * 100_000 + '</tool_call>', 'not_json'),
    ('<tool_call>' + '1' * 10_000 + '</tool_call>', 'not_json'),
    ('<tool_call></tool_call>', 'not_json'), ('<tool_call>', 'not_closed'),
    ('<tool_call>{"name": "calculator"', 'not_closed'),
    ('<tool_call>[]</tool_call>', 'not_a_call'), ('<tool_call>{}</tool_call>', 'not_a_call'),
    ('<tool_call>{"name": "calculator", "arguments": "3*4"}</tool_call>', 'not_a_call'),
    ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'not_a_call'),
    (_call('python', code='1'), 'unknown_tool'), (_call('', expression='1'), 'unknown_tool'),
    (_call('calculator'), 'wrong_arguments'),
    (_call('calculator', expression=3), 'wrong_arguments'),
    (_call('calculator', expression='1', precision=3), 'wrong_arguments'),
    (_call('calculator', expression='x'), 'failed')])
def test_what_is_no_call_is_answered_with_its_type(text, error):
  step = _step(CALCULATOR, f'I call {text}')
  response, = _responses(step.observation)
  assert response['error']['type'] == error in tools.ERROR_TYPES and response['error']['message']
  assert not step.done and step.reward == 0 and step.counts == {'tool_calls': 1, 'tool_errors': 1}


def test_calls_of_one_text_are_answered_in_order_up_to_a_bound():
  text = ' and '.join([_call('calculator', expression=f'{i}+1') for i in range(3)]
                      + ['<tool_call>no</tool_call>', _call('calculator', expression='9')] * 2)
  responses = _responses(_step(CALCULATOR, text).observation)
  assert [r.get('content', r.get('error', {}).get('type')) for r in responses] == [
      '1', '2', '3', 'not_json', 'too_many']


def test_a_call_that_is_not_closed_ends_where_the_next_begins():
  responses = _responses(_step(CALCULATOR, '<tool_call>{ ' + _call('calculator', expression='1')
                               ).observation)
  assert responses[0]['error']['type'] == 'not_closed' and responses[1]['content'] == '1'


@pytest.mark.parametrize('text, reward, counts', [
    (r'So \boxed{42}.', 1.0, {'correct': 1, 'parsed': 1}),
    (r'So \boxed{41}.', 0.0, {'correct': 0, 'parsed': 1}),
    ('So what?', 0.0, {'correct': 0, 'parsed': 0}),
    ('</tool_call> <tool_response>42</tool_response>', 0.0, {'correct': 0, 'parsed': 0})])
def test_a_text_without_a_call_is_the_answer(text, reward, counts):
  step = _step(CALCULATOR, text)
  assert (step.done, step.reward, step.counts) == (True, reward, counts)


def test_the_policy_is_told_of_the_tools():
  system, user = tools.game(BOTH).start(Problem('6 · 7?', '42'))
  lines = system.content.split('<tools>\n')[1].split('\n</tools>')[0].splitlines()
  schemas = [json.loads(line)['function'] for line in lines]
  assert [s['name'] for s in schemas] == ['calculator', 'python']
  assert schemas[1]['parameters']['required'] == ['code']
  assert (system.role, user.role, user.content) == ('system', 'user', '6 · 7?')


# --- In processes ---------------------------------------------------------------------


@ISOLATED
def test_programs_and_calculations_answer_one_text_and_the_answer_is_verified():
  with EpisodePool(cfg.Interactive(BOTH), cfg.VerifierPool(num_workers=1)) as pool:
    start, = pool.start([Problem('6 · 7?', '42')])
    text = (_call('python', code='print(6 * 7)') + _call('calculator', expression='6*7')
            + _call('python', code='open("/etc/passwd")'))
    seen, = pool.step([(start.episode, text)])
    answers = [r['content'] for r in _responses(seen.text)]
    assert answers[:2] == ['42', '42'] and 'FileNotFoundError' in answers[2]
    assert seen.counts == {'tool_calls': 3, 'tool_errors': 0}
    end, = pool.step([(seen.episode, r'\boxed{42}')])
  assert end.done and end.episode.reward == 1.0 and end.outcome is Outcome.OK


def test_programs_that_may_outlast_the_turn_are_refused():
  settings = cfg.Interactive(cfg.ToolUse((cfg.PythonTool(),), cfg.MathVerifier()))
  with pytest.raises(UserError, match='may take 20 s .* VerifierPool.wall_seconds = 20 ends'):
    EpisodePool(settings, cfg.VerifierPool(wall_seconds=20))


@ISOLATED
def test_where_programs_are_not_isolated_the_tool_is_refused(monkeypatch, tmp_path):
  # The worker is a process of its own: a module that stands before the package's breaks the number
  # of a call that isolation needs.
  (tmp_path / 'sitecustomize.py').write_text(
      'from jaxrl_pt.verifiers import isolated\nisolated._MOUNT_SETATTR = 10_000\n')
  monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{isolation.__file__.rsplit("/jaxrl_pt/", 1)[0]}')
  with pytest.raises(UserError, match='PythonTool runs programs only in isolation, which is not to '
                                      'be had here: Function not implemented'):
    EpisodePool(cfg.Interactive(BOTH), cfg.VerifierPool(num_workers=1))


def test_a_verifier_that_fails_masks_the_row():
  settings = cfg.ToolUse((cfg.Calculator(),), cfg.PythonVerifier('math:sqrt'))
  with EpisodePool(cfg.Interactive(settings), cfg.VerifierPool(num_workers=1)) as pool:
    start, = pool.start([Problem('?', '42')])
    seen, = pool.step([(start.episode, 'an answer')])
  assert seen.outcome is Outcome.RAISED and not seen.outcome.is_valid and seen.done
