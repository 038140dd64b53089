"""A policy as a judge: which of two responses to a query is better, asked of the engine.

    (query, first, second) → prompt → K responses of the engine → K verdicts

All comparisons that are known are one batch. Their prompts share pages: those of one query its
tokens and the system message's, those of one first response its tokens too (`JudgePrompt.template`
has them in this order), and the K votes of a comparison its whole prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import chat, chat_files, judge_prompts
from jaxrl_pt.run import places, samples
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving.comparing import Shown, Speaker
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.judge import NONE

# Queries whose comparisons are asked by turns, so that what a prompt shares with the one before it
# of the same query has been computed by the time it is admitted.
_WAVE = 8


@dataclass(frozen=True)
class Judged:
  """What a judge said of C comparisons, K times each.

  votes: i8[C, K] of FIRST, SECOND and NONE.
  num_tokens: i32[C, K] tokens of the responses.
  responses: their texts, [C][K].
  too_long: bool[C] whether a prompt was longer than the engine takes, so that it has no verdicts.
  """

  votes: np.ndarray
  num_tokens: np.ndarray
  responses: list[list[str]]
  too_long: np.ndarray


def of_policy(policy: Policy, prompt: cfg.JudgePrompt | None, sampler: cfg.Sampler,
              num_tokens: int, is_direct: bool) -> Speaker:
  """How a policy is asked: as it was trained, where it was trained as a judge.

  Args:
    policy: the judge.
    prompt: the texts of a prompt; None for those of its training, or for the default ones.
    sampler, num_tokens, is_direct: as in `Speaker`.

  Raises:
    UserError: the policy's tokenizer cannot write the verdicts.
  """
  session = policy.session
  tokenizer = session.data.tokenizer
  method, learned = session.run.objective, session.run.data.source
  folder = places.carried(session.run, session.workdir)
  own = None if folder is None else chat_files.read(folder)
  if isinstance(method, cfg.RL) and isinstance(method.problems.source, cfg.JudgePairs):
    prompt = prompt or method.problems.source.prompt
    own = chat_files.of_model(folder, tokenizer) if method.problems.is_chat else None
  elif isinstance(learned, cfg.Demonstrations) and isinstance(learned.source, cfg.JudgePairs):
    prompt, own = prompt or learned.source.prompt, None
  prompt = prompt or cfg.JudgePrompt()
  judge_prompts.check_tokenizer(prompt, tokenizer)
  template = None if own is None else chat.for_training(own)
  return Speaker(prompt, tokenizer, template, sampler, num_tokens, is_direct)


def engine_config(speaker: Speaker, prompt_len: int, slots: int, kv: cfg.KV = 'model'
                  ) -> cfg.Engine:
  """The sizes of an engine for a judge.

  Args:
    speaker: how it is asked.
    prompt_len: the most tokens of a prompt.
    slots: responses that are decoded at once.
    kv: how keys and values are stored.
  """
  return engine_sizes(prompt_len, speaker.num_tokens, slots, kv)


def engine_sizes(prompt_len: int, num_tokens: int, slots: int, kv: cfg.KV = 'model') -> cfg.Engine:
  """`engine_config` for verdicts of at most `num_tokens` tokens, whoever is asked."""
  return cfg.Engine(
      slots=slots, queue=4 * slots, prompt_len=prompt_len, response_len=num_tokens,
      prefill_chunk=min(prompt_len, 128), prefill_rows=4, kv=kv, top_logprobs=0, constrained=1)


def longest(speaker: Speaker, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> int:
  """A number of tokens that no comparison of two candidates to a query goes beyond.

  Joined texts may have a few tokens more than their parts, which the bound leaves room for.
  """
  most = 0
  for query, texts in zip(queries, candidates, strict=True):
    by_length = sorted(texts, key=lambda text: len(speaker.tokenizer.encode(text)))[-2:]
    if len(by_length) == 2:
      most = max(most, len(speaker.tokens(Shown(query, *by_length))) + 8)
  return most


class EngineJudge:
  """Asks an engine. Final."""

  def __init__(self, engine: Engine, speaker: Speaker) -> None:
    """A judge by an engine whose sizes are at least those of `engine_config`."""
    self.engine, self.speaker = engine, speaker

  def ask(self, comparisons: Sequence[Shown], num_votes: int) -> Judged:
    """Draws `num_votes` verdicts of each comparison, all in one batch.

    A comparison's texts address its noise, so that its verdicts do not depend on what else is
    asked. A prompt that is longer than the engine takes gets no verdicts.

    Args:
      comparisons: C of them; those of one query best follow one another.
      num_votes: K.
    """
    speaker, config = self.speaker, self.engine.config
    prompts = [speaker.tokens(shown) for shown in comparisons]
    too_long = np.array([len(tokens) > config.prompt_len for tokens in prompts], bool)
    order = [c for c in in_waves([shown.query for shown in comparisons]) if not too_long[c]]
    step = config.queue // num_votes * num_votes or config.queue
    requests = [speaker.request(comparisons[c], prompts[c], begin, size)
                for c in order for begin, size in _parts(num_votes, step)]
    votes = np.full((len(prompts), num_votes), NONE, np.int8)
    counts = np.zeros(votes.shape, np.int32)
    texts = [[''] * num_votes for _ in prompts]
    owners = [c for c in order for _ in _parts(num_votes, step)]
    for c, group in zip(owners, self.engine.run(requests), strict=True):
      for response in group:
        texts[c][response.sample], votes[c, response.sample] = speaker.said(response)
        counts[c, response.sample] = len(response.tokens)
    return Judged(votes, counts, texts, too_long)

  def of_candidates(self, queries: Sequence[str], candidates: Sequence[Sequence[str]],
                    num_votes: int) -> tournament.Judge:
    """The judge of tournaments among candidates, with `num_votes` votes a comparison."""
    def judge(comparisons_C3: np.ndarray) -> np.ndarray:
      return self.ask([Shown(queries[q], candidates[q][a], candidates[q][b])
                       for q, a, b in comparisons_C3.tolist()], num_votes).votes

    return judge


def _parts(num_votes: int, most: int) -> list[tuple[int, int]]:
  """(first sample, number) of the requests for the votes of a comparison."""
  return [(begin, min(most, num_votes - begin)) for begin in range(0, num_votes, most)]


def in_waves(queries: Sequence[str]) -> list[int]:
  """The order in which comparisons are asked: those of a few queries at a time take turns.

  So neither do all wait for one query's prompt, nor is a query's prompt given up before its last
  comparison.
  """
  numbers: dict[str, int] = {}
  seen: dict[str, int] = {}
  keys = []
  for query in queries:
    number = numbers.setdefault(query, len(numbers))
    rank = seen[query] = seen.get(query, -1) + 1
    keys.append((number // _WAVE, rank, number))
  return sorted(range(len(keys)), key=keys.__getitem__)


def make(policy: Policy, speaker: Speaker, config: cfg.Engine, seed: int) -> EngineJudge:
  """The judge by a policy, with an engine of its own."""
  return EngineJudge(samples.make_engine(policy, config, seed=seed), speaker)
