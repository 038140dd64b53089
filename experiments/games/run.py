"""Measures the games: frames a second in a batch and alone, and what the reader makes of damage.

    python experiments/games/run.py            # about two minutes on two cores

Writes results/speed.json, results/reading.json and results/reading.png beside this file.
"""

import functools
import json
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import games, reading, trajectories

RESULTS = Path(__file__).parent / 'results'
GAMES = cfg.Traveler(), cfg.Pong(), cfg.PacMan()
NOISE = 0.0, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3
SHARES = 0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5
BATCH, SINGLES = 256, 64
KINDS = 'exact', 'unreadable', 'misread'


def speed(config: cfg.Game) -> dict[str, float]:
  """Frames a second of episodes of 48 frames: in one batch, and one episode after the other."""
  source = trajectories.Source(cfg.Trajectories(config))
  seconds = {}
  for size, rounds in ((BATCH, 4), (1, SINGLES)):
    batches = [np.arange(size) + size * i for i in range(rounds + 1)]
    source.batch(batches[0])  # compiles
    start = time.perf_counter()
    for ids in batches[1:]:
      source.batch(ids)
    seconds[size] = (time.perf_counter() - start) / (rounds * size * source.config.num_frames)
  return {'batch': 1 / seconds[BATCH], 'single': 1 / seconds[1],
          'ratio': seconds[1] / seconds[BATCH]}


def damaged(config: cfg.Game) -> dict[str, dict[str, list[float]]]:
  """The shares of frames that are read exactly, unreadable, or read wrongly all the same."""
  source = trajectories.Source(cfg.Trajectories(config, num_frames=32))
  game = games.open_game(config)
  batch = source.batch(range(64))
  frames = batch.frames.reshape(-1, *game.frame_shape, 3).astype(np.float32) / 255
  truth = jax.tree.map(lambda x: x.reshape(len(frames), *x.shape[2:]), batch.truth)
  rng = np.random.default_rng(0)

  @jax.jit
  def shares(frames: Any) -> Any:
    readings = jax.vmap(functools.partial(reading.read, game))(frames)
    exact = jax.vmap(reading.is_exact)(readings, truth)
    wrong = readings.readable & ~exact
    return jnp.stack([exact.mean(), (~readings.readable).mean(), wrong.mean()])

  other = np.roll(frames, 32, 0)  # the same moment of another episode
  found = {'noise': [shares(frames + rng.normal(0, sigma, frames.shape).astype(np.float32))
                     for sigma in NOISE],
           'blend': [shares((1 - share) * frames + share * other) for share in SHARES],
           'uniform': [shares(rng.random(frames.shape, np.float32))]}
  return {name: {kind: [float(row[i]) for row in rows] for i, kind in enumerate(KINDS)}
          for name, rows in found.items()}


def plot(found: dict[str, Any]) -> None:
  """One panel for each game and kind of damage."""
  figure = Figure(figsize=(9, 4.6), layout='constrained')
  axes = figure.subplots(2, len(found), sharey=True)
  for column, (name, damage) in enumerate(found.items()):
    for axis, kind, amounts, label in (
        (axes[0, column], 'noise', NOISE, 'standard deviation of noise'),
        (axes[1, column], 'blend', SHARES, 'share of another frame')):
      for what, style in zip(KINDS, ('o-', 's--', 'x:'), strict=True):
        axis.plot(amounts, damage[kind][what], style, markersize=4, label=what)
      axis.set_xlabel(label)
      axis.grid(alpha=0.3)
    axes[0, column].set_title(name)
  axes[0, 0].set_ylabel('share of frames')
  axes[1, 0].set_ylabel('share of frames')
  axes[0, 0].legend(fontsize=8)
  figure.savefig(RESULTS / 'reading.png', dpi=80)


def main() -> None:
  RESULTS.mkdir(exist_ok=True)
  names = [type(config).__name__ for config in GAMES]
  speeds = {name: speed(config) for name, config in zip(names, GAMES, strict=True)}
  (RESULTS / 'speed.json').write_text(json.dumps(
      {'device': jax.devices()[0].device_kind, 'batch': BATCH, 'frames': 48, **speeds}, indent=2)
      + '\n')
  found = {name: damaged(config) for name, config in zip(names, GAMES, strict=True)}
  (RESULTS / 'reading.json').write_text(json.dumps(
      {'noise': NOISE, 'blend': SHARES, **found}, indent=2) + '\n')
  plot(found)
  print(json.dumps(speeds, indent=2))


if __name__ == '__main__':
  main()
