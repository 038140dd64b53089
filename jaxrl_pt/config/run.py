"""The settings of a whole run."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.data import SOURCES_OF, Data, Mixture, PolicyTokenizer
from jaxrl_pt.config.examples import Demonstrations, HybridConversations, WeightedConversations
from jaxrl_pt.config.game import Game, Trajectories
from jaxrl_pt.config.game_rl import GamePolicy, GameRL, OfGames
from jaxrl_pt.config.generated import HybridSums
from jaxrl_pt.config.hybrid import HybridModes, ResponseModes, SingleMode
from jaxrl_pt.config.model import Compute, Mesh, Model
from jaxrl_pt.config.objectives import RL, NextToken, Objective
from jaxrl_pt.config.optimizer import AdamW
from jaxrl_pt.config.verifiers import AnswerMatch, VerifierPool
from jaxrl_pt.config.worlds import VAE, Autoencoding, Diffusion, DiT, Recurrent, Shortcut
from jaxrl_pt.errors import UserError

if TYPE_CHECKING:
  from typing_extensions import TypeVar as DefaultTypeVar

  # A run without more is one of a language model on text.
  _ModelT = DefaultTypeVar('_ModelT', bound=Model | DiT | VAE | GamePolicy, default=Model)
  _DataT = DefaultTypeVar('_DataT', bound=Data | Trajectories, default=Data)
else:  # Defaults are for type checkers alone; settings are read where nothing else is installed.
  _ModelT = TypeVar('_ModelT', bound=Model | DiT | VAE | GamePolicy)
  _DataT = TypeVar('_DataT', bound=Data | Trajectories)


@dataclass(frozen=True)
class Train:
  """The number of steps, their batches, and how often the loop logs and evaluates.

  batch_size: the number of sequences, over all devices, of a step of NextToken or a supervised
    stage, and of those that the proxy of RPT scores at once. RL leaves it at 0, since
    Rollouts.num_prompts says what a step takes.
  accumulation: the number of micro-batches of an update.
  group_parts: the number of rows of the learner that share out the responses to each prompt, where
    a whole group is too long for one. More of them need less memory together with accumulation, and
    read the prompt more often.
  log_every, eval_every: steps between two records of metrics, and between two evaluations.
  eval_batches: the number of validation batches of an evaluation; 0 takes all of them.
  tensorboard: whether metrics are written for TensorBoard, too.
  """

  num_steps: int
  batch_size: int = 0
  accumulation: int = 1
  group_parts: int = 1
  log_every: int = 10
  eval_every: int = 100
  eval_batches: int = 16
  tensorboard: bool = True

  def __post_init__(self) -> None:
    for name in ('num_steps', 'accumulation', 'group_parts', 'log_every', 'eval_every'):
      checks.integer(self, name, 1)
    checks.size(self, 'batch_size', 0, 2**24, 4, 'one token of each sequence')
    checks.integer(self, 'eval_batches', 0)
    checks.flag(self, 'tensorboard')
    if self.batch_size % self.accumulation:
      raise UserError(f'Train.batch_size = {self.batch_size} is not a multiple of '
                      f'Train.accumulation = {self.accumulation}: choose one that is.')


@dataclass(frozen=True)
class Checkpoint:
  """Asynchronous checkpoints.

  every: steps between two checkpoints.
  keep: how many of the last checkpoints are kept.
  keep_every: checkpoints at multiples of this step are kept for ever; 0 keeps none so long.
  """

  every: int = 100
  keep: int = 3
  keep_every: int = 0

  def __post_init__(self) -> None:
    checks.integer(self, 'every', 1)
    checks.integer(self, 'keep', 1)
    checks.integer(self, 'keep_every', 0)


@dataclass(frozen=True)
class Run(Generic[_ModelT, _DataT]):
  """Everything that decides the numbers of one run. The work directory is not part of it.

  A run of Diffusion has a DiT and Trajectories, one of Autoencoding a VAE and Trajectories, one of
  GameRL a GamePolicy and Trajectories, and every other one a Model and Data.
  """

  seed: int
  model: _ModelT
  data: _DataT
  objective: Objective
  optimizer: AdamW
  train: Train
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  mesh: Mesh = field(default_factory=Mesh)
  compute: Compute = field(default_factory=Compute)

  def __post_init__(self) -> None:
    checks.integer(self, 'seed', 0, 2**31 - 1)
    checks.instance(self, 'model', Model, DiT, VAE, GamePolicy)
    checks.instance(self, 'data', Data, Trajectories)
    checks.instance(self, 'objective', *get_args(Objective))
    checks.instance(self, 'optimizer', AdamW)
    checks.instance(self, 'train', Train)
    checks.instance(self, 'checkpoint', Checkpoint)
    checks.instance(self, 'mesh', Mesh)
    checks.instance(self, 'compute', Compute)
    _check_together(self)
    match self.objective:
      case NextToken(int4_from=fraction) if (
          fraction < 1 and cast(Run, self).model.quant.weights == 'none'):
        raise UserError('NextToken.int4_from < 1 switches BitLinear activations: set '
                        "Quant.weights = 'ternary' too.")
      case _:
        pass
    if isinstance(self.objective, OfGames):
      _check_of_games(self)
      return
    _check_rollouts(cast(Run, self))
    _check_examples(cast(Run, self))
    _check_read(cast(Run, self))


WorldRun = Run[DiT, Trajectories]


def world_run(run: Run[Any, Any]) -> WorldRun:
  """A run of Diffusion, typed as one."""
  assert isinstance(run.model, DiT) and isinstance(run.data, Trajectories)
  return cast(WorldRun, run)


def game_of(run: Run[Any, Any]) -> Game:
  """The game that a run on games learns from."""
  assert isinstance(run.data, Trajectories)
  game: Game = run.data.game
  return game


_MODEL_OF: dict[type, type] = {Diffusion: DiT, Autoencoding: VAE, GameRL: GamePolicy}


def _check_together(run: Run[Any, Any]) -> None:
  """Refuses a language model of frames, and a model of frames on text."""
  name = type(run.objective).__name__
  wanted_types: tuple[type, type] = Model, Data
  source = 'text'
  if isinstance(run.objective, OfGames):
    wanted_types = _MODEL_OF[type(run.objective)], Trajectories
    source = 'episodes of a game'
  for field_name, wanted in zip(('model', 'data'), wanted_types, strict=True):
    value = getattr(run, field_name)
    if not isinstance(value, wanted):
      raise UserError(f'Run.{field_name} = @cfg.{type(value).__name__}(), but Run.objective = '
                      f'@cfg.{name}() learns from {source}: choose Run.{field_name} = '
                      f'@cfg.{wanted.__name__}().')


def _check_of_games(run: Run[Any, Any]) -> None:
  """Checks what a run on games needs, and what it does not read."""
  checks.integer(run.train, 'batch_size', 1)
  if isinstance(run.objective, Diffusion):
    _check_sizes(run.model, run.objective)
    is_latent = isinstance(run.model.space, VAE)
    if is_latent != bool(run.objective.vae_from):
      raise UserError(f'DiT.space = @cfg.{type(run.model.space).__name__}(), but '
                      f'Diffusion.vae_from = {run.objective.vae_from!r}: name the work directory '
                      'of a run of Autoencoding where the model draws latents, and none where it '
                      'draws pixels.')
  if isinstance(run.objective, GameRL):
    _check_game_rl(run, run.objective)
  elif not run.train.eval_batches:
    raise UserError('Train.eval_batches = 0 takes all that is held out, and there is no end of '
                    'episodes: set it to the number of batches to evaluate on.')
  for name, value, default in (('Train.group_parts', run.train.group_parts, 1),
                               ('Compute.loss_chunk', run.compute.loss_chunk, 0),
                               ('Mesh.context', run.mesh.context, 1)):
    if value != default:
      raise UserError(f'{name} = {value!r} is not read by {type(run.objective).__name__}, whose '
                      f'rows are no texts: leave it out, or at {default!r}.')


def _check_game_rl(run: Run[Any, Any], objective: GameRL) -> None:
  """Checks that the worlds of a step divide, and refuses what playing them does not read."""
  parts = objective.algorithm.minibatches * run.train.accumulation
  if run.train.batch_size % parts:
    raise UserError(f'Train.batch_size = {run.train.batch_size} worlds are no multiple of '
                    f'Algorithm.minibatches × Train.accumulation = {parts}: change one.')
  for name, value, default, reason in (
      ('Train.eval_batches', run.train.eval_batches, Train(1).eval_batches,
       'GameRL.eval_games says how many games are evaluated'),
      ('Trajectories.policy', run.data.policy, 'mixed',
       'the games are played by the policy that learns')):
    if value != default:
      raise UserError(f'{name} = {value!r} is not read by GameRL, because {reason}: leave it out, '
                      f'or at {default!r}.')
  if objective.eval_games > run.data.size:
    raise UserError(f'GameRL.eval_games = {objective.eval_games} is more than the '
                    f'{run.data.size} of Trajectories.size: lower it.')
  if num_updates(run) > checks.INT32:
    raise UserError(f'Train.num_steps = {run.train.num_steps} steps of '
                    f'{objective.algorithm.updates} updates (Algorithm.minibatches × epochs) are '
                    'more than 32 bits count: lower one of them.')


def _check_sizes(model: DiT, objective: Diffusion) -> None:
  """Checks that a shortcut model knows the sizes of its steps, and no other model does."""
  sizes, steps = model.step_sizes, objective.sampling_steps
  if isinstance(objective.process, Shortcut):
    if isinstance(model.past, Recurrent):
      raise UserError('Diffusion.process = @cfg.Shortcut() needs DiT.past = @cfg.FrameHistory(): a '
                      'large step is that of one frame, whose past is known.')
    if sizes < 2 or steps not in [2**i for i in range(sizes)]:
      raise UserError(f'Diffusion.process = @cfg.Shortcut() takes 1, 2, 4, … steps, as many as its '
                      f'smallest step size allows: DiT.step_sizes = {sizes} does not go with '
                      f'Diffusion.sampling_steps = {steps}; set it to 4 for up to 8 steps.')
  elif sizes:
    raise UserError(f'DiT.step_sizes = {sizes}, but Diffusion.process = '
                    f'@cfg.{type(objective.process).__name__}() tells the model of no step size: '
                    'leave it at 0.')


def _check_rollouts(run: Run) -> None:
  """Checks that the rows of an update divide into micro-batches."""
  objective, parts = run.objective, run.train.accumulation
  if objective.rollouts is None or objective.algorithm is None:
    return
  group_size, group_parts = objective.rollouts.group_size, run.train.group_parts
  if group_size % group_parts:
    raise UserError(f'Train.group_parts = {group_parts} does not divide Rollouts.group_size = '
                    f'{group_size}: change one.')
  rows = objective.rollouts.num_prompts // objective.algorithm.minibatches * group_parts
  if rows % parts:
    raise UserError(f'Train.accumulation = {parts} does not divide the {rows} rows of an update '
                    '(Rollouts.num_prompts / Algorithm.minibatches × Train.group_parts): change '
                    'one.')
  shared = objective.positions_per_document
  if shared > 1 and parts > 1:
    raise UserError(f'{type(objective).__name__}.positions_per_document = {shared} keeps prompts '
                    f'together that Train.accumulation = {parts} would part: set one of them to 1.')


def _check_examples(run: Run) -> None:
  """Refuses sources of which the objective's examples cannot be made, and tokenizers it has not."""
  objective, name, data = run.objective, type(run.objective).__name__, run.data
  if objective.examples is None:
    if isinstance(data.source, Mixture) and not isinstance(objective, RL):  # RL reads problems.
      raise UserError(f'Data.source = @cfg.Mixture(), but {name} draws positions of documents and '
                      'not examples in proportion to weights: choose one of its sources.')
    return
  mixed = data.source.sources if isinstance(data.source, Mixture) else ()
  for source in (data.source, *mixed):
    if not isinstance(source, SOURCES_OF[objective.examples]):
      raise UserError(f'Data.source = {data.source!r}, but {name} learns from '
                      f'{objective.examples}: choose '
                      f'{checks.one_of(SOURCES_OF[objective.examples])}.')
  starts = any(getattr(objective, field) for field in objective.policy_fields)
  if starts != (data.tokenizer == PolicyTokenizer()):
    raise UserError(f'Data.tokenizer = {data.tokenizer!r}, but '
                    + (f'{name} has the tokenizer of the policy that it starts from: set it to '
                       '@cfg.PolicyTokenizer().' if starts else
                       f'{name} starts from no policy that would have one: choose '
                       '@cfg.TrainedBPE() or another.'))
  if objective.examples != 'documents' and data.long_documents == 'split':
    raise UserError("Data.long_documents = 'split' would part an answer from its prompt: choose "
                    f"'cut' or 'error' for {name}.")


def _check_read(run: Run) -> None:
  """Refuses settings that the chosen objective does not read, and asks for those that it reads.

  A setting counts as set if it differs from its default.
  """
  objective = type(run.objective).__name__
  unread: list[tuple[str, Any, Any, str]] = []
  if isinstance(run.objective, RL):
    unread.append(('Train.batch_size', run.train.batch_size, 0,
                   'Rollouts.num_prompts says what a step takes'))
    if isinstance(run.objective.truth, AnswerMatch):
      unread.append(('RL.pool', run.objective.pool, VerifierPool(),
                     '@cfg.AnswerMatch() works on the device, without processes'))
  else:
    checks.integer(run.train, 'batch_size', 1)
  if run.objective.rollouts is None:
    unread.append(('Train.group_parts', run.train.group_parts, 1, 'it draws no groups'))
  if run.objective.rollouts is not None:
    unread += [
        ('Train.eval_batches', run.train.eval_batches, Train(1).eval_batches,
         'evaluation takes all that the objective holds out'),
        ('Data.num_workers', run.data.num_workers, 0,
         'a step draws responses instead of reading batches of text')]
  for name, value, default, reason in unread:
    if value != default:
      raise UserError(f'{name} = {value!r} is not read by {objective}, because {reason}: leave it '
                      f'out, or at {default!r}.')
  if num_updates(run) > checks.INT32:
    updates = num_updates(run) // run.train.num_steps
    raise UserError(f'Train.num_steps = {run.train.num_steps} steps of {updates} updates '
                    '(Algorithm.minibatches × epochs) are more than 32 bits count: lower one of '
                    'them.')
  if run.train.batch_size * run.data.seq_len > checks.INT32:
    num_tokens = run.train.batch_size * run.data.seq_len
    raise UserError(f'Train.batch_size × Data.seq_len = {num_tokens} tokens a batch, whose ids '
                    f'alone would take {checks.memory(4 * num_tokens)}: lower one of them.')


def num_updates(run: Run) -> int:
  """The number of optimiser steps of the whole run, by which its learning rate is scheduled."""
  algorithm = run.objective.algorithm
  return run.train.num_steps * (1 if algorithm is None else algorithm.updates)


def model_at(run: Run, step: int) -> Model:
  """The model of optimiser step `step`: activations are int4 from `int4_from` on."""
  match run.objective:
    case NextToken(int4_from=fraction) if step >= round(fraction * run.train.num_steps):
      if fraction < 1.0:
        quant = dataclasses.replace(run.model.quant, activations='int4')
        return dataclasses.replace(run.model, quant=quant)
  return run.model


def modes_of(run: Run) -> ResponseModes:
  """The modes that the run's policy knows: those of its rollouts, or of the examples it learned.

  SingleMode() where it has none.
  """
  rollouts = run.objective.rollouts
  if rollouts is not None and rollouts.modes != SingleMode():
    return rollouts.modes
  source: Any = run.data.source
  nested = (Mixture, WeightedConversations)
  sources = source.sources if isinstance(source, nested) else (source,)
  for one in sources:
    marks = one.source if isinstance(one, Demonstrations) else one
    if isinstance(marks, (HybridSums, HybridConversations)):
      return HybridModes(marks.think, marks.no_think, False, marks.think_end)
  return SingleMode()
