"""The job that pretraining and the supervised stages share: steps on batches of packed examples."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.data import loader
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs.kind import OTHER_START, abstract
from jaxrl_pt.parallel import rules
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Array, Batch, Params, TrainState, Weighted


class Start(NamedTuple):
  """The policy that a run starts from.

  params: its parameters; None starts with random ones.
  digest: names the policy, so that a run is resumed with the same; '' for random parameters.
  """

  params: Params | None = None
  digest: str = ''


RANDOM = Start()


class Stage(NamedTuple):
  """What an objective does of its own with packed examples.

  compile: (model settings, optimizer) → the jitted step(state, examples) → (state, metrics), in
    which the state is donated. The metrics have 'loss'.
  put: a host's part of a batch → the global examples that a step takes.
  evaluate: (state, steps taken) → the metrics of the held-out examples.
  new_method: parameters → what `TrainState.method` holds before the first step.
  """

  compile: Callable[[cfg.Model, optax.GradientTransformation], Any]
  put: Callable[[Batch], Any]
  evaluate: Callable[[TrainState, int], dict[str, float]]
  new_method: Callable[[Params], Any] = states.no_method


class PackedTraining:
  """A run on packed examples that has been opened. Final."""

  agrees_at_once = False
  stop_reason = ''

  def __init__(self, session: sessions.Session, stage: Stage, start: Start = RANDOM) -> None:
    """Opens the loader; compiles nothing yet."""
    run = session.run
    self.session, self._stage, self._start = session, stage, start
    # A policy that others have trained is measured before it is changed.
    self.measured_first = start.params is not None
    self.flops_per_token = model_flops(run) / num_tokens(run)
    # Only the activations' quantiser may change over a run, so every step's model has this state.
    self._model = session.model(run.model)
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), self._model.specs)
    self.abstract = states.abstract_state(self._model, self._optimizer, session.mesh,
                                          stage.new_method)
    rows, tokens = session.owned()
    mixed = run.data.source
    self._batches = loader.train_iterator(
        session.data.train, seed=run.seed, batch_size=run.train.batch_size, rows=rows,
        tokens=tokens, num_workers=run.data.num_workers,
        shares=mixed.shares if isinstance(mixed, cfg.Mixture) else ())
    self._count = _counting(mixed, session.data.train.parts)
    self._compiled = functools.cache(lambda model: stage.compile(model, self._optimizer))

  def close(self) -> None:
    """Ends the loader's threads."""
    self._batches.close()

  def start(self) -> TrainState:
    """A state at step 0, with the start policy's parameters or random ones."""
    params, self._start = self._start.params, self._start._replace(params=None)
    if params is None:
      return states.init_state(self._model, self._optimizer, self.session.mesh,
                               self.session.run.seed, self._stage.new_method)
    return states.state_of(self._model, params, self._optimizer, self.abstract,
                           self._stage.new_method, self.session.run.seed)

  def check(self, position: dict[str, Any]) -> None:
    """Refuses a checkpoint of a run with another start policy.

    The loader refuses a position of other data in `resume`.

    Raises:
      UserError: the policy that the run started from is another one now.
    """
    if position.get('start', '') != self._start.digest:
      raise UserError(OTHER_START)

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Sets the loader to the checkpoint's position."""
    del state
    self._start = self._start._replace(params=None)
    self._batches.set_state(position)

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches a step on the loader's next batch."""
    batch = self._stage.put(next(self._batches))
    tokens, counts = _num_real(batch.segments), self._count(batch.ids, batch.segments)
    state, values = self._compiled(cfg.model_at(self.session.run, step))(state, batch)
    return Dispatched(state, {**values, **counts}, batch.ids, tokens)

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """The metrics of the held-out examples, with the activations of the step just taken."""
    if len(self.session.data.validation) == 0:
      return {}
    return self._stage.evaluate(state, step)

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as it is, and the loader's position."""
    del step
    position = self._batches.get_state()
    return state, {**position, 'start': self._start.digest} if self._start.digest else position


@jax.jit
def _num_real(segments_BT: Array) -> Array:
  """i32[]: the number of tokens that are no padding."""
  return (segments_BT > 0).sum()


def _counting(source: cfg.Source, parts: tuple[int, ...]
              ) -> Callable[[Array, Array], dict[str, Weighted]]:
  """count(ids_B, segments_BT) → 'examples/NAME' and 'tokens/NAME' of each source of a mixture.

  Args:
    source: the run's source; others than mixtures have nothing to count.
    parts: the examples of each source, which are numbered through.
  """
  if not isinstance(source, cfg.Mixture):
    return lambda ids_B, segments_BT: {}
  ends = np.cumsum(parts)

  @jax.jit
  def count(ids_B: Array, segments_BT: Array) -> dict[str, Weighted]:
    counts: dict[str, Weighted] = {}
    num_real_B = (segments_BT > 0).sum(1)
    for name, part, end in zip(source.names, parts, ends, strict=True):
      is_of_B = (ids_B >= end - part) & (ids_B < end)
      counts[f'examples/{name}'] = Weighted.single(is_of_B.sum())
      counts[f'tokens/{name}'] = Weighted.single((num_real_B * is_of_B).sum())
    return counts

  return count


# --- Without opening a run --------------------------------------------------------


def num_tokens(run: cfg.Run) -> int:
  """Tokens that a step works on, padding included."""
  return run.train.batch_size * run.data.seq_len


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step on full rows."""
  return num_tokens(run) * metrics.flops_per_token(run.model, (run.data.seq_len + 1) / 2)


def abstract_batch(run: cfg.Run, mesh: Mesh) -> Batch:
  """A batch of packed examples as ShapeDtypeStructs with shardings."""
  shardings: Any = rules.batch_sharding(mesh)
  rows, length = run.train.batch_size, run.data.seq_len
  ints = abstract((rows, length), jnp.int32, shardings.tokens)
  return Batch(ints, ints, ints, ints, abstract((rows, length), jnp.float32, shardings.weights),
               abstract((rows,), jnp.int32, shardings.ids))


def keeps_nothing(run: cfg.Run, mesh: Mesh, params: Any) -> Any:
  """`Kind.new_method` of an objective that keeps only parameters and moments."""
  del run, mesh
  return states.no_method(params)
