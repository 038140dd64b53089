"""How reinforcement learning turns rewards into updates: advantage, surrogate and other choices."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.hybrid import DecoupledModes, ModeAdvantage
from jaxrl_pt.errors import UserError

# Advantages: how much better than expected each response was. An advantage that is `grouped`
# compares the responses to one prompt, and needs at least two of them.


@dataclass(frozen=True)
class GRPO:
  """A = (r − mean) / (std + 1e-6) inside the group (2402.03300)."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class DrGRPO:
  """A = r − mean inside the group (2503.20783)."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class RLOO:
  """A = r − mean of the group's other rewards (2402.14740)."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class OPO:
  """A = r − Σ|y|r / Σ|y| inside the group (2505.23585)."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class OPOLeaveOneOut:
  """OPO with a baseline from the group's other responses alone, which is unbiased."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class OPOBatch:
  """A = r − Σ|y|r / Σ|y| over the whole batch (2505.23585)."""

  grouped: ClassVar[bool] = False


@dataclass(frozen=True)
class ReinforcePlusPlus:
  """A_t = Σ_{s≥t} γ^{s−t} r_s, whitened over the batch's tokens (2501.03262)."""

  grouped: ClassVar[bool] = False

  gamma: float = 1.0

  def __post_init__(self) -> None:
    checks.number(self, 'gamma', 0.0, 1.0)


@dataclass(frozen=True)
class ReinforcePlusPlusBaseline:
  """REINFORCE++ of rewards from which the group's mean is subtracted first (2501.03262)."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class GAE:
  """PPO's advantage (1506.02438), with a value head that learns beside the policy.

  gamma: the discount γ.
  lam: λ, the decay of the weights of later temporal differences.
  value_lr: the learning rate of the value head, which is linear in the policy's hidden state.
  """

  grouped: ClassVar[bool] = False

  gamma: float = 1.0
  lam: float = 0.95
  value_lr: float = 1e-3

  def __post_init__(self) -> None:
    checks.number(self, 'gamma', 0.0, 1.0)
    checks.number(self, 'lam', 0.0, 1.0)
    checks.positive(self, 'value_lr')


@dataclass(frozen=True)
class OptimalTokenBaseline:
  """A_t = G_t − Σ_i G_t W_t / Σ_i W_t over the responses i of the group (verl).

  G_t is the return from token t on, and W_t the squared norm of the score of the tokens up to t.
  """

  grouped: ClassVar[bool] = True


Advantage = (GRPO | DrGRPO | RLOO | OPO | OPOLeaveOneOut | OPOBatch | ReinforcePlusPlus
             | ReinforcePlusPlusBaseline | GAE | OptimalTokenBaseline | ModeAdvantage)


# Surrogates: the function of importance ratio and advantage that is maximised.


@dataclass(frozen=True)
class PolicyGradient:
  """A · log π, which is exact where the policy that is updated has drawn every batch."""


@dataclass(frozen=True)
class PPOClip:
  """min(ρA, clip(ρ, 1 − low, 1 + high)A) (1707.06347; unequal ranges 2503.14476)."""

  low: float = 0.2
  high: float = 0.2

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)


@dataclass(frozen=True)
class DualClip:
  """PPOClip that also bounds the terms of negative advantages from below by bound · A (1912.09729).
  """

  low: float = 0.2
  high: float = 0.2
  bound: float = 3.0

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)
    checks.number(self, 'bound', 1.0)


@dataclass(frozen=True)
class GSPO:
  """PPO's clip of a response's ratio exp(mean log ρ) (2507.18071)."""

  low: float = 3e-4
  high: float = 4e-4

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)


@dataclass(frozen=True)
class CISPO:
  """sg(clip(ρ, 1 − low, 1 + high)) · A · log π, where no token loses its gradient (2506.13585)."""

  low: float = 1.0
  high: float = 0.2

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)


Surrogate = PolicyGradient | PPOClip | DualClip | GSPO | CISPO


# Aggregations: how the loss terms of tokens become one number.


@dataclass(frozen=True)
class TokenMean:
  """Σ over tokens / tokens of the batch (2503.14476)."""


@dataclass(frozen=True)
class SequenceMeanTokenSum:
  """Mean over responses of the sum over their tokens (2505.23585)."""


@dataclass(frozen=True)
class SequenceMeanTokenMean:
  """Mean over responses of the mean over their tokens (2402.03300)."""


@dataclass(frozen=True)
class ConstantDivisor:
  """Mean over responses of the sum over their tokens / num_tokens (2503.20783)."""

  num_tokens: int

  def __post_init__(self) -> None:
    checks.integer(self, 'num_tokens', 1)


Aggregation = (TokenMean | SequenceMeanTokenSum | SequenceMeanTokenMean | ConstantDivisor
               | DecoupledModes)


# Corrections: weights of tokens that another policy than the updated one has drawn.


@dataclass(frozen=True)
class NoCorrection:
  """Sampler and trainer count as one policy."""


@dataclass(frozen=True)
class TokenTIS:
  """Truncated importance sampling: each token's term times min(π_train / π_sampler, cap)."""

  cap: float = 2.0

  def __post_init__(self) -> None:
    checks.number(self, 'cap', 1.0)


@dataclass(frozen=True)
class SequenceTIS:
  """Each response's terms times min(Π π_train / π_sampler, cap)."""

  cap: float = 2.0

  def __post_init__(self) -> None:
    checks.number(self, 'cap', 1.0)


@dataclass(frozen=True)
class Rejection:
  """Leaves out responses whose mean ratio exp(mean log π_train / π_sampler) is outside [low, high].
  """

  low: float = 0.5
  high: float = 2.0

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 1.0)


Correction = NoCorrection | TokenTIS | SequenceTIS | Rejection


# KL terms: how the policy is kept near the reference policy.

KLEstimator = Literal['k1', 'k2', 'k3']


@dataclass(frozen=True)
class NoKL:
  """The KL to the reference policy is measured and has no part in loss or reward."""


@dataclass(frozen=True)
class KLInLoss:
  """coef · KL is added to the loss."""

  coef: float
  estimator: KLEstimator = 'k3'

  def __post_init__(self) -> None:
    checks.number(self, 'coef', 0.0)
    checks.choice(self, 'estimator', KLEstimator)
    if self.estimator == 'k1':
      raise UserError("KLInLoss.estimator = 'k1' has an expected gradient of zero: choose 'k2' or "
                      "'k3', or @cfg.KLInReward().")


@dataclass(frozen=True)
class KLInReward:
  """coef · KL is subtracted from the reward of each token."""

  coef: float
  estimator: KLEstimator = 'k1'

  def __post_init__(self) -> None:
    checks.number(self, 'coef', 0.0)
    checks.choice(self, 'estimator', KLEstimator)


KL = NoKL | KLInLoss | KLInReward


# Shapings: what is added to the verifier's reward for the length of a response.


@dataclass(frozen=True)
class NoShaping:
  """The reward is the verifier's alone."""


@dataclass(frozen=True)
class Overlong:
  """DAPO's penalty, which falls from 0 to −1 over the last `buffer_tokens` of `max_tokens`
  (2503.14476)."""

  max_tokens: int
  buffer_tokens: int

  def __post_init__(self) -> None:
    checks.integer(self, 'max_tokens', 1)
    checks.integer(self, 'buffer_tokens', 1, self.max_tokens)


@dataclass(frozen=True)
class ShortRL:
  """Short-RL's length reward (2505.12284, docs/methods/short_rl.md).

  Only correct responses get it, and only while the batch's accuracy is within `slack_accuracy` of
  the best accuracy so far.

  slack_tokens: how much longer than the shortest correct response of its group a response may be
    without loss.
  ema: 0 takes the running maximum of the accuracy as the best, as the paper's code does; a number
    in (0, 1) takes the exponential average with this decay, which depends less on the batch's size.
  weight: the factor of the length reward, whose range without it is [−0.5, 0.5].
  """

  slack_tokens: int = 200
  slack_accuracy: float = 0.05
  ema: float = 0.0
  weight: float = 1.0

  def __post_init__(self) -> None:
    checks.integer(self, 'slack_tokens', 0)
    checks.number(self, 'slack_accuracy', 0.0, 1.0)
    checks.below_one(self, 'ema')
    checks.number(self, 'weight', 0.0)


@dataclass(frozen=True)
class Kimi:
  """Kimi k1.5's length reward (2501.12599), for all responses and without a gate.

  weight: the factor of the length reward.
  """

  weight: float = 1.0

  def __post_init__(self) -> None:
    checks.number(self, 'weight', 0.0)


Shaping = NoShaping | Overlong | ShortRL | Kimi


@dataclass(frozen=True)
class Algorithm:
  """How rewards become updates, as a choice of each part.

  entropy_coef: this coefficient times the mean entropy is added to the objective.
  minibatches: the number of updates that a pass over a rollout batch is split into.
  epochs: the number of passes over a rollout batch. With one minibatch and one epoch every
    importance ratio is 1, and no clip changes anything.
  """

  advantage: Advantage = field(default_factory=OPO)
  surrogate: Surrogate = field(default_factory=PolicyGradient)
  aggregation: Aggregation = field(default_factory=SequenceMeanTokenSum)
  correction: Correction = field(default_factory=NoCorrection)
  kl: KL = field(default_factory=NoKL)
  shaping: Shaping = field(default_factory=NoShaping)
  entropy_coef: float = 0.0
  minibatches: int = 1
  epochs: int = 1

  def __post_init__(self) -> None:
    checks.instance(self, 'advantage', *get_args(Advantage))
    checks.instance(self, 'surrogate', *get_args(Surrogate))
    checks.instance(self, 'aggregation', *get_args(Aggregation))
    checks.instance(self, 'correction', *get_args(Correction))
    checks.instance(self, 'kl', *get_args(KL))
    checks.instance(self, 'shaping', *get_args(Shaping))
    checks.number(self, 'entropy_coef', 0.0)
    checks.integer(self, 'minibatches', 1)
    checks.integer(self, 'epochs', 1)
    if self.updates > 1 and self.surrogate == PolicyGradient():
      raise UserError(f'Algorithm makes {self.updates} updates of one rollout batch '
                      '(minibatches × epochs): choose a surrogate with a ratio, such as '
                      '@cfg.PPOClip(), or set both to 1.')

  @property
  def updates(self) -> int:
    """The number of optimiser steps that one rollout batch gets."""
    return self.minibatches * self.epochs
