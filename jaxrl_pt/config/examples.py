"""Sources of prompts with answers: demonstrations and conversations."""

from dataclasses import dataclass
from typing import get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.generated import Generated
from jaxrl_pt.config.pairs import JudgePairs, Preferences
from jaxrl_pt.config.problems import ReasoningGym
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class Demonstrations:
  """Prompts of problems, each with a response, for the warm start of RL.

  They are split by their prompts: Data.validation_fraction holds out the same prompts as an equal
  Problems.held_out. Demonstrations of generated problems show the work, with slips where the source
  has noise; those of reasoning-gym are the bare answer. Those of a judge are split by the queries.
  """

  source: Generated | ReasoningGym | JudgePairs

  def __post_init__(self) -> None:
    checks.instance(self, 'source', *get_args(Generated), ReasoningGym, JudgePairs)
    if isinstance(self.source, JudgePairs) and isinstance(self.source.source, Preferences):
      raise UserError('Demonstrations.source = @cfg.JudgePairs() shows how generated pairs are '
                      'judged, and files of preferences have no such work in them: choose '
                      'JudgePairs.source = @cfg.ResultPreferences() or @cfg.SlipPreferences().')


@dataclass(frozen=True)
class Conversations:
  """Conversations of which the assistant's part is learned: rows of JSON-lines files.

  A row has `messages`, a list of {"role", "content"}, or `prompt` and `completion`. Rows are split
  by what they ask: Data.validation_fraction holds out all conversations with the same prompt.
  """

  glob: str

  def __post_init__(self) -> None:
    checks.text(self, 'glob')


@dataclass(frozen=True)
class HybridConversations:
  """Examples that think first and such that answer at once, for hybrid fine-tuning (2505.14631).

  A row of a JSON-lines file has `prompt`, `thinking` (empty where the answer comes at once) and
  `answer`. Rows that say the same are learned once.

  think, think_end, no_think, no_think_end: the tags round thinking, and round an answer without;
    the last may be ''. The first tokens of both kinds are those of HybridModes.
  evaluation_glob, evaluation_field: JSON-lines files of the evaluation sets, and the field of their
    prompts; '' for none.
  ngram: rows whose prompt shares so many words in a row with one of those prompts are left out.
  """

  glob: str
  think: str = '<think>'
  think_end: str = '</think>'
  no_think: str = '<no_think>'
  no_think_end: str = '</no_think>'
  evaluation_glob: str = ''
  evaluation_field: str = 'prompt'
  ngram: int = 13

  def __post_init__(self) -> None:
    for name in ('glob', 'think', 'think_end', 'no_think', 'evaluation_field'):
      checks.text(self, name)
    for name in ('no_think_end', 'evaluation_glob'):
      checks.text(self, name, empty=True)
    checks.integer(self, 'ngram', 1, 100)
    if self.no_think == self.think:
      checks.fail(self, 'no_think', 'another text than HybridConversations.think')


@dataclass(frozen=True)
class WeightedConversations:
  """Several sources of conversations, each with a weight that multiplies its loss.

  weights: one for each source, in their order.
  """

  sources: tuple[Conversations | HybridConversations | Demonstrations, ...]
  weights: tuple[float, ...]

  def __post_init__(self) -> None:
    kinds = Conversations, HybridConversations, Demonstrations
    if not (isinstance(self.sources, (list, tuple)) and self.sources
            and all(isinstance(source, kinds) for source in self.sources)):
      checks.fail(self, 'sources', f'a list of {checks.one_of(kinds)}')
    if not (isinstance(self.weights, (list, tuple)) and len(self.weights) == len(self.sources)
            and all(checks.is_weight(weight) and weight > 0 for weight in self.weights)):
      checks.fail(self, 'weights', f'{len(self.sources)} numbers above 0, one for each source')
    object.__setattr__(self, 'sources', tuple(self.sources))
    object.__setattr__(self, 'weights', tuple(map(float, self.weights)))
