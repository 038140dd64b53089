"""When to think: HFT, HGPO, their controls and comparators on easy and on hard sums.

    python experiments/lhrm/run.py --workdir runs/lhrm [--workers 2] [--only hgpo,alpha_0] [--steps N]

Every arm is a run that `jaxrl-pt train` of shipped gin files makes, in a process of its own, in
several seeds: first the HFT policies (gin/run/hft_tiny.gin), and from them everything else. Then a
policy answers held-out sums K times in each forced mode; what it does when it chooses itself follows
from these answers and its exact probability of thinking, without further noise:

    accuracy = P(think) · accuracy of thinking + P(no-think) · accuracy of answering at once

What is finished is a row of runs.jsonl in the work directory, so the command may be interrupted and
repeated, and ARMS may be shared out between machines. `--report` reads the rows, writes
results/lhrm.json and the plots, and trains nothing.
"""

import argparse
import concurrent.futures
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

from jaxrl_pt.scaling.seeds import append_row, finished_rows

SEEDS = (0, 1, 2, 3, 4)
STEPS, HFT_STEPS = 200, 600
MARGIN = 0.05  # of Hybrid Accuracy: within it, the shorter mode is the right one
K, NUM_PROMPTS = 16, 64  # answers in each mode, and prompts, at once
HELD_OUT = 128
# Of HFT: easy and hard sums that are thought about, easy and hard ones that are answered at once.
SWAPPED = "cfg.HybridSums.slips = (0.05, 0.95, 0.7, 0.0)"
HFT = {'hft': (), 'hft_swapped': (SWAPPED,),
       'hft_rarely_at_once': ('cfg.HybridSums.think_share = 0.99',)}


def _hgpo(*changes: str, start: str = 'hft', gin: str = 'hgpo_tiny') -> tuple[str, str, list[str]]:
  return start, gin, list(changes)


_N4, _N16 = 'cfg.Rollouts.group_size = 4', 'cfg.Rollouts.group_size = 16'
_PLAIN = ('cfg.Algorithm.advantage = @cfg.GRPO()', 'cfg.HybridModes.forced = False')
ARMS: dict[str, tuple[str, str, list[str]]] = {
    'hgpo': _hgpo(),
    'alpha_0': _hgpo('cfg.HGPO.alpha = 0.0'),
    'swapped': _hgpo(SWAPPED, start='hft_swapped'),
    'rloo_form': _hgpo("cfg.HGPO.form = 'rloo'"),
    'reinforce_form': _hgpo("cfg.HGPO.form = 'reinforce_plus_plus'"),
    'all_best_win': _hgpo("cfg.HGPO.best_ties = 'all'", "cfg.HGPO.best_over = 'group'"),
    **{f'n4_margin_{m:g}': _hgpo(_N4, f'cfg.HGPO.margin = {m}') for m in (0.0, 0.2, 0.4, 0.6, 1.0)},
    **{f'n16_margin_{m:g}': _hgpo(_N16, f'cfg.HGPO.margin = {m}')
       for m in (0.0, 0.2, 0.4, 0.6, 1.0)},
    'grpo_free': _hgpo(*_PLAIN),
    'grpo_free_from_rare': _hgpo(*_PLAIN, start='hft_rarely_at_once'),
    'hgpo_from_rare': _hgpo(start='hft_rarely_at_once'),
    'thinkless': _hgpo(gin='thinkless_tiny'),
    'adapt_think': _hgpo(gin='adapt_think_tiny'),
    'mode_efficiency': _hgpo(gin='mode_efficiency_tiny'),
    'hft_rft': ('hft', 'rft', []),
    'hft_dpo': ('hft', 'dpo', []),
}


# --- One run, in a process of its own --------------------------------------------------


def child(arm: str, seed: int, root: Path, steps: int, rate: float, hft_steps: int) -> None:
  """Trains an arm's policy if it is not there, measures it, and appends its row."""
  from jaxrl_pt.main import main as jaxrl_pt
  began = time.time()
  workdir = root / f'{arm}-{seed}'
  common = [f'cfg.Run.seed = {seed}', 'cfg.Train.tensorboard = False', 'cfg.Checkpoint.keep = 1']
  if arm in HFT:
    files = ['gin/run/hft_tiny.gin']
    bindings = [f'cfg.Train.num_steps = {hft_steps}', f'cfg.Train.eval_every = {hft_steps}',
                f'cfg.Checkpoint.every = {hft_steps}', *HFT[arm]]
  else:
    start, gin, changes = ARMS[arm]
    start_from = str(root / f'{start}-{seed}')
    if gin in ('rft', 'dpo'):
      import samples
      files, bindings = samples.prepare(gin, Path(start_from), workdir.with_suffix('.jsonl'), seed)
    else:
      files = [f'gin/run/{gin}.gin']
      bindings = [f'cfg.RL.start_from = {start_from!r}', 'cfg.RL.eval_problems = 64',
                  f'cfg.Train.num_steps = {steps}', f'cfg.Train.eval_every = {steps}',
                  f'cfg.Checkpoint.every = {steps}', 'cfg.Rollouts.mismatch_gate = 0.0',
                  f'cfg.ConstantRate.learning_rate = {rate!r}']
    bindings += changes
  args = ['train', '--workdir', str(workdir)]
  for file in files:
    args += ['--gin_file', file]
  for binding in (*common, *bindings):
    args += ['--gin_bindings', binding]
  if jaxrl_pt(args):
    raise SystemExit(f'{arm} {seed}: training failed')
  import measure
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  curve = [[row['step'], *(round(row[name], 4) for name in ('think', 'reward', 'response_length'))]
           for row in rows if 'think' in row and 'reward' in row]
  swapped = arm in ('hft_swapped', 'swapped')
  found = measure.policy(workdir, SWAPPED if swapped else '', HELD_OUT, NUM_PROMPTS, K, MARGIN, seed)
  append_row(root / 'runs.jsonl', {
      'arm': arm, 'seed': seed, 'steps': steps, 'rate': rate, 'seconds': round(time.time() - began),
      'curve': curve, **found})
  if arm not in HFT:
    shutil.rmtree(workdir)


# --- All runs ----------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> None:
  root = args.workdir
  root.mkdir(parents=True, exist_ok=True)
  arms = args.only.split(',') if args.only else list(ARMS)
  seeds = tuple(map(int, args.seeds.split(',')))
  starts = {ARMS[arm][0] for arm in arms if arm in ARMS} | {arm for arm in arms if arm in HFT}
  done = {(row['arm'], row['seed']) for row in finished_rows(root / 'runs.jsonl')}

  def one(job: tuple[str, int]) -> None:
    if job in done:
      return
    began = time.time()
    command = [sys.executable, __file__, '--workdir', str(root), '--child', *map(str, job),
               '--steps', str(args.steps), '--rate', str(args.rate),
               '--hft_steps', str(args.hft_steps)]
    log = root / f'{job[0]}-{job[1]}.log'
    threads = {'XLA_FLAGS': os.environ.get('XLA_FLAGS', '') + (
        ' --xla_cpu_multi_thread_eigen=false' if args.workers > 1 else '')}
    with open(log, 'w', encoding='utf-8') as file:
      code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False,
                            env={**os.environ, **threads}).returncode
    last = log.read_text().strip().splitlines()[-1:]
    print(f'{job[0]} {job[1]}: {time.time() - began:.0f} s' + (f' FAILED {last}' if code else ''),
          flush=True)

  with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    list(pool.map(one, [(arm, seed) for seed in seeds for arm in sorted(starts)]))
    list(pool.map(one, [(arm, seed) for seed in seeds for arm in arms if arm in ARMS]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('--workdir', type=Path, default=Path('runs/lhrm'))
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--only', default='', help='arms, with commas between')
  parser.add_argument('--seeds', default=','.join(map(str, SEEDS)))
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--hft_steps', type=int, default=HFT_STEPS)
  parser.add_argument('--rate', type=float, default=1e-4)
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--child', nargs=2)
  args = parser.parse_args()
  args.workdir = args.workdir.absolute()
  if args.child:
    return child(args.child[0], int(args.child[1]), args.workdir, args.steps, args.rate,
                 args.hft_steps)
  if not args.report:
    run_all(args)
  import report
  report.write(args.workdir / 'runs.jsonl', Path(__file__).parent / 'results')


if __name__ == '__main__':
  main()
