"""A judge as the reward of reinforcement learning, and the guard that watches it."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.algorithm import Algorithm, Kimi, ShortRL
from jaxrl_pt.config.model import Model
from jaxrl_pt.config.rollouts import DynamicSampling, Rollouts, Sampler
from jaxrl_pt.config.verifiers import Verifier
from jaxrl_pt.errors import UserError

Bracket = Literal['round_robin', 'knockout']
JudgeScale = Literal['win_rate', 'rating']


@dataclass(frozen=True)
class JudgeGuard:
  """Warns when the judge's reward rises while verified accuracy falls by more than noise.

  Both are measured on the held-out problems at each evaluation (`Train.eval_every`);
  `rollouts.judge_guard` defines the statistic.

  window: the number of evaluations, the last ones, over which both trends are taken.
  threshold: how many standard errors both trends must differ from none.
  stop: whether the run then stops, after a checkpoint from which it can go on.
  """

  window: int = 5
  threshold: float = 2.0
  stop: bool = False

  def __post_init__(self) -> None:
    checks.integer(self, 'window', 2, 10_000)
    checks.positive(self, 'threshold')
    checks.flag(self, 'stop')


@dataclass(frozen=True)
class Tournament:
  """How the responses of a group meet before a judge.

  form: a round robin compares all pairs, and each response gets as many verdicts; a knockout makes
    group_size − 1 comparisons and tells losers apart badly.
  votes: verdicts of a comparison.
  budget: the most verdicts of a group; a round robin then has fewer comparisons. 0 for no bound.
  """

  form: Bracket = 'round_robin'
  votes: int = 1
  budget: int = 0

  def __post_init__(self) -> None:
    checks.choice(self, 'form', Bracket)
    checks.integer(self, 'votes', 1, 1024)
    checks.integer(self, 'budget', 0)


@dataclass(frozen=True)
class JudgeReward:
  """The reward is what a judge says of the responses of a group, compared two at a time (RRM).

  The judge is a second policy on the run's mesh, which does not learn. Its tokenizer must be that
  of the policy. True accuracy is measured beside it and is no part of the reward.

  judge_from: the work directory of the judge.
  model: the judge's model as its checkpoint has it, for `preflight`, which opens no checkpoint;
    `@cfg.Model()` where it is that of the policy, else `@judge/cfg.Model()`.
  truth: the verifier that says which answers are right.
  tournament: how the responses of a group meet.
  after: the judge is shown what stands after the last such text, as '</think>' or '#'; a response
    without it is blank, and loses. '' for responses as they were written.
  scale: how Bradley–Terry ratings θ become rewards. 'win_rate' is the chance to beat another
    response of the group, w_i = 1 / (G − 1) Σ_{j ≠ i} σ(θ_i − θ_j). It lies between 0 and 1, is ½
    for everybody where the judge has no preference, is after a whole round robin the share of the
    games that were won, and does not grow beyond bounds where one response wins all games, as
    ratings do but for their prior. 'rating' is θ_i in nats (Elo by another factor), for methods
    that divide by the standard deviation anyway. The paper does not say what it does.
  prompt_len, response_tokens: the most tokens of a comparison's prompt, and of a verdict. A longer
    prompt gets no verdict.
  sampler: how verdicts are drawn.
  slots: verdicts that a data shard draws at once.
  guard: what watches for a judge that is deceived.
  """

  judge_from: str
  model: Model
  truth: Verifier
  tournament: Tournament = field(default_factory=Tournament)
  after: str = ''
  scale: JudgeScale = 'win_rate'
  prompt_len: int = 4096
  response_tokens: int = 2048
  sampler: Sampler = field(default_factory=Sampler)
  slots: int = 64
  guard: JudgeGuard = field(default_factory=JudgeGuard)

  def __post_init__(self) -> None:
    checks.text(self, 'judge_from')
    checks.instance(self, 'model', Model)
    checks.instance(self, 'truth', *get_args(Verifier))
    checks.instance(self, 'tournament', Tournament)
    checks.text(self, 'after', empty=True)
    checks.choice(self, 'scale', JudgeScale)
    checks.size(self, 'prompt_len', 1, 2**24, 4, 'the tokens of one prompt')
    checks.size(self, 'response_tokens', 1, 2**24, 4, 'the tokens of one verdict')
    checks.instance(self, 'sampler', Sampler)
    checks.integer(self, 'slots', 1, 2**16)
    checks.instance(self, 'guard', JudgeGuard)


def check_judged_groups(settings: JudgeReward, rollouts: Rollouts, algorithm: Algorithm) -> None:
  """Refuses groups that a judge cannot compare, and settings that would learn from the truth."""
  for name, value, readers in (('Algorithm.shaping', algorithm.shaping, (Kimi, ShortRL)),
                               ('Rollouts.selection', rollouts.selection, (DynamicSampling,))):
    if isinstance(value, readers):
      raise UserError(f'{name} = @cfg.{type(value).__name__}() asks which responses are right, '
                      'which a policy must not learn that has RL.verifier = @cfg.JudgeReward(): '
                      'leave it out.')
  size = rollouts.group_size
  if size < 2:
    raise UserError('RL.verifier = @cfg.JudgeReward() compares the responses of a group, and '
                    'Rollouts.group_size is 1: set it to at least 2.')
  votes, budget = settings.tournament.votes, settings.tournament.budget
  least = (size - 1) * votes
  if 0 < budget < least:
    raise UserError(f'Tournament.budget = {budget} verdicts for {size} responses with {votes} '
                    'votes a comparison: every response is compared with another only from '
                    f'{least} on; raise it, or lower Tournament.votes.')
