"""The adapter's scores and texts against a plain forward pass."""

from collections.abc import Callable
import json
from pathlib import Path
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='needs lm-eval (the eval extra)')

from lm_eval.api.instance import Instance

from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import harness
from jaxrl_pt.main import main
from jaxrl_pt.run.policy import Policy
from tests.evaluation.local_tasks import write_task

Logp = Callable[[list[int]], np.ndarray]


def make(policy: Policy, *, max_length: int = 24, begin: int | None = 0, **settings: Any
         ) -> harness.PolicyLM:
  return harness.PolicyLM(policy, harness.Reading(max_length, begin, 0),
                          **{'batch_size': 3, 'seed': 0, **settings})


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
  return [Instance(kind, {}, args, 0) for args in arguments]


def greedy(logp: Logp, context: list[int], number: int) -> list[int]:
  tokens = list(context)
  for _ in range(number):
    tokens.append(int(logp(tokens)[-1].argmax()))
  return tokens[len(context):]


def test_scores_are_the_models_own_whatever_the_batch(policy: Policy, logp: Logp):
  context = [0, 70, 75, 80]
  likeliest = greedy(logp, context, 3)
  last_differs = [*likeliest[:2], (likeliest[2] + 1) % 290]
  first_differs = [(likeliest[0] + 1) % 290, *greedy(logp, [*context, (likeliest[0] + 1) % 290], 1)]
  requests = [('', context, likeliest), ('', context, last_differs), ('', context, first_differs),
              ('', list(range(40, 70)), [80, 81]), ('', [0], list(range(30, 54)))]
  found = make(policy)._loglikelihood_tokens(requests)
  for (_, before, after), (value, is_greedy) in zip(requests, found, strict=True):
    tokens = (before + after)[-25:]
    places = range(len(tokens) - len(after), len(tokens))
    of = logp(tokens)
    assert value == pytest.approx(sum(of[i - 1, tokens[i]] for i in places), abs=1e-4)
    assert is_greedy == all(of[i - 1].argmax() == tokens[i] for i in places)
  assert [is_greedy for _, is_greedy in found[:3]] == [True, False, False]
  alone = make(policy, batch_size=1)._loglikelihood_tokens(requests)
  np.testing.assert_allclose([value for value, _ in alone], [value for value, _ in found],
                             atol=1e-4)


def test_a_continuation_without_tokens_or_too_long_is_refused(policy: Policy):
  for continuation in ([], list(range(30, 55))):
    with pytest.raises(UserError, match=f'{len(continuation)} tokens and the model takes 1 to 24'):
      make(policy)._loglikelihood_tokens([(('a', 'b'), [0], continuation)])


def test_texts_begin_once_with_the_token_that_begins_them(policy: Policy):
  ids = policy.session.data.tokenizer.encode('pale horse')
  assert make(policy).tok_encode('pale horse') == [0, *ids]
  assert make(policy).tok_encode('<s>pale horse') == [0, *ids]
  assert make(policy).tok_encode('pale horse', add_special_tokens=False) == ids
  assert make(policy, begin=None).tok_encode('pale horse') == ids
  assert make(policy).tok_encode('pale horse</s>') == [0, *ids, 1]


@pytest.mark.parametrize('add_bos, begin', [(None, 0), (True, 0), (False, None)])
def test_what_is_read_of_an_imported_model(policy: Policy, add_bos: bool | None,
                                           begin: int | None):
  reading = lambda **told: harness.reading_of(policy, add_bos=add_bos, **told)
  described = {'max_position_embeddings': 77, 'bos_token': '<s>'}
  assert reading(max_length=None, described=described) == harness.Reading(77, begin, 0)
  assert reading(max_length=5, described=described).max_length == 5
  assert reading(max_length=None, described={}).max_length == policy.session.run.data.seq_len


def test_a_text_is_scored_in_windows(policy: Policy, logp: Logp):
  model = make(policy, max_length=8, begin=None)
  text = 'A pale horse stood by the river.'
  ids = policy.session.data.tokenizer.encode(text)
  assert len(ids) > 16 and len(ids) % 8
  expected, scored = 0.0, 0
  while scored < len(ids):
    end = min(scored + 8, len(ids))
    window = ([0, *ids])[max(0, end - 8):end + 1]  # As many tokens before as the model can read.
    of = logp(window)
    expected += sum(of[i - 1, window[i]]
                    for i in range(len(window) - (end - scored), len(window)))
    scored = end
  (found, empty) = model.loglikelihood_rolling(asked('loglikelihood_rolling', (text,), ('',)))
  assert found == pytest.approx(expected, abs=1e-3) and empty == 0.0


def test_texts_end_before_the_first_stop_text(policy: Policy, logp: Logp):
  model, tokenizer = make(policy), policy.session.data.tokenizer
  context = 'Nobody asked the miller why the wheel had stopped.' * 2
  prompt = model.tok_encode(context)[-16:]  # 8 of 24 tokens are left for the text.
  written = greedy(logp, prompt, 8)
  whole = tokenizer.decode(written)
  assert 1 not in written and len(whole) >= 4
  late, early, long = whole[-1:], whole[1:3], whole[:1] + 'x' * 40
  texts = model.generate_until(asked('generate_until', *(
      (context, {'until': until, 'max_gen_toks': 8})
      for until in ([], [early], [late, early], early, [long], [*'0123456789', early]))))
  first = whole.split(early)[0]
  assert texts == [whole, first, min(first, whole.split(late)[0], key=len), first, whole, first]


@pytest.mark.slow
def test_noise_is_addressed_by_the_request(policy: Policy):
  settings = {'do_sample': True, 'temperature': 1.0, 'max_gen_toks': 12}
  requests = asked('generate_until', *[('A pale', settings)] * 3)
  texts = make(policy).generate_until(requests)
  assert len(set(texts)) == 3  # Repeats of one request differ.
  assert make(policy, batch_size=1).generate_until(requests) == texts
  assert make(policy, seed=1).generate_until(requests) != texts
  cold = asked('generate_until', *[('A pale', {'temperature': 0.0, 'max_gen_toks': 12})] * 2)
  assert len(set(make(policy).generate_until(cold))) == 1


@pytest.mark.parametrize('settings, message', [
    ({'num_beams': 4}, 'generation_kwargs.num_beams is not supported'),
    ({'max_gen_toks': 24}, 'max_gen_toks = 24 of 24 tokens leaves no room'),
    ({'do_sample': True, 'temperature': -1.0, 'max_gen_toks': 8}, 'temperature')])
def test_settings_that_cannot_be_kept_are_refused(policy: Policy, settings: dict, message: str):
  with pytest.raises(UserError, match=message):
    make(policy).generate_until(asked('generate_until', ('A', settings)))


def test_bits_per_byte_are_those_of_eval(policy: Policy, workdir: Path, tasks: Path,
                                         capsys: pytest.CaptureFixture[str], logp: Logp):
  """`eval` predicts each document's end too, and lm-eval does not."""
  rows, other = tasks / 'rows.jsonl', tasks / 'other.jsonl'
  other.write_text('{"text": "Something else, which is there to be trained on."}')
  write_task(tasks, 'rolling', 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
             'doc_to_target: text\nmetric_list: [{metric: bits_per_byte}, '
             '{metric: word_perplexity}]')
  assert main(['eval', '--workdir', str(workdir), '--tasks', 'rolling', '--include_path',
               str(tasks), '--add_bos_token', 'false', '--json']) == 0
  found = json.loads(capsys.readouterr().out)['results']['rolling']
  settings = ('cfg.Data.source = @cfg.Jsonl()', f"cfg.Jsonl.glob = '{other}'",
              f"cfg.Data.validation_glob = '{rows}'")
  assert main(['eval', '--workdir', str(workdir), '--json',
               *(x for setting in settings for x in ('--gin_bindings', setting))]) == 0
  own = json.loads(capsys.readouterr().out)
  texts = [json.loads(line)['text'] for line in rows.read_text().splitlines()]
  num_bytes = sum(len(text.encode()) for text in texts)
  assert own['num_bytes'] == num_bytes
  tokenizer = policy.session.data.tokenizer
  ends = -sum(logp([0, *tokenizer.encode(text)])[-1, 1] for text in texts)
  nats = own['bits_per_byte'] * num_bytes * np.log(2) - ends
  assert found['bits_per_byte,none'] * num_bytes * np.log(2) == pytest.approx(nats, rel=1e-5)
  num_words = sum(len(re.split(r'\s+', text)) for text in texts)
  assert found['word_perplexity,none'] == pytest.approx(np.exp(nats / num_words), rel=1e-4)
