"""/v1/rerank: what clients send, what the judge's verdicts make of it, and what is refused."""

from collections.abc import Iterator

import httpx2
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving import reranking
from jaxrl_pt.serving.comparing import Speaker
from jaxrl_pt.serving.fields import ApiError
from jaxrl_pt.serving.protocol import Service
from jaxrl_pt.verifiers.judge import FIRST, SECOND
from tests.serving.conftest import MODEL, SIZES, TOKENIZER, Running, running

JUDGE = Speaker(cfg.JudgePrompt('', '{query}\nA {first}\nB {second}\n?', cfg.MarkedVerdict()),
                TOKENIZER, num_tokens=4, is_direct=True)
SERVICE = Service('tiny', TOKENIZER, SIZES, MODEL.config.vocab_size, judge=JUDGE)
BODY = {'model': 'tiny', 'query': 'q', 'documents': ['b', {'text': 'a'}, 'c', 'a']}


@pytest.fixture
def judge_server(engine: Engine) -> Iterator[Running]:
  with running(engine, judge=JUDGE) as it:
    yield it


def ranked(body: dict, prefers_first: object) -> dict:
  """The answer to a body whose judge follows a rule (first, second) → bool."""
  ask = reranking.understand(body, SERVICE)
  texts = dict(zip(ask.text_of.tolist(), ask.documents, strict=True))
  says = {(c, k): FIRST if prefers_first(texts[a], texts[b]) else SECOND
          for c, (_, a, b) in enumerate(ask.games.tolist()) for k in range(ask.votes)}

  class Knowing(Speaker):
    def said(self, response):
      return '', says[response.place]

  class Said:
    tokens = np.zeros(3, np.int32)
    def __init__(self, place):
      self.place = place

  object.__setattr__(ask, 'speaker', Knowing(JUDGE.prompt, TOKENIZER))
  return ask.body({place: Said(place) for place in says})


def test_documents_are_ranked_by_who_beats_whom():
  found = ranked({**BODY, 'return_documents': True}, lambda first, second: first < second)
  assert [r['index'] for r in found['results']] == [1, 3, 0, 2]
  scores = [r['relevance_score'] for r in found['results']]
  assert scores[0] == scores[1] > scores[2] > scores[3] > 0 and scores[0] < 1
  assert [r['document'] for r in found['results']] == [{'text': x} for x in 'aabc']
  assert found['comparisons'] == 3 and found['usage']['completion_tokens'] == 9
  top = ranked({**BODY, 'top_n': 2, 'votes': 2}, lambda first, second: first > second)
  assert [r['index'] for r in top['results']] == [2, 0] and 'document' not in top['results'][0]


def test_a_bound_of_comparisons_is_met():
  body = {**BODY, 'documents': list('abcdefg'), 'max_comparisons': 6}
  assert ranked(body, lambda first, second: True)['comparisons'] == 6
  assert len(reranking.understand({**BODY, 'documents': ['x', 'x']}, SERVICE).requests) == 0


def test_a_preference_for_a_place_does_not_favour_who_is_listed_first():
  always_first = lambda first, second: True
  first = [ranked({**BODY, 'query': f'q{n}', 'documents': ['a', 'b']}, always_first)['results'][0]
           ['index'] for n in range(200)]
  assert 70 < sum(first) < 130  # Four standard errors.


@pytest.mark.parametrize('change, said', [
    ({'query': ''}, 'query'), ({'documents': []}, 'documents'),
    ({'documents': ['a', ' ']}, 'blank'),
    ({'documents': [{'title': 'a'}]}, 'documents'), ({'documents': 'a'}, 'documents'),
    ({'top_n': 0}, 'top_n'), ({'votes': 99}, 'votes'), ({'max_comparisons': 1}, 'from 2 to'),
    ({'return_documents': 1}, 'true or false'), ({'truncate_prompt_tokens': 9}, 'does not support'),
    ({'documents': list('abcdefg')}, '21 comparisons of 7 documents with 1 votes take 21'),
    ({'topn': 1}, 'Unknown field'), ({'model': 'huge'}, 'There is no model')])
def test_bad_bodies_are_one_sentence(change, said):
  with pytest.raises(ApiError, match=said) as raised:
    reranking.understand({**BODY, **change}, SERVICE)
  assert raised.value.status == (404 if 'model' in change else 400)


def test_a_model_that_cannot_write_verdicts_is_no_judge():
  with pytest.raises(ApiError, match='cannot write the verdicts'):
    reranking.understand(BODY, Service('tiny', TOKENIZER, SIZES, MODEL.config.vocab_size))


def test_over_http_the_scores_are_those_of_the_engines_verdicts(
    engine: Engine, judge_server: Running):
  url = f'{judge_server.url}/v1/rerank'
  body = {**BODY, 'votes': 2, 'return_documents': True}
  answer = httpx2.post(url, json=body, timeout=60)
  assert answer.status_code == 200
  found = answer.json()
  ask = reranking.understand(body, SERVICE)
  judge_server.wait_until_free()
  drawn = engine.run(ask.requests)
  expected = ask.body({(c, r.sample): r for c, group in enumerate(drawn) for r in group})
  assert found['results'] == expected['results'] and found['usage'] == expected['usage']
  assert {r['index'] for r in found['results']} == {0, 1, 2, 3}
  assert httpx2.post(url, json=body, timeout=60).json()['results'] == found['results']
  alone = httpx2.post(url, json={**BODY, 'documents': ['x']}, timeout=60).json()
  assert [r['relevance_score'] for r in alone['results']] == [0.5]
  long = httpx2.post(url, json={**BODY, 'query': 'q' * 90}, timeout=60)
  assert long.status_code == 400 and 'tokens' in long.json()['error']['message']
  assert httpx2.post(url, json={**BODY, 'top_n': 'x'}, timeout=60).status_code == 400
