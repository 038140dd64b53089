"""Every setting of a run, as frozen dataclasses that validate themselves.

A run is one `Run` value. Choosing a method is choosing a type: `Run.objective`
is `NextToken()` or `RPT()`, `Algorithm.advantage` is `GRPO()` or `OPO()`, and code
dispatches on it with `match`. This module knows nothing of gin, files or
devices (`gin_bindings` builds these values from `*.gin` files); a bad value
raises `UserError` with what to write instead.
"""

import dataclasses
from dataclasses import dataclass, field
import math
from typing import Any, Literal, get_args

from jaxrl_pt.errors import UserError

WeightQuant = Literal['none', 'ternary']
ActivationQuant = Literal['none', 'int8', 'int4', 'int4_absmax']
Activation = Literal['swiglu', 'relu2']
Dtype = Literal['float32', 'bfloat16']
Remat = Literal['none', 'block']


# --- Validation helpers ---------------------------------------------------------


def _fail(owner: Any, name: str, expected: str) -> None:
  value = getattr(owner, name)
  raise UserError(f'{type(owner).__name__}.{name} = {value!r}: expected {expected}.')


def _integer(owner: Any, name: str, low: int, high: int | None = None) -> None:
  value = getattr(owner, name)
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  if not is_integer or value < low or (high is not None and value > high):
    _fail(owner, name, f'a whole number of at least {low}'
          if high is None else f'a whole number from {low} to {high}')


def _number(owner: Any, name: str, low: float, high: float = math.inf) -> None:
  value = getattr(owner, name)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not low <= value <= high or math.isnan(value):
    _fail(owner, name, f'a number of at least {low:g}'
          if high == math.inf else f'a number from {low:g} to {high:g}')


def _rising(owner: Any, name: str, length: int) -> None:
  """Also turns a list, as gin files write one, into the tuple that can be hashed."""
  value = getattr(owner, name)
  is_numbers = isinstance(value, (list, tuple)) and all(
      isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
  if not is_numbers or len(value) != length or list(value) != sorted(value):
    _fail(owner, name, f'{length} numbers that rise')
  object.__setattr__(owner, name, tuple(value))


def _token_ids(owner: Any, name: str) -> None:
  """Also turns a list, as gin files write one, into the tuple that can be hashed."""
  value = getattr(owner, name)
  is_ids = isinstance(value, (list, tuple)) and all(
      isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
  if not is_ids:
    _fail(owner, name, 'a list of token ids')
  object.__setattr__(owner, name, tuple(value))


def _choice(owner: Any, name: str, literal: Any) -> None:
  options = get_args(literal)
  if getattr(owner, name) not in options:
    _fail(owner, name, 'one of ' + ', '.join(repr(o) for o in options))


def _flag(owner: Any, name: str) -> None:
  if not isinstance(getattr(owner, name), bool):
    _fail(owner, name, 'True or False')


def _text(owner: Any, name: str, *, empty: bool = False) -> None:
  value = getattr(owner, name)
  if not isinstance(value, str) or (not value and not empty):
    _fail(owner, name, 'a string' if empty else 'a non-empty string')


def _instance(owner: Any, name: str, *types: type) -> None:
  if not isinstance(getattr(owner, name), types):
    _fail(owner, name, 'one of ' + ', '.join(f'@cfg.{t.__name__}()' for t in types))


# --- Model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Quant:
  """Which projections of the block are quantised, and how (specs: BitNet v2, 2B4T).

  weights: 'ternary' is absmean W1.58; activations: per token, 'int8' absmax,
  'int4' absmean, 'int4_absmax' the control of BitNet v2 section 1.9.
  hadamard: rotate the inputs of W_o and W_down (H-BitLinear, 2504.18415).
  """

  weights: WeightQuant = 'none'
  activations: ActivationQuant = 'none'
  hadamard: bool = False

  def __post_init__(self) -> None:
    _choice(self, 'weights', WeightQuant)
    _choice(self, 'activations', ActivationQuant)
    _flag(self, 'hadamard')
    if self.weights == 'none' and (self.activations != 'none' or self.hadamard):
      raise UserError(
          'Quant.activations and Quant.hadamard act on BitLinear layers only: set '
          "Quant.weights = 'ternary', or leave them at 'none' and False.")


@dataclass(frozen=True)
class Model:
  """Shape of a decoder-only transformer.

  norm_epsilon is that of every RMSNorm; it is here only because imported models differ in it.
  """

  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  rope_theta: float = 10_000.0
  activation: Activation = 'swiglu'
  sub_norm: bool = False
  tied_head: bool = True
  quant: Quant = field(default_factory=Quant)
  norm_epsilon: float = 1e-5

  def __post_init__(self) -> None:
    for name in ('num_layers', 'd_model', 'd_ff', 'num_heads', 'num_kv_heads', 'head_dim',
                 'vocab_size'):
      _integer(self, name, 1)
    _number(self, 'rope_theta', 1.0)
    _number(self, 'norm_epsilon', 0.0, 1.0)
    _choice(self, 'activation', Activation)
    _flag(self, 'sub_norm')
    _flag(self, 'tied_head')
    _instance(self, 'quant', Quant)
    if self.num_heads % self.num_kv_heads:
      raise UserError(f'Model.num_heads = {self.num_heads} is not a multiple of '
                      f'Model.num_kv_heads = {self.num_kv_heads}: each key/value head serves '
                      'a whole group of query heads.')
    if self.head_dim % 2:
      raise UserError(f'Model.head_dim = {self.head_dim} is odd: RoPE rotates pairs, so make '
                      'it even.')


@dataclass(frozen=True)
class Compute:
  """How the same arithmetic is carried out; changes speed and memory, not the method.

  loss_chunk: tokens of the whole batch, over all devices, whose float32 logits exist at
  once; 0 computes all of them.
  unroll: layers per iteration of the scan over layers (0 unrolls them all, which
  XLA runs faster on a CPU and compiles slower everywhere).
  """

  dtype: Dtype = 'float32'
  remat: Remat = 'none'
  unroll: int = 1
  loss_chunk: int = 0

  def __post_init__(self) -> None:
    _choice(self, 'dtype', Dtype)
    _choice(self, 'remat', Remat)
    _integer(self, 'unroll', 0)
    _integer(self, 'loss_chunk', 0)


@dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; `fsdp = 0` takes all devices that are left."""

  data: int = 1
  fsdp: int = 0
  tensor: int = 1
  context: int = 1

  def __post_init__(self) -> None:
    for name in ('data', 'tensor', 'context'):
      _integer(self, name, 1)
    _integer(self, 'fsdp', 0)


# --- Problems -------------------------------------------------------------------
# Prompts with a reference answer, for a verifier to judge. Generated ones are a function of
# (seed, index) alone.


@dataclass(frozen=True)
class JsonlProblems:
  """JSON-lines files (plain or .gz): a row's prompt and its reference answer."""

  glob: str
  prompt_field: str = 'question'
  answer_field: str = 'answer'

  def __post_init__(self) -> None:
    for name in ('glob', 'prompt_field', 'answer_field'):
      _text(self, name)


@dataclass(frozen=True)
class KnightsAndKnaves:
  """Knights tell the truth, knaves lie: who is what? Each puzzle has exactly one solution."""

  size: int
  min_people: int = 3
  max_people: int = 7
  seed: int = 0

  def __post_init__(self) -> None:
    _integer(self, 'size', 1)
    _integer(self, 'min_people', 2, 8)
    _integer(self, 'max_people', self.min_people, 8)
    _integer(self, 'seed', 0)


@dataclass(frozen=True)
class ReasoningGym:
  """Any task of the reasoning-gym library by its name (needs the `gym` extra).

  settings: of the task, as pairs of name and value: (('max_terms', 3), ('max_digits', 1)).
  """

  task: str
  size: int
  seed: int = 0
  settings: tuple[tuple[str, int | float | str], ...] = ()

  def __post_init__(self) -> None:
    _text(self, 'task')
    _integer(self, 'size', 1)
    _integer(self, 'seed', 0)
    is_pair = lambda x: (isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)
                         and isinstance(x[1], (int, float, str)))
    if not isinstance(self.settings, tuple) or not all(map(is_pair, self.settings)):
      _fail(self, 'settings', "pairs of a setting's name and its value, as (('max_terms', 3),)")


@dataclass(frozen=True)
class Arithmetic:
  """Sums of num_terms numbers of up to num_digits digits, worked out term by term.

  noise: share of the demonstrations that go wrong at some step.
  """

  size: int
  num_terms: int = 3
  num_digits: int = 2
  noise: float = 0.5
  seed: int = 0

  def __post_init__(self) -> None:
    _integer(self, 'size', 1)
    _integer(self, 'num_terms', 2, 16)
    _integer(self, 'num_digits', 1, 9)
    _number(self, 'noise', 0.0, 1.0)
    _integer(self, 'seed', 0)


@dataclass(frozen=True)
class RedundantChecks:
  """Sums modulo 10 of 2 to max_steps + 1 digits: a step for each, then checks that change
  nothing.

  min_steps, max_steps: steps that the answer needs, which the prompt shows.
  max_checks: a complete demonstration ends with 0 to max_checks redundant checks.
  noise: share of the demonstrations that stop before the last step, mostly wrong then.
  """

  size: int
  min_steps: int = 1
  max_steps: int = 6
  max_checks: int = 8
  noise: float = 0.5
  seed: int = 0

  def __post_init__(self) -> None:
    _integer(self, 'size', 1)
    _integer(self, 'min_steps', 1, 64)
    _integer(self, 'max_steps', self.min_steps, 64)
    _integer(self, 'max_checks', 0)
    _number(self, 'noise', 0.0, 1.0)
    _integer(self, 'seed', 0)


ProblemSource = JsonlProblems | KnightsAndKnaves | ReasoningGym | Arithmetic | RedundantChecks


@dataclass(frozen=True)
class Problems:
  """Problems to reinforce on, and those held out to measure it.

  template: what the policy reads, with {prompt} where the problem's own text goes.
  held_out: share of the problems, chosen by a hash of their text, that training never sees.
  """

  source: ProblemSource
  template: str = '{prompt}'
  held_out: float = 0.05

  def __post_init__(self) -> None:
    _instance(self, 'source', *get_args(ProblemSource))
    _text(self, 'template')
    _number(self, 'held_out', 0.0, 1.0)
    if self.template.count('{prompt}') != 1:
      _fail(self, 'template', 'a text with {prompt} in it once')


# --- Data -----------------------------------------------------------------------


@dataclass(frozen=True)
class PythonStdlib:
  """The embedded default corpus: the standard library's source and docstrings.

  max_bytes bounds the text taken (files in a fixed shuffled order).
  """

  max_bytes: int = 8_000_000

  def __post_init__(self) -> None:
    _integer(self, 'max_bytes', 10_000)


@dataclass(frozen=True)
class TextFiles:
  """UTF-8 text files (plain or .gz) matching `glob`.

  document_start: a regular expression (multi-line mode) at whose matches a new
  document begins; empty means that each file is one document.
  """

  glob: str
  document_start: str = ''

  def __post_init__(self) -> None:
    _text(self, 'glob')
    _text(self, 'document_start', empty=True)


@dataclass(frozen=True)
class Jsonl:
  """JSON-lines files (plain or .gz); the text of each row stands in `text_field`."""

  glob: str
  text_field: str = 'text'

  def __post_init__(self) -> None:
    _text(self, 'glob')
    _text(self, 'text_field')


@dataclass(frozen=True)
class Parquet:
  """Parquet files; the text of each row stands in `column`."""

  glob: str
  column: str = 'text'

  def __post_init__(self) -> None:
    _text(self, 'glob')
    _text(self, 'column')


@dataclass(frozen=True)
class ArrayRecord:
  """ArrayRecord files: UTF-8 text records, or tf.train.Example with `feature` as text."""

  glob: str
  feature: str = ''

  def __post_init__(self) -> None:
    _text(self, 'glob')
    _text(self, 'feature', empty=True)


@dataclass(frozen=True)
class Seqio:
  """A registered seqio Task or Mixture, cached once (needs the `seqio` extra).

  module is imported to register it; feature holds the token ids.
  """

  name: str
  module: str
  feature: str = 'targets'

  def __post_init__(self) -> None:
    for name in ('name', 'module', 'feature'):
      _text(self, name)


@dataclass(frozen=True)
class Demonstrations:
  """Examples of problems, prompt and response: the warm start of RL.

  Those of generated problems are worked, with slips where the source is noisy; those of
  reasoning-gym are the bare answer.
  """

  source: Arithmetic | RedundantChecks | ReasoningGym

  def __post_init__(self) -> None:
    _instance(self, 'source', Arithmetic, RedundantChecks, ReasoningGym)


Source = PythonStdlib | TextFiles | Jsonl | Parquet | ArrayRecord | Seqio | Demonstrations


@dataclass(frozen=True)
class Bytes:
  """One token per UTF-8 byte, ids 0–255, and end of text 256."""


@dataclass(frozen=True)
class TrainedBPE:
  """Byte-level BPE trained on the training documents and saved with the run."""

  vocab_size: int

  def __post_init__(self) -> None:
    _integer(self, 'vocab_size', 257)


@dataclass(frozen=True)
class HuggingFaceTokenizer:
  """Any Hugging Face `tokenizer.json` (plain or .gz) on disk; `end_of_text` is its EOS token."""

  path: str
  end_of_text: str

  def __post_init__(self) -> None:
    _text(self, 'path')
    _text(self, 'end_of_text')


@dataclass(frozen=True)
class SentencePiece:
  """A SentencePiece `.model` file on disk."""

  path: str

  def __post_init__(self) -> None:
    _text(self, 'path')


Tokenizer = Bytes | TrainedBPE | HuggingFaceTokenizer | SentencePiece


@dataclass(frozen=True)
class Data:
  """Documents → tokens → packed examples of `seq_len` predicted tokens.

  validation_fraction: share of the documents (whole documents, by hash) held out.
  validation_glob: files of the source's kind that are the validation split instead.
  long_documents: a document longer than seq_len is 'split' over examples or an 'error'.
  cache_dir: where prepared examples are kept and shared between runs; empty means
  the run's own work directory.
  num_workers: Grain worker processes a host; 0 reads in the training process.
  """

  source: Source
  tokenizer: Tokenizer
  seq_len: int
  validation_fraction: float = 0.02
  validation_glob: str = ''
  long_documents: Literal['split', 'error'] = 'split'
  cache_dir: str = ''
  num_workers: int = 0

  def __post_init__(self) -> None:
    _instance(self, 'source', *get_args(Source))
    _instance(self, 'tokenizer', *get_args(Tokenizer))
    _integer(self, 'seq_len', 2)
    _number(self, 'validation_fraction', 0.0, 0.5)
    _text(self, 'validation_glob', empty=True)
    if self.validation_glob and isinstance(self.source,
                                           (PythonStdlib, Seqio, Demonstrations)):
      raise UserError('Data.validation_glob goes with a source of files: leave it empty for '
                      f'{type(self.source).__name__}.')
    _choice(self, 'long_documents', Literal['split', 'error'])
    _text(self, 'cache_dir', empty=True)
    _integer(self, 'num_workers', 0)


# --- Optimiser ------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
  """Linear warm-up, then constant. All steps are optimiser steps."""

  peak: float
  warmup_steps: int = 0

  def __post_init__(self) -> None:
    _number(self, 'peak', 0.0)
    _integer(self, 'warmup_steps', 0)


@dataclass(frozen=True)
class Cosine:
  """Linear warm-up, then cosine decay to `end` at the last step."""

  peak: float
  end: float = 0.0
  warmup_steps: int = 0

  def __post_init__(self) -> None:
    _number(self, 'peak', 0.0)
    _number(self, 'end', 0.0)
    _integer(self, 'warmup_steps', 0)


@dataclass(frozen=True)
class WSD:
  """Warm-up, stable, linear decay to `end` over the last `decay_fraction` of the run."""

  peak: float
  end: float = 0.0
  warmup_steps: int = 0
  decay_fraction: float = 0.2

  def __post_init__(self) -> None:
    _number(self, 'peak', 0.0)
    _number(self, 'end', 0.0)
    _integer(self, 'warmup_steps', 0)
    _number(self, 'decay_fraction', 0.0, 1.0)


@dataclass(frozen=True)
class TwoStage:
  """BitNet's two stages (specs/bitnet_v2.md 1.5): both peaks start full-length decays.

  Up to `switch_fraction` of the run the schedule decays from `peak`, afterwards it
  is the tail of the schedule that would have decayed from `second_peak`; weight
  decay is on before the switch and exactly 0 after it. `shape` 'linear' is BitNet
  v2's, 'cosine' BitNet b1.58 2B4T's.
  """

  peak: float
  second_peak: float
  end: float = 0.0
  warmup_steps: int = 0
  switch_fraction: float = 0.5
  shape: Literal['linear', 'cosine'] = 'linear'

  def __post_init__(self) -> None:
    for name in ('peak', 'second_peak', 'end'):
      _number(self, name, 0.0)
    _integer(self, 'warmup_steps', 0)
    _number(self, 'switch_fraction', 0.0, 1.0)
    _choice(self, 'shape', Literal['linear', 'cosine'])


Schedule = Constant | Cosine | WSD | TwoStage


@dataclass(frozen=True)
class AdamW:
  """optax AdamW after a clip of the global gradient norm (0 switches the clip off).

  Weight decay acts on matrices only (embeddings and norms are left alone).
  weight_decay_shape: 'constant', or 'cosine' to rise to `weight_decay` over stage
  one as 2B4T's does; either way TwoStage sets it to 0 in its second stage.
  """

  schedule: Schedule
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  weight_decay_shape: Literal['constant', 'cosine'] = 'constant'
  clip_norm: float = 1.0

  def __post_init__(self) -> None:
    _instance(self, 'schedule', *get_args(Schedule))
    _number(self, 'b1', 0.0, 1.0)
    _number(self, 'b2', 0.0, 1.0)
    _number(self, 'eps', 0.0)
    _number(self, 'weight_decay', 0.0)
    _choice(self, 'weight_decay_shape', Literal['constant', 'cosine'])
    _number(self, 'clip_norm', 0.0)


# --- Objectives -----------------------------------------------------------------


@dataclass(frozen=True)
class NextToken:
  """Next-token prediction over packed documents.

  int4_from: fraction of the steps after which activations go from int8 to int4
  with the optimiser's state kept (BitNet v2: 0.95); 1.0 never switches.
  """

  int4_from: float = 1.0

  def __post_init__(self) -> None:
    _number(self, 'int4_from', 0.0, 1.0)


# How much better than expected each response was.


@dataclass(frozen=True)
class GRPO:
  """A = (r − mean) / (std + 1e-6) inside the group (2402.03300)."""


@dataclass(frozen=True)
class DrGRPO:
  """A = r − mean inside the group (2503.20783)."""


@dataclass(frozen=True)
class RLOO:
  """A = r − mean of the group's other rewards (2402.14740)."""


@dataclass(frozen=True)
class OPO:
  """A = r − Σ|y|r / Σ|y| inside the group (2505.23585)."""


@dataclass(frozen=True)
class OPOLeaveOneOut:
  """OPO's baseline of the group's other responses, which takes its bias away."""


@dataclass(frozen=True)
class OPOBatch:
  """A = r − Σ|y|r / Σ|y| over the whole batch (2505.23585)."""


@dataclass(frozen=True)
class ReinforcePlusPlus:
  """A_t = Σ_{s≥t} γ^{s−t} r_s, whitened over the batch's tokens (2501.03262)."""

  gamma: float = 1.0

  def __post_init__(self) -> None:
    _number(self, 'gamma', 0.0, 1.0)


@dataclass(frozen=True)
class ReinforcePlusPlusBaseline:
  """REINFORCE++ of rewards from which the group's mean is taken first (2501.03262)."""


@dataclass(frozen=True)
class GAE:
  """PPO's advantage (1506.02438) under a value head that learns beside the policy.

  value_lr: learning rate of the head, which is linear in the policy's hidden state.
  """

  gamma: float = 1.0
  lam: float = 0.95
  value_lr: float = 1e-3

  def __post_init__(self) -> None:
    _number(self, 'gamma', 0.0, 1.0)
    _number(self, 'lam', 0.0, 1.0)
    _number(self, 'value_lr', 0.0)


@dataclass(frozen=True)
class OptimalTokenBaseline:
  """A_t = G_t − Σ_i G_t W_t / Σ_i W_t inside the group, W_t the squared norm of the score of
  the tokens up to t (verl)."""


Advantage = (GRPO | DrGRPO | RLOO | OPO | OPOLeaveOneOut | OPOBatch | ReinforcePlusPlus
             | ReinforcePlusPlusBaseline | GAE | OptimalTokenBaseline)
# Those that compare the responses of one prompt.
GROUPED = (GRPO, DrGRPO, RLOO, OPO, OPOLeaveOneOut, ReinforcePlusPlusBaseline,
           OptimalTokenBaseline)


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
    _number(self, 'low', 0.0, 1.0)
    _number(self, 'high', 0.0)


@dataclass(frozen=True)
class DualClip:
  """PPOClip that also keeps the term of a negative advantage above bound · A (1912.09729)."""

  low: float = 0.2
  high: float = 0.2
  bound: float = 3.0

  def __post_init__(self) -> None:
    _number(self, 'low', 0.0, 1.0)
    _number(self, 'high', 0.0)
    _number(self, 'bound', 1.0)


@dataclass(frozen=True)
class GSPO:
  """PPO's clip of the sequence's ratio exp(mean log ρ) (2507.18071)."""

  low: float = 3e-4
  high: float = 4e-4

  def __post_init__(self) -> None:
    _number(self, 'low', 0.0, 1.0)
    _number(self, 'high', 0.0)


@dataclass(frozen=True)
class CISPO:
  """sg(clip(ρ, 1 − low, 1 + high)) · A · log π: no token loses its gradient (2506.13585)."""

  low: float = 1.0
  high: float = 0.2

  def __post_init__(self) -> None:
    _number(self, 'low', 0.0, 1.0)
    _number(self, 'high', 0.0)


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
    _integer(self, 'num_tokens', 1)


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
    _number(self, 'cap', 1.0)


@dataclass(frozen=True)
class SequenceTIS:
  """Each response's terms times min(Π π_train / π_sampler, cap)."""

  cap: float = 2.0

  def __post_init__(self) -> None:
    _number(self, 'cap', 1.0)


@dataclass(frozen=True)
class Rejection:
  """Responses whose mean ratio exp(mean log π_train / π_sampler) lies outside are left out."""

  low: float = 0.5
  high: float = 2.0

  def __post_init__(self) -> None:
    _number(self, 'low', 0.0, 1.0)
    _number(self, 'high', 1.0)


Correction = NoCorrection | TokenTIS | SequenceTIS | Rejection


# How the policy is held near the one it started from.

KLEstimator = Literal['k1', 'k2', 'k3']


@dataclass(frozen=True)
class NoKL:
  """The distance to the start policy is measured, not punished."""


@dataclass(frozen=True)
class KLInLoss:
  """coef · KL added to the loss."""

  coef: float
  estimator: KLEstimator = 'k3'

  def __post_init__(self) -> None:
    _number(self, 'coef', 0.0)
    _choice(self, 'estimator', KLEstimator)
    if self.estimator == 'k1':
      raise UserError("KLInLoss.estimator = 'k1' has an expected gradient of zero: choose 'k2' or "
                      "'k3', or @cfg.KLInReward().")


@dataclass(frozen=True)
class KLInReward:
  """coef · KL taken from the reward of each token."""

  coef: float
  estimator: KLEstimator = 'k1'

  def __post_init__(self) -> None:
    _number(self, 'coef', 0.0)
    _choice(self, 'estimator', KLEstimator)


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
    _integer(self, 'max_tokens', 1)
    _integer(self, 'buffer_tokens', 1, self.max_tokens)


@dataclass(frozen=True)
class ShortRL:
  """Short-RL's length reward (specs/short_rl.md): for correct responses only, a slack of
  `slack_tokens` above the shortest, and only while the batch's accuracy is within
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
    _integer(self, 'slack_tokens', 0)
    _number(self, 'slack_accuracy', 0.0, 1.0)
    _number(self, 'ema', 0.0, 1.0)
    _number(self, 'weight', 0.0)


@dataclass(frozen=True)
class Kimi:
  """Kimi k1.5's length reward (2501.12599): over all responses, without gates."""

  weight: float = 1.0

  def __post_init__(self) -> None:
    _number(self, 'weight', 0.0)


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
    _instance(self, 'advantage', *get_args(Advantage))
    _instance(self, 'surrogate', *get_args(Surrogate))
    _instance(self, 'aggregation', *get_args(Aggregation))
    _instance(self, 'correction', *get_args(Correction))
    _instance(self, 'kl', *get_args(KL))
    _instance(self, 'shaping', *get_args(Shaping))
    _number(self, 'entropy_coef', 0.0)
    _integer(self, 'minibatches', 1)
    _integer(self, 'epochs', 1)
    if self.updates > 1 and self.surrogate == PolicyGradient():
      raise UserError(f'Algorithm makes {self.updates} updates of one rollout batch '
                      '(minibatches × epochs): choose a surrogate with a ratio, such as '
                      '@cfg.PPOClip(), or set both to 1.')

  @property
  def updates(self) -> int:
    """Optimiser steps of one rollout batch."""
    return self.minibatches * self.epochs


# --- Rollouts ---------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
  """How responses are drawn. top_k = 0, top_p = 1 and min_p = 0 filter nothing.

  min_p drops tokens less likely than min_p times the likeliest; banned tokens are never drawn.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  banned: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    _number(self, 'temperature', 0.0)
    _integer(self, 'top_k', 0)
    _number(self, 'top_p', 0.0, 1.0)
    _number(self, 'min_p', 0.0, 1.0)
    if self.top_p == 0:
      _fail(self, 'top_p', 'a number above 0')
    _token_ids(self, 'banned')


@dataclass(frozen=True)
class Every:
  """Rectify after every so many tokens of a row. 1 reads a dense cache at each step: the
  ceiling of what sparse reading alone allows ("decode-only")."""

  tokens: int = 32

  def __post_init__(self) -> None:
    _integer(self, 'tokens', 1)


@dataclass(frozen=True)
class Never:
  """Sparse decoding without rectification."""


@dataclass(frozen=True)
class ReSA:
  """Rectified sparse attention (2506.04108): blocks of `block` tokens, of which a step reads
  the share `active`, at least min_blocks, the last local_blocks always among them.

  refresh: when keys and values of drawn tokens are computed again by dense attention.
  """

  block: int = 16
  active: float = 0.1
  min_blocks: int = 16
  local_blocks: int = 1
  refresh: Every | Never = field(default_factory=Every)

  def __post_init__(self) -> None:
    _integer(self, 'block', 1)
    _number(self, 'active', 0.0, 1.0)
    if self.active == 0:
      _fail(self, 'active', 'a share of the blocks above 0, at most 1')
    _integer(self, 'min_blocks', 1)
    _integer(self, 'local_blocks', 0, self.min_blocks)
    _instance(self, 'refresh', Every, Never)


@dataclass(frozen=True)
class Engine:
  """Sizes of the continuous-batching engine; its program is compiled once for them.

  slots: responses decoded at once; queue: responses waiting or under way at most.
  prompt_len, response_len: most tokens of each. page_size: tokens of a cache page;
  num_pages: of the pool, 0 for as many as all slots could need. prefill_chunk: prompt tokens
  a forward pass takes. kv: how keys and values are stored. steps_per_call: tokens a slot
  decodes between two looks of the host.
  """

  slots: int = 32
  queue: int = 256
  prompt_len: int = 1024
  response_len: int = 1024
  page_size: int = 16
  num_pages: int = 0
  prefill_chunk: int = 128
  kv: Literal['model', 'int8'] = 'model'
  steps_per_call: int = 16

  def __post_init__(self) -> None:
    for name in ('slots', 'queue', 'prompt_len', 'response_len', 'page_size', 'prefill_chunk',
                 'steps_per_call'):
      _integer(self, name, 1)
    _integer(self, 'num_pages', 0)
    _choice(self, 'kv', Literal['model', 'int8'])
    # One response, the prompt kept for sharing, and the page that is nobody's.
    pages = lambda tokens: -(-tokens // self.page_size)
    least = pages(self.prompt_len + self.response_len) + pages(self.prompt_len) + 1
    if self.num_pages and self.num_pages < least:
      raise UserError(f'Engine.num_pages = {self.num_pages} cannot hold one response of '
                      f'Engine.prompt_len + Engine.response_len = '
                      f'{self.prompt_len + self.response_len} tokens: set it to at least {least}.')


@dataclass(frozen=True)
class OnPolicy:
  """Each batch is drawn by the very parameters that it updates."""


@dataclass(frozen=True)
class OneStepOff:
  """Each batch is drawn while the one before is verified: by parameters one step older.

  Needs a correction.
  """


Mode = OnPolicy | OneStepOff


@dataclass(frozen=True)
class AllGroups:
  """Every group drawn is learned from."""


@dataclass(frozen=True)
class DynamicSampling:
  """From step `from_step` on, draws again until all groups have right and wrong responses, at
  most `max_rounds` times a step (2503.14476); what is still missing then stays uninformative.
  """

  from_step: int = 0
  max_rounds: int = 4

  def __post_init__(self) -> None:
    _integer(self, 'from_step', 0)
    _integer(self, 'max_rounds', 1)


Selection = AllGroups | DynamicSampling


@dataclass(frozen=True)
class Rollouts:
  """What a step draws: num_prompts groups of group_size responses.

  prompt_len, response_tokens: most tokens of a prompt and of a response.
  dump_every: steps between rollouts kept in the work directory, for replay; 0 keeps none.
  """

  num_prompts: int = 32
  group_size: int = 8
  prompt_len: int = 64
  response_tokens: int = 1
  sampler: Sampler = field(default_factory=Sampler)
  mode: Mode = field(default_factory=OnPolicy)
  selection: Selection = field(default_factory=AllGroups)
  dump_every: int = 0

  def __post_init__(self) -> None:
    for name in ('num_prompts', 'group_size', 'prompt_len', 'response_tokens'):
      _integer(self, name, 1)
    _instance(self, 'sampler', Sampler)
    _instance(self, 'mode', *get_args(Mode))
    _instance(self, 'selection', *get_args(Selection))
    _integer(self, 'dump_every', 0)
    if self.mode == OneStepOff() and self.selection != AllGroups():
      raise UserError('Rollouts.selection = @cfg.DynamicSampling() draws until it has what it '
                      'needs, which @cfg.OneStepOff() cannot foresee: choose @cfg.OnPolicy().')


def _check_method(name: str, rollouts: Rollouts, algorithm: Algorithm) -> None:
  """What rollouts and algorithm of one method ask of each other."""
  if rollouts.group_size == 1 and isinstance(algorithm.advantage, GROUPED):
    raise UserError(f'Rollouts.group_size = 1, but {type(algorithm.advantage).__name__} compares '
                    'the responses of a group: set it to at least 2.')
  if rollouts.num_prompts % algorithm.minibatches:
    raise UserError(f'Algorithm.minibatches = {algorithm.minibatches} does not divide '
                    f'Rollouts.num_prompts = {rollouts.num_prompts}: change one of them.')
  if rollouts.mode == OneStepOff() and algorithm.correction == NoCorrection():
    raise UserError(f'{name} draws one step off-policy: choose an Algorithm.correction, such as '
                    '@cfg.TokenTIS(), or Rollouts.mode = @cfg.OnPolicy().')


# --- Verifiers --------------------------------------------------------------------

AnswerFormat = Literal['boxed', 'gsm8k', 'last_number']
GymAnswer = Literal['tags', 'text']


@dataclass(frozen=True)
class AnswerMatch:
  """On the device: the tokens between the last marker and the end are the answer's.

  marker: text of exactly one token.
  """

  marker: str = '#'

  def __post_init__(self) -> None:
    _text(self, 'marker')


@dataclass(frozen=True)
class MathVerifier:
  r"""The answer is right as a number or, if `symbolic`, as an expression (`math` extra).

  answer: where it stands, 'boxed' in the last balanced \boxed{…}, 'gsm8k' after the last
  ####, 'last_number' in the last number of the response.
  """

  answer: AnswerFormat = 'boxed'
  symbolic: bool = True

  def __post_init__(self) -> None:
    _choice(self, 'answer', AnswerFormat)
    _flag(self, 'symbolic')


@dataclass(frozen=True)
class LogicVerifier:
  """Knights and Knaves: think and answer tags ±1, the roles +2, −1.5 or −2 (short_rl.md 5.1)."""


@dataclass(frozen=True)
class GymVerifier:
  """reasoning-gym's own scorer of the problem's task.

  answer: 'tags' scores what stands between answer tags, 'text' the whole response.
  """

  answer: GymAnswer = 'tags'

  def __post_init__(self) -> None:
    _choice(self, 'answer', GymAnswer)


@dataclass(frozen=True)
class WordVerifier:
  """Free text: a third of the reward each for the reference word, the length in words and
  no n-gram said twice; correct where all three hold."""

  min_words: int
  max_words: int
  ngram: int = 4

  def __post_init__(self) -> None:
    _integer(self, 'min_words', 0)
    _integer(self, 'max_words', max(1, self.min_words))
    _integer(self, 'ngram', 1)


@dataclass(frozen=True)
class FormatVerifier:
  """1 where each pair of tags stands in the response once, in this order, else 0."""

  tags: tuple[str, ...] = ('think', 'answer')

  def __post_init__(self) -> None:
    if (not isinstance(self.tags, (list, tuple)) or not self.tags
        or not all(isinstance(tag, str) and tag for tag in self.tags)):
      _fail(self, 'tags', 'a list of names such as [\'think\', \'answer\']')
    object.__setattr__(self, 'tags', tuple(self.tags))


@dataclass(frozen=True)
class LengthVerifier:
  """1 up to min_chars of text, falling to 0 at max_chars."""

  min_chars: int
  max_chars: int

  def __post_init__(self) -> None:
    _integer(self, 'min_chars', 0)
    _integer(self, 'max_chars', self.min_chars + 1)


@dataclass(frozen=True)
class PythonVerifier:
  """A function of your own, (response, reference) → verifiers.judgement.Judgement.

  target: 'module:function', importable where the run starts; parts: names of its parts.
  """

  target: str
  parts: tuple[str, ...] = ('answer',)

  def __post_init__(self) -> None:
    _text(self, 'target')
    if self.target.count(':') != 1:
      _fail(self, 'target', "'module:function'")
    if (not isinstance(self.parts, (list, tuple))
        or not all(isinstance(part, str) and part for part in self.parts)):
      _fail(self, 'parts', 'a list of names')
    object.__setattr__(self, 'parts', tuple(self.parts))


Part = (MathVerifier | LogicVerifier | GymVerifier | WordVerifier | FormatVerifier
        | LengthVerifier | PythonVerifier)


@dataclass(frozen=True)
class Composite:
  """Σ weight · score of several verifiers; correct is what the first one says."""

  verifiers: tuple[Part, ...]
  weights: tuple[float, ...]

  def __post_init__(self) -> None:
    for name in ('verifiers', 'weights'):
      if not isinstance(getattr(self, name), (list, tuple)):
        _fail(self, name, 'a list')
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if not self.verifiers or not all(isinstance(v, get_args(Part)) for v in self.verifiers):
      _fail(self, 'verifiers', 'a list such as [@cfg.MathVerifier(), @cfg.FormatVerifier()]')
    is_numbers = all(isinstance(w, (int, float)) and math.isfinite(w) for w in self.weights)
    if len(self.weights) != len(self.verifiers) or not is_numbers:
      _fail(self, 'weights', f'{len(self.verifiers)} numbers, one for each verifier')


HostVerifier = Part | Composite
Verifier = AnswerMatch | HostVerifier


@dataclass(frozen=True)
class VerifierPool:
  """Child processes that judge text, and what one response may cost before they are killed.

  cpu_seconds does not depend on how busy the machine is; wall_seconds also ends one that waits.
  """

  num_workers: int = 2
  cpu_seconds: float = 5.0
  wall_seconds: float = 30.0
  memory_mib: int = 2048

  def __post_init__(self) -> None:
    _integer(self, 'num_workers', 1)
    _number(self, 'cpu_seconds', 0.01)
    _number(self, 'wall_seconds', 0.01)
    _integer(self, 'memory_mib', 64)


# --- Objectives of reinforcement learning -------------------------------------------


# What RPT pays for a prediction (2506.08007).


@dataclass(frozen=True)
class PrefixMatch:
  """1 if the bytes are those of the truth up to the end of one of its tokens, else 0."""


@dataclass(frozen=True)
class FirstTokenMatch:
  """1 if the first token is the true one, else 0."""


@dataclass(frozen=True)
class DenseMatch:
  """1 if the prefix matches, else the policy's own probability of the wrong prediction."""


@dataclass(frozen=True)
class GatedDenseMatch:
  """DenseMatch in groups with a match; −penalty for each response of the others."""

  penalty: float = 0.0

  def __post_init__(self) -> None:
    _number(self, 'penalty', 0.0)


@dataclass(frozen=True)
class InformationGain:
  """RLP (2510.01265): what a thought adds to the log-probability of the true next token, over an
  average policy without a thought; decay: of that average. Needs @cfg.Reason()."""

  decay: float = 0.999

  def __post_init__(self) -> None:
    _number(self, 'decay', 0.0, 1.0)


NextTokenReward = PrefixMatch | FirstTokenMatch | DenseMatch | GatedDenseMatch | InformationGain


# How RPT's policy comes to a prediction.


@dataclass(frozen=True)
class Direct:
  """The response is the prediction."""


@dataclass(frozen=True)
class Reason:
  """Context, think marker, thought, answer marker, prediction.

  think, answer: texts of exactly one token each; rollouts.prompt_len holds the think marker
  too, and rollouts.response_tokens the thought, the answer marker and the prediction.
  """

  think: str = '<think>'
  answer: str = '</think>'

  def __post_init__(self) -> None:
    _text(self, 'think')
    _text(self, 'answer')
    if self.think == self.answer:
      _fail(self, 'answer', 'another text than Reason.think')


Prediction = Direct | Reason


@dataclass(frozen=True)
class RPT:
  """Reinforcement Pre-Training (2506.08007): reward a correct prediction of what comes next.

  start_from: work directory (or checkpoint) of the pretrained policy.
  proxy_from: work directory of the frozen proxy whose entropy chooses positions, with the
  same tokenizer; empty takes the start policy.
  min_entropy: positions whose proxy entropy (nats, over its 16 likeliest tokens,
  renormalised) is below are dropped; difficulty: nested thresholds (nats) of the
  easy, medium and hard evaluation splits; scored_examples: packed examples of each split
  that the proxy scores; eval_positions: held-out positions evaluated.
  positions_per_document: so many prompts of a batch end in the same document, whose first
  prompt_len tokens are computed once for all; 1 gives each its own last prompt_len tokens.
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

  def __post_init__(self) -> None:
    _integer(self, 'positions_per_document', 1)
    _check_shared(self)
    _text(self, 'start_from')
    _text(self, 'proxy_from', empty=True)
    _instance(self, 'reward', *get_args(NextTokenReward))
    _instance(self, 'prediction', *get_args(Prediction))
    _instance(self, 'rollouts', Rollouts)
    _instance(self, 'algorithm', Algorithm)
    _check_method('RPT', self.rollouts, self.algorithm)
    _number(self, 'min_entropy', 0.0)
    _integer(self, 'scored_examples', 1)
    _integer(self, 'eval_positions', 1)
    _rising(self, 'difficulty', 3)
    if isinstance(self.reward, InformationGain):
      _check_information_gain(self)


def _check_information_gain(method: RPT) -> None:
  """RLP's step is one program over prompts of their own, and its reward is no 0 or 1."""
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
  """What prompts that share a document do not go with."""
  shared, rollouts = method.positions_per_document, method.rollouts
  if shared == 1:
    return
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

  start_from: work directory of the policy to begin with, which is also the reference of KL.
  pool: the processes of a verifier that reads text; not read by one on the device.
  eval_problems: held-out problems measured, once sampled as in training and once greedily.
  """

  start_from: str
  problems: Problems
  verifier: Verifier
  pool: VerifierPool = field(default_factory=VerifierPool)
  rollouts: Rollouts = field(default_factory=Rollouts)
  algorithm: Algorithm = field(default_factory=Algorithm)
  eval_problems: int = 256

  def __post_init__(self) -> None:
    _text(self, 'start_from')
    _instance(self, 'problems', Problems)
    _instance(self, 'verifier', *get_args(Verifier))
    _instance(self, 'pool', VerifierPool)
    _instance(self, 'rollouts', Rollouts)
    _instance(self, 'algorithm', Algorithm)
    _check_method('RL', self.rollouts, self.algorithm)
    _integer(self, 'eval_problems', 1)


Objective = NextToken | RPT | RL


# --- Run ------------------------------------------------------------------------


@dataclass(frozen=True)
class Train:
  """Steps and cadence of the loop. batch_size counts sequences over all devices.

  accumulation: micro-batches a step; each holds batch_size / accumulation rows.
  eval_batches: validation batches a pass; 0 takes them all.
  """

  num_steps: int
  batch_size: int
  accumulation: int = 1
  log_every: int = 10
  eval_every: int = 100
  eval_batches: int = 16
  tensorboard: bool = True

  def __post_init__(self) -> None:
    for name in ('num_steps', 'batch_size', 'accumulation', 'log_every', 'eval_every'):
      _integer(self, name, 1)
    _integer(self, 'eval_batches', 0)
    _flag(self, 'tensorboard')
    if self.batch_size % self.accumulation:
      raise UserError(f'Train.batch_size = {self.batch_size} is not a multiple of '
                      f'Train.accumulation = {self.accumulation}: choose one that is.')


@dataclass(frozen=True)
class Checkpoint:
  """Asynchronous checkpoints: every `every` steps, the last `keep` of them, and for
  good those at multiples of `keep_every` (0 keeps none for good)."""

  every: int = 100
  keep: int = 3
  keep_every: int = 0

  def __post_init__(self) -> None:
    _integer(self, 'every', 1)
    _integer(self, 'keep', 1)
    _integer(self, 'keep_every', 0)


@dataclass(frozen=True)
class Run:
  """Everything that decides the numbers of one run. The work directory is not part of it."""

  seed: int
  model: Model
  data: Data
  objective: Objective
  optimizer: AdamW
  train: Train
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  mesh: Mesh = field(default_factory=Mesh)
  compute: Compute = field(default_factory=Compute)

  def __post_init__(self) -> None:
    _integer(self, 'seed', 0, 2**31 - 1)
    _instance(self, 'model', Model)
    _instance(self, 'data', Data)
    _instance(self, 'objective', *get_args(Objective))
    _instance(self, 'optimizer', AdamW)
    _instance(self, 'train', Train)
    _instance(self, 'checkpoint', Checkpoint)
    _instance(self, 'mesh', Mesh)
    _instance(self, 'compute', Compute)
    match self.objective:
      case NextToken(int4_from=fraction) if fraction < 1 and self.model.quant.weights == 'none':
        raise UserError('NextToken.int4_from < 1 switches BitLinear activations: set '
                        "Quant.weights = 'ternary' too.")
      case RPT(rollouts=rollouts, algorithm=algorithm) | RL(rollouts=rollouts,
                                                            algorithm=algorithm):
        rows, parts = rollouts.num_prompts // algorithm.minibatches, self.train.accumulation
        if rows % parts:
          raise UserError(f'Train.accumulation = {parts} does not divide the {rows} prompts of an '
                          'update (Rollouts.num_prompts / Algorithm.minibatches): change one.')
      case _:
        pass
    match self.objective:
      case RPT(positions_per_document=shared) if shared > 1 and self.train.accumulation > 1:
        raise UserError(f'RPT.positions_per_document = {shared} keeps prompts together that '
                        f'Train.accumulation = {self.train.accumulation} would part: set one of '
                        'them to 1.')


def model_at(run: Run, step: int) -> Model:
  """The model of optimiser step `step`: activations are int4 from `int4_from` on."""
  match run.objective:
    case NextToken(int4_from=fraction) if step >= round(fraction * run.train.num_steps):
      if fraction < 1.0:
        quant = dataclasses.replace(run.model.quant, activations='int4')
        return dataclasses.replace(run.model, quant=quant)
  return run.model
