"""An imported chat model: its template, end tokens and generation config go wherever it goes."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from jaxrl_pt import config as cfg
from jaxrl_pt import frontends, gin_bindings
from jaxrl_pt.data import chat_files, chat_sandbox
from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.main import main
from jaxrl_pt.run import start
from jaxrl_pt.run.policy import load_policy
from tests.interop.test_exchange import MODEL, draw, make_source, mistake

CHAT = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        '{% endif %}')
TOKENS = ('<|im_start|>', '<|im_end|>', '<|eom|>')


def _source(folder: Path) -> Path:
  source = make_source(folder)
  backend = tokenizers.Tokenizer.from_file(str(source / 'tokenizer.json'))
  backend.add_special_tokens(list(TOKENS))
  backend.save(str(source / 'tokenizer.json'))
  eom = backend.token_to_id('<|eom|>')
  (source / 'generation_config.json').write_text(json.dumps(
      {'eos_token_id': [1, eom], 'temperature': 0.6, 'top_k': 20, 'top_p': 0.95}))
  (source / 'tokenizer_config.json').write_text(json.dumps(
      {'eos_token': {'content': '</s>'}, 'bos_token': '<s>', 'chat_template': CHAT}))
  return source


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return _source(tmp_path_factory.mktemp('chat') / 'model')


def test_end_tokens_are_a_list(workdir: Path, source: Path, tmp_path: Path):
  tokenizer = load_policy(workdir).session.data.tokenizer
  special = tokenizer.special_tokens
  # Those of generation_config.json, and the one by which the template ends an answer.
  assert tokenizer.stop_ids == (1, special['<|eom|>'], special['<|im_end|>'])
  assert main(['export', '--workdir', str(workdir), str(tmp_path / 'out')]) == 0
  for name in ('generation_config.json', 'tokenizer_config.json'):
    assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()


def test_the_models_own_template_and_drawing_are_the_default(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  policy = load_policy(workdir)
  own = frontends._template(None, policy)
  hi = [{'role': 'user', 'content': 'hi'}]
  assert own.render(hi) == '<s><|im_start|>user\nhi<|im_end|>\n'
  (tmp_path / 'mine.jinja').write_text('{{ bos_token }}mine')
  given = chat_files.read_template(tmp_path / 'mine.jinja')
  assert frontends._template(given, policy).render(hi) == '<s>mine'
  assert main(['sample', '--workdir', str(workdir), '--prompt', 'the', '--num_tokens', '2',
               '--top_k', '3']) == 0
  assert 'temperature 0.6, top_p 0.95' in capsys.readouterr().err
  assert frontends._sampler(workdir, {'top_k': 3}, open('/dev/null', 'w')) == cfg.Sampler(
      0.6, top_k=3, top_p=0.95)


@pytest.mark.parametrize(('name', 'content', 'expected'), [
    ('generation_config.json', '{"eos_token_id": "x"}', "eos_token_id = 'x'"),
    ('generation_config.json', '[]', 'holds no JSON object'),
    ('generation_config.json', '{', 'is not JSON'),
    ('generation_config.json', '{"eos_token_id": 1, "top_p": 7}', 'asks for what cannot be'),
    ('chat_template.jinja', '{% for', 'is no Jinja2 template: line 1'),
    ('tokenizer_config.json', '{"eos_token": "</s>", "chat_template": [{"name": "a"}]}',
     'neither a text nor a list of named templates'),
    ('chat_template.jinja', '{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}'
     '{% endfor %}', 'was stopped: it computes for more than 0.1 seconds; mend the template'),
    ('chat_template.jinja', '{{ bos_token.__class__ }}', 'reads what it must not'),
    ('chat_template.jinja', '{{ raise_exception("no " + messages[0].role) }}',
     'refuses these messages: no user; mend the template'),
    ('chat_template.jinja', '{{ messages[7].content }}', 'refuses these messages'),
    ('tokenizer_config.json', '{"eos_token": "</s>", "chat_template": [{"name": "default", '
     '"template": "a"}, {"name": "tool_use", "template": "{{ tools[1].a.b }}"}]}',
     'refuses these messages')])
def test_a_damaged_file_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch, name: str,
                                               content: str, expected: str):
  monkeypatch.setattr(chat_sandbox, 'MOST_SECONDS', 0.1)
  source = _source(tmp_path / 'model')
  (source / name).write_text(content)
  told = mistake(capsys, 'import', str(source), '--workdir', str(tmp_path / 'run'))
  assert expected in told and name in told
  assert not (tmp_path / 'run').exists()


def test_a_template_that_wants_a_system_message_is_imported():
  asks = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}a"
  chat_files.check(ChatTemplate(asks, asks), ByteTokenizer())


def test_named_templates(tmp_path: Path):
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': [
      {'name': 'default', 'template': 'plain'}, {'name': 'tool_use', 'template': 'tools'}]}))
  own = chat_files.read(tmp_path)
  hi = [{'role': 'user', 'content': 'hi'}]
  assert own is not None and own.render(hi) == 'plain' and own.render(hi, [{}]) == 'tools'
  (tmp_path / 'chat_template.jinja').write_text('file')
  other = chat_files.read(tmp_path)
  assert other is not None and other.render(hi) == 'file'


# --- Reinforced -----------------------------------------------------------------------

_RL = '''
cfg.Run.seed = 1
cfg.Run.objective = @cfg.RL()
cfg.RL.problems = @cfg.Problems()
cfg.Problems.source = @cfg.Arithmetic()
cfg.Problems.is_chat = True
cfg.Problems.held_out = 0.0
cfg.Arithmetic.size = 24
cfg.Arithmetic.num_terms = 2
cfg.Arithmetic.num_digits = 1
cfg.RL.verifier = @cfg.AnswerMatch()
cfg.RL.rollouts = @cfg.Rollouts()
cfg.Rollouts.num_prompts = 2
cfg.Rollouts.group_size = 4
cfg.Rollouts.prompt_len = 64
cfg.Rollouts.response_tokens = 6
cfg.Run.optimizer = @cfg.AdamW()
cfg.AdamW.schedule = @cfg.ConstantRate()
cfg.ConstantRate.learning_rate = 0.001
cfg.Run.train = @cfg.Train()
cfg.Train.num_steps = 1
'''


def test_a_run_starts_from_an_imported_model(workdir: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]):
  path, ours = tmp_path / 'rl.gin', tmp_path / 'rl'
  path.write_text(_RL)
  args = ['train', '--gin_file', str(path), '--start_from', str(workdir), '--workdir', str(ours)]
  assert main(args) == 0, capsys.readouterr().err
  trained = load_policy(ours)
  assert trained.step == 1 and trained.model.config == MODEL
  tokenizer = trained.session.data.tokenizer
  assert tokenizer.stop_ids == load_policy(workdir).session.data.tokenizer.stop_ids
  own = frontends._template(None, trained)
  assert own.render([{'role': 'user', 'content': 'hi'}]).startswith('<s><|im_start|>user\nhi')
  changed: Any = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained.params, draw(MODEL))
  assert max(jax.tree.leaves(changed)) < 0.01  # One step from the imported parameters.


def test_what_a_run_takes_of_a_policy(workdir: Path, tmp_path: Path):
  path = tmp_path / 'rl.gin'
  path.write_text(_RL + "include 'gin/model/tiny.gin'\ncfg.Model.param_dtype = 'bfloat16'\n")
  taken = start.bindings(workdir, [str(path)], [])
  run, _ = gin_bindings.load([str(path)], taken)
  # All but the type of the run's own copy; the files' own model gives way.
  assert run.model == MODEL.__class__(**{**vars(MODEL), 'param_dtype': 'bfloat16'})
  assert run.data.source == cfg.PythonStdlib() and run.objective.start_from == str(workdir)
  path.write_text(path.read_text() + 'cfg.Run.data = @cfg.Data()\ncfg.Data.seq_len = 7\n'
                  'cfg.Data.source = @cfg.TextFiles()\ncfg.TextFiles.glob = "x"\n'
                  'cfg.Data.tokenizer = @cfg.Bytes()\n')
  run, _ = gin_bindings.load([str(path)], start.bindings(workdir, [str(path)], []))
  assert run.data.seq_len == 7 and run.data.source == cfg.TextFiles('x')
  assert isinstance(run.data.tokenizer, cfg.HuggingFaceTokenizer)


def test_start_from_where_nothing_is_or_starts(workdir: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]):
  path = tmp_path / 'rl.gin'
  path.write_text(_RL)
  train = ('train', '--workdir', str(tmp_path / 'x'), '--start_from')
  told = mistake(capsys, *train, str(tmp_path), '--gin_file', str(path))
  assert 'holds no config.gin: give the work directory of a trained or imported' in told
  told = mistake(capsys, *train, str(workdir), '--gin_file', 'gin/run/pretrain_tiny.gin')
  assert 'needs a run that starts from a policy, and Run.objective is @cfg.NextToken()' in told
