"""When to think: HFT, HGPO, its controls and comparators on easy and on hard sums.

    python experiments/lhrm/run.py [--workdir runs/lhrm] [--workers 2] [--only hgpo,alpha_0]

First the HFT policies are trained (gin/run/hft_tiny.gin), one for each seed, each in a process of
its own. From them goes everything else: an arm is a process whose seeds share its compiled step,
that of the shipped run file with the changes that ARMS names. Then each policy answers held-out
sums K times in each forced mode. What it does when it chooses itself follows from these answers and
its exact probability of thinking, without further noise:

    accuracy = P(think) · accuracy of thinking + P(no-think) · accuracy of answering at once

What is finished is a row of runs.jsonl in the work directory, so that the command may be repeated,
and `--only` shares arms out between machines. `--report` trains nothing: it reads the rows
and writes results/lhrm.json and the plots.
"""

import argparse
import concurrent.futures
import functools
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from jaxrl_pt.scaling.seeds import append_row, finished_rows

SEEDS = (0, 1, 2, 3, 4)
STEPS, HFT_STEPS = 200, 700
# So that arms take minutes: 0.14M parameters instead of the shipped tiny model's 0.82M.
MODEL = ('cfg.Model.num_layers = 2', 'cfg.Model.d_model = 64', 'cfg.Model.d_ff = 192')
# Chosen on sums that are trained on, from a few settings of HGPO (README.md); the arms that have no
# KL in their papers get the same one, because it is what keeps the thoughts right.
RATE, KL = 2e-4, ('cfg.Algorithm.kl = @cfg.KLInLoss()', 'cfg.KLInLoss.coef = 0.01')
# Learning rates of their own: those of the HFT policies, and of the arms for which another one than
# HGPO's did better on a policy that no arm starts from (README.md).
RATES = {'hft': 0.006, 'hft_rare': 0.006, 'rft': 0.002, 'dpo': 3e-4, 'thinkless': 1e-3,
         'adapt_think': 5e-4}
K, AT_ONCE = 16, 32  # answers in each mode, and prompts, at once
HFT: dict[str, tuple[str, ...]] = {
    'hft': (), 'hft_rare': ('cfg.HybridSums.think_share = 0.99',)}


def _arm(*changes: str, start: str = 'hft', gin: str = 'hgpo') -> tuple[str, str, list[str]]:
  return start, gin, list(changes)


_FREE = ('cfg.Algorithm.advantage = @cfg.GRPO()', 'cfg.HybridModes.forced = False')
_MARGINS = (0.0, 0.2, 0.4, 0.6)
ARMS: dict[str, tuple[str, str, list[str]]] = {
    'hgpo': _arm(),
    'alpha_0': _arm('cfg.HGPO.alpha = 0.0'),
    'swapped': _arm(),
    'grpo_free': _arm(*_FREE),
    'grpo_free_from_rare': _arm(*_FREE, start='hft_rare'),
    'hgpo_from_rare': _arm(start='hft_rare'),
    'thinkless': _arm(gin='thinkless'),
    'thinkless_alpha_1': _arm('cfg.DecoupledModes.alpha = 1.0', gin='thinkless'),
    'adapt_think': _arm(gin='adapt_think'),
    'mode_efficiency': _arm(gin='mode_efficiency'),
    'rft': _arm(gin='rft'),
    'dpo': _arm(gin='dpo'),
    'rloo_form': _arm("cfg.HGPO.form = 'rloo'"),
    'reinforce_form': _arm("cfg.HGPO.form = 'reinforce_plus_plus'"),
    # As many responses a step as all others: 128.
    **{f'n{n}_margin_{m:g}': _arm(f'cfg.Rollouts.group_size = {n}',
                                  f'cfg.Rollouts.num_prompts = {128 // n}',
                                  f'cfg.HGPO.margin = {m}') for n in (16, 4) for m in _MARGINS},
}
# The sweeps of the margin have fewer seeds.
SWEEP_SEEDS = 3


def of_start(start: str, seed: int) -> int:
  """The seed of the HFT policy that a seed of an arm starts from; side ones are trained once."""
  return seed if start == 'hft' else 0


def rate_of(arm: str, args: argparse.Namespace) -> float:
  """The learning rate of an arm."""
  return args.rate or RATES.get(arm, RATE)


def swapped(verifier: Any) -> Any:
  """A verifier on the device that pays for `verifier`'s reward in the wrong mode alone.

  Thinking is paid on easy sums, and answering at once on hard ones.
  """
  import jax.numpy as jnp

  from jaxrl_pt.types import NO_THINK, THINK
  from jaxrl_pt.verifiers.base import DeviceVerifier

  def pay(prompts: Any, rollouts: Any) -> Any:
    verdict = verifier.verify(prompts, rollouts)
    is_worth = (prompts.tokens > ord('0')) & (prompts.tokens <= ord('9'))  # a digit but 0
    is_easy = is_worth.sum(-1, keepdims=True) <= 1
    paid = rollouts.mode == jnp.where(is_easy, THINK, NO_THINK)
    return verdict.replace(reward=verdict.reward * paid)

  return DeviceVerifier(pay)


# --- One process ----------------------------------------------------------------------


def hft(arm: str, seed: int, root: Path, steps: int) -> None:
  """Trains an HFT policy as `jaxrl-pt train` does."""
  from jaxrl_pt.main import main as jaxrl_pt
  args = ['train', '--workdir', str(root / f'{arm}-{seed}'), '--gin_file', 'gin/run/hft_tiny.gin']
  for binding in (f'cfg.Run.seed = {seed}', f'cfg.Train.num_steps = {steps}',
                  f'cfg.Train.eval_every = {steps}', f'cfg.Checkpoint.every = {steps}',
                  'cfg.Train.tensorboard = False', *MODEL, *HFT[arm]):
    args += ['--gin_bindings', binding]
  if jaxrl_pt(args):
    raise SystemExit(f'{arm} {seed}: training failed')


def reinforce(arm: str, seeds: list[int], root: Path, steps: int, rate: float) -> Any:
  """Yields (seed, policy, its parameters at the end, its metrics step by step) of an arm."""
  import jax

  from jaxrl_pt import gin_bindings
  from jaxrl_pt import params as P
  from jaxrl_pt.data import modes
  from jaxrl_pt.environments import problems
  from jaxrl_pt.jobs.open import kind
  from jaxrl_pt.run import session as sessions
  from jaxrl_pt.run.policy import load_policy
  from jaxrl_pt.train import optim, programs
  from jaxrl_pt.train import state as states

  start, gin, changes = ARMS[arm]
  starts = {seed: load_policy(root / f'{start}-{of_start(start, seed)}') for seed in seeds}
  first = starts[seeds[0]]
  run, text = gin_bindings.load([f'gin/run/{gin}_tiny.gin'], [
      f'cfg.RL.start_from = {str(first.session.workdir)!r}', 'cfg.RL.eval_problems = 1',
      f'cfg.Train.num_steps = {steps}', f'cfg.ConstantRate.learning_rate = {rate!r}',
      *MODEL, *KL, *changes])
  session = sessions.open_session(run, root / arm, text, data=first.session.data,
                                  allow=frozenset(), data_dir=first.session.workdir / 'data')
  method, tokenizer = run.objective, first.session.data.tokenizer
  model = session.model(run.model)
  optimizer = optim.make_optimizer(run.optimizer, steps, model.specs)
  new_method = functools.partial(kind(method).new_method, run, session.mesh)
  abstract = states.abstract_state(model, optimizer, session.mesh, new_method)
  with problems.open_environment(session, method) as environment:
    mode_ids = modes.token_ids(tokenizer, method.rollouts.modes)
    verifier = environment.verifier
    if arm == 'swapped':
      verifier = swapped(verifier)
    step = programs.fused_step(run, session.mesh, method, optimizer, verifier, tokenizer.stop_ids,
                               mode_ids)
    for seed in seeds:
      params = starts[seed].params
      reference = P.trained(model.specs, params)
      state = states.state_of(model, jax.tree.map(lambda x: x.copy(), params), optimizer, abstract,
                              new_method, seed)
      curve = []
      for i in range(steps):
        prompts, _ = environment.take(1000 * seed + i)
        state, metrics, _, _ = step(state, reference, session.put_rows(prompts))
        curve.append({name: float(metrics[name].mean())
                      for name in ('think', 'reward', 'response_length', 'grad_norm')})
      yield seed, starts[seed], state.params, curve


def supervise(arm: str, seed: int, root: Path, rate: float) -> Any:
  """(seed, policy, its parameters, []) of HFT-RFT or HFT-DPO, trained as `jaxrl-pt train` does."""
  import samples

  from jaxrl_pt.main import main as jaxrl_pt
  from jaxrl_pt.run.policy import load_policy
  workdir = root / f'{arm}-{seed}'
  args = ['train', '--workdir', str(workdir), *samples.prepare(
      arm, root / f'hft-{seed}', workdir.with_suffix('.jsonl'), seed)]
  for binding in (*MODEL, f'cfg.Cosine.peak_rate = {rate!r}'):
    args += ['--gin_bindings', binding]
  if jaxrl_pt(args):
    raise SystemExit(f'{arm} {seed}: training failed')
  policy = load_policy(workdir)
  return seed, policy, policy.params, []


def child(arm: str, seeds: list[int], root: Path, args: argparse.Namespace) -> None:
  """Trains and measures, and appends a row for each seed."""
  import measure

  from jaxrl_pt.run.policy import load_policy
  began, rate = time.time(), rate_of(arm, args)
  if arm in HFT:
    hft(arm, seeds[0], root, args.hft_steps)
    policy = load_policy(root / f'{arm}-{seeds[0]}')
    trained = iter([(seeds[0], policy, policy.params, [])])
  elif ARMS[arm][1] in ('rft', 'dpo'):
    trained = iter([supervise(arm, seeds[0], root, rate)])
  else:
    trained = reinforce(arm, seeds, root, args.steps, rate)
  answer, chosen = None, measure.held_out()
  for seed, policy, params, curve in trained:
    answer = answer or measure.answering(policy, AT_ONCE, K)
    answers, _ = answer(params, chosen, 100_000 + 1000 * seed)
    rounded = [{k: float(f'{v:.4g}') for k, v in row.items()} for row in curve]
    append_row(root / 'runs.jsonl', {
        'arm': arm, 'seed': seed, 'steps': len(curve), 'rate': rate,
        'seconds': round(time.time() - began), 'curve': rounded,
        **measure.numbers(answers, [p.level for p in chosen])})


# --- All processes ------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> None:
  root = args.workdir
  root.mkdir(parents=True, exist_ok=True)
  arms = args.only.split(',') if args.only else list(ARMS)
  seeds = list(map(int, args.seeds.split(',')))
  done = {(row['arm'], row['seed']) for row in finished_rows(root / 'runs.jsonl')}

  def one(job: tuple[str, tuple[int, ...]]) -> None:
    arm, wanted = job[0], [seed for seed in job[1] if (job[0], seed) not in done]
    if not wanted:
      return
    began = time.time()
    name = f'{arm}-{"-".join(map(str, wanted))}'
    command = [sys.executable, __file__, '--workdir', str(root), '--child', arm,
               '--seeds', ','.join(map(str, wanted)), '--steps', str(args.steps),
               '--rate', str(rate_of(arm, args)), '--hft_steps', str(args.hft_steps)]
    # One core for each process, whose programs are compiled in one piece: half the time.
    alone = ' --xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1'
    with open(root / f'{name}.log', 'w', encoding='utf-8') as log:
      code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env={
          **os.environ, 'XLA_FLAGS': os.environ.get('XLA_FLAGS', '') + alone,
          'JAX_COMPILATION_CACHE_DIR': str(root / 'compiled')}).returncode
    said = (root / f'{name}.log').read_text().strip().splitlines()[-1:] if code else ''
    print(f'{name}: {time.time() - began:.0f} s {said}', flush=True)

  of_arm = lambda arm: seeds[:SWEEP_SEEDS] if '_margin_' in arm else seeds
  starts = {ARMS[arm][0] if arm in ARMS else arm for arm in arms}
  jobs = []
  for arm in arms:
    if arm in ARMS:
      apart = ARMS[arm][1] in ('rft', 'dpo')
      jobs += [(arm, (seed,)) for seed in seeds] if apart else [(arm, tuple(of_arm(arm)))]
  with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    list(pool.map(one, [(arm, (seed,)) for arm in sorted(starts)
                        for seed in sorted({of_start(arm, seed) for seed in seeds})]))
    list(pool.map(one, jobs))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('--workdir', type=Path, default=Path('runs/lhrm'))
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--only', default='', help='arms, with commas between')
  parser.add_argument('--seeds', default=','.join(map(str, SEEDS)))
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--hft_steps', type=int, default=HFT_STEPS)
  parser.add_argument('--rate', type=float, help='of all arms, instead of their own')
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--child')
  args = parser.parse_args()
  args.workdir = args.workdir.absolute()
  if args.child:
    return child(args.child, list(map(int, args.seeds.split(','))), args.workdir, args)
  if not args.report:
    run_all(args)
  import report
  report.write(args.workdir / 'runs.jsonl', Path(__file__).parent / 'results')


if __name__ == '__main__':
  main()
