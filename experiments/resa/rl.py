"""Reward curves of dense, sparse + corrected and sparse + replayed rollouts, three seeds.

    JAX_PLATFORMS=cpu python experiments/resa/rl.py

Task: repeat 32 random letters. What to write next stands in the prompt, one place in 32, so that a
step which reads the wrong blocks cannot know it. The start policy is fitted to demonstrations until
it writes about half of the letters right; the reward is the share of right letters. Arms share the
start policy, prompts, seeds and noise; they differ in how responses are drawn and in what the
learner does about it:

    dense       every step reads the whole cache
    corrected   sparse steps, the learner reads everything, terms times min(ρ, 2) (TIS)
    replayed    sparse steps, the learner reads what they read; no correction
    ignored     sparse steps, the learner reads everything, no correction (what to avoid)

Sparse steps read 3 of 9 to 16 blocks of 4 tokens, rectified every 8. Every 10 steps the policy
also draws held-out responses by dense attention. Writes results/rl.json and results/rl.png.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import groups, resa_attention
from jaxrl_pt.train import fused, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, TrainState, Verdict

RESULTS = Path(__file__).parent / 'results'
LETTERS, SEPARATOR, LENGTH = 16, 16, 32
MODEL = cfg.Model(num_layers=2, d_model=64, d_ff=192, num_heads=4, num_kv_heads=2, head_dim=16,
                  vocab_size=LETTERS + 1)
SPARSE = cfg.ReSA(block=4, active=0.1, min_blocks=3, refresh=cfg.RefreshEvery(8))
PROMPTS, GROUP, RATE = 16, 8, 1e-3
ARMS = {'dense': (cfg.Dense(), cfg.NoCorrection()),
        'corrected': (SPARSE, cfg.TokenTIS(cap=2.0)),
        'replayed': (dataclasses.replace(SPARSE, replay=True), cfg.NoCorrection()),
        'ignored': (SPARSE, cfg.NoCorrection())}


def prompts_of(number: int, count: int = PROMPTS) -> Prompts:
  """`count` prompts: letters, then the separator."""
  letters = np.random.default_rng(number).integers(0, LETTERS, (count, LENGTH))
  tokens = np.concatenate([letters, np.full((count, 1), SEPARATOR)], 1)
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.full(count, LENGTH + 1),
                 jnp.arange(count) + count * number)


def verify(prompts: Prompts, rollouts) -> Verdict:
  right = rollouts.tokens == prompts.tokens[:, None, :LENGTH]
  reward = right.mean(-1)
  return Verdict(reward, jnp.ones_like(reward), right.all(-1).astype(jnp.float32))


def fit_start(model, wanted: float):
  """A policy fitted to demonstrations until it writes a share `wanted` of the letters right."""
  params = P.init(model.specs, jax.random.key(0))
  optimizer = optax.adam(2e-3)

  @jax.jit
  def step(params, moments, letters):
    whole = jnp.concatenate([letters, jnp.full((letters.shape[0], 1), SEPARATOR), letters], 1)
    fed = whole[:, :-1]

    def loss(params):
      hidden = model.apply(params, fed, jnp.broadcast_to(jnp.arange(fed.shape[1]), fed.shape),
                           jnp.ones_like(fed))
      logp = jax.nn.log_softmax(hidden[:, LENGTH:] @ model.head(params))
      of_letters = jnp.take_along_axis(logp, letters[..., None], -1)[..., 0]
      return -of_letters.mean(), jnp.exp(of_letters).mean()

    (_, share), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(grads, moments)
    return optax.apply_updates(params, updates), moments, share

  moments, random = optimizer.init(params), np.random.default_rng(1)
  for number in range(6000):
    params, moments, share = step(params, moments, jnp.asarray(
        random.integers(0, LETTERS, (64, LENGTH))))
    if share > wanted:
      return params, number
  raise SystemExit(f'the start policy stays at {float(share):.2f}')


def make_step(model, sparse, correction, num_steps: int):
  """The first state of a seed, and the compiled step of an arm."""
  rollouts = cfg.Rollouts(PROMPTS, GROUP, LENGTH + 1, LENGTH, sparse=sparse)
  algorithm = cfg.Algorithm(advantage=cfg.RLOO(), correction=correction)
  # The settings of a run refuse the arm that ignores the gap, so that it is put in behind them.
  accepted = dataclasses.replace(algorithm, correction=cfg.TokenTIS())
  run = cfg.Run(
      seed=0, model=MODEL, objective=cfg.RPT('start', rollouts=rollouts, algorithm=accepted),
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(RATE), weight_decay=0.0),
      train=cfg.Train(num_steps=num_steps, batch_size=PROMPTS))
  optimizer = optim.make_optimizer(run.optimizer, num_steps, model.specs)
  method = _Method(rollouts, algorithm)
  new = lambda params, seed: TrainState(
      jnp.asarray(seed * 100_000, jnp.int32), jax.tree.map(jnp.copy, params),
      optimizer.init(params), states.new_method(rollouts, algorithm, MODEL.d_model))
  return new, jax.jit(fused.make_fused_step(model, optimizer, run, method, verify))


@dataclasses.dataclass(frozen=True)
class _Method:
  """Of an objective, what the fused step reads."""

  rollouts: cfg.Rollouts
  algorithm: cfg.Algorithm


def run_arm(model, start, arm: str, seeds: list[int], num_steps: int) -> list[dict]:
  """The curves of each seed."""
  new, step = make_step(model, *ARMS[arm], num_steps)
  held_out, curves = prompts_of(10_000_000, 64), []
  evaluate = jax.jit(lambda params: verify(held_out, groups.generate(
      model, params, held_out, jax.random.key(1), sampler=cfg.Sampler(), num_samples=1,
      num_tokens=LENGTH)).reward.mean())
  for seed in seeds:
    state, began = new(start, seed), time.perf_counter()
    curve = {'seed': seed, 'reward': [], 'mismatch': [], 'correction': [], 'held_out': []}
    for number in range(num_steps):
      if number % 10 == 0:
        curve['held_out'].append(float(evaluate(state.params)))
      state, metrics, *_ = step(state, start, prompts_of(1000 * seed + number))
      for name in ('reward', 'mismatch', 'correction'):
        curve[name].append(float(metrics[name].mean()))
    curve['held_out'].append(float(evaluate(state.params)))
    curves.append(curve)
    print(f'{arm}, seed {seed}: reward {np.mean(curve["reward"][:10]):.3f} → '
          f'{np.mean(curve["reward"][-10:]):.3f}, dense held out {curve["held_out"][0]:.3f} → '
          f'{curve["held_out"][-1]:.3f}, mismatch − 1 {np.mean(curve["mismatch"]) - 1:.2g}, '
          f'{time.perf_counter() - began:.0f} s', flush=True)
  return curves


def share_read() -> float:
  """The mean share of blocks that sparse steps read; a prompt's last token reads all."""
  selection = resa_attention.selection_of(SPARSE)
  blocks = [-(-(LENGTH + 1 + i) // SPARSE.block) for i in range(1, LENGTH)]
  return float(np.mean([int(selection.num_selected(m)) / m for m in blocks]))


def summary(curves: list[dict]) -> dict:
  """Means over seeds, and each seed's own number."""
  of = lambda f: (lambda values: {'mean': float(np.mean(values)), 'seeds': values})(
      [float(f(c)) for c in curves])
  return {'reward of the last 20 steps': of(lambda c: np.mean(c['reward'][-20:])),
          'held out, dense, at the end': of(lambda c: c['held_out'][-1]),
          'mismatch − 1, mean': of(lambda c: np.mean(c['mismatch']) - 1),
          'mismatch − 1, largest of a step': of(lambda c: np.max(c['mismatch']) - 1)}


def plot(curves: dict[str, list[dict]]) -> None:
  from matplotlib.figure import Figure
  figure = Figure(figsize=(11, 3.6), layout='constrained')
  axes = figure.subplots(1, 3)
  for number, (arm, of_seeds) in enumerate(curves.items()):
    colour = f'C{number}'
    for axis, name, every in ((axes[0], 'reward', 1), (axes[1], 'held_out', 10)):
      values = np.array([c[name] for c in of_seeds])
      if every == 1:
        values = values[:, :values.shape[1] // 5 * 5].reshape(len(values), -1, 5).mean(2)
        every = 5
      at = every * np.arange(values.shape[1])
      axis.plot(at, values.mean(0), color=colour, label=arm)
      axis.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.15)
    gap = np.array([c['mismatch'] for c in of_seeds]).mean(0) - 1
    axes[2].semilogy(np.maximum(gap, 1e-8), color=colour, label=arm)
  for axis, title in zip(axes, ('reward of what was drawn', 'dense, held out',
                                'mismatch − 1'), strict=True):
    axis.set(xlabel='step', title=title)
    axis.grid(alpha=0.3)
  axes[0].legend()
  figure.savefig(RESULTS / 'rl.png', dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
  parser.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS))
  args = parser.parse_args()
  model = transformer.build(MODEL)
  start, fitted = fit_start(model, 0.5)
  print(f'start policy after {fitted} steps', flush=True)
  run = functools.partial(run_arm, model, start, seeds=args.seeds, num_steps=args.steps)
  curves = {arm: run(arm) for arm in args.arms}
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'rl.json').write_text(json.dumps({
      'steps': args.steps, 'prompts': PROMPTS, 'group': GROUP, 'learning_rate': RATE,
      'share of blocks read': share_read(),
      'sparse': dataclasses.asdict(SPARSE), 'summary': {
          arm: summary(c) for arm, c in curves.items()}, 'curves': curves}, indent=1) + '\n')
  plot(curves)


if __name__ == '__main__':
  main()
