"""Does a policy that has learned inside a model of a game play the game?

    python experiments/maag_rl/run.py [--workdir runs/maag_rl] [--workers 2] [--seeds 0,1,2]
    python experiments/maag_rl/run.py --both runs/maag/both-0 --none runs/maag/none-0
    python experiments/maag_rl/run.py --smoke          # a few steps of everything

A policy of Traveler that sees frames alone learns by reinforcement (`jaxrl-pt train`) and is then
played in the true game in held-out worlds (`jaxrl-pt eval`), beside a random and the scripted
policies. Arms, each for every seed:

    true           in the true game
    both           inside a model with ledger and map, paid for changes that events can have made
    none           inside a model that was trained and is played without either, paid the same way
    none_changes   the same, paid whatever the displayed number changes by
    every_step     a control: the model of `both`, whose ledger is made to count an event in every
                   step, so that the display is wrong and nothing that a policy does matters

The models are the arms `both` and `none` of experiments/maag, seed 0; --both and --none name work
directories in which they have been trained already, which are only read. What is finished is a row
of runs.jsonl in the work directory, and the command may be repeated.
"""

import argparse
from collections.abc import Sequence
import concurrent.futures
import dataclasses
from dataclasses import dataclass
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from jaxrl_pt.scaling import runs
from jaxrl_pt.scaling.seeds import append_row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / 'maag'))
import arms as models  # noqa: E402  # The models are arms of that experiment.

ARMS = 'true', 'both', 'none', 'none_changes', 'every_step'
MODELS = {'both': 'both', 'every_step': 'both', 'none': 'none', 'none_changes': 'none'}
_ALONE = ("MaaG.events = 'none'", 'MaaG.shows_counters = False', 'MaaG.map = @cfg.NoMap()')
_CURVES = 'reward', 'true_reward', 'unreadable', 'false_events', 'missed', 'entropy'


@dataclass(frozen=True)
class Size:
  """How much is trained and measured.

  steps: of a policy; worlds × group_size games of `frames` actions in each.
  eval_games: held-out worlds of an evaluation.
  model: the size of the models' own trainings.
  """

  steps: int = 24
  worlds: int = 4
  group_size: int = 4
  frames: int = 24
  eval_games: int = 64
  rate: float = 0.002
  model: models.Size = models.FULL


FULL = Size()
SMOKE = Size(3, 2, 2, 5, 4, 0.002, models.SMOKE)


# --- One part -----------------------------------------------------------------------


def model_of(arm: str, root: Path, size: Size, given: dict[str, Path]) -> Path:
  """The work directory of the model that an arm plays in, trained here unless it was given."""
  name = MODELS[arm]
  if name not in given:
    models.train(name, 0, root / 'models', size.model)
  return given.get(name, models.directory(name, 0, root / 'models'))


def changes(arm: str, seed: int, size: Size, model: Path | None) -> list[str]:
  """The settings of a policy's training."""
  found = [f'Run.seed = {seed}', f'Train.num_steps = {size.steps}',
           f'Train.batch_size = {size.worlds}', f'GameRL.group_size = {size.group_size}',
           f'Trajectories.num_frames = {size.frames + 1}',
           f'GameRL.eval_games = {size.eval_games}', f'Train.eval_every = {size.steps}',
           f'ConstantRate.learning_rate = {size.rate}',
           f'Checkpoint.every = {max(1, size.steps // 8)}', 'Checkpoint.keep = 1']
  if model is not None:
    found.append(f'InsideModel.model_from = {str(model)!r}')
  if arm.startswith('none'):
    found += _ALONE
  if arm == 'every_step':
    found.append("MaaG.events = 'every_step'")
  if arm == 'none_changes':
    found.append("GameRL.pays = 'changes'")
  return found


def run_part(arm: str, seed: int, root: Path, size: Size, given: dict[str, Path]) -> dict[str, Any]:
  """Trains a policy and evaluates it."""
  model = None if arm == 'true' else model_of(arm, root, size, given)
  gin = ROOT / 'gin' / 'run' / f'game_rl{"" if model is None else "_model"}_tiny.gin'
  workdir = root / f'{arm}-{seed}'
  rows = runs.train(str(gin), workdir,
                    [f'cfg.{change}' for change in changes(arm, seed, size, model)])
  if rows[-1]['step'] != size.steps:
    raise SystemExit(f'{workdir} holds {rows[-1]["step"]} of {size.steps} steps: see {workdir}.log')
  curve = {name: [round(row[name], 5) for row in rows if name in row] for name in _CURVES}
  return {'curve': curve, 'evaluation': evaluation(workdir)}


def evaluation(workdir: Path) -> dict[str, float]:
  """What `jaxrl-pt eval` says of a policy."""
  command = [sys.executable, '-m', 'jaxrl_pt.main', 'eval', '--workdir', str(workdir), '--json']
  done = subprocess.run(command, check=False, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f'eval of {workdir} ended with {done.returncode}: {done.stderr.strip()}')
  found: dict[str, float] = json.loads(done.stdout)
  return found


# --- All parts ----------------------------------------------------------------------


def run_all(wanted: Sequence[tuple[str, int]], root: Path, size: Size, given: dict[str, Path],
            workers: int) -> None:
  """Runs the parts that have no row yet, `workers` at a time; the models come first."""
  done = models.results(root, size)
  todo = [(arm, seed) for arm, seed in wanted if f'{arm}/{seed}' not in done]
  for arm in {MODELS[arm]: arm for arm, _ in todo if arm in MODELS}.values():
    model_of(arm, root, size, given)

  def one(part: tuple[str, int]) -> None:
    began = time.perf_counter()
    found = run_part(*part, root, size, given)
    seconds = round(time.perf_counter() - began, 1)
    name = '/'.join(map(str, part))
    append_row(root / 'runs.jsonl', {'part': name, 'size': dataclasses.asdict(size),
                                     'seconds': seconds, 'result': found})
    print(f'{name}: {seconds:.0f} s', flush=True)

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    list(pool.map(one, todo))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, help='runs/maag_rl, or runs/maag_rl_smoke')
  parser.add_argument('--workers', type=int, default=2, help='parts at a time')
  parser.add_argument('--seeds', default='0,1,2')
  parser.add_argument('--arms', default=','.join(ARMS))
  parser.add_argument('--steps', type=int, help='of every policy, for a shorter experiment')
  parser.add_argument('--both', type=Path, help='a trained model with both modules')
  parser.add_argument('--none', type=Path, help='a trained model without modules')
  parser.add_argument('--smoke', action='store_true', help='a few steps of everything, one seed')
  parser.add_argument('--report', action='store_true', help='run nothing, read the rows')
  parser.add_argument('--results', type=Path, help='where the table and the plot go')
  args = parser.parse_args()
  size = SMOKE if args.smoke else FULL
  if args.steps:
    size = dataclasses.replace(size, steps=args.steps)
  root = (args.workdir or Path('runs/maag_rl_smoke' if args.smoke else 'runs/maag_rl')).resolve()
  root.mkdir(parents=True, exist_ok=True)
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(root / 'compiled'))
  os.environ.setdefault('XLA_FLAGS', '--xla_cpu_multi_thread_eigen=false '
                        '--xla_cpu_parallel_codegen_split_count=1')
  given = {name: path.resolve() for name, path in (('both', args.both), ('none', args.none))
           if path is not None}
  if not args.report:
    seeds = [0] if args.smoke else list(map(int, args.seeds.split(',')))
    run_all([(arm, seed) for seed in seeds for arm in args.arms.split(',')], root, size, given,
            args.workers)
  import picture
  picture.write(models.results(root, size), args.results or root / 'results',
                dataclasses.asdict(size))


if __name__ == '__main__':
  main()
