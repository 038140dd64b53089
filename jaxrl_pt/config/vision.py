"""The vision tower: what makes tokens of an image, for a language model to read beside its text.

docs/vision.md has the equations. No run holds a tower yet: `models.vision.build` takes it.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.model import Quant
from jaxrl_pt.errors import UserError

# Where the tokens of an image stand in a language model: one after the other ('1d'), at their time,
# row and column with a section of RoPE's frequencies for each ('mrope', Qwen2-VL) or with every
# third frequency for each ('interleaved', Qwen3-VL), or all at one place ('constant', BaPA).
TextPositions = Literal['1d', 'mrope', 'interleaved', 'constant']

# --- Positions of patches -----------------------------------------------------------


@dataclass(frozen=True)
class NoPositions:
  """The tower is not told where a patch is: an image is a set of patches."""


@dataclass(frozen=True)
class LearnedPositions:
  """A learned vector for the number of each patch, counted row by row (ViT, 2010.11929).

  max_patches: the patches of the largest image.
  """

  max_patches: int = 1024

  def __post_init__(self) -> None:
    checks.integer(self, 'max_patches', 1, 2**16)


@dataclass(frozen=True)
class SinCosPositions:
  """Fixed sines and cosines of row and column are added to each patch (2212.09748)."""


@dataclass(frozen=True)
class Rope2D:
  """Queries and keys are rotated by row and column, as in Qwen2-VL's tower (2409.12191)."""


PatchPositions = NoPositions | LearnedPositions | SinCosPositions | Rope2D

# --- From patches to tokens ---------------------------------------------------------


@dataclass(frozen=True)
class AllPatches:
  """Each patch is a token of the language model."""


@dataclass(frozen=True)
class MergePatches:
  """Each square of 2 × 2 patches is a token, which holds all four side by side (2409.12191)."""


@dataclass(frozen=True)
class Resampler:
  """Learned queries attend to the patches, and each is a token (2308.12966).

  num_tokens: the queries.
  """

  num_tokens: int = 64

  def __post_init__(self) -> None:
    checks.integer(self, 'num_tokens', 1, 2**16)


@dataclass(frozen=True)
class MeanPatches:
  """The mean of all patches is the one token of an image."""


Pooling = AllPatches | MergePatches | Resampler | MeanPatches

# --- The tower ----------------------------------------------------------------------


@dataclass(frozen=True)
class VisionTower:
  """A transformer encoder of patches, with a projector to the width of a language model.

  patch: pixels of the side of a patch.
  d_out: the width of the tokens, which is that of the language model.
  positions: how the tower is told where a patch is.
  pooling: how patches become tokens.
  sub_norm: whether a block has an RMSNorm before W_o and W_down (SubLN), as ternary models do.
  """

  patch: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  d_out: int
  positions: PatchPositions = field(default_factory=Rope2D)
  pooling: Pooling = field(default_factory=AllPatches)
  quant: Quant = field(default_factory=Quant)
  sub_norm: bool = False

  def __post_init__(self) -> None:
    checks.integer(self, 'patch', 1, 64)
    for name, high, beside, what in (
        ('num_layers', 2**12, ('d_model', 'd_ff'), 'its layers'),
        ('d_model', 2**17, ('num_layers', 'd_ff'), 'its layers'),
        ('d_ff', 2**20, ('num_layers', 'd_model'), 'its layers'),
        ('d_out', 2**17, ('d_model',), 'the projector')):
      checks.size(self, name, 1, high, 4 * checks.units(self, *beside), what)
    checks.integer(self, 'num_heads', 1, 2**12)
    checks.instance(self, 'positions', *get_args(PatchPositions))
    checks.instance(self, 'pooling', *get_args(Pooling))
    checks.instance(self, 'quant', Quant)
    checks.flag(self, 'sub_norm')
    if self.d_model % self.num_heads:
      raise UserError(f'VisionTower.d_model = {self.d_model} is no multiple of '
                      f'VisionTower.num_heads = {self.num_heads}, which share it evenly: change '
                      'one of them.')
    if isinstance(self.positions, Rope2D) and self.head_dim % 4:
      raise UserError(f'VisionTower.d_model / num_heads = {self.head_dim} is no multiple of 4, as '
                      '@cfg.Rope2D() needs, which rotates pairs by row and as many by column: '
                      'change one of them, or choose @cfg.SinCosPositions().')
    if isinstance(self.positions, SinCosPositions) and self.d_model % 4:
      raise UserError(f'VisionTower.d_model = {self.d_model} is no multiple of 4, as '
                      '@cfg.SinCosPositions() needs for the sines and cosines of row and column: '
                      'change it, or choose @cfg.LearnedPositions().')
    if self.quant.weights == 'ternary_128':
      raise UserError("Quant.weights = 'ternary_128' is for imported language models: choose "
                      "'ternary' for a VisionTower.")

  @property
  def head_dim(self) -> int:
    """The width of a head."""
    return self.d_model // self.num_heads
