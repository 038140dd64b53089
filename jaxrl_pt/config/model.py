"""The model, how its arithmetic is carried out, and the mesh of devices."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError

WeightQuant = Literal['none', 'ternary', 'ternary_128']
GROUP = 128  # inputs of an output that share a scale in 'ternary_128'
ActivationQuant = Literal['none', 'int8', 'int4', 'int4_absmax']
Activation = Literal['swiglu', 'relu2']
Dtype = Literal['float32', 'bfloat16']
Remat = Literal['none', 'block']
Projection = Literal['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


@dataclass(frozen=True)
class Quant:
  """How the projections of a block are quantised (docs/methods/bitnet.md, bitnet_v2.md).

  weights: 'ternary' weights are W1.58, with the absmean of a matrix as its scale. 'ternary_128' is
    the layout of imported models that have one scale for each 128 inputs of an output: it is the
    absmax of those weights, so that weights which are ternary already stay what they are.
  activations: each token has a scale, with 'int8' its absmax, with 'int4' its absmean, and with
    'int4_absmax', a control experiment that needs no rotation, its absmax.
  hadamard: whether the inputs of W_o and W_down are rotated (H-BitLinear, 2504.18415).
  """

  weights: WeightQuant = 'none'
  activations: ActivationQuant = 'none'
  hadamard: bool = False

  def __post_init__(self) -> None:
    checks.choice(self, 'weights', WeightQuant)
    checks.choice(self, 'activations', ActivationQuant)
    checks.flag(self, 'hadamard')
    if self.weights == 'ternary_128' and self.hadamard:
      raise UserError("Quant.hadamard rotates the inputs of Quant.weights = 'ternary': no imported "
                      "model with 'ternary_128' has it, so leave it at False.")
    if self.weights == 'none' and (self.activations != 'none' or self.hadamard):
      raise UserError(
          'Quant.activations and Quant.hadamard act on BitLinear layers only: set '
          "Quant.weights = 'ternary', or leave them at 'none' and False.")

  @property
  def is_ternary(self) -> bool:
    """Whether a weight of a block takes one of three values."""
    return self.weights != 'none'


@dataclass(frozen=True)
class PlainRope:
  """RoPE with the frequencies of its paper (2104.09864)."""


@dataclass(frozen=True)
class Llama3Rope:
  """RoPE whose slow frequencies are lowered, as Llama 3.1 does for longer texts (2407.21783).

  factor: what a frequency is divided by whose wavelength is above original_length /
    low_freq_factor. One below original_length / high_freq_factor stays; those between change over
    linearly in original_length / wavelength.
  original_length: the tokens of a text before the model was trained on longer ones.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self) -> None:
    checks.number(self, 'factor', 1.0)
    checks.positive(self, 'low_freq_factor')
    checks.positive(self, 'high_freq_factor')
    checks.integer(self, 'original_length', 1)
    if self.high_freq_factor <= self.low_freq_factor:
      raise UserError(f'Llama3Rope.high_freq_factor = {self.high_freq_factor} is not above '
                      f'Llama3Rope.low_freq_factor = {self.low_freq_factor}: the frequencies '
                      'between the two change over from one to the other.')


Rope = PlainRope | Llama3Rope


@dataclass(frozen=True)
class NoAdapter:
  """All parameters are trained."""


@dataclass(frozen=True)
class LoRA:
  """Low-rank adapters of some projections are trained, and all else is frozen (2106.09685).

  rank: r of the matrices A[in, r] and B[r, out].
  alpha: what an adapter computes is multiplied by alpha / r.
  projections: the projections that have an adapter, as PEFT names them.
  rank_stabilized: whether the factor is alpha / √r instead (rsLoRA, 2312.03732).
  """

  rank: int = 8
  alpha: float = 16.0
  projections: tuple[Projection, ...] = get_args(Projection)
  rank_stabilized: bool = False

  def __post_init__(self) -> None:
    checks.integer(self, 'rank', 1, 2**12)
    checks.positive(self, 'alpha')
    options = ', '.join(map(repr, get_args(Projection)))
    checks.texts(self, 'projections', f'a list of names among {options}', 1)
    if (set(self.projections) - set(get_args(Projection))
        or len(set(self.projections)) < len(self.projections)):
      checks.fail(self, 'projections', f'names among {options}, each once')
    checks.flag(self, 'rank_stabilized')

  @property
  def scale(self) -> float:
    """What an adapter's product is multiplied by."""
    return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


Adapter = NoAdapter | LoRA


@dataclass(frozen=True)
class Model:
  """The shape of a decoder-only transformer.

  head_dim: the width of a head.
  rope_theta: the base of RoPE's frequencies.
  sub_norm: whether a block has a second RMSNorm before W_o and W_down (SubLN).
  tied_head: whether the head is the transposed embedding.
  norm_epsilon: the epsilon of every RMSNorm, in which imported models differ.
  rope: how RoPE's frequencies are scaled for long texts.
  qkv_bias: whether queries, keys and values have biases (Qwen2).
  qk_norm: whether each head of queries and keys has an RMSNorm before RoPE (Qwen3).
  param_dtype: the type that parameters are kept in. Training wants float32, in which a small
    update is not lost; an imported model keeps the type of its file.
  adapter: which parameters are trained: all of them, or low-rank adapters of a frozen model.
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
  rope: Rope = field(default_factory=PlainRope)
  qkv_bias: bool = False
  qk_norm: bool = False
  param_dtype: Dtype = 'float32'
  adapter: Adapter = field(default_factory=NoAdapter)

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
    checks.instance(self, 'rope', *get_args(Rope))
    checks.flag(self, 'qkv_bias')
    checks.flag(self, 'qk_norm')
    checks.choice(self, 'param_dtype', Dtype)
    checks.instance(self, 'adapter', *get_args(Adapter))
    for name, width in (('d_model', self.d_model), ('d_ff', self.d_ff),
                        ('num_heads × head_dim', self.num_heads * self.head_dim)):
      if self.quant.weights == 'ternary_128' and width % GROUP:
        raise UserError(f'Model.{name} = {width} is no multiple of {GROUP}, the inputs that share '
                        "a scale in Quant.weights = 'ternary_128'.")
    if self.num_heads % self.num_kv_heads:
      raise UserError(f'Model.num_heads = {self.num_heads} is not a multiple of '
                      f'Model.num_kv_heads = {self.num_kv_heads}: each key/value head serves '
                      'a whole group of query heads.')
    if self.head_dim % 2:
      raise UserError(f'Model.head_dim = {self.head_dim} is odd: RoPE rotates pairs, so make '
                      'it even.')
    if isinstance(self.adapter, LoRA):
      _check_rank(self, self.adapter)


def _check_rank(model: Model, adapter: LoRA) -> None:
  """Refuses a rank at which an adapter would be no smaller than the projection beside it."""
  heads, keys = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
  widths = {'q_proj': (model.d_model, heads), 'k_proj': (model.d_model, keys),
            'v_proj': (model.d_model, keys), 'o_proj': (heads, model.d_model)}
  for name in adapter.projections:
    sizes = widths.get(name, (model.d_model, model.d_ff))
    if adapter.rank >= min(sizes):
      raise UserError(f'LoRA.rank = {adapter.rank} is not below {min(sizes)}, the smaller width of '
                      f'{name} ({max(sizes)} × {min(sizes)}), so that the adapter would be no '
                      'smaller than what it adapts: lower it, or leave the adapter out.')


@dataclass(frozen=True)
class Compute:
  """How the arithmetic is carried out, which changes speed and memory and not the method.

  dtype: the type of activations and of the weights that they are multiplied with.
  remat: 'block' keeps only the residual stream of each block and computes the rest again in the
    backward pass.
  unroll: layers of one iteration of the scan over layers; 0 unrolls all of them, which runs faster
    on a CPU and compiles more slowly everywhere.
  loss_chunk: tokens of the whole batch, over all devices, whose float32 logits exist at once; 0
    computes the logits of all tokens at once.
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
  """The number of devices along each mesh axis; `fsdp = 0` takes all devices that are left."""

  data: int = 1
  fsdp: int = 0
  tensor: int = 1
  context: int = 1

  def __post_init__(self) -> None:
    for name in ('data', 'tensor', 'context'):
      checks.integer(self, name, 1)
    checks.integer(self, 'fsdp', 0)
