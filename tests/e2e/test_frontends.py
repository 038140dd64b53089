"""sample, chat and serve as real processes on a trained model."""

from collections.abc import Iterator
import contextlib
import json
import re
import signal
import subprocess
import sys
import time

import openai
import pytest

from jaxrl_pt.main import main
from tests.e2e.conftest import Job

TRAILER = re.compile(r'\n--- (\d+) tokens, log-probability (-?\d+\.\d\d) nats\n')


def command(job: Job, name: str, *flags: str) -> list[str]:
  return [sys.executable, '-m', 'jaxrl_pt.main', name, '--workdir', str(job.workdir), *flags]


def output(job: Job, name: str, *flags: str, stdin: str = '') -> str:
  done = subprocess.run(command(job, name, *flags), env=job.environment, input=stdin, text=True,
                        capture_output=True, timeout=120, check=False)
  assert done.returncode == 0 and done.stderr == '', done.stderr
  return done.stdout


def test_sample_streams_what_json_says(pretrained: Job, tmp_path, capsys):
  (tmp_path / 'prompts.jsonl').write_text('{"prompt": "the model "}\n{"prompt": ""}\n')
  flags = ('--prompt_file', str(tmp_path / 'prompts.jsonl'), '--num_samples', '3',
           '--num_tokens', '24', '--temperature', '0.7', '--seed', '5', '--stop', 'er')
  assert main(['sample', '--workdir', str(pretrained.workdir), *flags, '--json']) == 0
  samples = json.loads(capsys.readouterr().out)
  assert [s['prompt'] for s in samples] == ['the model '] * 3 + [''] * 3
  assert len({s['text'] for s in samples}) > 1 and not any('er' in s['text'] for s in samples)
  *shown, last = re.split(r'(?<=nats\n)', output(pretrained, 'sample', *flags))
  assert shown == [f'{s["prompt"]}{s["text"]}\n--- {s["num_tokens"]} tokens, log-probability '
                   f'{s["logp"]:.2f} nats\n' for s in samples]
  total = sum(s['num_tokens'] for s in samples)
  assert re.fullmatch(rf'=== {total} tokens in \d+\.\d\d s: [\d,]+ tokens/s\n', last)


@pytest.mark.slow
def test_sparse_sampling_of_every_block_is_dense(pretrained: Job, capsys):
  flags = ('sample', '--workdir', str(pretrained.workdir), '--prompt', 'the model ', '--prompt', '',
           '--num_samples', '2', '--num_tokens', '24', '--seed', '5', '--json')
  assert main(flags) == 0
  dense = json.loads(capsys.readouterr().out)
  # 16 blocks of one token: a share below 1 would leave some of them out.
  assert main([*flags, '--resa', '--resa_block', '1', '--resa_share', '1']) == 0
  sparse = json.loads(capsys.readouterr().out)
  assert [s['text'] for s in sparse] == [s['text'] for s in dense]
  assert [s['num_tokens'] for s in sparse] == [s['num_tokens'] for s in dense]
  assert main([*flags, '--resa', '--resa_block', '1', '--resa_share', '0.1']) == 0
  assert json.loads(capsys.readouterr().out) != sparse
  # Whatever is drafted, what is kept is what dense decoding draws.
  assert main([*flags[:-1], '--resa', '--resa_block', '1', '--resa_share', '0.1',
               '--resa_drafts', '3']) == 0
  *shown, last = re.split(r'(?<=nats\n)', capsys.readouterr().out)
  assert [TRAILER.split(text)[0] for text in shown] == [s['prompt'] + s['text'] for s in dense]
  assert re.search(r'tokens/s\n=== of \d+ drafted tokens \d+ were kept \(\d+%\), in \d+', last)


def test_chat_over_a_pipe(pretrained: Job):
  said = output(pretrained, 'chat', '--temperature', '0', '--num_tokens', '20', '--prompt_len',
                '64', stdin='hello\n/new\nhello\n/quit\n')
  first, second = said.split('(a new conversation)\n')
  assert len(first.splitlines()) >= 2 and first.count('tokens/s)') == 1
  drop = lambda text: re.sub(r'\(\d+ tokens.*\)', '', text)
  assert drop(first) == drop(second)


@contextlib.contextmanager
def serving(job: Job, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
  process = subprocess.Popen(command(job, 'serve', '--port', '0', *flags), env=job.environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.fullmatch(r'Serving (\w+), step \d+, at (http://127\.0\.0\.1:\d+/v1)\n', line)
    assert found, line + process.stderr.read()
    assert found[1] == job.workdir.name
    yield process, found[2]
  finally:
    process.kill()
    process.wait()


@pytest.mark.parametrize('number', [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_ends_its_streams_and_then_itself(pretrained: Job, tmp_path, number: signal.Signals):
  (tmp_path / 'token').write_text('abc\n')
  flags = ('--token_file', str(tmp_path / 'token'), '--slots', '2', '--queue', '4',
           '--prompt_len', '64', '--response_len', '2000')
  with serving(pretrained, *flags) as (process, url):
    client = openai.OpenAI(base_url=url, api_key='abc', max_retries=0)
    with pytest.raises(openai.AuthenticationError):
      openai.OpenAI(base_url=url, api_key='abd', max_retries=0).models.list()
    # No end of text, so that the answer is long enough to be under way.
    stream = client.completions.create(model=pretrained.workdir.name, prompt='the ', seed=1,
                                       max_tokens=2000, stream=True)
    chunks = [next(iter(stream))]
    process.send_signal(number)
    start = time.monotonic()
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason in ('length', 'stop')
    assert process.wait(timeout=30) == 0
    assert time.monotonic() - start < 30
    assert process.stderr is not None and process.stderr.read() == ''
