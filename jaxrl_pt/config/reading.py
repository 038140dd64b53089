"""How a sampler keeps its cache and weights, and how it reads them: sparse attention, drafts."""

from dataclasses import dataclass, field
from typing import Literal

from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError

# How keys and values are stored: in the model's type, or quantised (`nn.kv_quant`).
KV = Literal['model', 'int8', 'int4', 'int3']
# How a sampler holds embedding and head: in the model's type, or quantised (`nn.packed`).
Table = Literal['model', 'int8', 'int4']
MOST_TOKENS = 2**24  # The largest number of tokens of a row.


@dataclass(frozen=True)
class RefreshEvery:
  """Each row is rectified after every `tokens` tokens.

  With 1 each step reads a dense cache, which shows the effect of sparse reading alone
  ("decode-only").
  """

  tokens: int = 32

  def __post_init__(self) -> None:
    checks.size(self, 'tokens', 1, MOST_TOKENS, 4, 'so many tokens of a row')


@dataclass(frozen=True)
class RefreshNever:
  """No row is rectified."""


@dataclass(frozen=True)
class Dense:
  """A step reads the whole KV cache of a row."""


@dataclass(frozen=True)
class ReSA:
  """Rectified sparse attention (2506.04108): a step reads only some blocks of the KV cache.

  block: tokens of a block.
  active: the share of the blocks that a step reads.
  min_blocks: the smallest number of blocks that a step reads, if there are so many.
  local_blocks: how many of the last blocks are always among those that a step reads.
  refresh: when keys and values of drawn tokens are computed again by dense attention.
  replay: whether the learner's forward pass reads the blocks that the sampler read, so that both
    compute one policy. It takes two forward passes over the responses, and one bit for each block,
    key/value head, layer and token.
  """

  block: int = 16
  active: float = 0.1
  min_blocks: int = 16
  local_blocks: int = 1
  refresh: RefreshEvery | RefreshNever = field(default_factory=RefreshEvery)
  replay: bool = False

  def __post_init__(self) -> None:
    checks.size(self, 'block', 1, MOST_TOKENS, 4, 'the tokens of one block')
    checks.number(self, 'active', 0.0, 1.0)
    if self.active == 0:
      checks.fail(self, 'active', 'a share of the blocks above 0, at most 1')
    checks.integer(self, 'min_blocks', 1)
    checks.integer(self, 'local_blocks', 0, self.min_blocks)
    checks.instance(self, 'refresh', RefreshEvery, RefreshNever)
    checks.flag(self, 'replay')

  @property
  def window(self) -> int:
    """Tokens between two rectifications of a row; 0 where there is none."""
    return self.refresh.tokens if isinstance(self.refresh, RefreshEvery) else 0


@dataclass(frozen=True)
class NoDrafts:
  """The tokens of a response go through the model one by one."""


MOST_DRAFTS = 64


@dataclass(frozen=True)
class PromptLookup:
  """Drafts are what followed the newest `ngram` tokens when they last stood in the text.

  A dense forward pass checks them, so that the responses are those of NoDrafts.

  tokens: the number of drafts.
  """

  tokens: int = 4
  ngram: int = 3

  def __post_init__(self) -> None:
    checks.integer(self, 'tokens', 1, MOST_DRAFTS)
    checks.integer(self, 'ngram', 1, MOST_DRAFTS)


@dataclass(frozen=True)
class SparseDrafts:
  """Drafts are what sparse attention draws (2506.04108 section 4.4).

  A dense forward pass checks them, so that the responses are those of NoDrafts. It also rectifies
  the cache, so that `ReSA.refresh` and `ReSA.replay` are not read.

  tokens: the number of drafts.
  resa: which blocks are read.
  """

  tokens: int = 4
  resa: ReSA = field(default_factory=ReSA)

  def __post_init__(self) -> None:
    checks.integer(self, 'tokens', 1, MOST_DRAFTS)
    checks.instance(self, 'resa', ReSA)
    if self.resa.replay:
      raise UserError('SparseDrafts.resa has replay = True, but what is drawn is dense: leave it '
                      'out.')


Drafts = NoDrafts | PromptLookup | SparseDrafts


def block_of(sparse: Dense | ReSA, drafts: Drafts) -> int:
  """Tokens of a block where sparse attention draws or drafts, else 0."""
  if isinstance(drafts, SparseDrafts):
    return drafts.resa.block
  return sparse.block if isinstance(sparse, ReSA) else 0


def check_reading(sparse: Dense | ReSA, drafts: Drafts) -> None:
  """Refuses what does not go with sparse attention."""
  if sparse != Dense() and drafts != NoDrafts():
    raise UserError('Drafts are checked by dense attention, which @cfg.ReSA() replaces: choose '
                    '@cfg.NoDrafts(), or @cfg.SparseDrafts() with @cfg.Dense().')
