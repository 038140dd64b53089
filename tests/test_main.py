"""The command line in processes of its own: help, mistakes, interruption, doctor."""

import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys

import pytest

from jaxrl_pt import doctor, flags, frontends
from jaxrl_pt import main as cli

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / 'gin/run/pretrain_tiny.gin')
COMMANDS = ('quickstart', 'train', 'sample', 'chat', 'serve', 'eval', 'score', 'judge', 'import',
            'export', 'trajectories', 'spatial', 'doctor')


def _run(*args: str, cwd: Path = ROOT, stdin: bytes = b'') -> subprocess.CompletedProcess[bytes]:
  return subprocess.run([sys.executable, '-m', 'jaxrl_pt.main', *args], cwd=cwd, input=stdin,
                        capture_output=True, check=False)


def _mistake(capfd: pytest.CaptureFixture[str], *args: str) -> str:
  """The one line on stderr of a call that ends with exit code 2 and prints nothing else."""
  assert cli.main(args) == 2
  out, err = capfd.readouterr()
  assert out == '' and err.count('\n') == 1 and err.startswith('jaxrl-pt: '), (out, err)
  return err


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example(command, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main([command, '--help'])
  text = capsys.readouterr().out
  assert stopped.value.code == 0 and f'example:\n  jaxrl-pt {command}' in text
  assert ('--json' in text) == (
      command in ('sample', 'eval', 'judge', 'trajectories', 'spatial', 'doctor'))


@pytest.mark.parametrize('command', COMMANDS)
def test_examples_parse(command, capsys):
  with pytest.raises(SystemExit):
    cli.main([command, '--help'])
  text = capsys.readouterr().out.split('example:\n')[1].replace('\\\n', ' ')
  examples = [line for line in text.splitlines() if line.strip()]
  assert examples
  for example in examples:
    arguments = [a.strip('\'"') for a in re.findall(r'"[^"]*"|\'[^\']*\'|\S+', example)]
    assert arguments[0] == 'jaxrl-pt'
    assert flags.make_parser().parse_args(arguments[1:]).command == command


def test_help_imports_neither_jax_nor_numpy():
  code = ('import sys; from jaxrl_pt import main\n'
          'try: main.main(["--help"])\n'
          'except SystemExit: pass\n'
          'assert not {"jax", "numpy", "gin"} & set(sys.modules), "slow imports"')
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize('args, expected', [
    ((), 'required: COMMAND'),
    (('trian',), "invalid choice: 'trian'"),
    (('train', '--gin_file', TINY), 'required: --workdir'),
    (('train', '--workdir', 'x', '--gin_flie', 'y'), 'Unrecognized arguments: --gin_flie y'),
    (('train', '--workdir', 'x'), 'No settings given'),
    (('train', '--workdir', 'x', '--gin_file', 'nowhere.gin'), 'no gin file nowhere.gin'),
    (('train', '--workdir', 'x', '--gin_file', TINY, '--gin_bindings', 'cfg.Train.num_stepz = 1'),
     'did you mean num_steps?'),
    (('train', '--workdir', 'x', '--gin_file', TINY, '--gin_bindings', 'cfg.Run.seed = -1'),
     'Run.seed = -1'),
    (('sample', '--workdir', 'x', '--num_tokens', '0'), 'whole number of at least 1'),
    (('sample', '--workdir', 'x', '--prompt', 'a', '--temperature', '-1'),
     'Sampler.temperature = -1.0'),
    (('sample', '--workdir', 'x', '--prompt', 'a', '--top_p', '0'), 'Sampler.top_p = 0'),
    (('sample', '--workdir', 'x', '--prompt', 'a', '--min_p', '2'), 'Sampler.min_p = 2.0'),
    (('sample', '--workdir', 'x', '--prompt', 'a', '--prompt_file', 'b'), 'not both'),
    (('sample', '--workdir', 'x', '--prompt_file', 'nowhere.txt'),
     'Cannot read the prompts in nowhere.txt'),
    (('sample', '--workdir', 'nowhere', '--prompt', 'a'), 'nowhere holds no config.gin'),
    (('sample', '--workdir', 'x', '--resa', '--resa_share', '0'), 'ReSA.active = 0'),
    (('sample', '--workdir', 'x', '--resa', '--resa_share', '1.5'), 'ReSA.active = 1.5'),
    (('sample', '--workdir', 'x', '--resa', '--resa_block', '0'), 'whole number of at least 1'),
    (('sample', '--workdir', 'x', '--resa', '--resa_block', 'x'), "at least 1, not 'x'"),
    (('sample', '--workdir', 'x', '--resa', '--resa_every', '0'), 'whole number of at least 1'),
    (('sample', '--workdir', 'x', '--resa', '--resa_every', '99999999999'), 'at most 2147483647'),
    (('sample', '--workdir', 'x', '--resa_share', '0.2'), 'without --resa: add it'),
    (('sample', '--workdir', 'x', '--resa_drafts', '4'), 'without --resa: add it'),
    (('sample', '--workdir', 'x', '--resa', '--lookup_drafts', '4'), 'leave one of them out'),
    (('sample', '--workdir', 'x', '--lookup_drafts', '65'), 'PromptLookup.tokens = 65'),
    *(((command, '--workdir', bad, *more), f'--workdir: expected a path, not {bad!r}')
      for command, more in (
          ('train', ()), ('sample', ()), ('chat', ()), ('serve', ()), ('eval', ()),
          ('replay', ('--only', 'sampler')), ('doctor', ()), ('quickstart', ()))
      for bad in ('', 'a\0b')),
    *((('sample', '--workdir', 'x', flag, ''), f'{flag}: expected a path')
      for flag in ('--prompt_file',)),
    *(((command, '--workdir', 'x', '--template', ''), '--template: expected a path')
      for command in ('chat', 'serve')),
    (('quickstart', '--data', ''), '--data: expected a path'),
    *(((command, '--workdir', 'x', '--seed', str(2**32)), '--seed: expected a whole number of at '
       f'most {2**32 - 1}') for command in ('sample', 'chat', 'serve')),
    (('sample', '--workdir', 'x', '--prompt', 'a\udcff'), '--prompt: expected UTF-8 text'),
    (('chat', '--workdir', 'x', '--system', '\udcff'), '--system: expected UTF-8 text'),
    (('sample', '--workdir', 'x', '--prompt', 'a', '--num_tokens', str(10**12)),
     '--num_tokens: expected a whole number of at most'),
    *((('train', '--workdir', 'x', '--gin_file', TINY, '--gin_bindings', binding), expected)
      for binding, expected in (
          ('cfg.WSD.peak_rate = 1e309', 'cfg.WSD.peak_rate holds a number beyond what 64 bits'),
          ('cfg.WSD.peak_rate = 0', 'WSD.peak_rate = 0: expected a number above 0'),
          ('cfg.AdamW.b1 = 1', 'never learns'),
          (f'cfg.Run.seed = {"9" * 4000}', 'whole number of 13288 bits'),
          (f'cfg.Run.seed = {"9" * 5000}', 'this is not gin'),
          (f'cfg.Run.seed = {"[" * 2000}{"]" * 2000}', 'nested'),
          (f'cfg.Run.seed = {"(" * 90}{")" * 90}', 'Run.seed = ('),
          ("cfg.Data.cache_dir = 'a\\0b'", 'Data.cache_dir = '),
          ("cfg.Run.model = @cfg.Quant", 'expected one of @cfg.Model()'))),
    (('train', '--workdir', 'x', '--gin_file', 'a\0b'), "'a\\x00b' is not a file name"),
    (('chat', '--workdir', 'nowhere'), 'nowhere holds no config.gin'),
    (('chat', '--workdir', 'x', '--temperature', 'hot'), "invalid float value: 'hot'"),
    (('chat', '--workdir', 'x', '--template', 'nowhere.json'),
     'Cannot read the chat template nowhere.json'),
    (('chat', '--workdir', 'x', '--markers', '<think>'), 'expected 2 arguments'),
    (('chat', '--workdir', 'x', '--thinking', 'maybe'), "choose from 'auto', 'on', 'off'"),
    (('sample', '--workdir', 'x', '--thinking_budget', '-1'), 'a whole number of at least 0'),
    (('sample', '--workdir', 'x', '--prompt', 'a', '--thinking', 'off', '--thinking_budget', '3'),
     'A budget of 3 thinking tokens does nothing where thinking is off'),
    (('chat', '--workdir', 'x', '--thinking', 'on', '--max_thought', '3'),
     '--max_thought makes any model think'),
    (('serve', '--workdir', 'nowhere', '--port', '0'), 'nowhere holds no config.gin'),
    (('serve', '--workdir', 'x', '--host', '0.0.0.0'), 'lets others in: give a --token_file'),
    (('serve', '--workdir', 'x', '--host', '::'), 'lets others in'),
    (('serve', '--workdir', 'x', '--token_file', 'nowhere.txt'),
     'Cannot read a token in nowhere.txt'),
    (('serve', '--workdir', 'x', '--port', '99999'), 'Cannot listen at 127.0.0.1:99999'),
    (('serve', '--workdir', 'x', '--slots', '0'), 'whole number of at least 1'),
    (('eval', '--workdir', 'nowhere', '--gin_bindings', 'cfg.Data.seq_len = 8'),
     'nowhere holds no config.gin'),
])
def test_a_mistake_is_one_line_and_exit_code_2(args, expected, capfd):
  assert expected in _mistake(capfd, *args)


def test_debug_shows_the_traceback(capfd):
  assert cli.main(['train', '--workdir', 'x', '--debug']) == 2
  assert 'Traceback' in capfd.readouterr().err


def test_the_process_ends_with_the_exit_code(tmp_path):
  done = _run('train', '--gin_file', TINY, '--workdir', 'w', '--gin_bindings', 'x = 1',
              cwd=tmp_path)
  assert done.returncode == 2 and done.stdout == b''
  assert done.stderr.startswith(b'jaxrl-pt: Nothing reads x') and done.stderr.count(b'\n') == 1
  assert list(tmp_path.iterdir()) == []  # A mistake in the settings leaves nothing behind.


def test_standard_input_must_be_utf8(tmp_path):
  done = _run('sample', '--workdir', 'w', stdin=b'ab\xff', cwd=tmp_path)
  assert done.returncode == 2 and b'not UTF-8 text (byte 2)' in done.stderr


def test_a_port_that_is_taken(capfd):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = str(taken.getsockname()[1])
    assert f'Cannot listen at 127.0.0.1:{port}' in _mistake(
        capfd, 'serve', '--workdir', 'x', '--port', port)


@pytest.mark.parametrize('token', ['', ' \n', 'two words', 'é'])
def test_a_token_that_is_none(token, tmp_path, capfd, monkeypatch):
  (tmp_path / 'token').write_text(token)
  line = _mistake(capfd, 'serve', '--workdir', 'x', '--token_file', str(tmp_path / 'token'))
  assert 'token' in line
  monkeypatch.setenv('JAXRL_PT_TOKEN', token)
  assert 'JAXRL_PT_TOKEN must hold one token' in _mistake(capfd, 'serve', '--workdir', 'x')


@pytest.mark.parametrize(('name', 'content', 'expected'), [
    ('p.txt', b'', 'holds no prompt'), ('p.txt', b'a\n\xff', 'not UTF-8 text (byte 2)'),
    ('p.jsonl', b'{"prompt": "a"}\n"b"\n', 'p.jsonl:2: expected an object'),
    ('p.jsonl', b'{"prompt": 3}', 'p.jsonl:1: expected'),
    ('p.jsonl', b'{"prompt": "\\ud800"}', 'p.jsonl:1: expected'),
    ('p.jsonl', b'{"prompt"', 'p.jsonl:1: expected')])
def test_a_prompt_file_that_is_none(name, content, expected, tmp_path, capfd):
  (tmp_path / name).write_bytes(content)
  assert expected in _mistake(capfd, 'sample', '--workdir', 'x', '--prompt_file',
                              str(tmp_path / name))


def test_prompt_files(tmp_path):
  (tmp_path / 'p.txt').write_text('one\n\n  two\r\nthrée\n')
  (tmp_path / 'p.jsonl').write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": ""}\n')
  assert frontends.read_prompts(tmp_path / 'p.txt') == ['one', '  two', 'thrée']
  assert frontends.read_prompts(tmp_path / 'p.jsonl') == ['a\nb', '']
  (tmp_path / 'b.txt').write_bytes(b'\xef\xbb\xbfone\n')  # A byte order mark is no text.
  (tmp_path / 'b.jsonl').write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
  assert frontends.read_prompts(tmp_path / 'b.txt') == ['one']
  assert frontends.read_prompts(tmp_path / 'b.jsonl') == ['a']


def test_interruption_is_a_clean_message(capfd, monkeypatch):
  def interrupted(args: object) -> int:
    raise KeyboardInterrupt
  monkeypatch.setitem(cli._COMMANDS, 'doctor', interrupted)
  assert cli.main(['doctor']) == 130
  assert capfd.readouterr().err == '\njaxrl-pt: interrupted.\n'


def test_ctrl_c_while_importing_ends_the_command(tmp_path):
  """Raised inside a finaliser, as inside any callback of the import system, Python drops it."""
  code = """
import os, signal, sys
class Dropped:
  def __del__(self): os.kill(os.getpid(), signal.SIGINT)
class Finder:
  def find_spec(self, name, path=None, target=None):
    if name == 'jaxrl_pt.run': Dropped()
sys.meta_path.insert(0, Finder())
from jaxrl_pt import main
sys.exit(main.main(['eval', '--workdir', 'nowhere']))
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=False,
                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
  assert done.returncode == 130, done.stderr
  assert done.stderr.endswith(b'jaxrl-pt: interrupted.\n') and b'nowhere' not in done.stderr


def test_the_library_is_quiet_about_a_tpu_that_is_not_there():
  code = 'import jax; from jaxrl_pt import config; print(jax.devices()[0].platform)'
  environment = {k: v for k, v in os.environ.items()
                 if not k.startswith(('TPU_', 'JAX_PLATFORMS'))}
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=True,
                        env=environment)
  if done.stdout.strip() == b'cpu':
    assert done.stderr == b''


def test_a_closed_pipe_is_no_traceback(tmp_path):
  command = f'{sys.executable} -m jaxrl_pt.main --help | true'
  done = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, check=True,
                        env={**os.environ, 'PYTHONUNBUFFERED': '1'})
  assert b'Traceback' not in done.stderr


def test_doctor_examines_and_checks(tmp_path, capsys):
  assert cli.main(['doctor', '--json', '--workdir', str(tmp_path / 'not' / 'yet')]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['ok'] and [c['name'] for c in found['checks']] == [
      'training', 'cache', 'checkpoint', 'work directory']
  assert found['versions']['jax'] and found['disk']['free_bytes'] > 0 and found['devices']
  assert not (tmp_path / 'not').exists()
  text = doctor.text(found)
  assert 'All is well.' in text and 'FAIL' not in text


def test_doctor_says_that_a_directory_takes_no_files(tmp_path):
  check = doctor._check_writable(tmp_path / 'not' / 'yet')
  assert check['ok'] and list(tmp_path.iterdir()) == []
  check = doctor._check_writable(Path('/proc/nowhere'))  # Not even root may write there.
  assert not check['ok'] and 'choose another --workdir' in check['detail']


def test_doctor_says_what_is_broken(monkeypatch):
  def broken(*args: object, **kwargs: object) -> None:
    raise OSError('no such disk')
  monkeypatch.setattr(doctor, 'Checkpointer', broken)
  checks = {check['name']: check for check in doctor.self_check()}
  assert checks['cache']['ok'] and not checks['checkpoint']['ok']
  assert checks['checkpoint']['detail'] == 'OSError: no such disk'
