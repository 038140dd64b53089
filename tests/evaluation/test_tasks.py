"""`eval --tasks` as a user calls it: what it prints and writes, and what it refuses to run."""

from collections.abc import Callable
import json
from pathlib import Path
import re
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='needs lm-eval (the eval extra)')

from jaxrl_pt.main import main
from jaxrl_pt.run.policy import Policy
from tests.evaluation.local_tasks import write_task

CHOICES = 'output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n'
METRIC = 'metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'


def run(workdir: Path, tasks: Path, names: str, *args: str) -> int:
  return main(['eval', '--workdir', str(workdir), '--tasks', names, '--include_path', str(tasks),
               *args])


def mistake(capsys: pytest.CaptureFixture[str], code: int) -> str:
  out, err = capsys.readouterr()
  said = [line for line in err.splitlines() if line.startswith('jaxrl-pt: ')]
  assert code == 2 and out == '' and len(said) == 1 and 'Traceback' not in err, err
  return said[0]


def test_a_table_is_printed_and_results_are_written(workdir: Path, tasks: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]):
  output = tmp_path / 'deep' / 'results.json'
  assert run(workdir, tasks, 'choices', '--num_fewshot', '1', '--limit', '3', '--output',
             str(output)) == 0
  table = capsys.readouterr().out
  assert '|choices|' in table and '|acc' in table
  found = json.loads(output.read_text())
  assert found['command'].startswith('jaxrl-pt eval --workdir ') and '--limit 3' in found['command']
  assert found['n-shot'] == {'choices': 1} and found['limit'] == 3
  assert found['n-samples']['choices'] == {'original': 4, 'effective': 3}
  assert {'lm_eval', 'jax', 'jaxrl_pt'} <= set(found['versions_of'])
  assert f'{found["results"]["choices"]["acc,none"]:.4f}' in table


def test_a_group_and_wikitext_as_the_docs_have_it(
    workdir: Path, tasks: Path, policy: Policy, logp: Callable[[list[int]], np.ndarray],
    capsys: pytest.CaptureFixture[str]):
  """The task of docs/evaluation.md: text is detokenised, words and bytes are those before that."""
  pages = [' = A pale horse = \n \n It stood by the " river " @-@ side , 1 @.@ 5 m high . \n',
           ' = A mill = \n \n Nobody asked ( as was said ) why . \n']
  read = [' = A pale horse =\n\nIt stood by the "river"-side, 1.5 m high.\n',
          ' = A mill =\n\nNobody asked (as was said) why.\n']
  (tasks / 'pages.jsonl').write_text(''.join(json.dumps({'page': page}) + '\n' for page in pages))
  docs = (Path(__file__).parents[2] / 'docs' / 'evaluation.md').read_text()
  yaml = textwrap.dedent(re.search(r'^    task: wikitext2\n(    .*\n)+', docs, re.M)[0])
  (tasks / 'wikitext2.yaml').write_text(yaml.replace('pages.jsonl', f'{tasks}/pages.jsonl'))
  (tasks / 'both.yaml').write_text('group: both\ntask: [wikitext2, choices]\n')
  assert run(workdir, tasks, 'both', '--max_length', '16', '--add_bos_token', 'false',
             '--json') == 0
  found = json.loads(capsys.readouterr().out)['results']
  assert {'wikitext2', 'choices'} <= set(found)
  total = 0.0
  for text in read:
    ids = policy.session.data.tokenizer.encode(text)
    assert len(ids) > 16 and len(ids) % 16
    for low in range(0, len(ids), 16):
      # The last window is filled up with earlier tokens, which are not predicted again.
      high = min(low + 16, len(ids))
      window = [0, *ids][max(0, high - 16):high + 1]
      chosen = logp(window[:-1])[np.arange(len(window) - 1), window[1:]]
      total += chosen[len(chosen) - (high - low):].sum()
  words, size = (sum(len(split(page)) for page in pages)
                 for split in (lambda page: re.split(r'\s+', page), str.encode))
  expected = {'word_perplexity': np.exp(-total / words), 'byte_perplexity': np.exp(-total / size),
              'bits_per_byte': -total / size / np.log(2)}
  for name, value in expected.items():
    assert found['wikitext2'][f'{name},none'] == pytest.approx(value, rel=1e-4), name


def test_a_chat_template_goes_round_prompts(workdir: Path, tasks: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]):
  template = tmp_path / 'chat.jinja'
  template.write_text('{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}A:')
  given = []
  for args in ((), ('--apply_chat_template',),
               ('--apply_chat_template', '--template', str(template))):
    assert run(workdir, tasks, 'choices', '--json', *args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['chat_template'] == bool(args)
    given.append(found['results']['choices'])
  assert len({json.dumps(found) for found in given}) > 1


BAD = {
    'own_function': (f'{CHOICES}{METRIC}doc_to_text: !function code.text', 'code.text'),
    'function_in_a_list': (f'{CHOICES}doc_to_text: a\nmetric_list: [{{metric: !function code.m}}]',
                           'code.m'),
    'function_of_the_library': (f'{CHOICES}{METRIC}doc_to_text: !function os.system', 'os.system'),
    'python_object': (f'{CHOICES}{METRIC}doc_to_text: !!python/name:os.system', 'no readable task'),
    'metric_of_a_script': (f'{CHOICES}doc_to_text: a\nmetric_list: [{{metric: some/metric}}]',
                           'some/metric'),
    'hf_evaluate': (f'{CHOICES}doc_to_text: a\nmetric_list: [{{metric: acc, hf_evaluate: true}}]',
                    'hf_evaluate'),
    'unsafe': (f'{CHOICES}{METRIC}doc_to_text: a\nunsafe_code: true', 'unsafe_code'),
    'class': (f'{CHOICES}{METRIC}doc_to_text: a\nclass: Other', 'sets class'),
    'repository': (f'{CHOICES}{METRIC}doc_to_text: a\ndataset_path: cais/mmlu', 'cais/mmlu'),
    'pickles': (f'{CHOICES}{METRIC}doc_to_text: a\ndataset_path: pandas', "'pandas'"),
    'address': (f'{CHOICES}{METRIC}doc_to_text: a\n'
                'dataset_kwargs: {data_files: {test: "https://example.org/rows.jsonl"}}',
                'https://example.org'),
    'trust': (f'{CHOICES}{METRIC}doc_to_text: a\ndataset_kwargs: {{trust_remote_code: true}}',
              'trust_remote_code'),
    'included': ('include: other.yaml', 'other.yaml'),
    'missing_include': ('include: nowhere.yaml', 'nowhere.yaml'),
    'missing_files': (f'{CHOICES}{METRIC}doc_to_text: a\n'
                      'dataset_kwargs: {data_files: {test: nowhere/rows.jsonl}}', 'nowhere'),
    'unknown_column': (f'{CHOICES}{METRIC}doc_to_text: "{{{{nothing}}}}"', 'nothing'),
    'escape': (CHOICES + METRIC
               + "doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"", 'unsafe'),
    'split': (f'{CHOICES}{METRIC}doc_to_text: a\ntest_split: train', 'train'),
    'setting': ('output_type: generate_until\ndoc_to_text: question\ndoc_to_target: text\n'
                'generation_kwargs: {num_beams: 2}\nmetric_list: [{metric: exact_match}]',
                'num_beams')}


@pytest.mark.parametrize('name', BAD)
def test_what_a_task_must_not_do_is_said_in_one_sentence(
    workdir: Path, tasks: Path, capsys: pytest.CaptureFixture[str], name: str):
  settings, words = BAD[name]
  (tasks / 'code.py').write_text('import pathlib\npathlib.Path(__file__).with_name("ran").touch()\n'
                                 'text = m = lambda doc: "a"\n')
  write_task(tasks, 'bad', settings)
  (tasks / 'other.yaml').write_text(f'{CHOICES}{METRIC}doc_to_text: !function code.text\n')
  (tasks / 'group.yaml').write_text('group: some\ntask: [choices, {group: inner, task: [bad]}]\n')
  code = run(workdir, tasks, 'some' if name == 'own_function' else 'bad')
  assert words in mistake(capsys, code)
  assert not (tasks / 'ran').exists()


def test_no_tasks_no_folder_no_extra(workdir: Path, tasks: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]):
  assert 'no folder' in mistake(capsys, run(workdir, tmp_path / 'none', 'choices'))
  assert 'nothing without --tasks' in mistake(
      capsys, main(['eval', '--workdir', str(workdir), '--limit', '3']))
  assert 'holds no config.gin' in mistake(capsys, run(tmp_path / 'none', tasks, 'choices'))
  assert 'leave them out' in mistake(capsys, run(workdir, tasks, 'choices', '--gin_bindings', 'a'))
  assert 'names none' in mistake(capsys, run(workdir, tasks, ','))
  assert 'is a folder' in mistake(capsys, run(workdir, tasks, 'choices', '--output', '/'))
  monkeypatch.delitem(sys.modules, 'jaxrl_pt.evaluation.benchmark')
  monkeypatch.delattr('jaxrl_pt.evaluation.benchmark')
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  assert "pip install 'jaxrl_pt[eval]'" in mistake(capsys, run(workdir, tasks, 'choices'))


@pytest.mark.slow
def test_an_unknown_task(workdir: Path, tasks: Path, capsys: pytest.CaptureFixture[str]):
  assert "did you mean 'choices'" in mistake(capsys, run(workdir, tasks, 'choicez'))
