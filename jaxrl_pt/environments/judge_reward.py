"""The judge as reward: a second policy compares the responses of each group, two at a time.

    texts of a group → tournament → ratings → rewards; true accuracy beside them, for the log alone

The judge lies on the run's mesh like the policy. Before it is asked its parameters are handed over
to an engine for each data shard by the weight sync that the policy's sampler has, stamped with the
step of its checkpoint; afterwards the engines let go of them. A verdict's noise is addressed by the
texts that are compared and the engines begin each batch with an empty cache, so that a run which
was stopped and goes on gets the same rewards.

Rewards of a group cannot rise together, since they compare its responses. What can is how often
the policy's responses to held-out problems beat those of the policy that the run started from:
`validation/reward` is that win rate, ½ before the first step. Both are asked in both orders.

Source: Reward Reasoning Model, 2505.14674. Departs from the paper in the scale of the rewards
(`cfg.JudgeReward.scale`), which it does not give.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.checksum import checksum
from jaxrl_pt.environments import problems as environment
from jaxrl_pt.environments.base import Task
from jaxrl_pt.environments.judge_engines import Ask, JudgeEngines, load_judge
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.serving import comparing
from jaxrl_pt.serving.comparing import Shown
from jaxrl_pt.types import Params, Prompts, RolloutBatch, Verdict
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.base import DeviceVerifier, PendingVerdict
from jaxrl_pt.verifiers.host import PoolVerifier
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND

# A context in which a judge can be asked.
Asking = Callable[[], contextlib.AbstractContextManager[Ask]]


class Rated(NamedTuple):
  """What a judge made of N groups of G responses; f32[N, G] each.

  valid: 0 in groups of which the judge said nothing.
  no_verdict: the share of the group's verdicts that are missing.
  comparisons: of the group.
  """

  reward: np.ndarray
  valid: np.ndarray
  no_verdict: np.ndarray
  comparisons: np.ndarray


def rate(queries: Sequence[str], texts: Sequence[Sequence[str]], ask: Ask,
         settings: cfg.JudgeReward, seed: int) -> Rated:
  """The rewards of groups by a tournament of each.

  Equal texts (up to space round them) are one candidate and earn the same. Who meets whom, and in
  which place, follows from the texts and not from the order in which they came. A blank text loses
  against every other without being asked about. A comparison without a verdict is half a win for
  each in a round robin, and a coin in a knockout.

  Args:
    queries: what each of the N groups answers.
    texts: [N][G] the responses.
    ask: the judge.
    settings: the tournament and the scale.
    seed: of brackets, orders and coins.
  """
  entrants = [comparing.distinct(query, (text.strip() for text in group))
              for query, group in zip(queries, texts, strict=True)]
  numbers, num_votes = [len(group) for group in entrants], settings.tournament.votes
  unasked = np.zeros(len(texts))  # comparisons with a blank text

  def judge(games_C3: np.ndarray) -> np.ndarray:
    votes = np.full((len(games_C3), num_votes), NONE, np.int8)
    asked = []
    for c, (q, first, second) in enumerate(games_C3.tolist()):
      if entrants[q][first] and entrants[q][second]:
        asked.append(c)
      else:
        votes[c], unasked[q] = (FIRST if entrants[q][first] else SECOND), unasked[q] + 1
    shown = [Shown(queries[q], entrants[q][first], entrants[q][second])
             for q, first, second in games_C3[asked].tolist()]
    if asked:
      votes[asked] = ask(shown, num_votes).votes
    return votes

  ended = _tournament(numbers, judge, settings.tournament, seed)
  reward = np.zeros((len(texts), len(texts[0])), np.float32)
  of_group = np.zeros((3, len(texts), 1), np.float32)
  for n, (group, end) in enumerate(zip(texts, ended, strict=True)):
    places = [entrants[n].index(text.strip()) for text in group]
    theta = tournament.ratings(end.table)[places]
    reward[n] = theta if settings.scale == 'rating' else tournament.win_rates(theta)
    asked = end.num_votes - unasked[n] * num_votes
    of_group[:, n, 0] = (end.num_unparsed < asked or not asked,
                         end.num_unparsed / max(asked, 1), end.num_comparisons - unasked[n])
  valid, no_verdict, comparisons = np.broadcast_to(of_group, (3, *reward.shape)).copy()
  return Rated(reward, valid, no_verdict, comparisons)


def _tournament(numbers: Sequence[int], judge: tournament.Judge, settings: cfg.Tournament,
                seed: int) -> list[tournament.Standing]:
  if settings.form == 'knockout':
    return tournament.knockout(numbers, judge, tournament.Rule('coin', seed=seed))
  most = settings.budget // settings.votes if settings.budget else None
  return tournament.round_robin(numbers, judge, tournament.Rule('half', seed=seed), most)


def win_rates(queries: Sequence[str], texts: Sequence[str], others: Sequence[str], ask: Ask,
              votes: int) -> np.ndarray:
  """f32[N]: how often each text beats another one, asked in both orders; ½ where they are equal.

  Verdicts that are missing do not count; without any it is ½. A blank text loses.

  Args:
    queries: what both texts of each pair answer.
    texts, others: N of each.
    ask: the judge.
    votes: verdicts in each order.
  """
  rates = np.full(len(texts), 0.5, np.float32)
  asked = []
  for n, (text, other) in enumerate(zip(texts, others, strict=True)):
    if text.strip() == other.strip():
      continue
    if text.strip() and other.strip():
      asked.append(n)
    else:
      rates[n] = float(bool(text.strip()))
  shown = [Shown(queries[n], texts[n].strip(), others[n].strip()) for n in asked]
  if not asked:
    return rates
  turned = [Shown(one.query, one.second, one.first) for one in shown]
  said = ask([*shown, *turned], votes).votes
  both = np.concatenate([said[:len(shown)], tournament.turned(said[len(shown):])], 1)
  rates[asked] = tournament.shares(both)
  return rates


def judged_part(text: str, after: str) -> str:
  """What stands after the last `after`, '' where there is none; all of it where `after` is ''."""
  if not after:
    return text
  return text.rpartition(after)[2] if after in text else ''


# --- The verifier -----------------------------------------------------------------


@dataclass(frozen=True)
class PendingReward:
  """The future of the rewards of a batch; the judge is asked when they are waited for."""

  rated: Callable[[], Rated]
  truth: PendingVerdict

  def result(self) -> Verdict:
    """The judge's rewards; `correct` is what the verifier of the answers says."""
    rated, truth = self.rated(), self.truth.result()
    correct = np.asarray(truth.correct) * np.asarray(truth.valid)
    measures = {'judge/no_verdict': rated.no_verdict, 'judge/comparisons': rated.comparisons,
                'accuracy/verified': np.asarray(truth.valid, np.float32)}
    return Verdict(rated.reward, rated.valid, correct, {}, measures)  # type: ignore[arg-type]

  def parsed(self) -> None:
    """None: a judge compares responses whether they state an answer or not."""

  def last_words(self) -> str:
    """Why responses were not rated."""
    return ('the judge stated no verdict on them (does it know the form, is '
            'JudgeReward.response_tokens long enough, and JudgeReward.prompt_len?)')


class JudgeVerifier:
  """Rewards responses by a judge, and has their answers verified beside it. Final."""

  def __init__(self, asking: Asking, truth: DeviceVerifier | PoolVerifier,
               settings: cfg.JudgeReward, queries: Mapping[int, str],
               decode: Callable[[Sequence[int]], str], seed: int) -> None:
    """A verifier of responses to problems.

    Args:
      asking: the judge.
      truth: verifies answers, for the log alone.
      settings: the tournament and the scale.
      queries: what each problem asks, by its id.
      decode: ids → text.
      seed: of the run.
    """
    self._asking, self._truth, self._settings = asking, truth, settings
    self._queries, self._decode, self._seed = queries, decode, seed

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]
             ) -> PendingReward:
    """Hands over the answers at once; the judge is asked when the rewards are waited for."""
    prompts, rollouts = on_host(prompts), on_host(rollouts)
    queries = [self._queries[i] for i in prompts.ids.tolist()]

    @functools.cache
    def rated() -> Rated:
      with self._asking() as ask:
        return rate(queries, self.texts(rollouts), ask, self._settings, self._seed)

    return PendingReward(rated, self._truth.submit(prompts, rollouts, references))

  def texts(self, rollouts: RolloutBatch) -> list[list[str]]:
    """[N][G]: what the judge is shown of responses on the host."""
    tokens, there = np.asarray(rollouts.tokens), np.asarray(rollouts.in_response) > 0
    return [[judged_part(self._decode(row[mask].tolist()), self._settings.after)
             for row, mask in zip(*group, strict=True)]
            for group in zip(tokens, there, strict=True)]


# --- The environment --------------------------------------------------------------


@contextlib.contextmanager
def open_environment(session: sessions.Session, method: cfg.RL, start: Params) -> Iterator[Task]:
  """The problems of `method`, rewarded by its judge, as long as the context lasts.

  Args:
    session, method: the run's session and objective, whose verifier is `cfg.JudgeReward`.
    start: the parameters of the policy that the run starts from, whose responses to the held-out
      problems are drawn now.

  Raises:
    UserError: as `problems.open_problems` and `judge_engines.load_judge`.
  """
  settings = method.verifier
  assert isinstance(settings, cfg.JudgeReward)
  judge = load_judge(session, settings)
  with environment.open_problems(session, method) as opened:
    held_out = () if opened.held_out is None else opened.held_out.problems
    engines = JudgeEngines(session, settings, judge)
    queries = {p.id: p.prompt for p in (*opened.training.problems, *held_out)}
    verifier = JudgeVerifier(engines.asking, opened.verifier, settings, queries,
                             session.data.tokenizer.decode, session.run.seed)
    score: Callable[[Params], dict[str, float]] = lambda params: {}
    if opened.held_out is not None:
      score = _scorer(environment.HeldOut(session, method.rollouts, opened.held_out), opened,
                      verifier, engines.asking, queries, start, settings)
    yield Task(environment.taker(session, method, opened.training), verifier, score,
               _digest(opened.training.digest, judge), len(held_out))


def _scorer(held_out: environment.HeldOut, opened: environment.Opened, verifier: JudgeVerifier,
            asking: Asking, queries: Mapping[int, str], start: Params, settings: cfg.JudgeReward
            ) -> Callable[[Params], dict[str, float]]:
  """score(params), whose `validation/reward` is the win rate against the start policy."""
  sampled = held_out.SUFFIXES[0]
  texts = lambda answers: [group[0] for group in verifier.texts(answers.fetched)]
  anchors = [texts(answers) for answers in held_out.draw(held_out.synced(start), sampled)]

  def amend(suffix: str, number: int, answers: environment.Answers, columns: dict[str, Any]
            ) -> dict[str, Any]:
    del columns['reward']
    if suffix == sampled:
      asked = [queries[i] for i in on_host(answers.prompts.ids).tolist()]
      with asking() as ask:
        rates = win_rates(asked, texts(answers), anchors[number], ask,
                          settings.tournament.votes)
      columns['reward'] = rates[:, None]
    return columns

  return environment.make_scorer(held_out, opened.verifier, amend)


def _digest(of_problems: str, judge: Policy) -> str:
  """A hash of the problems and of the judge's parameters."""
  said = f'{of_problems}{sorted(checksum(judge.params).items())}'
  return hashlib.sha256(said.encode()).hexdigest()
