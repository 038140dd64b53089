"""Hybrid reasoning (LHRM 2505.14631): modes of responses, and HGPO's advantage."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jaxrl_pt.config import checks


@dataclass(frozen=True)
class SingleMode:
  """Responses begin as the policy likes, and none of their tokens stands for a mode."""


@dataclass(frozen=True)
class HybridModes:
  """The first token of a response says its mode: that it thinks first, or answers at once.

  think, no_think: the texts of the two modes' tokens, of exactly one token each.
  think_end: the text that ends thinking, which those read who show a thought apart from its answer
    or give it a budget; training does not.
  forced: whether half of each group is forced into each mode, as HGPO needs; otherwise the policy
    draws the mode's token like any other.
  """

  think: str = '<think>'
  no_think: str = '<no_think>'
  forced: bool = True
  think_end: str = '</think>'

  def __post_init__(self) -> None:
    checks.text(self, 'think')
    checks.text(self, 'no_think')
    checks.text(self, 'think_end')
    checks.flag(self, 'forced')
    if self.think == self.no_think:
      checks.fail(self, 'no_think', 'another text than HybridModes.think')
    if self.think_end in (self.think, self.no_think):
      checks.fail(self, 'think_end', "another text than those of the modes' tokens")


ResponseModes = SingleMode | HybridModes


def of_its_own(modes: ResponseModes) -> ResponseModes:
  """The same modes, of which the policy chooses itself."""
  return replace(modes, forced=False) if isinstance(modes, HybridModes) else modes


HybridForm = Literal['grpo', 'rloo', 'reinforce_plus_plus']
ModeTies = Literal['no_think', 'think', 'neither']
BestTies = Literal['one', 'all']


@dataclass(frozen=True)
class HGPO:
  """A = A(r_intra) + α A(r_inter) on the token of the mode (2505.14631).

  form: how rewards become advantages; the paper finds all three competitive.
  alpha: α, the weight of the mode's token.
  margin: δ, how much better thinking must be on average. With 0/1 rewards and N responses the means
    are multiples of 2/N, so that every δ between two of them is the same one; a reward model's
    scale is not normalised.
  mode_ties: the mode that wins where think equals no-think + δ. The shorter one by default, as in
    Hybrid Accuracy, whose ties go to the shorter response.
  best_ties: 'one' makes the first of several best responses of a mode its winner, and none where
    all are equal; with 'all' every best one wins. By default 'one': with 'all' and rewards
    that are normalised over the group, a mode with more right answers raises all of its tokens,
    which is what the inter-group reward says already.
  best_over: over which responses r_intra is normalised. Within each mode by default: the means of
    both modes then are zero, and no token but the mode's learns of the other mode.
  gamma: γ of 'reinforce_plus_plus', which nothing else reads.
  """

  grouped: ClassVar[bool] = True

  form: HybridForm = 'grpo'
  alpha: float = 1.0
  margin: float = 0.2
  mode_ties: ModeTies = 'no_think'
  best_ties: BestTies = 'one'
  best_over: Literal['mode', 'group'] = 'mode'
  gamma: float = 0.99

  def __post_init__(self) -> None:
    checks.choice(self, 'form', HybridForm)
    checks.number(self, 'alpha', 0.0)
    checks.number(self, 'margin', 0.0)
    checks.choice(self, 'mode_ties', ModeTies)
    checks.choice(self, 'best_ties', BestTies)
    checks.choice(self, 'best_over', Literal['mode', 'group'])
    checks.number(self, 'gamma', 0.0, 1.0)


@dataclass(frozen=True)
class Thinkless:
  """A = r − γ r 1[think] − mean inside the group, where the policy chooses modes (2505.13379).

  think_cost: γ, the share of a reward that thinking costs.
  """

  grouped: ClassVar[bool] = True

  think_cost: float = 0.5

  def __post_init__(self) -> None:
    checks.number(self, 'think_cost', 0.0, 1.0)


@dataclass(frozen=True)
class AdaptThink:
  """A = δ 1[no-think] + r − mean reward of thinking, with modes drawn evenly (2505.13417).

  The ratio of the mode's token is π / ½, so that a surrogate with a ratio is needed.

  bonus: δ, what answering at once is worth.
  """

  grouped: ClassVar[bool] = True

  bonus: float = 0.05

  def __post_init__(self) -> None:
    checks.number(self, 'bonus', 0.0)


@dataclass(frozen=True)
class ModeEfficiency:
  """A = A(r) + α A(r 1[no-think]) on the mode's token, with A as in GRPO (after 2606.19919).

  alpha: α, the weight of efficiency.
  """

  grouped: ClassVar[bool] = True

  alpha: float = 1.0

  def __post_init__(self) -> None:
    checks.number(self, 'alpha', 0.0)


ModeAdvantage = HGPO | Thinkless | AdaptThink | ModeEfficiency
# Those that need both modes in each group.
FORCED_MODES: tuple[type, ...] = (HGPO, AdaptThink)


@dataclass(frozen=True)
class DecoupledModes:
  """Mean over responses of α · the mode token's term + the mean of the others' (2505.13379).

  alpha: α, the weight of the mode's token.
  """

  alpha: float = 1e-3

  def __post_init__(self) -> None:
    checks.number(self, 'alpha', 0.0)
