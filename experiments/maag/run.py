"""Do a model's numbers and places stay true if it is told ledger and map? The acceptance tests.

    python experiments/maag/run.py [--workdir runs/maag] [--workers 2] [--only arm/both,control]
    python experiments/maag/run.py --smoke      # every kind of part, a few steps each

Parts are independent processes, so that they can be spread over cores and machines; what is
finished is a row of runs.jsonl in the work directory, a training that was killed goes on at its
last checkpoint, and the command may be repeated. What a part needs is made first.

    rate/ARM/RATE             the loss of a shorter training at each rate, on a seed apart
    vae/SEED                  the autoencoder of the recurrent rival
    arm/ARM/SEED              trained by `jaxrl-pt train`, measured by `jaxrl-pt eval` (G1, G6)
    control/CONTROL/SEED      what is told to the arm `both` is changed (G2)
    delay/ARM/SEED            longer games, so that cells return after longer absences (G3)
    place/MODEL/WORLD/MARGIN/ERROR   localisation where places look alike or do not (G4)
    drift/SEED                long games inside the arm `both` (G5)
    speed                     frame times, both arms in turn in one process; run it alone

Arms, rates and sizes are in arms.py, what the rows say together is in report.py.
"""

import argparse
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import arms
from arms import ARMS, FOUR, GAMES, RIVALS, Size

from jaxrl_pt.scaling.seeds import append_row

HERE = Path(__file__).resolve().parent
SEEDS = 0, 1, 2
EXTRA = 'both', 'none', *RIVALS  # the arms of the curves against the return delay
CONTROLS = {
    'shuffled': ('GameEvaluation.shuffled_map = True',),
    'ledger': ('GameEvaluation.edit = @cfg.AddToLedger()', 'AddToLedger.amount = 37',
               'AddToLedger.frame = {edit}'),
    'paint': ('GameEvaluation.edit = @cfg.PaintCells()', 'PaintCells.frame = {edit}'),
    'events_none': ("MaaG.events = 'none'",),
    'events_every_step': ("MaaG.events = 'every_step'",),
    'events_true': ("MaaG.events = 'true'",),
}
WORLDS = {'one_colour': 1, 'six_colours': 6}
# `renderer` draws the truth whatever it is told, so that its frames say where the view is.
MODELS = {'renderer': ("GameEvaluation.model = 'ignores'", 'GameEvaluation.pixel_noise = 0.02'),
          'trained': ()}
MARGINS, ERRORS = ('0', '0.005'), ('0', '0.1')


def parts(seeds: Sequence[int], is_smoke: bool) -> list[str]:
  """The names of all parts; of a smoke run, some of every kind."""
  if is_smoke:
    few = 'none', 'both', 'recurrent', 'pong_numerical', 'pacman_both'
    return ['rate/both/0.002', 'vae/0', *(f'arm/{arm}/0' for arm in few), 'control/shuffled/0',
            'control/ledger/0', 'control/paint/0', 'delay/recurrent/0',
            'place/renderer/one_colour/0/0.1', 'place/trained/one_colour/0.005/0.1', 'drift/0',
            'speed']
  return [*(f'rate/{arm}/{rate:g}' for arm in ARMS for rate in arms.TRIED),
          *(f'vae/{seed}' for seed in (*seeds, arms.SEED_OF_RATES)),
          *(f'arm/{arm}/{seed}' for chosen in (FOUR, RIVALS, GAMES) for seed in seeds
            for arm in chosen),
          *(f'control/{control}/{seed}' for seed in seeds for control in CONTROLS),
          *(f'delay/{arm}/{seed}' for seed in seeds for arm in EXTRA),
          *(f'place/{model}/{world}/{margin}/{error}' for model in MODELS for world in WORLDS
            for margin in MARGINS for error in ERRORS),
          *(f'drift/{seed}' for seed in seeds), 'speed']


def needs(name: str, seeds: Sequence[int]) -> list[str]:
  """The parts that must be finished before one begins."""
  match name.split('/'):
    case ['rate', 'recurrent', _]:
      return [f'vae/{arms.SEED_OF_RATES}']
    case ['arm', 'recurrent', seed]:
      return [f'vae/{seed}']
    case ['control', _, seed] | ['drift', seed]:
      return [f'arm/both/{seed}']
    case ['delay', arm, seed]:
      return [f'arm/{arm}/{seed}']
    case ['place', 'trained', *_]:
      return [f'arm/both/{seeds[0]}']
  return []


# --- One part -----------------------------------------------------------------------


def run_part(name: str, root: Path, size: Size, seeds: Sequence[int]) -> Any:
  """The result of a part, as JSON has it."""
  of_both = lambda seed: arms.directory('both', int(seed), root)
  match name.split('/'):
    case ['rate', arm, rate]:
      shorter = dataclasses.replace(size, steps=min(size.steps, arms.RATE_STEPS))
      return arms.train(arm, arms.SEED_OF_RATES, root, shorter, float(rate))
    case ['vae', seed]:
      return arms.train_vae(int(seed), root, size)
    case ['arm', arm, seed]:
      trained = arms.train(arm, int(seed), root, size)
      return {**trained, **arms.evaluate(ARMS[arm], arms.directory(arm, int(seed), root), 'main',
                                         size)}
    case ['control', control, seed]:
      changes = [change.format(edit=size.edit) for change in CONTROLS[control]]
      return arms.evaluate(ARMS['both'], of_both(seed), control, size, changes)
    case ['delay', arm, seed]:
      return arms.evaluate(ARMS[arm], arms.directory(arm, int(seed), root), 'delay', size,
                           frames=size.delay_frames)
    case ['place', model, world, margin, error]:
      workdir = of_both(seeds[0]) if model == 'trained' else root / model
      changes = [*MODELS[model], f'Traveler.num_colours = {WORLDS[world]}',
                 "MapMemory.entries = 'colours'", f'SlidingWindow.margin = {float(margin)}',
                 f'GameEvaluation.nudge_rate = {float(error)}']
      return arms.evaluate(ARMS['both'], workdir, name.replace('/', '_'), size, changes)
    case ['drift', seed]:
      settings = arms.settings(ARMS['both'], size, ['GameEvaluation.checkpoint_every = 100'],
                               size.drift_frames)
      return script('drift', of_both(seed), ['--workdir', str(of_both(seed)), *settings])
    case ['speed']:
      return script('speed', root, ['--rounds', '40' if size == arms.FULL else '3'])
  raise SystemExit(f'no part {name!r}')


def script(name: str, workdir: Path, flags: Sequence[str]) -> Any:
  """The result of a script beside this one, which writes it as JSON."""
  output = workdir / 'evaluations' / f'{name}.json'
  output.parent.mkdir(parents=True, exist_ok=True)
  # Frame times are those of all cores, as a player has them.
  env = {key: value for key, value in os.environ.items() if (name, key) != ('speed', 'XLA_FLAGS')}
  with open(f'{workdir}.log', 'a', encoding='utf-8') as log:
    subprocess.run([sys.executable, str(HERE / f'{name}.py'), '--output', str(output), *flags],
                   check=True, stdout=log, stderr=subprocess.STDOUT, env=env)
  return json.loads(output.read_text(encoding='utf-8'))


# --- All parts ----------------------------------------------------------------------


def with_needs(names: Sequence[str], seeds: Sequence[int]) -> list[str]:
  """The parts and all that they need, each after what it needs."""
  ordered: list[str] = []

  def add(name: str) -> None:
    for other in needs(name, seeds):
      add(other)
    if name not in ordered:
      ordered.append(name)

  for name in names:
    add(name)
  return ordered


def run_all(wanted: Sequence[str], known: dict[str, Any], root: Path, size: Size,
            args: argparse.Namespace) -> None:
  """Runs the parts that have no result yet, and what they need, `workers` at a time.

  A part begins when all that it needs is done, and `speed`, which measures times, when nothing else
  is left.
  """
  def one(name: str) -> bool:
    began = time.perf_counter()
    try:
      found = run_part(name, root, size, args.seeds)
    except subprocess.CalledProcessError as error:
      print(f'{name}: FAILED, exit code {error.returncode}; see the logs in {root}', flush=True)
      return False
    seconds = round(time.perf_counter() - began, 1)
    append_row(root / 'runs.jsonl', {'part': name, 'size': dataclasses.asdict(size),
                                     'seconds': seconds, 'result': found})
    print(f'{name}: {seconds:.0f} s', flush=True)
    return True

  left = [name for name in with_needs(wanted, args.seeds) if name not in known]
  done, running = set(known), dict[concurrent.futures.Future[bool], str]()

  def is_ready(name: str) -> bool:
    return (left == [name] and not running if name == 'speed'
            else done.issuperset(needs(name, args.seeds)))

  with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    while left or running:
      ready = [name for name in left if is_ready(name)][:args.workers - len(running)]
      for name in ready:
        left.remove(name)
        running[pool.submit(one, name)] = name
      finished, _ = concurrent.futures.wait(
          running, return_when=concurrent.futures.FIRST_COMPLETED)
      if not all(part.result() for part in finished):
        raise SystemExit(1)
      done.update(running.pop(part) for part in finished)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, default=None, help='runs/maag, or runs/maag_smoke')
  parser.add_argument('--workers', type=int, default=2, help='parts at a time')
  parser.add_argument('--only', default='', help='beginnings of names of parts, with commas')
  parser.add_argument('--seeds', default=','.join(map(str, SEEDS)))
  parser.add_argument('--steps', type=int, help='of every training, for a shorter experiment')
  parser.add_argument('--smoke', action='store_true', help='a few steps of some of every kind')
  parser.add_argument('--report', action='store_true', help='run nothing, read the rows')
  parser.add_argument('--known', type=Path, help='a maag.json of an earlier run, whose parts are '
                      'not run again')
  parser.add_argument('--results', type=Path, help='where tables and plots go; WORKDIR/results')
  args = parser.parse_args()
  args.seeds = list(map(int, args.seeds.split(',')))
  size = arms.SMOKE if args.smoke else arms.FULL
  if args.steps:
    size = dataclasses.replace(size, steps=args.steps)
  root = (args.workdir or Path('runs/maag_smoke' if args.smoke else 'runs/maag')).resolve()
  root.mkdir(parents=True, exist_ok=True)
  # A process has one core and finds the programs that others have compiled.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(root / 'compiled')
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + (
      ' --xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1')
  known = json.loads(args.known.read_text(encoding='utf-8'))['parts'] if args.known else {}
  if not args.report:
    begins = tuple(args.only.split(','))
    run_all([name for name in parts(args.seeds, args.smoke) if name.startswith(begins)],
            known | arms.results(root, size), root, size, args)
  import report
  report.write(known | arms.results(root, size), root, args.results or root / 'results')


if __name__ == '__main__':
  main()
