"""Child of test_turn_shards.py: guessing games on meshes of 8 fake CPU devices, as JSON.

One row for each mesh: whether its tokens, masks, rewards and held-out measures are those of one
device, the largest difference of log-probabilities, and where each engine works. Of the first mesh
it also takes a step of the learner.
"""

import argparse
import dataclasses
import json
from pathlib import Path
import types

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.problems import Problem
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments.base import Task
from jaxrl_pt.environments.episodes import EpisodePool
from jaxrl_pt.environments.multi_turn import Player
from jaxrl_pt.environments.transcript import make_transcript
from jaxrl_pt.jobs import open as opening
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.rollouts.stages import Stages
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params, RolloutBatch, TrainState, Verdict

TOKENIZER = ByteTokenizer()
MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=32, num_heads=8, num_kv_heads=8, head_dim=4,
                  vocab_size=264, quant=cfg.Quant('ternary', 'int8'))
MODULE = transformer.build(MODEL)
# Three guesses of 0 or 1, each of at most two digits, most of them wrong: rows of one to three
# turns, and texts of one or two tokens, stand in a batch.
SETTINGS = cfg.Interactive(
    cfg.GuessNumber(0, 1, 3), max_turns=3, turn_tokens=2, observation_tokens=8,
    template=cfg.ChatTemplate('{content}|', '{content}|', '', '|'))
DIGITS = cfg.Sampler(banned=tuple(t for t in range(264) if t not in (48, 49, TOKENIZER.eos_id)))
ROLLOUTS = cfg.Rollouts(8, 2, 200, 40, DIGITS, slots=cfg.Slots(page_size=16, prefill_chunk=32))
METHOD = cfg.RL('somewhere', cfg.Problems(cfg.NumberedGames(9)), SETTINGS, rollouts=ROLLOUTS,
                algorithm=cfg.Algorithm(advantage=cfg.OPOBatch()))
RUN = cfg.Run(seed=5, model=MODEL, objective=METHOD,
              data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
              optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)), train=cfg.Train(9))
PROBLEMS = [Problem(100 + n, f'game {n}', '', f'game {n}') for n in range(8)]
# The first one stands in the batch twice, on a mesh in two shards.
BATCH = [*PROBLEMS[:7], PROBLEMS[0]]
HELD_OUT = PROBLEMS[:5]  # No number of shards divides them.


def make_player(mesh: Mesh, pool: EpisodePool) -> tuple[Player, sessions.Session]:
  session = sessions.Session(RUN, Path('unused'), '', mesh,
                             types.SimpleNamespace(tokenizer=TOKENIZER))
  return Player(session, METHOD, pool, make_transcript(SETTINGS, TOKENIZER), PROBLEMS), session


def play(player: Player, params: Params
         ) -> tuple[RolloutBatch, Verdict, dict[str, float]]:
  """A batch's rollouts and verdict, and the measures on held-out problems."""
  rollouts, played = player.draw(params, player.take(BATCH)[0], 3, 11)
  return rollouts, played.verdict, player.score(HELD_OUT, params)


def learned(player: Player, session: sessions.Session, params: Params) -> dict[str, object]:
  """The metrics of a step of the learner, and whether it was given rows that the mesh splits."""
  optimizer = optim.make_optimizer(RUN.optimizer, 9, MODULE.specs)
  stages = Stages(session, Task(lambda batch: player.take(BATCH), player, lambda params: {}, ''),
                  params, optimizer, METHOD)
  method = states.new_method(ROLLOUTS, METHOD.algorithm, MODEL.d_model)
  prompts, references = stages.take(3)
  rollouts, pending = stages.draw_verified(params, prompts, references, 3, 0)
  rows = rules.row_sharding(session.mesh)
  is_split = all(x.sharding == rows for x in jax.tree.leaves(rollouts))
  copied = jax.tree.map(jnp.copy, params)
  state = TrainState(jnp.zeros((), jnp.int32), copied, optimizer.init(copied), method)
  _, done = stages.learn(state, prompts, references, rollouts, stages.settle(pending), False)
  return {'is_split': is_split and stages.balance is None,
          'metrics': {name: float(value.mean()) for name, value in done.metrics.items()}}


def preflight_knows(engine: Engine, mesh: Mesh) -> bool:
  """Whether preflight lays out the pages of the first shard's engine as they are."""
  program, *_ = opening.kind(METHOD).programs(RUN, mesh)
  laid_out = lambda tree: [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]
  return laid_out(program.args[4].cache) == laid_out(engine._slots.cache) and (
      program.copies == rules.num_shards(mesh))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('meshes', nargs='+')
  shapes = [tuple(map(int, text.split(','))) for text in parser.parse_args().meshes]
  params = P.init(MODULE.specs, jax.random.key(0))
  params = {**params, 'embed': params['embed'] * 8}  # A random model has no opinions.
  with EpisodePool(SETTINGS, cfg.VerifierPool(num_workers=2)) as pool:
    player, _ = make_player(make_mesh(cfg.Mesh(), jax.devices()[:1]), pool)
    rollouts, verdict, measures = play(player, params)
    for shape in shapes:
      devices = jax.devices()[:int(np.prod(shape))]
      mesh = make_mesh(cfg.Mesh(*shape), devices)
      player, session = make_player(mesh, pool)
      placed = jax.device_put(params, rules.param_shardings(MODULE.specs, mesh))
      drawn, judged, measured = play(player, placed)
      engines = player._engines
      more = learned(player, session, placed) if shape == shapes[0] else {}
      print(json.dumps({
          'mesh': shape,
          'same': {f.name: bool(np.array_equal(getattr(drawn, f.name), getattr(rollouts, f.name)))
                   for f in dataclasses.fields(drawn) if f.name not in ('logp', 'selected')},
          'same_verdict': all(np.array_equal(a, b) for a, b in zip(
              jax.tree.leaves(judged), jax.tree.leaves(verdict), strict=True)),
          'held_out': max(abs(measured[name] - measures[name]) for name in measures),
          'logp': float(np.abs(drawn.logp - rollouts.logp).max()),
          'turns': sorted(set(judged.measures['turns'].ravel().tolist())),
          'repeated': bool(np.array_equal(drawn.tokens[0], drawn.tokens[7])),
          'devices': [sorted(d.id for d in e._slots.cache.pages.sharding.device_set)
                      for e in engines],
          'slots': [e.config.slots for e in engines],
          'drawn': [e.counters()['occupancy'] > 0 for e in engines],
          'preflight': preflight_knows(engines[0], mesh),
          'shards': [[d.id for d in part] for part in mesh.devices.reshape(len(engines), -1)],
          **more}), flush=True)


if __name__ == '__main__':
  main()
