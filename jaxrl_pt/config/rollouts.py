"""How responses are drawn: sampler, engine, groups."""

from dataclasses import dataclass, field
from typing import get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.hybrid import HybridModes, ResponseModes, SingleMode
from jaxrl_pt.config.reading import (
  KV,
  MOST_TOKENS,
  Dense,
  Drafts,
  NoDrafts,
  ReSA,
  Table,
  block_of,
  check_reading,
)
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class Sampler:
  """Temperature and filters with which tokens are drawn.

  temperature: the logits are divided by it; 0 takes the likeliest token.
  top_k: the k likeliest tokens are kept; 0 filters nothing.
  top_p: the smallest set of likeliest tokens with this mass is kept; 1 filters nothing.
  min_p: tokens less likely than min_p times the likeliest are dropped; 0 filters nothing.
  banned: tokens that are never drawn.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  banned: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    checks.number(self, 'temperature', 0.0)
    if self.temperature and not 1e-6 <= self.temperature <= 1e6:
      checks.fail(self, 'temperature', '0 for the likeliest token, or a number from 1e-06 to 1e+06')
    checks.integer(self, 'top_k', 0)
    checks.number(self, 'top_p', 0.0, 1.0)
    checks.number(self, 'min_p', 0.0, 1.0)
    if self.top_p == 0:
      checks.fail(self, 'top_p', 'a number above 0')
    checks.token_ids(self, 'banned')


@dataclass(frozen=True)
class Engine:
  """Sizes of the continuous-batching engine, for which its program is compiled once.

  slots: the number of responses that are decoded at once.
  queue: the largest number of responses that wait or are under way.
  prompt_len, response_len: the largest numbers of tokens of a prompt and of a response.
  page_size: tokens of a page of the KV cache.
  num_pages: the number of pages; 0 for as many as all slots could need.
  prefill_chunk: tokens of a prompt that go through the model in one forward pass.
  prefill_rows: the number of prompts that go through the model in one forward pass.
  kv: how keys and values are stored: in the model's type, or in 8, 4 or 3 bits.
  steps_per_call: decode steps of one call, after which the host sees the new tokens.
  top_logprobs: the most of the likeliest tokens whose log-probabilities a request may ask for.
  constrained: the largest number of constrained responses at a time.
  sparse: whether responses are drawn by sparse attention, whose blocks are the pages.
  drafts: whether tokens are drafted, of which several then go through the model at once.
  """

  slots: int = 32
  queue: int = 256
  prompt_len: int = 1024
  response_len: int = 1024
  page_size: int = 16
  num_pages: int = 0
  prefill_chunk: int = 128
  prefill_rows: int = 2
  kv: KV = 'model'
  steps_per_call: int = 16
  top_logprobs: int = 20
  constrained: int = 16
  sparse: Dense | ReSA = field(default_factory=Dense)
  drafts: Drafts = field(default_factory=NoDrafts)

  def __post_init__(self) -> None:
    for name, high, beside, what in (
        ('slots', 2**20, ('response_len',), 'the tokens of the slots'),
        ('queue', 2**20, ('response_len',), 'the tokens of the queue'),
        ('prompt_len', MOST_TOKENS, ('slots',), 'the prompts of the slots'),
        ('response_len', MOST_TOKENS, ('slots',), 'the tokens of the slots'),
        ('page_size', MOST_TOKENS, (), 'one page'),
        ('prefill_chunk', MOST_TOKENS, ('prefill_rows',), 'one piece'),
        ('prefill_rows', 2**20, ('prefill_chunk',), 'one piece'),
        ('steps_per_call', MOST_TOKENS, ('slots',), 'the tokens of a call')):
      checks.size(self, name, 1, high, 4 * checks.units(self, *beside), what)
    checks.size(self, 'num_pages', 0, 2**26, 4 * self.page_size, 'the pages')
    checks.size(self, 'top_logprobs', 0, 1000, 8 * checks.units(self, 'queue', 'response_len'),
                'the likeliest tokens')
    checks.size(self, 'constrained', 1, 2**20, 2**12, 'the masks of their tokens')
    checks.choice(self, 'kv', KV)
    checks.instance(self, 'sparse', Dense, ReSA)
    checks.instance(self, 'drafts', *get_args(Drafts))
    check_reading(self.sparse, self.drafts)
    block = block_of(self.sparse, self.drafts)
    if block and block != self.page_size:
      raise UserError(f'Engine.page_size = {self.page_size} is not ReSA.block = {block}, but a '
                      'block is a page: set both to one number.')
    # Pages for one response, for the prompt that is kept for sharing, and page 0, which nobody has.
    pages = lambda tokens: -(-tokens // self.page_size)
    least = pages(self.prompt_len + self.response_len) + pages(self.prompt_len) + 1
    if self.num_pages and self.num_pages < least:
      raise UserError(f'Engine.num_pages = {self.num_pages} cannot hold one response of '
                      f'Engine.prompt_len + Engine.response_len = '
                      f'{self.prompt_len + self.response_len} tokens: set it to at least {least}.')


@dataclass(frozen=True)
class Slots:
  """How rollouts are decoded: slots that are refilled as responses end, over a cache in pages.

  slots: the number of responses that are decoded at once on each data shard; 0 for all of them.
  page_size: tokens of a page of the KV cache. With sparse attention a page is a block of
    ReSA.block tokens.
  num_pages: the number of pages of each data shard, if there are fewer slots than responses; 0 for
    as many as its slots could need.
  prefill_chunk: tokens of a prompt that go through the model in one forward pass.
  prefill_tokens: tokens of all prompts that go through the model in one forward pass.
  kv: how keys and values are stored: in the model's type, or in 8, 4 or 3 bits.
  head: how the sampler holds embedding and head: in the model's type, or in 8 or 4 bits.
  packed: whether a sampler on one device holds ternary weights packed; on a mesh it always does.
  drafts: whether tokens are drafted, of which several then go through the model at once.
  """

  slots: int = 0
  page_size: int = 32
  num_pages: int = 0
  prefill_chunk: int = 256
  prefill_tokens: int = 1024
  kv: KV = 'model'
  head: Table = 'model'
  packed: bool = False
  drafts: Drafts = field(default_factory=NoDrafts)

  def __post_init__(self) -> None:
    checks.instance(self, 'drafts', *get_args(Drafts))
    checks.size(self, 'slots', 0, 2**20, 4, 'the slots')
    for name in ('page_size', 'prefill_chunk', 'prefill_tokens'):
      checks.size(self, name, 1, MOST_TOKENS, 4, 'so many tokens')
    checks.size(self, 'num_pages', 0, 2**26, 4 * self.page_size, 'the pages')
    if self.num_pages and not self.slots:
      raise UserError(f'Slots.num_pages = {self.num_pages} with a slot for every response, which '
                      'needs all pages: set Slots.slots too.')
    checks.choice(self, 'kv', KV)
    checks.choice(self, 'head', Table)
    checks.flag(self, 'packed')

  @property
  def coarse(self) -> str:
    """The setting that rounds so much that another policy draws; empty where none does."""
    if self.kv in ('int4', 'int3'):
      return f"Slots.kv = '{self.kv}'"
    return f"Slots.head = '{self.head}'" if self.head == 'int4' else ''


@dataclass(frozen=True)
class OnPolicy:
  """Each batch is drawn by the parameters that it updates."""


@dataclass(frozen=True)
class OneStepOff:
  """Each batch is drawn while the batch before is verified, by parameters that are one step older.

  It needs a correction.
  """


MOST_STALENESS = 64  # steps


@dataclass(frozen=True)
class InFlight:
  """Responses are under way over several steps and go on with the parameters of each.

  The sampler works on the batches of this step and of the next `staleness` ones, and a step ends
  once its own batch is drawn. What is left of the others goes on in the next step (a partial
  rollout) under newer parameters (an in-flight weight update, as in PipelineRL 2509.19128), so that
  the longest responses of a batch are drawn beside the next batches. It needs a correction.

  staleness: the most steps by which the parameters that drew a token may be older than those that
    learn from it. So many batches are under way beside a step's own.
  """

  staleness: int = 1

  def __post_init__(self) -> None:
    checks.integer(self, 'staleness', 1, MOST_STALENESS)


Mode = OnPolicy | OneStepOff | InFlight


@dataclass(frozen=True)
class AllGroups:
  """Every group that is drawn is learned from."""


@dataclass(frozen=True)
class DynamicSampling:
  """Groups are drawn again until each has right and wrong responses (2503.14476).

  from_step: the first step of which this holds.
  max_rounds: how often a step draws at most; zero-advantage groups fill the batch after that.
  """

  from_step: int = 0
  max_rounds: int = 4

  def __post_init__(self) -> None:
    checks.integer(self, 'from_step', 0)
    checks.integer(self, 'max_rounds', 1)


Selection = AllGroups | DynamicSampling


@dataclass(frozen=True)
class Rollouts:
  """The responses that a step draws: num_prompts groups of group_size responses.

  prompt_len, response_tokens: the largest numbers of tokens of a prompt and of a response.
  slots: how many responses are decoded at once, and in what cache.
  dump_every: steps between rollouts that are kept in the work directory for replay; 0 keeps none.
  mismatch_gate: a step whose sampler–trainer mismatch, mean exp|log π_train − log π_sampler|, is
    larger stops the run and leaves its worst responses in the work directory; 0 switches the gate
    off. There is no gate where the two policies differ on purpose: off-policy, where responses are
    drawn by sparse attention that the learner does not replay, and with keys and values of 4 or 3
    bits or a head of 4.
  sparse: whether responses are drawn by sparse attention.
  modes: whether the first token of a response says if it thinks first.
  """

  num_prompts: int = 32
  group_size: int = 8
  prompt_len: int = 64
  response_tokens: int = 1
  sampler: Sampler = field(default_factory=Sampler)
  mode: Mode = field(default_factory=OnPolicy)
  selection: Selection = field(default_factory=AllGroups)
  slots: Slots = field(default_factory=Slots)
  dump_every: int = 0
  mismatch_gate: float = 1.05
  sparse: Dense | ReSA = field(default_factory=Dense)
  modes: ResponseModes = field(default_factory=SingleMode)

  def __post_init__(self) -> None:
    for name, high, beside, what in (
        ('num_prompts', 2**20, ('group_size', 'response_tokens'), 'the responses of a batch'),
        ('group_size', 2**16, ('num_prompts', 'response_tokens'), 'the responses of a batch'),
        ('prompt_len', MOST_TOKENS, ('num_prompts',), 'the prompts of a batch'),
        ('response_tokens', MOST_TOKENS, ('num_prompts', 'group_size'),
         'the responses of a batch')):
      checks.size(self, name, 1, high, 4 * checks.units(self, *beside), what)
    num_tokens = self.num_prompts * (self.prompt_len + self.group_size * self.response_tokens)
    if num_tokens > checks.INT32:
      raise UserError(f'Rollouts asks for {num_tokens} tokens a batch (num_prompts × (prompt_len '
                      f'+ group_size × response_tokens)), whose ids alone would take '
                      f'{checks.memory(4 * num_tokens)}: lower one of the four.')
    checks.instance(self, 'sampler', Sampler)
    checks.instance(self, 'mode', *get_args(Mode))
    checks.instance(self, 'selection', *get_args(Selection))
    checks.instance(self, 'sparse', Dense, ReSA)
    checks.instance(self, 'slots', Slots)
    checks.integer(self, 'dump_every', 0)
    checks.number(self, 'mismatch_gate', 0.0)
    if 0 < self.mismatch_gate < 1:
      checks.fail(self, 'mismatch_gate', 'at least 1, where both agree, or 0 for no gate')
    if self.mode != OnPolicy() and self.selection != AllGroups():
      raise UserError('Rollouts.selection = @cfg.DynamicSampling() draws until it has what it '
                      f'needs, which @cfg.{type(self.mode).__name__}() cannot foresee: choose '
                      '@cfg.OnPolicy().')
    if isinstance(self.mode, InFlight) and self.sparse != Dense():
      raise UserError('Rollouts.mode = @cfg.InFlight() draws by dense attention: leave '
                      'Rollouts.sparse at @cfg.Dense().')
    check_reading(self.sparse, self.slots.drafts)
    checks.instance(self, 'modes', *get_args(ResponseModes))
    _check_modes(self)

  @property
  def forces_modes(self) -> bool:
    """Whether half of each group is made to think, and the other half not to."""
    return isinstance(self.modes, HybridModes) and self.modes.forced

  @property
  def is_replayed(self) -> bool:
    """Whether the learner reads the blocks that the sampler read."""
    return isinstance(self.sparse, ReSA) and self.sparse.replay

  @property
  def is_gated(self) -> bool:
    """Whether a mismatch can stop the run."""
    same = (self.sparse == Dense() or self.is_replayed) and not self.slots.coarse
    return self.mismatch_gate > 0 and self.mode == OnPolicy() and same


def _check_modes(rollouts: Rollouts) -> None:
  """Refuses settings with which half of each group cannot be forced into each mode."""
  if isinstance(rollouts.modes, HybridModes) and rollouts.response_tokens < 2:
    raise UserError('Rollouts.response_tokens = 1 has room for the token of a mode alone (Rollouts.'
                    'modes = @cfg.HybridModes()): set it to at least 2.')
  if not rollouts.forces_modes:
    return
  if rollouts.group_size % 2:
    raise UserError(f'Rollouts.group_size = {rollouts.group_size} is odd, but half of each group '
                    'is forced into each mode (HybridModes.forced): choose an even number.')
  sampler = rollouts.sampler
  if sampler.top_k or sampler.top_p < 1 or sampler.min_p:
    raise UserError(f'{sampler} may leave a mode no probability at all, and so no gradient, while '
                    'HybridModes.forced draws it all the same: leave Sampler.top_k, top_p and '
                    'min_p at their defaults.')
