"""OPO in three seeds, OPO and RPT in three precisions, and every tiny run for a few steps.

    python experiments/rl_core/run.py [--only PART] [--steps 120] [--workdir runs/rl_core]

seeds: OPO on sums. gym: OPO on reasoning-gym's chain_sum. low_bit: the same OPO and RPT runs in
float32, W1.58A8 and W1.58A4. mismatch: every gin/run/*_tiny.gin for ten steps, and its largest
distance between trainer and sampler.

Every run is a `jaxrl-pt train` of a shipped gin file in a process of its own. Finished runs are
kept, and what was interrupted goes on.
"""

import argparse
import itertools
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.data import loader, problems, splits
from jaxrl_pt.scaling.runs import train

HERE = Path(__file__).parent
PRECISIONS = {
    'float32': ("cfg.Quant.weights = 'none'", "cfg.Quant.activations = 'none'"),
    'W1.58A8': (),
    'W1.58A4': ("cfg.Quant.activations = 'int4'", 'cfg.Quant.hadamard = True'),
}
SEEDS = (0, 1, 2)
# RPT on the text of the warm start itself: noisy sums, whose results can be worked out.
RPT = ('cfg.Run.objective = @cfg.RPT()', 'cfg.RPT.rollouts = @cfg.Rollouts()',
       'cfg.RPT.algorithm = @cfg.Algorithm()', 'cfg.Rollouts.group_size = 16',
       'cfg.Rollouts.num_prompts = 32', 'cfg.RPT.difficulty = (0.5, 1.0, 1.5)',
       'cfg.Rollouts.prompt_len = 32', 'response_tokens = 1', 'cfg.RPT.scored_examples = 256',
       'cfg.RPT.eval_positions = 512', 'cfg.Train.batch_size = 32')


def warm_start(root: Path, name: str) -> Path:
  """The policy of one precision that its runs start from."""
  workdir = root / f'warmstart-{name}'
  train('gin/run/warmstart_arithmetic_tiny.gin', workdir, PRECISIONS[name])
  return workdir


def opo(root: Path, name: str, seed: int, steps: int) -> list[dict]:
  """One OPO run on sums."""
  start = warm_start(root, name)
  return train('gin/run/opo_tiny.gin', root / f'opo-{name}-{seed}', (
      *PRECISIONS[name], f'cfg.RL.start_from = {str(start)!r}', f'cfg.Run.seed = {seed}',
      f'cfg.Train.num_steps = {steps}', f'cfg.Train.eval_every = {steps}'))


def rpt(root: Path, name: str, seed: int, steps: int) -> list[dict]:
  """One RPT run on the text of the warm start."""
  start = warm_start(root, name)
  return train('gin/run/opo_tiny.gin', root / f'rpt-{name}-{seed}', (
      *RPT, *PRECISIONS[name], f'cfg.RPT.start_from = {str(start)!r}',
      f'cfg.Run.seed = {seed}', f'cfg.Train.num_steps = {steps}',
      f'cfg.Train.eval_every = {steps}'))


def gym(root: Path, seed: int, steps: int) -> list[dict]:
  """One OPO run on reasoning-gym's chain_sum."""
  start = root / 'warmstart-gym'
  train('gin/run/warmstart_gym_tiny.gin', start)
  return train('gin/run/opo_gym_tiny.gin', root / f'gym-{seed}', (
      f'cfg.RL.start_from = {str(start)!r}', f'cfg.Run.seed = {seed}',
      f'cfg.Train.num_steps = {steps}', f'cfg.Train.eval_every = {steps}'))


def mismatch(root: Path, gin_file: Path) -> dict[str, float]:
  """The largest mismatch in ten steps of a shipped run, from the policy that it names."""
  run, _ = gin_bindings.load([str(gin_file)], [])
  start = Path(run.objective.start_from).name  # runs/NAME is what gin/run/NAME.gin leaves
  train(f'gin/run/{start}.gin', root / start)
  objective = type(run.objective).__name__
  rows = train(str(gin_file), root / f'mismatch-{gin_file.stem}', (
      f'cfg.{objective}.start_from = {str(root / start)!r}', 'cfg.Train.num_steps = 10',
      'cfg.Train.log_every = 1', 'cfg.Train.eval_every = 10'))
  worst = lambda key: max((row[key] for row in rows if key in row), default=None)
  return {'mismatch': worst('mismatch'), 'staleness': worst('staleness')}


def check_apart(start_file: str, gin_file: str, bindings: tuple[str, ...] = ()) -> None:
  """Prints how many held-out prompts or documents there are that neither run has trained on.

  The runs refuse an overlap by themselves; this counts.
  """
  start, _ = gin_bindings.load([start_file], [])
  run, _ = gin_bindings.load([gin_file], list(bindings))
  demonstrated = loader.split_keys(start.data, held_out=False)
  if isinstance(run.objective, cfg.RPT):
    print(splits.refuse_overlap(demonstrated, loader.split_keys(run.data, held_out=True),
                                f'prompts of {gin_file} as RPT'), flush=True)
    return
  asked = run.objective.problems
  print(splits.refuse_overlap(
      itertools.chain(demonstrated, problems.prompts(asked, held_out=False)),
      problems.prompts(asked, held_out=True), f'prompts of {gin_file}'), flush=True)


# --- What came of it ------------------------------------------------------------


def curve(rows: list[dict], key: str, window: int = 10) -> np.ndarray:
  """Mean over windows of steps."""
  values = np.array([row[key] for row in rows if row['step'] > 0 and key in row])
  return values[:len(values) // window * window].reshape(-1, window).mean(1)


def summary(rows: list[dict]) -> dict[str, float]:
  """First and last ten steps, the mismatch's worst step, seconds of all steps."""
  trained = [row for row in rows if row['step'] > 0]
  reward = [row['reward'] for row in trained]
  kl = [row['kl'] for row in trained if 'kl' in row]
  held_out = {key.split('/')[1]: [row[key] for row in rows if key in row]
              for row in rows for key in row if key.startswith('validation/')}
  return {'reward_first_10': float(np.mean(reward[:10])),
          'reward_last_10': float(np.mean(reward[-10:])),
          'largest_mismatch': max(row['mismatch'] for row in trained),
          'kl_last': kl[-1] if kl else float('nan'), 'entropy_last': trained[-1]['entropy'],
          'seconds': sum(row['time/seconds'] for row in trained),
          **{f'{name}_before': values[0] for name, values in held_out.items()},
          **{f'{name}_after': values[-1] for name, values in held_out.items()}}


def draw(path: Path, curves: dict[str, list[np.ndarray]], title: str) -> None:
  """Reward curves: a thin line a seed, a thick one for their mean."""
  figure = Figure(figsize=(6.4, 3.6), dpi=144, layout='constrained', facecolor='white')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for (name, seeds), colour in zip(curves.items(), ('#0072B2', '#D55E00', '#009E73'),
                                     strict=False):
    steps = 10 * np.arange(1, len(seeds[0]) + 1)
    for values in seeds:
      axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.9)
    axes.plot(steps, np.mean(seeds, 0), color=colour, linewidth=2, label=name)
  axes.set_title(title, loc='left', fontsize=11, fontweight='bold')
  axes.set_xlabel('step')
  axes.set_ylabel('mean reward of ten steps')
  axes.set_ylim(bottom=0)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path)


def three_seeds(results: Path, name: str, title: str, runs: dict[int, list[dict]]) -> None:
  (results / f'{name}.json').write_text(json.dumps(
      {seed: summary(rows) for seed, rows in runs.items()}, indent=1) + '\n')
  draw(results / f'{name}.png', {'OPO, W1.58A8': [curve(r, 'reward') for r in runs.values()]},
       title)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', choices=('seeds', 'gym', 'low_bit', 'mismatch'))
  parser.add_argument('--steps', type=int, default=120)
  parser.add_argument('--workdir', type=Path, default=Path('runs/rl_core'))
  args = parser.parse_args()
  results = HERE / 'results'
  results.mkdir(exist_ok=True)
  warm = 'gin/run/warmstart_arithmetic_tiny.gin'
  if args.only in (None, 'seeds', 'low_bit'):
    check_apart(warm, 'gin/run/opo_tiny.gin')
  if args.only in (None, 'gym'):
    check_apart('gin/run/warmstart_gym_tiny.gin', 'gin/run/opo_gym_tiny.gin')
  if args.only in (None, 'low_bit'):
    check_apart(warm, 'gin/run/opo_tiny.gin', (*RPT, f'cfg.RPT.start_from = {warm!r}'))
  if args.only in (None, 'seeds'):
    three_seeds(results, 'opo_seeds', 'OPO on sums of three digits, three seeds',
                {seed: opo(args.workdir, 'W1.58A8', seed, args.steps) for seed in SEEDS})
  if args.only in (None, 'gym'):
    three_seeds(results, 'gym_seeds', "OPO on reasoning-gym's chain_sum, three seeds",
                {seed: gym(args.workdir, seed, args.steps) for seed in SEEDS})
  if args.only in (None, 'low_bit'):
    found: dict[str, dict] = {}
    for method, run in (('opo', opo), ('rpt', rpt)):
      runs_of = {name: [run(args.workdir, name, seed, args.steps) for seed in SEEDS]
                 for name in PRECISIONS}
      found[method] = {name: [summary(rows) for rows in runs] for name, runs in runs_of.items()}
      draw(results / f'low_bit_{method}.png',
           {name: [curve(r, 'reward') for r in runs] for name, runs in runs_of.items()},
           f'{method.upper()} in three precisions, three seeds')
    (results / 'low_bit.json').write_text(json.dumps(found, indent=1) + '\n')
  if args.only in (None, 'mismatch'):
    files = sorted(Path('gin/run').glob('*_tiny.gin'))
    found = {path.stem: mismatch(args.workdir, path) for path in files
             if not path.stem.startswith(('pretrain', 'warmstart'))}
    (results / 'mismatch.json').write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
  main()
