"""What an evaluation measures."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from jaxrl_pt.config import checks
from jaxrl_pt.config.hybrid import HybridModes
from jaxrl_pt.config.objectives import RL
from jaxrl_pt.config.rollouts import Sampler
from jaxrl_pt.config.run import Run
from jaxrl_pt.errors import UserError

Measured: TypeAlias = Literal['held_out', 'all']


@dataclass(frozen=True)
class HybridAccuracy:
  """How often a policy chooses the mode that is better for a prompt (LHRM 2505.14631).

  The paper names neither N nor the margin nor the scorer of its numbers.

  run: the run whose objective names problems, verifier, lengths and modes; nothing else of it is
    read. The verifier's reward is the score.
  problems: whether the problems that the run holds out are measured, or all of them, as where the
    run's source has been replaced by a file that nobody was trained on.
  num_problems: the most problems that are measured.
  samples: N, the number of responses in each forced mode.
  free_samples: the number of responses whose mode the policy chooses.
  margin: modes whose mean scores differ by no more are equal, and the shorter one is better. Means
    of N scores of 0 or 1 are multiples of 1 / N.
  sampler: how responses are drawn; the paper has temperature 0.6 and top-p 0.95.
  budgets: budgets of thinking tokens, as shares of Rollouts.response_tokens, at which the policy is
    made to think, to compare accuracies at equal numbers of tokens.
  resamples: the number of resamples of the problems from which intervals are taken.
  slots: the number of responses that are decoded at once.
  seed: addresses the noise of the responses and of the resamples.
  """

  run: Run
  problems: Measured = 'held_out'
  num_problems: int = 256
  samples: int = 16
  free_samples: int = 16
  margin: float = 0.05
  sampler: Sampler = field(default_factory=Sampler)
  budgets: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
  resamples: int = 2000
  slots: int = 64
  seed: int = 0

  def __post_init__(self) -> None:
    checks.instance(self, 'run', Run)
    checks.choice(self, 'problems', Measured)
    for name in ('num_problems', 'samples', 'free_samples'):
      checks.size(self, name, 1, 2**20, 4, 'the responses')
    checks.number(self, 'margin', 0.0)
    checks.instance(self, 'sampler', Sampler)
    if not (isinstance(self.budgets, (list, tuple)) and self.budgets
            and all(checks.is_weight(share) and 0 <= share < 1 for share in self.budgets)):
      checks.fail(self, 'budgets', 'numbers from 0 to below 1, as (0.0, 0.25, 0.5)')
    object.__setattr__(self, 'budgets', tuple(sorted(set(map(float, self.budgets)))))
    checks.integer(self, 'resamples', 100, 10**6)
    checks.integer(self, 'slots', 1, 2**16)
    checks.integer(self, 'seed', 0, 2**31 - 1)
    method = self.run.objective
    if not isinstance(method, RL):
      raise UserError(f'Run.objective = @cfg.{type(method).__name__}() has no problems whose '
                      'answers a verifier scores, as Hybrid Accuracy needs: give the file of a run '
                      'of @cfg.RL() too, such as --gin_file gin/run/hgpo_tiny.gin.')
    if not isinstance(method.rollouts.modes, HybridModes):
      raise UserError(f'Rollouts.modes = @cfg.{type(method.rollouts.modes).__name__}(), but Hybrid '
                      'Accuracy compares modes of responses: choose @cfg.HybridModes().')

  @property
  def method(self) -> RL:
    """The run's objective."""
    assert isinstance(self.run.objective, RL)
    return self.run.objective

  @property
  def modes(self) -> HybridModes:
    """The modes of its rollouts."""
    assert isinstance(self.method.rollouts.modes, HybridModes)
    return self.method.rollouts.modes
