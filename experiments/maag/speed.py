"""Frame times of the mini model with and without its modules, in turn, in one process.

With modules a frame is one program: LogicNet, ledger, retrieval, the frame, linking and writing.
Without them it is the frame alone, by a model that is told nothing. Parameters are random, since
times do not depend on them.
"""

import argparse
from collections.abc import Callable
import functools
import json
from pathlib import Path
import time
from typing import Any

import arms
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import files, gin_bindings
from jaxrl_pt import params as P
from jaxrl_pt.diffusion.sampling import Solver
from jaxrl_pt.game import base, dream, games, trajectories
from jaxrl_pt.jobs import diffusion, world_models
from jaxrl_pt.parallel.mesh import make_mesh


def program(name: str, size: int) -> tuple[Callable[[], Any], int]:
  """A frame of `size` games by an untrained arm, and the number of its parameters."""
  arm = arms.ARMS[name]
  run, _ = gin_bindings.load([str(arms.ROOT / 'gin' / 'run' / f'{arm.run}.gin')], [
      f'cfg.Conditions.values = {arm.values}', f'cfg.Conditions.map = {arm.map}'])
  method, source = run.objective, trajectories.Source(run.data, True)
  model, game = diffusion.world_of(run, make_mesh(run.mesh)), games.open_game(run.data.game)
  params = jax.jit(functools.partial(P.init, model.specs))(jax.random.key(0))
  memory = cfg.MapMemory() if arm.map else cfg.NoMap()
  world = dream.World(game, world_models.world_model(
      model, Solver(method.process, arms.SAMPLING_STEPS), game.stay), memory)
  episodes, keys = source.batch(range(size)), jnp.stack(
      [trajectories.key_of(source, number) for number in range(size)])
  started = jax.jit(functools.partial(dream.start, world))(
      params, episodes.frames[:, 0], jax.tree.map(lambda x: x[:, 0], episodes.truth), keys)
  actions = jnp.asarray(episodes.actions[:, 1])
  on = dream.switches(cfg.MaaG(shows_counters=arm.values, map=memory))
  nothing = dream.Condition(jnp.full_like(started.values, -1),
                            jnp.full((size, *game.view_shape), base.UNKNOWN))
  whole = jax.jit(functools.partial(dream.step, world))
  alone = jax.jit(world.model.next_frame)
  draw = {
      'both': lambda: whole(params, started, dream.given(actions), on),
      'none': lambda: alone(params, started.model, actions, nothing, keys)}[name]
  return draw, sum(x.size for x in jax.tree.leaves(params))


def seconds(draw: Callable[[], Any], repeats: int) -> float:
  """Seconds of a frame."""
  began = time.perf_counter()
  for _ in range(repeats):
    jax.block_until_ready(draw())
  return (time.perf_counter() - began) / repeats


def measured(size: int, rounds: int) -> dict[str, Any]:
  """Times of both arms with so many games at once; each round has both, in turns of order."""
  made = {name: program(name, size) for name in ('both', 'none')}
  for draw, _ in made.values():
    draw()  # It is compiled.
  repeats = max(1, round(0.2 / seconds(made['both'][0], 3)))
  times: dict[str, list[float]] = {'both': [], 'none': []}
  for number in range(rounds):
    for name in sorted(times, reverse=bool(number % 2)):
      times[name].append(seconds(made[name][0], repeats))
  ratios = np.array(times['both']) / np.array(times['none'])
  drawn = np.random.default_rng(0).choice(ratios, (2000, rounds))
  low, high = np.percentile(np.median(drawn, 1), (2.5, 97.5))
  median = {name: float(np.median(values)) for name, values in times.items()}
  return {'games': size, 'seconds': median, 'frames_per_second': size / median['both'],
          'ratio': float(np.median(ratios)), 'ratio_interval': [float(low), float(high)],
          'parameters': {name: number for name, (_, number) in made.items()}}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output', type=Path, required=True)
  parser.add_argument('--rounds', type=int, default=40)
  args = parser.parse_args()
  found = []
  for size in arms.AT_ONCE:
    found.append(measured(size, args.rounds))
    print(found[-1], flush=True)
  files.write_text(args.output, json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
