"""Long games inside a trained model: `jaxrl-pt eval`, and its measures stretch by stretch."""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.evaluation import game_report, game_worlds
from jaxrl_pt.game import base, games, measures

SHOWN = ('unreadable', 'score_exact', 'spa_con_all', 'spa_con_reentry', 'bare', 'act_acc',
         'event_acc')
STRETCHES = 10


def stretch(played: measures.Played, low: int, high: int) -> measures.Played:
  """The frames low + 1 … high of games, and the frame before them."""
  with_first = lambda tree: jax.tree.map(lambda x: x[:, low:high + 1], tree)
  rest = (x[:, low:high] for x in (played.values, played.predicted, played.origin, played.offset))
  return measures.Played(with_first(played.readings), with_first(played.claims), *rest)


def by_time(game: base.Game, played: measures.Played) -> list[dict[str, Any]]:
  """The measures of equal stretches of the games, each with its last frame."""
  frames = played.values.shape[1]
  ends = np.linspace(0, frames, STRETCHES + 1).astype(int)
  found = []
  for low, high in zip(ends[:-1], ends[1:], strict=True):
    shares = measures.measures(game, stretch(played, low, high), 1)
    found.append({'frame': int(high)} | {
        name: float(shares[name].right.sum() / shares[name].asked.sum())
        if shares[name].asked.sum() else None for name in SHOWN})
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=Path, required=True)
  parser.add_argument('--output', type=Path, required=True)
  parser.add_argument('--gin_file', action='append', default=[])
  parser.add_argument('--gin_bindings', action='append', default=[])
  args = parser.parse_args()
  settings = gin_bindings.load_value(cfg.GameEvaluation, args.gin_file, args.gin_bindings)
  # All games are in the one batch whose frames are cut into stretches.
  assert settings.batch_size >= settings.episodes
  found = game_worlds.evaluate(args.workdir, settings, step=None, say=print)
  results = {**found.results, 'by_time': by_time(games.open_game(found.game),
                                                 found.first.progress.played)}
  game_report.write(args.output, 'experiments/maag/drift.py', found._replace(results=results))


if __name__ == '__main__':
  main()
