"""Objectives: next-token prediction, supervised stages, RPT, RLP, RL; those of games in `worlds`
and `game_rl`.

Beside its own settings every objective has five attributes that code may read without asking which
objective it is: `rollouts` and `algorithm`, which are None where no responses are drawn;
`positions_per_document`; `policy_fields`, the names of its settings that are work directories of
policies; and `examples`, what its packed examples are made of, or None where it has none of its
own and reads those of the start policy. Only `jobs` asks which objective a run has.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.algorithm import Algorithm
from jaxrl_pt.config.compatible import check_judge, check_method, check_modes, check_turns
from jaxrl_pt.config.data import Examples
from jaxrl_pt.config.environments import Interactive
from jaxrl_pt.config.game_rl import OfGames
from jaxrl_pt.config.hybrid import SingleMode
from jaxrl_pt.config.judging import JudgeReward, check_judged_groups
from jaxrl_pt.config.pairs import JudgePairs
from jaxrl_pt.config.problems import Problems
from jaxrl_pt.config.rollouts import AllGroups, InFlight, OnPolicy, Rollouts
from jaxrl_pt.config.verifiers import Verifier, VerifierPool, programs_of
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class NextToken:
  """Next-token prediction over packed documents.

  int4_from: the fraction of the steps after which activations go from int8 to int4, with the
    optimiser's state kept (BitNet v2: 0.95); 1.0 never switches.
  """

  int4_from: float = 1.0
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ()
  examples: ClassVar[Examples] = 'documents'

  def __post_init__(self) -> None:
    checks.number(self, 'int4_from', 0.0, 1.0)


# --- Supervised stages ------------------------------------------------------------


@dataclass(frozen=True)
class SFT:
  """Supervised fine-tuning: next-token prediction of the assistant's part of conversations.

  start_from: the work directory of the policy to begin with, whose tokenizer is used; '' begins
    with random parameters and the tokenizer of Data.tokenizer.
  loss: what the summed loss of all learned tokens of a batch is divided by. 'mean' divides by
    their number; 'sum' by nothing, as BitNet b1.58 2B4T is fine-tuned.
  """

  start_from: str
  loss: Literal['mean', 'sum'] = 'mean'
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ('start_from',)
  examples: ClassVar[Examples] = 'conversations'

  def __post_init__(self) -> None:
    checks.text(self, 'start_from', empty=True)
    checks.choice(self, 'loss', Literal['mean', 'sum'])


@dataclass(frozen=True)
class DPO:
  """Direct preference optimisation (2305.18290) against the policy that the run starts from.

  start_from: the work directory of the policy to begin with, which is also the reference policy.
  loss: 'sigmoid' is DPO's; 'robust' is rDPO's (2403.00409), for preferences of which a share is
    wrong; 'ipo' is IPO's (2310.12036); 'length_normalised' is DPO's of log-ratios per token.
  beta: how strongly the policy is held to the reference policy (IPO's τ).
  label_smoothing: the share of preferences that are wrong, for 'robust' alone.
  """

  start_from: str
  loss: Literal['sigmoid', 'robust', 'ipo', 'length_normalised'] = 'sigmoid'
  beta: float = 0.1
  label_smoothing: float = 0.0
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ('start_from',)
  examples: ClassVar[Examples] = 'preferences'

  def __post_init__(self) -> None:
    checks.text(self, 'start_from')
    checks.choice(self, 'loss', Literal['sigmoid', 'robust', 'ipo', 'length_normalised'])
    checks.positive(self, 'beta')
    checks.number(self, 'label_smoothing', 0.0, 0.49)
    if (self.loss == 'robust') != (self.label_smoothing > 0):
      raise UserError(f'DPO.loss = {self.loss!r} with DPO.label_smoothing = '
                      f"{self.label_smoothing:g}: 'robust' needs one above 0, and no other loss "
                      'reads it.')


@dataclass(frozen=True)
class RewardModel:
  """A reward model: a scalar head on a policy, trained on preferences (Bradley–Terry).

  start_from: the work directory of the policy to begin with; '' begins with random parameters and
    the tokenizer of Data.tokenizer.
  center: the weight of the mean squared sum of both rewards, which keeps rewards near zero.
  """

  start_from: str
  center: float = 0.0
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ('start_from',)
  examples: ClassVar[Examples] = 'preferences'

  def __post_init__(self) -> None:
    checks.text(self, 'start_from', empty=True)
    checks.number(self, 'center', 0.0)


# --- Reinforcement learning -------------------------------------------------------


# The rewards of a prediction in RPT (2506.08007).


@dataclass(frozen=True)
class PrefixMatch:
  """1 if the prediction's bytes begin the true text and end where a true token does, else 0."""


@dataclass(frozen=True)
class FirstTokenMatch:
  """1 if the prediction's first token is the true one, else 0."""


@dataclass(frozen=True)
class DenseMatch:
  """1 if the prefix matches, else the policy's own probability of the wrong prediction."""


@dataclass(frozen=True)
class GatedDenseMatch:
  """DenseMatch in groups with a match, and −penalty for each response of other groups."""

  penalty: float = 0.0

  def __post_init__(self) -> None:
    checks.number(self, 'penalty', 0.0)


@dataclass(frozen=True)
class InformationGain:
  """RLP (2510.01265): how much a thought raises the log-probability of the true next token.

  It is compared with the log-probability under an average policy without a thought. It needs
  @cfg.Reason().

  decay: the decay of the average of the policy's parameters.
  """

  decay: float = 0.999

  def __post_init__(self) -> None:
    checks.below_one(self, 'decay')


NextTokenReward = PrefixMatch | FirstTokenMatch | DenseMatch | GatedDenseMatch | InformationGain


# How the policy of RPT comes to a prediction.


@dataclass(frozen=True)
class Direct:
  """The response is the prediction."""


@dataclass(frozen=True)
class Reason:
  """The policy thinks first: context, think marker, thought, answer marker, prediction.

  think, answer: the texts of the two markers, of exactly one token each. The think marker counts
    in Rollouts.prompt_len; thought, answer marker and prediction count in Rollouts.response_tokens.
  """

  think: str = '<think>'
  answer: str = '</think>'

  def __post_init__(self) -> None:
    checks.text(self, 'think')
    checks.text(self, 'answer')
    if self.think == self.answer:
      checks.fail(self, 'answer', 'another text than Reason.think')


Prediction = Direct | Reason


@dataclass(frozen=True)
class RPT:
  """Reinforcement Pre-Training (2506.08007): reward a correct prediction of what comes next.

  start_from: the work directory or checkpoint of the pretrained policy.
  proxy_from: the work directory of the frozen proxy whose entropy chooses positions and which has
    the same tokenizer; empty takes the start policy.
  min_entropy: positions with a lower entropy of the proxy are dropped (nats, over its 16 likeliest
    tokens, renormalised).
  difficulty: nested thresholds of this entropy (nats) for the easy, medium and hard evaluation
    splits.
  scored_examples: the number of packed examples of each split that the proxy scores.
  eval_positions: the number of held-out positions that are evaluated.
  positions_per_document: how many prompts of a batch end in the same document, whose first
    prompt_len tokens are computed once for all of them; with 1, each prompt is the last prompt_len
    tokens before its position.
  """

  start_from: str
  rollouts: Rollouts = field(default_factory=Rollouts)
  algorithm: Algorithm = field(default_factory=Algorithm)
  min_entropy: float = 0.5
  difficulty: tuple[float, float, float] = (0.5, 1.0, 1.5)
  scored_examples: int = 1024
  eval_positions: int = 1024
  reward: NextTokenReward = field(default_factory=PrefixMatch)
  prediction: Prediction = field(default_factory=Direct)
  proxy_from: str = ''
  positions_per_document: int = 1
  policy_fields: ClassVar[tuple[str, ...]] = ('start_from', 'proxy_from')
  examples: ClassVar[None] = None

  def __post_init__(self) -> None:
    checks.integer(self, 'positions_per_document', 1)
    _check_shared(self)
    checks.text(self, 'start_from')
    checks.text(self, 'proxy_from', empty=True)
    checks.instance(self, 'reward', *get_args(NextTokenReward))
    checks.instance(self, 'prediction', *get_args(Prediction))
    checks.instance(self, 'rollouts', Rollouts)
    checks.instance(self, 'algorithm', Algorithm)
    check_method('RPT', self.rollouts, self.algorithm)
    check_modes(self.rollouts, self.algorithm)
    if self.rollouts.modes != SingleMode():
      raise UserError('Rollouts.modes = @cfg.HybridModes() begins a response with a word that '
                      'is no prediction: leave it at @cfg.SingleMode() for RPT.')
    checks.number(self, 'min_entropy', 0.0)
    checks.integer(self, 'scored_examples', 1)
    checks.integer(self, 'eval_positions', 1)
    checks.rising(self, 'difficulty', 3)
    if isinstance(self.reward, InformationGain):
      _check_information_gain(self)


def _check_information_gain(method: RPT) -> None:
  """Refuses settings that RLP's step, a single program over separate prompts, does not have."""
  rollouts = method.rollouts
  for name, value, needed in (
      ('RPT.prediction', method.prediction, Reason), ('Rollouts.mode', rollouts.mode, OnPolicy),
      ('Rollouts.selection', rollouts.selection, AllGroups)):
    if not isinstance(value, needed):
      raise UserError(f'RPT.reward = @cfg.InformationGain() needs {name} = '
                      f'@cfg.{needed.__name__}(), not {value!r}.')
  if method.positions_per_document != 1 or rollouts.dump_every:
    raise UserError('RPT.reward = @cfg.InformationGain() needs RPT.positions_per_document = 1 and '
                    'Rollouts.dump_every = 0: its thoughts end at a marker that neither knows.')


def _check_shared(method: RPT) -> None:
  """Refuses settings that do not go with prompts that share a document."""
  shared, rollouts = method.positions_per_document, method.rollouts
  if shared == 1:
    return
  if isinstance(rollouts.mode, InFlight):
    raise UserError(f'RPT.positions_per_document = {shared} shares documents within a batch, which '
                    'Rollouts.mode = @cfg.InFlight() does not: set it to 1, or choose '
                    '@cfg.OnPolicy().')
  if rollouts.num_prompts % shared:
    raise UserError(f'RPT.positions_per_document = {shared} does not divide '
                    f'Rollouts.num_prompts = {rollouts.num_prompts}: change one of them.')
  if method.algorithm.minibatches > 1 or rollouts.selection != AllGroups():
    raise UserError(f'RPT.positions_per_document = {shared} keeps prompts together that '
                    'Algorithm.minibatches and Rollouts.selection would part: set them to 1 and '
                    '@cfg.AllGroups().')


@dataclass(frozen=True)
class RL:
  """Reinforcement learning on problems whose answers can be verified.

  start_from: the work directory of the policy to begin with, which is also the reference policy.
  verifier: what rewards a response; or @cfg.Interactive(), an environment that answers the policy
    and rewards an episode of several turns, all of which are one response; or @cfg.JudgeReward(), a
    judge that compares the responses of a group.
  pool: the processes of a verifier that reads text, or of the environment; a verifier on the device
    does not read it.
  eval_problems: the number of held-out problems that are measured, once sampled as in training and
    once greedily.
  """

  start_from: str
  problems: Problems
  verifier: Verifier | Interactive | JudgeReward
  pool: VerifierPool = field(default_factory=VerifierPool)
  rollouts: Rollouts = field(default_factory=Rollouts)
  algorithm: Algorithm = field(default_factory=Algorithm)
  eval_problems: int = 256
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ('start_from',)
  examples: ClassVar[None] = None

  def __post_init__(self) -> None:
    checks.text(self, 'start_from')
    checks.instance(self, 'problems', Problems)
    checks.instance(self, 'verifier', *get_args(Verifier), Interactive, JudgeReward)
    checks.instance(self, 'pool', VerifierPool)
    truth = self.truth
    for programs in () if isinstance(truth, Interactive) else programs_of(truth):
      if programs.wall_seconds >= self.pool.wall_seconds:
        raise UserError(f'Interpreter.wall_seconds = {programs.wall_seconds:g} leaves a program as '
                        'long as its verification may take (VerifierPool.wall_seconds = '
                        f'{self.pool.wall_seconds:g}), so that a slow one would be masked instead '
                        'of being wrong: lower it, or raise the other.')
    checks.instance(self, 'rollouts', Rollouts)
    checks.instance(self, 'algorithm', Algorithm)
    check_method('RL', self.rollouts, self.algorithm)
    check_modes(self.rollouts, self.algorithm)
    checks.integer(self, 'eval_problems', 1)
    if isinstance(self.verifier, Interactive):
      check_turns(self.rollouts)
      if self.problems.is_chat:
        raise UserError('RL.verifier = @cfg.Interactive() has a template of its own '
                        '(Interactive.template): leave Problems.is_chat at False.')
    if isinstance(self.verifier, JudgeReward):
      check_judged_groups(self.verifier, self.rollouts, self.algorithm)
    if isinstance(self.problems.source, JudgePairs):
      check_judge(self.problems.source.prompt.verdict, truth)

  @property
  def truth(self) -> Verifier | Interactive:
    """What says which responses are right: the verifier, unless that is a judge."""
    return self.verifier.truth if isinstance(self.verifier, JudgeReward) else self.verifier


# Objectives that draw responses and learn from their rewards.
Reinforced = RPT | RL
Supervised = SFT | DPO | RewardModel
Objective = NextToken | Supervised | Reinforced | OfGames


def judge_of(objective: Objective) -> tuple[JudgeReward, ...]:
  """The judge that rewards responses, if one does."""
  if isinstance(objective, RL) and isinstance(objective.verifier, JudgeReward):
    return (objective.verifier,)
  return ()
