"""A judge as the reward: does the policy's true accuracy follow what the judge says of it?

    python experiments/rrm/reward.py --judge runs/rrm/reasoning-3-0/judge \
        --biased runs/rrm/biased-3-1/judge [--workdir runs/rrm_reward] [--seeds 0 1 2]

A tiny policy is fine-tuned on sums of one to three steps, of whose demonstrations 30 % stop too
early, so that about 70 % of its answers are right. From it GRPO goes on for some steps with four
rewards:

    judge    the win rate of a response in its group, by a judge that reasons and has learned the
             same kind of sums; it sees the results alone
    truth    whether the answer is right
    biased   the judge that has learned to name the first place
    none     a learning rate of 1e-12: what the measure itself moves by

Everything is run by `jaxrl-pt train`. True accuracy of all arms is that of held-out sums, which
neither a policy nor a judge is trained on. Runs that are finished are kept. Writes
results/reward.json and reward.png.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxrl_pt.scaling import runs
from jaxrl_pt.scaling.seeds import interval, shown

RESULTS = Path(__file__).resolve().parent / 'results'
ARMS = ('judge', 'truth', 'biased', 'none')
COLOURS = {'judge': '#009E73', 'truth': '#000000', 'biased': '#D55E00', 'none': '#999999'}
WARMUP, STEPS, EVERY = 1000, 40, 5
# What the judge has not seen either.
HELD_OUT = 0.2
# The policy's; its weights are ternary, the judge's are not.
MODEL = ('cfg.Model.num_layers = 2', 'cfg.Model.d_model = 64', 'cfg.Model.d_ff = 192')
SUMS = ('cfg.RedundantChecks.max_steps = 3', 'cfg.RedundantChecks.max_checks = 0')
ALWAYS = (*MODEL, *SUMS)


def train(workdir: Path, gin: str, *bindings: str) -> list[dict[str, Any]]:
  """Runs a shipped gin file to its end, unless it is there already; its rows of metrics."""
  print(f'{workdir.name} …', flush=True)
  return runs.train(f'gin/run/{gin}.gin', workdir, (*ALWAYS, *bindings))


def reinforced(arm: str, seed: int, start: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
  """The rows of an arm."""
  judge = args.biased if arm == 'biased' else args.judge
  reward = (['cfg.RL.verifier = @cfg.AnswerMatch()'] if arm == 'truth' else
            [f'cfg.JudgeReward.judge_from = {str(judge.absolute())!r}'])
  rate = 1e-12 if arm == 'none' else args.rate
  return train(args.workdir / f'{arm}-{seed}', 'judge_reward_tiny', *reward,
               f'cfg.RL.start_from = {str(start)!r}', f'cfg.ConstantRate.learning_rate = {rate!r}',
               f'cfg.Run.seed = {seed}', f'cfg.Train.num_steps = {args.steps}',
               f'cfg.Train.eval_every = {EVERY}', f'cfg.Checkpoint.every = {args.steps}',
               f'cfg.Problems.held_out = {HELD_OUT}', 'cfg.RL.eval_problems = 256')


def of_run(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
  """(step, value) of what an arm's evaluations measured."""
  names = {'accuracy': 'validation/accuracy', 'win rate': 'validation/reward'}
  return {short: [[row['step'], round(row[name], 4)] for row in rows if name in row]
          for short, name in names.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=(
      argparse.RawDescriptionHelpFormatter))
  parser.add_argument('--judge', type=Path, required=True)
  parser.add_argument('--biased', type=Path, required=True)
  parser.add_argument('--workdir', type=Path, default=Path('runs/rrm_reward'))
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--arms', nargs='+', choices=ARMS, default=ARMS)
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--rate', type=float, default=5e-4)
  args = parser.parse_args()
  args.workdir = args.workdir.absolute()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(args.workdir / 'compiled'))
  found: dict[str, list[dict[str, list[list[float]]]]] = {arm: [] for arm in args.arms}
  for seed in args.seeds:
    start = args.workdir / f'start-{seed}'
    train(start, 'hft_tiny', 'cfg.Demonstrations.source = @cfg.RedundantChecks()',
          'cfg.RedundantChecks.size = 40000', 'cfg.RedundantChecks.noise = 0.3',
          'cfg.RedundantChecks.min_steps = 1', f'cfg.Data.validation_fraction = {HELD_OUT}',
          f'cfg.Run.seed = {seed}',
          f'cfg.Train.num_steps = {WARMUP}', f'cfg.Train.eval_every = {WARMUP}',
          f'cfg.Checkpoint.every = {WARMUP}')
    for arm in args.arms:
      found[arm].append(of_run(reinforced(arm, seed, start, args)))
  at = lambda arm, name, n: [run[name][n][1] for run in found[arm]]
  table = {arm: {name: {'before': interval(at(arm, name, 0)), 'after': interval(at(arm, name, -1)),
                        'change': interval([after - before for before, after in zip(
                            at(arm, name, 0), at(arm, name, -1), strict=True)])}
                 for name in ('accuracy', 'win rate')} for arm in args.arms}
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'reward.json').write_text(json.dumps(
      {'seeds': args.seeds, 'steps': args.steps, 'rate': args.rate, 'arms': table, 'runs': found},
      indent=1) + '\n', encoding='utf-8')
  for arm, names in table.items():
    print(arm, {name: {when: shown(value) for when, value in row.items()}
                for name, row in names.items()})
  _plot(found).savefig(RESULTS / 'reward.png', dpi=120)


def _plot(found: dict[str, list[dict[str, list[list[float]]]]]) -> Figure:
  figure = Figure(figsize=(9, 3.8), layout='constrained')
  for axes, name in zip(figure.subplots(1, 2), ('accuracy', 'win rate'), strict=True):
    for arm, of_arm in found.items():
      for n, run in enumerate(of_arm):
        axes.plot(*zip(*run[name], strict=True), color=COLOURS[arm], alpha=0.8,
                  label=arm if n == 0 else None)
    axes.set(xlabel='step of GRPO', ylim=(0, 1))
  axes_left, axes_right = figure.axes
  axes_left.set(title='true accuracy on held-out sums')
  axes_right.set(title="win rate against the start, by the arm's reward")
  axes_left.legend(title='reward', fontsize=8)
  return figure


if __name__ == '__main__':
  main()
