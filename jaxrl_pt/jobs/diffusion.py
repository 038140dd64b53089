"""Training of a model of a game on its episodes (Model as a Game, 2503.21172)."""

import contextlib
import dataclasses
from dataclasses import dataclass
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.diffusion.sampling import Solver
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import worlds
from jaxrl_pt.game.base import Game
from jaxrl_pt.game.teacher_forced import frame_metrics
from jaxrl_pt.jobs import autoencoding, episodes, world_models
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.jobs.packed import keeps_nothing
from jaxrl_pt.models.world import World, build
from jaxrl_pt.parallel import memory
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import worlds as losses
from jaxrl_pt.types import Array, Params, Weighted


def _method(run: cfg.Run) -> cfg.Diffusion:
  assert isinstance(run.objective, cfg.Diffusion)
  return run.objective


def world_of(run: cfg.Run, mesh: Mesh) -> World:
  """The model of a run's game, laid out over a mesh.

  Raises:
    UserError: the patches or latents do not divide the frame.
  """
  shape = worlds.shape_of(episodes.game_of(run))
  return models.build_world(cfg.world_run(run).model, shape, run.compute, mesh)


def _stage(run: cfg.Run, mesh: Mesh, workdir: Path | None = None) -> episodes.Stage:
  """What a run does with episodes.

  Args:
    run, mesh: the run and its mesh.
    workdir: of the run, from which the path of an autoencoder is relative; None loads none.
  """
  world, game, method = world_of(run, mesh), episodes.game_of(run), _method(run)

  def start(params: Params) -> Params:
    assert workdir is not None and isinstance(world.config.space, cfg.VAE)
    there = places.policy(method.vae_from, workdir, 'vae_from')
    loaded = autoencoding.load_params(there, world.config.space)
    as_here = lambda new, old: jax.device_put(new, old.sharding)
    return {**params, 'vae': jax.tree.map(as_here, loaded, params['vae'])}

  return episodes.Stage(
      world, lambda played, keys_B: worlds.clips(game, method, world.config, played, keys_B),
      losses.frame_loss(world, method), losses.num_frames, num_tokens(run), model_flops(run),
      start if method.vae_from and workdir else None)


def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> contextlib.AbstractContextManager[episodes.EpisodeTraining]:
  check_fits(run)
  return episodes.opened(run, workdir, resolved_text, allow,
                         functools.partial(_stage, workdir=workdir))


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  step = episodes.program(run, mesh, 'diffusion step', _stage(run, mesh))
  if mesh.size > 1:  # A game is played on one device.
    return [step]
  method = _method(run)
  passes = method.sampling_steps * _tokens_per_frame(run)  # Each costs a third of a training pass.
  return [step, world_models.frame_program(
      episodes.game_of(run), world_of(run, mesh), Solver(method.process, method.sampling_steps),
      mesh, passes / (3 * num_tokens(run)))]


# --- Trained models ---------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
  """A trained model of a game, with all that is needed to play in it."""

  session: sessions.Session
  game: Game
  world: World
  params: Params
  step: int  # the checkpoint's step


def solver_of(run: cfg.Run, drawing: cfg.Drawing = cfg.Drawing()) -> Solver:
  """How the model of a run draws: as the run says, but for what `drawing` sets.

  Raises:
    UserError: levels of a process that has none, or steps that the model cannot take.
  """
  method = _method(run)
  process, steps = method.process, drawing.sampling_steps or method.sampling_steps
  if drawing.sampling_shift:
    if not isinstance(process, cfg.Flow):
      raise UserError(f'Drawing.sampling_shift = {drawing.sampling_shift:g} is of the levels of '
                      f'@cfg.Flow(), and the model was trained by @cfg.{type(process).__name__}(): '
                      'leave it at 0.')
    process = dataclasses.replace(process, sampling_shift=drawing.sampling_shift)
  # A run with these settings is checked as any other is.
  dataclasses.replace(run, objective=dataclasses.replace(
      method, process=process, sampling_steps=steps))
  return Solver(process, steps)


def load(workdir: Path, step: int | None = None, mesh: cfg.Mesh = cfg.Mesh()) -> Trained:
  """Restores the model of a game from a work directory.

  Args:
    workdir: a work directory written by `train`.
    step: the checkpoint's step; None takes the newest good one.
    mesh: the mesh to use, which need not be the mesh that it was trained on.

  Raises:
    UserError: no such directory, no checkpoint, or a run of another objective.
  """
  return _restored(open_trained(workdir, step, mesh), step)


def open_trained(workdir: Path, step: int | None, mesh: cfg.Mesh) -> sessions.Session:
  """The session of a checkpoint of a model of a game; arguments and errors as in `load`."""
  session = policy.open_run(workdir, step, mesh)
  if not isinstance(session.run.objective, cfg.Diffusion):
    raise UserError(f'{workdir} holds a run of {type(session.run.objective).__name__}: give the '
                    'work directory of a run of Diffusion, such as gin/run/maag_tiny.gin.')
  return session


def _restored(session: sessions.Session, step: int | None) -> Trained:
  world = world_of(session.run, session.mesh)
  restored = policy.restore(session, step, 'params', model=world)
  return Trained(session, episodes.game_of(session.run), world, restored.state, restored.step)


def _evaluate(session: sessions.Session, step: int) -> dict[str, float]:
  """The loss on held-out episodes, and what is read from frames drawn after a true past."""
  trained = _restored(session, step)
  run, solver = session.run, solver_of(session.run)
  measure = episodes.measuring(run, _stage(run, session.mesh))

  @jax.jit
  def both(params: Params, played: Any, ids_B: Array) -> dict[str, Weighted]:
    keys_B = episodes.keys(run, episodes.VALIDATION, 1, ids_B)
    return {**measure(params, played, ids_B),
            **frame_metrics(trained.game, trained.world, params, solver, played, keys_B)}

  return episodes.measured(session, both, trained.params)


# --- Without opening a run --------------------------------------------------------


def num_tokens(run: cfg.Run) -> int:
  """Tokens that a step works on: the patches and digits of each frame that it learns to draw."""
  world = cfg.world_run(run)
  is_whole = isinstance(world.model.past, cfg.Recurrent)
  num_frames = world.data.num_frames if is_whole else _method(run).windows
  return run.train.batch_size * num_frames * _tokens_per_frame(run)


def _tokens_per_frame(run: cfg.Run) -> int:
  shape, model = worlds.shape_of(episodes.game_of(run)), cfg.world_run(run).model
  factor = model.space.factor if isinstance(model.space, cfg.VAE) else 1
  height, width = (max(size // factor // model.patch, 1) for size in shape.frame)
  return height * width + sum(shape.digits)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: 6 a parameter of the blocks and token, and attention among all tokens.

  What is computed once for a frame (modulation, LogicNet, the encoder of latents) and the large
  steps of a shortcut model are left out.
  """
  model = cfg.world_run(run).model
  products = model.num_layers * (4 * model.d_model**2 + 2 * model.d_model * model.d_ff)
  attention = 2 * model.num_layers * model.d_model * _tokens_per_frame(run)
  return 6.0 * num_tokens(run) * (products + attention)


def check_fits(run: cfg.Run) -> None:
  """Refuses a run whose step cannot fit the devices here, as `memory.check_fits` does.

  Raises:
    UserError: it cannot, or the patches or latents do not divide the frame.
  """
  world = cfg.world_run(run)
  specs = build(world.model, worlds.shape_of(episodes.game_of(run))).specs
  width = 2 if run.compute.dtype == 'bfloat16' else 4
  # A sequence keeps the passes of one frame at a time.
  length = world.data.num_frames if isinstance(world.model.past, cfg.Recurrent) else 1
  stream = width * world.model.d_model * world.model.num_layers
  memory.check_needed({
      'DiT': 3 * P.num_bytes(specs),
      'Train.batch_size': num_tokens(run) // length // run.train.accumulation * stream})


KIND = Kind(_open, _programs, num_tokens, model_flops, keeps_nothing, evaluate=_evaluate,
            build=world_of)
