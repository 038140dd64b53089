"""The job that all objectives share which learn from episodes of games.

An example is an episode, which is a function of (seed, index) and is played when its turn comes.
What a step draws follows from keys of (seed, step, row). The loop, optimizer, checkpoints and
metrics are those of every run.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.game import trajectories
from jaxrl_pt.game.base import Game
from jaxrl_pt.game.games import open_game
from jaxrl_pt.jobs.kind import Program
from jaxrl_pt.models.base import Specified
from jaxrl_pt.parallel import hosts, rules
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train import step as steps
from jaxrl_pt.types import Array, Params, TrainState, Weighted

TRAIN, VALIDATION = 0, 1  # What is drawn for either split has keys of its own.


class Stage(NamedTuple):
  """What an objective does of its own with episodes.

  model: whose parameters are trained.
  examples: (episodes [B, T, ...], key[B] of each) → what the loss takes.
  loss: (params, examples) → its sum and metrics.
  number: examples → how many there are, by which the sum is divided.
  num_tokens, model_flops: of a step.
  start: random parameters → those to begin with. A resumed run has them from its checkpoint.
  """

  model: Specified
  examples: Callable[[trajectories.Trajectory, Array], Any]
  loss: steps.MeasuredLoss
  number: Callable[[Any], Array]
  num_tokens: int
  model_flops: float
  start: Callable[[Params], Params] | None = None


def game_of(run: cfg.Run) -> Game:
  """The game that a run learns from."""
  return open_game(cfg.game_of(run))


def source_of(run: cfg.Run, is_validation: bool = False) -> trajectories.Source:
  """The episodes of a split of a run."""
  data: Any = run.data
  return trajectories.Source(data, is_validation)


@contextlib.contextmanager
def opened(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str],
           stage_of: Callable[[cfg.Run, Mesh], Stage]) -> Iterator['EpisodeTraining']:
  """The job of a run on episodes, as `Kind.open` gives it."""
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow)
    with contextlib.closing(EpisodeTraining(session, stage_of(run, session.mesh))) as job:
      yield job


class EpisodeTraining:
  """A run on episodes that has been opened. Final."""

  agrees_at_once = False
  stop_reason = ''
  measured_first = False

  def __init__(self, session: sessions.Session, stage: Stage) -> None:
    """Opens the source of episodes; compiles nothing yet."""
    run = session.run
    self.session, self._stage = session, stage
    self.flops_per_token = stage.model_flops / stage.num_tokens
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), stage.model.specs)
    self.abstract = states.abstract_state(stage.model, self._optimizer, session.mesh)
    self._rows = rules.row_sharding(session.mesh)
    mine, = hosts.owned(self._rows, (run.train.batch_size,))
    self._batches = trajectories.train_iterator(
        source_of(run), seed=run.seed, batch_size=run.train.batch_size, rows=mine)
    self._step = train_step(run, stage, self._optimizer)
    self._measure = measuring(run, stage)

  def close(self) -> None:
    """Ends the loader's threads."""
    self._batches.close()

  def start(self) -> TrainState:
    """A state at step 0: random parameters, and what the stage puts in their place."""
    state = states.init_state(self._stage.model, self._optimizer, self.session.mesh,
                              self.session.run.seed)
    if self._stage.start is None:
      return state
    return dataclasses.replace(state, params=self._stage.start(state.params))

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
    return Dispatched(state, values, ids, self._stage.num_tokens)

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """The loss on some held-out episodes, as validation/NAME."""
    del step
    found = measured(self.session, self._measure, state.params)
    return {f'validation/{name}': value for name, value in found.items()}

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as it is, and the loader's position."""
    del step
    return state, self._batches.get_state()


# --- Its programs -----------------------------------------------------------------


def train_step(run: cfg.Run, stage: Stage, optimizer: optax.GradientTransformation) -> Any:
  """The jitted step(state, episodes [B, T, ...]) → (state, metrics); the state is donated."""
  schedule = optim.learning_rate(run.optimizer.schedule, cfg.num_updates(run))
  step = steps.make_measured_step(stage.model.specs, stage.loss, stage.number,
                                  steps.Optimizers(optimizer), schedule, run.train.accumulation)

  def on_episodes(state: TrainState, episodes: trajectories.Trajectory
                  ) -> tuple[TrainState, dict[str, Weighted]]:
    keys_B = keys(run, TRAIN, state.step, jnp.arange(episodes.actions.shape[0]))
    return step(state, stage.examples(episodes, keys_B))

  return jax.jit(on_episodes, donate_argnums=0)


def keys(run: cfg.Run, split: int, step: Array | int, rows_B: Array) -> Array:
  """key[B]: of each row of a step, or of each episode of the validation split."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), split), step)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def program(run: cfg.Run, mesh: Mesh, name: str, stage: Stage) -> Program:
  """The step as a program for preflight."""
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), stage.model.specs)
  state = states.abstract_state(stage.model, optimizer, mesh)
  rows = rules.row_sharding(mesh)
  ids = jax.ShapeDtypeStruct((run.train.batch_size,), jnp.uint32)
  shapes = jax.eval_shape(functools.partial(trajectories.generate, source_of(run)), ids)
  episodes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes)
  return Program(name, train_step(run, stage, optimizer), (state, episodes))


# --- Evaluation -------------------------------------------------------------------


def measuring(run: cfg.Run, stage: Stage) -> Any:
  """The jitted measure(params, episodes, ids u32[B]) → metrics of the loss on held-out episodes.

  What is drawn for an episode is the same in every evaluation.
  """
  def measure(params: Params, episodes: Any, ids_B: Array) -> dict[str, Weighted]:
    return stage.loss(params, stage.examples(episodes, keys(run, VALIDATION, 0, ids_B)))[1]

  return jax.jit(measure)


def measured(session: sessions.Session, measure: Any, params: Params) -> dict[str, float]:
  """The metrics of the first held-out episodes, `Train.eval_batches` batches of them.

  Args:
    session: the run's session.
    measure: (params, episodes [B, T, ...], ids u32[B]) → their metrics.
    params: the parameters.
  """
  run, source = session.run, source_of(session.run, is_validation=True)
  rows, total = run.train.batch_size, dict[str, Weighted]()
  for number in range(run.train.eval_batches):
    ids = np.arange(number * rows, (number + 1) * rows) % source.num_examples
    episodes = session.put_rows(source.batch(ids))
    values = measure(params, episodes, session.put_rows(ids.astype(np.uint32)))
    total = {k: Weighted(total[k].sum + v.sum, total[k].count + v.count) if total else v
             for k, v in values.items()}
  return metrics.host_values(total)
