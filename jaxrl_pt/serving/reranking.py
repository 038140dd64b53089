"""/v1/rerank: documents ranked for a query by the model as judge, two at a time.

The fields are those that clients of Cohere, Jina and vLLM send. The documents meet in a round
robin, or in as many of its games as `max_comparisons` allows, each of which has `votes` verdicts;
what Bradley–Terry ratings make of them is the `relevance_score` (`tournament.win_rates`). Equal
documents are compared once and score alike. The games and the noise of the verdicts are functions
of the texts, so that a request which comes again gets the same answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
import secrets
from typing import Any

import numpy as np

from jaxrl_pt.sampling.engine import Request, Response
from jaxrl_pt.serving.comparing import Shown, Speaker, distinct
from jaxrl_pt.serving.fields import ApiError, Fields, is_text
from jaxrl_pt.serving.protocol import Service, check_model
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.judge import NONE

# Fields that clients send for their own records or to steer what a judge does not have.
_IGNORED = ('user', 'priority', 'max_chunks_per_doc', 'input_type')
# Fields that other servers support and this one does not, with the values that ask for nothing.
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ('rank_fields', ([], ['text'])), ('max_tokens_per_doc', ()), ('truncate_prompt_tokens', ()),
    ('overlap_tokens', ()), ('truncation', (True,)))


@dataclass(frozen=True)
class Rerank:
  """What a body of /v1/rerank asks for.

  documents: as they came, one after the other.
  text_of: i64[n] the number of each document's text among the m distinct ones.
  games: i64[C, 3], comparisons of distinct texts.
  requests: of the engine, one for each game.
  """

  name: str
  speaker: Speaker
  documents: tuple[str, ...]
  text_of: np.ndarray
  games: np.ndarray
  requests: tuple[Request, ...]
  votes: int
  top_n: int
  has_documents: bool

  @property
  def num_verdicts(self) -> int:
    """The responses that the engine draws."""
    return len(self.games) * self.votes

  def body(self, responses: Mapping[tuple[int, int], Response]) -> dict[str, Any]:
    """The answer.

    Args:
      responses: by the numbers of the game and of the verdict; all of them.
    """
    votes = np.full((len(self.games), self.votes), NONE, np.int8)
    for place, response in responses.items():
      votes[place] = self.speaker.said(response)[1]
    end = tournament.standing(int(self.text_of.max()) + 1, self.games, votes)
    scores = tournament.win_rates(np.asarray(end.ratings)[self.text_of])
    ranked = np.argsort(-scores.round(9), kind='stable')[:self.top_n].tolist()
    drawn = sum(len(response.tokens) for response in responses.values())
    read = sum(len(request.prompt) for request in self.requests)
    results = [{'index': i, 'relevance_score': float(scores[i]),
                **({'document': {'text': self.documents[i]}} if self.has_documents else {})}
               for i in ranked]
    return {'id': f'rerank-{secrets.token_hex(12)}', 'object': 'rerank', 'model': self.name,
            'results': results,
            'comparisons': len(self.games), 'no_verdict': end.num_unparsed,
            'usage': {'prompt_tokens': read, 'completion_tokens': drawn,
                      'total_tokens': read + drawn}}


def understand(body: dict[str, Any], service: Service) -> Rerank:
  """What a body asks for.

  Raises:
    ApiError: 400 for a body that cannot be answered, 404 for another model.
  """
  fields = Fields(body)
  check_model(fields, service)
  speaker = service.judge
  if speaker is None:
    raise ApiError(400, "This model's tokenizer cannot write the verdicts of a judge: send the "
                   'request to a server of another model.')
  query = fields.need('query', 'a text', is_text)
  given = fields.need('documents', 'a list of at least one text, or of objects {"text": "…"}, none '
                      'of them blank', _is_documents)
  documents = tuple(one if isinstance(one, str) else one['text'] for one in given)
  texts = distinct(query, documents)
  top_n = fields.integer('top_n', len(documents), 1, 2**31 - 1)
  has_documents = fields.flag('return_documents')
  votes = fields.integer('votes', 1, 1, service.max_samples)
  whole = tournament.num_comparisons('round_robin', len(texts))
  num_games = min(whole, fields.integer(
      'max_comparisons', max(whole, 1), max(1, len(texts) - 1), 2**31 - 1))
  for name, harmless in _UNSUPPORTED:
    fields.refuse(name, *harmless)
  fields.ignore(_IGNORED)
  fields.finish()
  most = service.engine.queue
  if num_games * votes > most:
    raise ApiError(400, f'{num_games} comparisons of {len(texts)} documents with {votes} votes '
                   f'take {num_games * votes} verdicts, and at most {most} are drawn at once: send '
                   'fewer documents, or lower max_comparisons or votes.', param='documents')
  games = tournament.drawn_up(0, len(texts), tournament.HALVES.seed, num_games)
  shown = [Shown(query, texts[first], texts[second]) for _, first, second in games.tolist()]
  return Rerank(
      service.name, speaker, documents, np.array([texts.index(text) for text in documents]), games,
      tuple(speaker.request(one, speaker.tokens(one), 0, votes) for one in shown), votes, top_n,
      has_documents)


def _is_documents(value: Any) -> bool:
  is_one = lambda x: is_text(x) and bool(x.strip())
  return isinstance(value, list) and bool(value) and all(
      is_one(x.get('text')) if isinstance(x, dict) and set(x) == {'text'} else is_one(x)
      for x in value)
