"""Training of the autoencoder in whose latents a model of a game can draw (2412.00887)."""

import contextlib
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import worlds
from jaxrl_pt.jobs import episodes
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.jobs.packed import keeps_nothing
from jaxrl_pt.models import vae
from jaxrl_pt.parallel import memory
from jaxrl_pt.run import policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import autoencoding as losses
from jaxrl_pt.types import Params


def _settings(run: cfg.Run) -> tuple[cfg.VAE, cfg.Autoencoding]:
  model: Any = run.model
  assert isinstance(run.objective, cfg.Autoencoding)
  return model, run.objective


def _build(run: cfg.Run, mesh: Mesh) -> vae.Coder:
  del mesh  # Its parameters are few, and whole on every device.
  return vae.build(_settings(run)[0])


def _stage(run: cfg.Run, mesh: Mesh) -> episodes.Stage:
  coder, method = _build(run, mesh), _settings(run)[1]
  shape = worlds.shape_of(episodes.game_of(run))
  return episodes.Stage(
      coder, lambda played, keys_B: worlds.stills(method, played, keys_B),
      losses.frame_loss(coder, shape, method), losses.num_frames, num_tokens(run), model_flops(run))


def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> contextlib.AbstractContextManager[episodes.EpisodeTraining]:
  check_fits(run)
  return episodes.opened(run, workdir, resolved_text, allow, _stage)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  return [episodes.program(run, mesh, 'autoencoder step', _stage(run, mesh))]


def _evaluate(session: sessions.Session, step: int) -> dict[str, float]:
  """The loss on held-out episodes."""
  coder = _build(session.run, session.mesh)
  params = policy.restore(session, step, 'params', model=coder).state
  measure = episodes.measuring(session.run, _stage(session.run, session.mesh))
  return episodes.measured(session, measure, params)


def load_params(workdir: Path, config: cfg.VAE) -> Params:
  """The parameters of a trained autoencoder.

  Args:
    workdir: of a run of Autoencoding.
    config: what the autoencoder is to be, but for its offset and scale.

  Raises:
    UserError: no checkpoint, a run of another objective, or another autoencoder.
  """
  session = policy.open_run(workdir, None, cfg.Mesh())
  if not isinstance(session.run.objective, cfg.Autoencoding):
    raise UserError(f'{workdir} holds a run of {type(session.run.objective).__name__}: give '
                    'Diffusion.vae_from the work directory of a run of Autoencoding.')
  coder = _build(session.run, session.mesh)
  if P.abstract(coder.specs) != P.abstract(vae.build(config).specs):
    raise UserError(f'The autoencoder in {workdir} is {coder.config!r}, and DiT.space = '
                    f'{config!r}: give both the same sizes.')
  params: Params = policy.restore(session, None, 'params', model=coder).state
  return params


def check_fits(run: cfg.Run) -> None:
  """Refuses a run whose step cannot fit the devices here, or whose latents divide no frame."""
  model, method = _settings(run)
  frame = worlds.shape_of(episodes.game_of(run)).frame
  vae.check_divides(model, frame)
  rows = run.train.batch_size * method.windows // run.train.accumulation
  # The first and the last activations of a frame, which every step keeps.
  memory.check_needed({'VAE': 3 * P.num_bytes(vae.build(model).specs),
                       'Train.batch_size': 2 * 4 * rows * frame[0] * frame[1] * model.base})


# --- Without opening a run --------------------------------------------------------


def num_tokens(run: cfg.Run) -> int:
  """Pixels of the frames of a step, which stand for tokens here."""
  height, width = worlds.shape_of(episodes.game_of(run)).frame
  return run.train.batch_size * _settings(run)[1].windows * height * width


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: 3 times those of the convolutions of a forward pass."""
  model, method = _settings(run)
  shape = worlds.shape_of(episodes.game_of(run))
  frames = run.train.batch_size * method.windows
  return 3.0 * 2.0 * frames * vae.multiply_adds(model, shape.frame)


KIND = Kind(_open, _programs, num_tokens, model_flops, keeps_nothing, evaluate=_evaluate,
            build=_build)
