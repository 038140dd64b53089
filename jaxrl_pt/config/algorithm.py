"""What reinforcement learning makes of verified responses: advantage, surrogate, and the rest."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError

# How much better than expected each response was. `grouped` ones compare the responses of one
# prompt, and need at least two.


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
  """OPO's baseline of the group's other responses, which takes its bias away."""

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
  """REINFORCE++ of rewards from which the group's mean is taken first (2501.03262)."""

  grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class GAE:
  """PPO's advantage (1506.02438) under a value head that learns beside the policy.

  value_lr: learning rate of the head, which is linear in the policy's hidden state.
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
  """A_t = G_t − Σ_i G_t W_t / Σ_i W_t inside the group, W_t the squared norm of the score of
  the tokens up to t (verl)."""

  grouped: ClassVar[bool] = True


Advantage = (GRPO | DrGRPO | RLOO | OPO | OPOLeaveOneOut | OPOBatch | ReinforcePlusPlus
             | ReinforcePlusPlusBaseline | GAE | OptimalTokenBaseline)


# What is maximised.


@dataclass(frozen=True)
class PolicyGradient:
  """A · log π: exact where every batch is drawn by the policy it updates."""


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
  """PPOClip that also keeps the term of a negative advantage above bound · A (1912.09729)."""

  low: float = 0.2
  high: float = 0.2
  bound: float = 3.0

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)
    checks.number(self, 'bound', 1.0)


@dataclass(frozen=True)
class GSPO:
  """PPO's clip of the sequence's ratio exp(mean log ρ) (2507.18071)."""

  low: float = 3e-4
  high: float = 4e-4

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)


@dataclass(frozen=True)
class CISPO:
  """sg(clip(ρ, 1 − low, 1 + high)) · A · log π: no token loses its gradient (2506.13585)."""

  low: float = 1.0
  high: float = 0.2

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 0.0)


Surrogate = PolicyGradient | PPOClip | DualClip | GSPO | CISPO


# How the terms of tokens become one number.


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


Aggregation = TokenMean | SequenceMeanTokenSum | SequenceMeanTokenMean | ConstantDivisor


# What weighs responses that another policy than the one being updated has drawn.


@dataclass(frozen=True)
class NoCorrection:
  """Sampler and trainer are taken to be one policy."""


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
  """Responses whose mean ratio exp(mean log π_train / π_sampler) lies outside are left out."""

  low: float = 0.5
  high: float = 2.0

  def __post_init__(self) -> None:
    checks.number(self, 'low', 0.0, 1.0)
    checks.number(self, 'high', 1.0)


Correction = NoCorrection | TokenTIS | SequenceTIS | Rejection


# How the policy is held near the one it started from.

KLEstimator = Literal['k1', 'k2', 'k3']


@dataclass(frozen=True)
class NoKL:
  """The distance to the reference policy is measured, not punished."""


@dataclass(frozen=True)
class KLInLoss:
  """coef · KL added to the loss."""

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
  """coef · KL taken from the reward of each token."""

  coef: float
  estimator: KLEstimator = 'k1'

  def __post_init__(self) -> None:
    checks.number(self, 'coef', 0.0)
    checks.choice(self, 'estimator', KLEstimator)


KL = NoKL | KLInLoss | KLInReward


# What a response's length is worth.


@dataclass(frozen=True)
class NoShaping:
  """The verifier's reward alone."""


@dataclass(frozen=True)
class Overlong:
  """DAPO's penalty: falls from 0 to −1 over the last `buffer_tokens` of `max_tokens`
  (2503.14476)."""

  max_tokens: int
  buffer_tokens: int

  def __post_init__(self) -> None:
    checks.integer(self, 'max_tokens', 1)
    checks.integer(self, 'buffer_tokens', 1, self.max_tokens)


@dataclass(frozen=True)
class ShortRL:
  """Short-RL's length reward (2505.12284, docs/methods/short_rl.md): for correct responses only,
  with a slack of `slack_tokens` above the shortest, and only while the batch's accuracy is within
  `slack_accuracy` of the best so far.

  ema: 0 takes the running maximum of the accuracy, as the code does; a number in (0, 1) its
  exponential average with that decay, which depends less on the batch's size.
  weight: of the length reward, whose own range is [−0.5, 0.5].
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
  """Kimi k1.5's length reward (2501.12599): over all responses, without gates."""

  weight: float = 1.0

  def __post_init__(self) -> None:
    checks.number(self, 'weight', 0.0)


Shaping = NoShaping | Overlong | ShortRL | Kimi


@dataclass(frozen=True)
class Algorithm:
  """From rewards to an update, as a choice of each part.

  entropy_coef: times the mean entropy is added to the objective.
  minibatches: updates a rollout batch is split into; epochs: passes over it. 1 and 1 is the
  exact on-policy setting, in which every clip is inert.
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
    """Optimiser steps of one rollout batch."""
    return self.minibatches * self.epochs
