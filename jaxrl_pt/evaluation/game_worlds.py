"""`jaxrl-pt eval --gin_file gin/eval/maag.gin`: do the numbers and places of a model stay true?

A model draws held-out games from their first frames on, in response to actions that scripted
players have chosen, with LogicNet, ledger and map round it as `cfg.MaaG` says. Every frame is read
back and compared with what the model's own history demands (`game/history.py`, `game/measures.py`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
from pathlib import Path
import shutil
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.evaluation.game_rollouts import Batch, Player, Rollouts
from jaxrl_pt.game import base, dream, maps, measures, noise, renderers, trajectories
from jaxrl_pt.game.games import open_game
from jaxrl_pt.jobs import trained_worlds

_TIMED = 15  # frames whose drawing is timed
_RESAMPLES = 2000  # of the games, for intervals
_AFTER_EDIT = 'digit_acc', 'spa_con_all', 'score_exact', 'unreadable'


class Found(NamedTuple):
  """The results, which JSON can hold, and what pictures are made of."""

  results: dict[str, Any]
  game: cfg.Game
  first: Batch  # the first batch


def evaluate(workdir: Path, settings: cfg.GameEvaluation, *, step: int | None,
             say: Callable[[str], None]) -> Found:
  """Measures a model.

  Args:
    workdir: the work directory of a trained model; one that has learned nothing only saves its
      rollouts there.
    settings: what is measured.
    step: the checkpoint's step; None takes the newest good one.
    say: gets a line for each batch of games.

  Raises:
    UserError: no checkpoint, one of another game, or modules that the game cannot have.
  """
  game = open_game(settings.trajectories.game)
  maps.check(game, settings.modules.map)
  model, params_of, step = _open(workdir, game, settings, step)
  world = dream.World(game, model, settings.modules.map)
  rollouts = Rollouts(world, params_of, trajectories.Source(settings.trajectories, True), settings)
  said = hashlib.sha256(repr((settings, step)).encode()).hexdigest()[:12]
  saved = workdir / 'evaluations' / f'rollouts_{said}'
  batches = _played(rollouts, saved if settings.checkpoint_every else None, say)
  results = {
      'game': type(game.config).__name__, 'model': settings.model, 'step': step,
      'episodes': settings.episodes, 'frames': settings.trajectories.num_frames - 1,
      **summary(game, settings, batches), 'frame_time': frame_time(rollouts),
      'settings': _plain(settings)}
  shutil.rmtree(saved, ignore_errors=True)
  return Found(results, game.config, batches[0])


def _open(workdir: Path, game: base.Game, settings: cfg.GameEvaluation, step: int | None
          ) -> tuple[dream.WorldModel, Callable[[Any], Any], int | None]:
  """The model, its parameters for games with these keys, and the checkpoint's step."""
  if settings.model == 'trained':
    found = trained_worlds.load(workdir, step, game, settings.drawing)
    return found.model, lambda keys: found.params, found.step
  init = jax.jit(jax.vmap(lambda key: game.init(noise.fold(key, trajectories.OF_WORLD))))
  return renderers.world_model(game, settings.model, settings.pixel_noise), init, None


def _played(rollouts: Rollouts, saved: Path | None, say: Callable[[str], None]) -> list[Batch]:
  settings, player, batches = rollouts.settings, Player(rollouts), []
  for low in range(0, settings.episodes, settings.batch_size):
    ids = range(low, min(low + settings.batch_size, settings.episodes))
    start = time.perf_counter()
    batches.append(player.play(ids, None if saved is None else saved / str(low)))
    say(f'{ids[-1] + 1} of {settings.episodes} games, {time.perf_counter() - start:.1f} s')
  return batches


# --- Results ----------------------------------------------------------------------


def summary(game: base.Game, settings: cfg.GameEvaluation, batches: Sequence[Batch]
            ) -> dict[str, Any]:
  """Every measure with its 95 % interval of the bootstrap over games.

  Returns:
    measures: by name value, interval, and how often it was asked; `digit_acc` is null where the
      model is not told the ledger, and the measures of places where there are none.
    by_delay: re-entry by how long a cell was out of view.
    after_edit: some measures of the frames after an edit alone, and `painted`.
  """
  num_frames = settings.trajectories.num_frames - 1
  count = jax.jit(functools.partial(measures.measures, game, at=settings.at_frame))
  delays = jax.jit(functools.partial(measures.by_delay, num_bins=num_frames))
  played = [batch.progress.played for batch in batches]
  shares = {name: _estimate(share, settings)
            for name, share in _whole([count(one) for one in played]).items()}
  if not settings.modules.shows_counters:
    shares['digit_acc'] = _NOTHING
  found: dict[str, Any] = {'measures': shares}
  curve = _whole([{'curve': delays(one)} for one in played])['curve']
  found['by_delay'] = [
      {'delay': delay + 1, **_estimate(measures.Share(curve.right[:, delay], asked), settings)}
      for delay, asked in enumerate(np.asarray(curve.asked).T) if asked.sum()]
  if not isinstance(settings.edit, cfg.NoEdit):
    found['after_edit'] = _after_edit(game, settings, batches)
  return found


def _after_edit(game: base.Game, settings: cfg.GameEvaluation, batches: Sequence[Batch]
                ) -> dict[str, Any]:
  """The measures of the frames that come after an edit."""
  edit = settings.edit
  assert not isinstance(edit, cfg.NoEdit)
  frame, counted = edit.frame, []
  for batch in batches:
    played = batch.progress.played
    later = measures.Played(
        *(jax.tree.map(lambda x: x[:, frame:], part) for part in (played.readings, played.claims)),
        *(x[:, frame:] for x in (played.values, played.predicted, played.origin, played.offset)))
    shares = {name: share for name, share in measures.measures(game, later, 1).items()
              if name in _AFTER_EDIT}
    if batch.painted is not None:
      shares['painted'] = measures.painted(
          played, jnp.asarray(batch.painted.cells), jnp.asarray(batch.painted.contents), frame)
    counted.append(shares)
  return {name: _estimate(share, settings) for name, share in _whole(counted).items()}


def _whole(batches: Sequence[dict[str, measures.Share]]) -> dict[str, measures.Share]:
  """The shares of all games, of those of batches of them."""
  whole: dict[str, measures.Share] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
  return whole


_NOTHING: dict[str, Any] = {'value': None, 'interval': [None, None], 'asked': 0}


def _estimate(share: measures.Share, settings: cfg.GameEvaluation) -> dict[str, Any]:
  """A measure's value and interval, of sums over all games."""
  right, asked = (np.asarray(x, np.float64) for x in share)
  if not asked.sum():
    return _NOTHING

  def ratio(right: np.ndarray, asked: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore', divide='ignore'):
      return right.sum(-1) / asked.sum(-1)

  low, high = metrics.interval(ratio, (right, asked), _RESAMPLES, settings.trajectories.seed)
  return {'value': round(float(ratio(right, asked)), 6),
          'interval': [round(low, 6), round(high, 6)], 'asked': int(asked.sum())}


def frame_time(rollouts: Rollouts) -> dict[str, Any]:
  """Seconds of a frame of one game and of a batch: with modules, and of the model alone."""
  found = {}
  for size in sorted({1, min(rollouts.settings.batch_size, rollouts.settings.episodes)}):
    whole, alone = _timed(rollouts, size)
    found[str(size)] = {'seconds': whole, 'model_alone': alone, 'ratio': round(whole / alone, 4),
                        'frames_per_second': round(size / whole, 1)}
  return found


def _timed(rollouts: Rollouts, size: int) -> tuple[float, float]:
  """Median seconds of a frame of `size` games, with modules and of the model alone."""
  world, on = rollouts.world, dream.switches(rollouts.settings.modules)
  episodes = rollouts.source.batch(range(size))
  keys = jax.vmap(functools.partial(trajectories.key_of, rollouts.source))(
      jnp.arange(size, dtype=jnp.uint32))
  params = rollouts.params_of(keys)
  started = jax.jit(functools.partial(dream.start, world))(
      params, episodes.frames[:, 0], jax.tree.map(lambda x: x[:, 0], episodes.truth), keys)
  given = dream.given(jnp.asarray(episodes.actions[:, 1]))
  told = dream.Condition(started.values, jnp.full((size, *world.game.view_shape), base.UNKNOWN))
  whole = jax.jit(lambda params, dreamed: dream.step(world, params, dreamed, given, on))
  alone = jax.jit(lambda params, dreamed: world.model.next_frame(
      params, dreamed.model, given.actions, told, dreamed.keys))
  times: dict[Any, list[float]] = {whole: [], alone: []}
  for program in times:
    jax.block_until_ready(program(params, started))
  for _ in range(_TIMED):  # In turn, so that what else the machine does falls on both.
    for program, seconds in times.items():
      start = time.perf_counter()
      jax.block_until_ready(program(params, started))
      seconds.append(time.perf_counter() - start)
  return statistics.median(times[whole]), statistics.median(times[alone])


def _plain(value: Any) -> Any:
  """Settings as JSON has them, each with its type."""
  if dataclasses.is_dataclass(value):
    return {'type': type(value).__name__,
            **{field.name: _plain(getattr(value, field.name))
               for field in dataclasses.fields(value)}}
  return value

