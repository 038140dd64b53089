"""Models of worlds: a diffusion transformer that draws the next frame of a game, and its training.

docs/methods/maag.md has the equations. Beside its settings `Diffusion` has the attributes of every
objective (`config.objectives`).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.model import Quant
from jaxrl_pt.errors import UserError

# --- The model --------------------------------------------------------------------


@dataclass(frozen=True)
class FrameHistory:
  """What the model knows of the past are the last frames, as channels beside the new one.

  num_frames: how many; before the first frame of an episode stands that frame itself.
  noise_buckets: the number of embedded levels of the noise that the last frames may have
    (GameNGen, 2408.14837).
  """

  num_frames: int = 2
  noise_buckets: int = 10

  def __post_init__(self) -> None:
    checks.integer(self, 'num_frames', 1, 256)
    checks.integer(self, 'noise_buckets', 1, 1000)


@dataclass(frozen=True)
class Recurrent:
  """What the model knows of the past is a hidden state, which every frame changes (2412.00887).

  It begins with a state that is learned. A run learns whole episodes, frame by frame.

  channels: of the state, whose height and width are those of a frame, in pixels or latents.
  """

  channels: int = 32

  def __post_init__(self) -> None:
    checks.integer(self, 'channels', 1, 2**12)


Past = FrameHistory | Recurrent


@dataclass(frozen=True)
class Pixels:
  """The model draws pixels."""


@dataclass(frozen=True)
class VAE:
  """A variational autoencoder of frames; a model with one draws the latents of frames.

  base: channels at the size of a frame.
  multipliers: channels at each size in units of `base`; from one to the next the side is halved.
  num_blocks: ResBlocks at each size of the encoder; the decoder has one more.
  latent_channels: of a frame's latents.
  offset, scale: a model draws (latents − offset) · scale, which should be about as large as noise.
  """

  base: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4)
  num_blocks: int = 2
  latent_channels: int = 4
  offset: float = 0.0
  scale: float = 1.0

  def __post_init__(self) -> None:
    checks.integer(self, 'base', 1, 2**12)
    checks.counts(self, 'multipliers', 8)
    checks.integer(self, 'num_blocks', 1, 64)
    checks.integer(self, 'latent_channels', 1, 2**10)
    checks.weight(self, 'offset')
    checks.positive(self, 'scale')

  @property
  def factor(self) -> int:
    """Pixels of a frame's side to a latent."""
    return 2 ** (len(self.multipliers) - 1)


Space = Pixels | VAE


@dataclass(frozen=True)
class Conditions:
  """What the model is told of the frame that it is to draw, besides the past.

  A model that is not told something has the parameters for it all the same, and sees what it would
  see where there is nothing to tell. So the parameters of an ablation are as many.

  action: what the player does.
  values: the numbers of the display, one token a digit.
  map: what a memory of the world says of each cell in view, as channels aligned with the frame.
  """

  action: bool = True
  values: bool = True
  map: bool = True

  def __post_init__(self) -> None:
    for name in ('action', 'values', 'map'):
      checks.flag(self, name)


@dataclass(frozen=True)
class LogicNet:
  """The classifier of events: three convolutions of the model's past, the action, and an MLP.

  channels: of the convolutions, and the width of the action's embedding.
  hidden: the width of the MLP.
  """

  channels: int = 64
  hidden: int = 256

  def __post_init__(self) -> None:
    checks.integer(self, 'channels', 1, 2**12)
    checks.integer(self, 'hidden', 1, 2**16)


@dataclass(frozen=True)
class DiT:
  """A diffusion transformer with adaLN-zero (2212.09748) that draws a game's next frame.

  patch: pixels or latents of the side of a patch, which is a token.
  past: what it knows of the frames before.
  space: whether it draws pixels or latents.
  step_sizes: of how many step sizes a shortcut model is told, 1, 1/2, 1/4, …; 0 for others.
  sub_norm: whether a block has an RMSNorm before W_o and W_down (SubLN), as ternary models do.
  """

  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  patch: int
  past: Past = field(default_factory=FrameHistory)
  space: Space = field(default_factory=Pixels)
  conditions: Conditions = field(default_factory=Conditions)
  logic: LogicNet = field(default_factory=LogicNet)
  step_sizes: int = 0
  quant: Quant = field(default_factory=Quant)
  sub_norm: bool = False

  def __post_init__(self) -> None:
    for name, high, beside in (('num_layers', 2**12, ('d_model', 'd_ff')),
                               ('d_model', 2**17, ('num_layers', 'd_ff')),
                               ('d_ff', 2**20, ('num_layers', 'd_model'))):
      checks.size(self, name, 1, high, 4 * checks.units(self, *beside), 'its layers')
    checks.integer(self, 'num_heads', 1, 2**12)
    checks.integer(self, 'patch', 1, 64)
    checks.instance(self, 'past', *get_args(Past))
    checks.instance(self, 'space', *get_args(Space))
    checks.instance(self, 'conditions', Conditions)
    checks.instance(self, 'logic', LogicNet)
    checks.integer(self, 'step_sizes', 0, 16)
    checks.instance(self, 'quant', Quant)
    checks.flag(self, 'sub_norm')
    if self.d_model % self.num_heads or self.d_model % 4:
      raise UserError(f'DiT.d_model = {self.d_model} is no multiple of 4, or none of DiT.num_heads '
                      f'= {self.num_heads}: heads share it evenly, and so do the sines and cosines '
                      'of both coordinates.')
    if self.quant.weights == 'ternary_128':
      raise UserError("Quant.weights = 'ternary_128' is for imported language models: choose "
                      "'ternary' for a DiT.")

  @property
  def head_dim(self) -> int:
    """The width of a head."""
    return self.d_model // self.num_heads


# --- How it is trained --------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
  """Flow matching on straight paths (2210.02747): x_t = (1 − t) x + t ε, t uniform.

  prediction: what the network says, the frame x ('x0') or the velocity ε − x; the loss is its
    squared error.
  shift: s of t ← s t / (1 + (s − 1) t) in training (2403.03206 section 5.3.2). Above 1 there are
    more levels near noise, where what no condition decides is decided, such as the colour of a new
    building.
  sampling_shift: the same of the levels from which a frame is drawn. Below 1 there are more of them
    near the frame.
  """

  prediction: Literal['x0', 'velocity'] = 'x0'
  shift: float = 1.0
  sampling_shift: float = 1.0

  def __post_init__(self) -> None:
    checks.choice(self, 'prediction', Literal['x0', 'velocity'])
    checks.number(self, 'shift', 0.01, 100.0)
    checks.number(self, 'sampling_shift', 0.01, 100.0)


@dataclass(frozen=True)
class Shortcut:
  """Flow matching that also learns to take large steps (shortcut models, 2410.12557).

  One of the Diffusion.windows of an episode learns that a step of size 2 d equals two of size d,
  the others the velocity. Steps are from the whole path down to 2^(1 − DiT.step_sizes) of it.
  """


@dataclass(frozen=True)
class VDiffusion:
  """Variance-preserving diffusion with a sigmoid schedule and v-prediction (2202.00512).

  Each frame has a noise level of its own, and the error at a level is weighted by the
  signal-to-noise ratio of the frame and of those before it (diffusion forcing, 2407.01392).

  num_levels: noise levels.
  snr_clip: above which a signal-to-noise ratio counts no more.
  decay: of the running signal-to-noise ratio of earlier frames, γ.
  """

  num_levels: int = 1000
  snr_clip: float = 5.0
  decay: float = 0.4096

  def __post_init__(self) -> None:
    checks.integer(self, 'num_levels', 8, 10_000)
    checks.positive(self, 'snr_clip')
    checks.below_one(self, 'decay')


Process = Flow | Shortcut | VDiffusion


@dataclass(frozen=True)
class Diffusion:
  """Training of a model of a game on its episodes, of which Train.batch_size are in a step.

  The loss of a frame is that of `process`, plus λ times the cross-entropy of the event.

  process: from noise to a frame.
  windows: frames of each episode that a step learns to draw; a model that remembers by recurrence
    learns all of them.
  context_noise: the last frames get noise of a level drawn from 0 to this, which the model is told.
  map_dropout: the share of the map's cells that are hidden from the model.
  pose_jitter: the share of frames at which the map is off by a cell.
  paint_rate: the share of frames before which somebody has painted a cell of the map, so that the
    frame must show what no earlier one did; of models with a history of frames that see the map.
  display_weight: the weight of the error of a pixel of the display; others have 1.
  event_weight: λ.
  sampling_steps: steps from noise to a frame in evaluation, from 1 to 8.
  vae_from: the work directory of the autoencoder of DiT.space, from a run of Autoencoding; '' if
    the model draws pixels.
  """

  process: Process = field(default_factory=Flow)
  windows: int = 4
  context_noise: float = 0.7
  map_dropout: float = 0.05
  pose_jitter: float = 0.1
  paint_rate: float = 0.1
  display_weight: float = 8.0
  event_weight: float = 0.1
  sampling_steps: int = 4
  vae_from: str = ''
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ('vae_from',)
  examples: ClassVar[None] = None

  def __post_init__(self) -> None:
    checks.instance(self, 'process', *get_args(Process))
    checks.integer(self, 'windows', 1, 2**14)
    for name in ('context_noise', 'map_dropout', 'pose_jitter', 'paint_rate'):
      checks.number(self, name, 0.0, 1.0)
    checks.positive(self, 'display_weight')
    checks.number(self, 'event_weight', 0.0)
    checks.integer(self, 'sampling_steps', 1, 8)
    checks.text(self, 'vae_from', empty=True)
    if isinstance(self.process, Shortcut) and self.windows < 2:
      raise UserError('Diffusion.process = @cfg.Shortcut() takes one of Diffusion.windows of an '
                      'episode for its large steps: set Diffusion.windows to at least 2.')


@dataclass(frozen=True)
class Autoencoding:
  """Training of a VAE on frames of episodes, of which Train.batch_size are in a step.

  The loss is the squared error of the pixels, with the weight of the display, plus `kl_weight`
  times the divergence of the latents from a Gaussian. Departs from the base model: no perceptual
  loss (LPIPS), whose network would have to be fetched.

  windows: frames of each episode in a step.
  kl_weight: of the divergence of a frame, in nats.
  display_weight: the weight of the error of a pixel of the display; others have 1.
  """

  windows: int = 4
  kl_weight: float = 1e-6
  display_weight: float = 8.0
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ()
  examples: ClassVar[None] = None

  def __post_init__(self) -> None:
    checks.integer(self, 'windows', 1, 2**14)
    checks.number(self, 'kl_weight', 0.0)
    checks.positive(self, 'display_weight')

