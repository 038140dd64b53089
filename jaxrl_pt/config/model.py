"""The model, how it is computed, and the mesh it is computed on."""

from dataclasses import dataclass, field
from typing import Literal

from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError

WeightQuant = Literal['none', 'ternary']
ActivationQuant = Literal['none', 'int8', 'int4', 'int4_absmax']
Activation = Literal['swiglu', 'relu2']
Dtype = Literal['float32', 'bfloat16']
Remat = Literal['none', 'block']


@dataclass(frozen=True)
class Quant:
  """Which projections of the block are quantised, and how (docs/methods/bitnet.md, bitnet_v2.md).

  weights: 'ternary' is absmean W1.58; activations: per token, 'int8' absmax,
  'int4' absmean, 'int4_absmax' the control that needs no rotation.
  hadamard: rotate the inputs of W_o and W_down (H-BitLinear, 2504.18415).
  """

  weights: WeightQuant = 'none'
  activations: ActivationQuant = 'none'
  hadamard: bool = False

  def __post_init__(self) -> None:
    checks.choice(self, 'weights', WeightQuant)
    checks.choice(self, 'activations', ActivationQuant)
    checks.flag(self, 'hadamard')
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
    for name, high, beside, what in (
        ('num_layers', 2**12, ('d_model', 'd_ff'), 'its layers'),
        ('d_model', 2**17, ('num_layers', 'd_ff'), 'its layers'),
        ('d_ff', 2**20, ('num_layers', 'd_model'), 'its layers'),
        ('num_heads', 2**12, ('num_layers', 'd_model', 'head_dim'), 'its attention'),
        ('num_kv_heads', 2**12, ('num_layers', 'd_model', 'head_dim'), 'its attention'),
        ('head_dim', 2**13, ('num_layers', 'd_model', 'num_heads'), 'its attention'),
        ('vocab_size', 2**24, ('d_model',), 'the embedding')):
      checks.size(self, name, 1, high, 4 * checks.units(self, *beside), what)
    checks.number(self, 'rope_theta', 1.0)
    checks.number(self, 'norm_epsilon', 0.0, 1.0)
    checks.choice(self, 'activation', Activation)
    checks.flag(self, 'sub_norm')
    checks.flag(self, 'tied_head')
    checks.instance(self, 'quant', Quant)
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
    checks.choice(self, 'dtype', Dtype)
    checks.choice(self, 'remat', Remat)
    checks.integer(self, 'unroll', 0)
    checks.integer(self, 'loss_chunk', 0)


@dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; `fsdp = 0` takes all devices that are left."""

  data: int = 1
  fsdp: int = 0
  tensor: int = 1
  context: int = 1

  def __post_init__(self) -> None:
    for name in ('data', 'tensor', 'context'):
      checks.integer(self, name, 1)
    checks.integer(self, 'fsdp', 0)
