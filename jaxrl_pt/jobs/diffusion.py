"""Training of a model of a game on its episodes (Model as a Game, 2503.21172).

An example is an episode, which is a function of (seed, index) and is played when its turn comes.
The step cuts clips out of it, hides parts of its map and draws noise, all from keys of (seed, step,
row). The loop, optimizer, checkpoints and metrics are those of every run.
"""

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt import params as P
from jaxrl_pt.diffusion.sampling import Solver
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import trajectories, worlds
from jaxrl_pt.game.base import Game
from jaxrl_pt.game.games import open_game
from jaxrl_pt.game.teacher_forced import frame_metrics
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.models.world import World, build
from jaxrl_pt.parallel import hosts, memory, rules
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run import policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train import step as steps
from jaxrl_pt.train import worlds as losses
from jaxrl_pt.types import Array, Params, TrainState, Weighted

_TRAIN, _VALIDATION = 0, 1  # Clips of either split are cut with keys of their own.


def _method(run: cfg.Run) -> cfg.Diffusion:
  assert isinstance(run.objective, cfg.Diffusion)
  return run.objective


def _game(run: cfg.Run) -> Game:
  return open_game(cfg.world_run(run).data.game)


def world_of(run: cfg.Run, mesh: Mesh) -> World:
  """The model of a run's game, laid out over a mesh.

  Raises:
    UserError: the patches do not divide the frame.
  """
  shape = worlds.shape_of(_game(run))
  return models.build_world(cfg.world_run(run).model, shape, run.compute, mesh)


@contextlib.contextmanager
def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> Iterator['DiffusionTraining']:
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  check_fits(run)
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow)
    with contextlib.closing(DiffusionTraining(session)) as job:
      yield job


class DiffusionTraining:
  """A run on episodes that has been opened. Final."""

  agrees_at_once = False
  stop_reason = ''
  measured_first = False

  def __init__(self, session: sessions.Session) -> None:
    """Opens the source of episodes; compiles nothing yet."""
    run = session.run
    self.session = session
    self.flops_per_token = model_flops(run) / num_tokens(run)
    self._world = world_of(run, session.mesh)
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), self._world.specs)
    self.abstract = states.abstract_state(self._world, self._optimizer, session.mesh)
    self._rows = rules.row_sharding(session.mesh)
    mine, = hosts.owned(self._rows, (run.train.batch_size,))
    self._batches = trajectories.train_iterator(
        _source(run), seed=run.seed, batch_size=run.train.batch_size, rows=mine)
    self._step = train_step(run, self._world, self._optimizer)

  def close(self) -> None:
    """Ends the loader's threads."""
    self._batches.close()

  def start(self) -> TrainState:
    """A state at step 0 with random parameters."""
    return states.init_state(self._world, self._optimizer, self.session.mesh,
                             self.session.run.seed)

  def check(self, position: dict[str, Any]) -> None:
    """Takes every position: the loader refuses one of other episodes in `resume`."""

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Sets the loader to the checkpoint's position."""
    del state
    self._batches.set_state(position)

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches a step on the loader's next batch of episodes."""
    del step
    ids_B, mine = next(self._batches)
    rows = len(ids_B)
    episodes = jax.tree.map(
        lambda x: hosts.from_part(x, (rows, *x.shape[1:]), self._rows), mine)
    state, values = self._step(state, episodes)
    ids = hosts.from_whole(ids_B.astype(np.int32), self._rows)
    return Dispatched(state, values, ids, num_tokens(self.session.run))

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """The loss on some held-out episodes, as validation/NAME."""
    del step
    found = _losses(self.session, state.params, self.session.run.train.eval_batches)
    return {f'validation/{name}': value for name, value in found.items()}

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as it is, and the loader's position."""
    del step
    return state, self._batches.get_state()


def _source(run: cfg.Run, is_validation: bool = False) -> trajectories.Source:
  return trajectories.Source(cfg.world_run(run).data, is_validation)


# --- Its programs -----------------------------------------------------------------


def train_step(run: cfg.Run, world: World, optimizer: Any) -> Any:
  """The jitted step(state, episodes [B, T, ...]) → (state, metrics); the state is donated."""
  method, game = _method(run), _game(run)
  schedule = optim.learning_rate(run.optimizer.schedule, cfg.num_updates(run))
  step = steps.make_measured_step(
      world.specs, losses.frame_loss(world, method), losses.num_frames, steps.Optimizers(optimizer),
      schedule, run.train.accumulation)

  def on_episodes(state: TrainState, episodes: trajectories.Trajectory
                  ) -> tuple[TrainState, dict[str, Weighted]]:
    keys_B = _keys(run, _TRAIN, state.step, jnp.arange(episodes.actions.shape[0]))
    return step(state, worlds.clips(game, method, world.config.past, episodes, keys_B))

  return jax.jit(on_episodes, donate_argnums=0)


def _keys(run: cfg.Run, split: int, step: Array | int, rows_B: Array) -> Array:
  """key[B]: of each row of a step, or of each episode of the validation split."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), split), step)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  world = world_of(run, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), world.specs)
  state = states.abstract_state(world, optimizer, mesh)
  rows = rules.row_sharding(mesh)
  ids = jax.ShapeDtypeStruct((run.train.batch_size,), jnp.uint32)
  shapes = jax.eval_shape(functools.partial(trajectories.generate, _source(run)), ids)
  episodes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes)
  return [Program('diffusion step', train_step(run, world, optimizer), (state, episodes))]


# --- Evaluation -------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
  """A trained model of a game, with all that is needed to play in it."""

  session: sessions.Session
  game: Game
  world: World
  params: Params
  step: int  # the checkpoint's step

  @property
  def solver(self) -> Solver:
    """The process that it was trained in, with the number of steps of its settings."""
    method = _method(self.session.run)
    return Solver(method.process, method.sampling_steps)


def load(workdir: Path, step: int | None = None, mesh: cfg.Mesh = cfg.Mesh()) -> Trained:
  """Restores the model of a game from a work directory.

  Args:
    workdir: a work directory written by `train`.
    step: the checkpoint's step; None takes the newest good one.
    mesh: the mesh to use, which need not be the mesh that it was trained on.

  Raises:
    UserError: no such directory, no checkpoint, or a run of another objective.
  """
  session = policy.open_run(workdir, step, mesh)
  if not isinstance(session.run.objective, cfg.Diffusion):
    raise UserError(f'{workdir} holds a run of {type(session.run.objective).__name__}: give the '
                    'work directory of a run of Diffusion, such as gin/run/maag_tiny.gin.')
  world = world_of(session.run, session.mesh)
  restored = policy.restore(session, step, 'params', model=world)
  return Trained(session, _game(session.run), world, restored.state, restored.step)


def _batches(session: sessions.Session, limit: int) -> Iterator[tuple[np.ndarray, Any]]:
  """The first held-out episodes with their ids, in so many batches."""
  run, source = session.run, _source(session.run, is_validation=True)
  rows = run.train.batch_size
  for number in range(limit):
    ids = np.arange(number * rows, (number + 1) * rows) % source.num_examples
    yield ids, session.put_rows(source.batch(ids))


def _losses(session: sessions.Session, params: Params, limit: int) -> dict[str, float]:
  """The metrics of the loss on held-out episodes, whose noise is the same in every evaluation."""
  measure = _compiled_losses(session)
  return _added(measure(params, episodes, session.put_rows(ids.astype(np.uint32)))
                for ids, episodes in _batches(session, limit))


def _added(found: Any) -> dict[str, float]:
  total: dict[str, Weighted] = {}
  for values in found:
    total = {k: Weighted(total[k].sum + v.sum, total[k].count + v.count) if total else v
             for k, v in values.items()}
  return metrics.host_values(total)


@functools.lru_cache(maxsize=4)
def _compiled_losses(session: sessions.Session) -> Any:
  run = session.run
  world, game, method = world_of(run, session.mesh), _game(run), _method(run)
  loss = losses.frame_loss(world, method)

  def measure(params: Params, episodes: Any, ids_B: Array) -> dict[str, Weighted]:
    keys_B = _keys(run, _VALIDATION, 0, ids_B)
    return loss(params, worlds.clips(game, method, world.config.past, episodes, keys_B))[1]

  return jax.jit(measure)


def _evaluate(session: sessions.Session, step: int) -> dict[str, float]:
  """The loss on held-out episodes, and what is read from frames drawn after a true past."""
  trained = load(session.workdir, step)
  run, solver = session.run, trained.solver
  limit = run.train.eval_batches

  @jax.jit
  def draw(params: Params, episodes: Any, ids_B: Array) -> dict[str, Weighted]:
    keys_B = _keys(run, _VALIDATION, 1, ids_B)
    return frame_metrics(trained.game, trained.world, params, solver, episodes, keys_B)

  drawn = _added(draw(trained.params, episodes, session.put_rows(ids.astype(np.uint32)))
                 for ids, episodes in _batches(session, limit))
  return {**_losses(session, trained.params, limit), **drawn}


# --- Without opening a run --------------------------------------------------------


def num_tokens(run: cfg.Run) -> int:
  """Tokens that a step works on: the patches and digits of each frame that it learns to draw."""
  return run.train.batch_size * _method(run).windows * _tokens_per_frame(run)


def _tokens_per_frame(run: cfg.Run) -> int:
  shape, patch = worlds.shape_of(_game(run)), cfg.world_run(run).model.patch
  height, width = shape.frame
  return (height // patch) * (width // patch) + sum(shape.digits)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: 6 a parameter of the blocks and token, and attention among all tokens.

  What is computed once for a frame (modulation, LogicNet) and the large steps of a shortcut model
  are left out.
  """
  model = cfg.world_run(run).model
  products = model.num_layers * (4 * model.d_model**2 + 2 * model.d_model * model.d_ff)
  attention = 2 * model.num_layers * model.d_model * _tokens_per_frame(run)
  return 6.0 * num_tokens(run) * (products + attention)


def check_fits(run: cfg.Run) -> None:
  """Refuses a run whose step cannot fit the devices here, as `memory.check_fits` does.

  Raises:
    UserError: it cannot, or the patches do not divide the frame.
  """
  world = cfg.world_run(run)
  specs = build(world.model, worlds.shape_of(_game(run))).specs
  width = 2 if run.compute.dtype == 'bfloat16' else 4
  stream = width * world.model.d_model * world.model.num_layers
  memory.check_needed({
      'DiT': 3 * P.num_bytes(specs),
      'Diffusion.windows': num_tokens(run) // run.train.accumulation * stream})


def _keeps_nothing(run: cfg.Run, mesh: Mesh, params: Any) -> Any:
  del run, mesh
  return states.no_method(params)


KIND = Kind(_open, _programs, num_tokens, model_flops, _keeps_nothing, evaluate=_evaluate,
            build=world_of)
