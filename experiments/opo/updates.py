"""OPO's two ingredients apart: {mean, length-weighted} baseline × {1, 4} updates a batch.

    python experiments/opo/updates.py

Task: given a number from 6 to 25, write digits that add up to it ("3+9+2" for 14), with as
many terms as one likes. The start policy is fitted to sums of which 3 in 10 are right. All arms
of a seed share the start policy, the learning rate and the number of responses a batch; the
arms of four updates split the batch in four and clip the ratio. Writes results/updates.json
and .png.
"""

import argparse
import functools
import json
from pathlib import Path
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy import stats

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.rl import advantages, kl, objectives
from jaxrl_pt.sampling import branch, groups
from jaxrl_pt.train import optim
from jaxrl_pt.types import Prompts

matplotlib.use('Agg')
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
PLUS, STOP, FIRST_TARGET = 10, 11, 12  # tokens 0 … 9 are digits
TARGETS = np.arange(6, 26)
MAX_TERMS, NUM_TOKENS = 6, 12
GROUP, NUM_PROMPTS = 8, 16
MODEL = cfg.Model(num_layers=2, d_model=64, d_ff=128, num_heads=4, num_kv_heads=2, head_dim=16,
                  vocab_size=FIRST_TARGET + len(TARGETS))
BASELINES = {
    'mean': lambda r, y, v: advantages.mean_centred(r, v),
    'length-weighted': advantages.length_weighted,
}
# Updates a batch, the share of the learning rate that each takes, and times as many batches.
UPDATES = {'1 update': (1, 1.0, 1), '4 updates': (4, 1.0, 1),
           '4 updates, rate / 4': (4, 0.25, 1), '1 update, rate / 4': (1, 0.25, 3)}
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8)  # rewards at which arms are compared
WINDOW = 9  # batches of the running mean


class Learner(NamedTuple):
  params: dict
  opt_state: tuple


# --- The task ---------------------------------------------------------------------


def draw_sums(random, num_rows):
  """Targets and sums written for them, about 3 in 10 right: tokens, mask of [num_rows, 1, S]."""
  tokens = np.full((num_rows, 1, NUM_TOKENS), STOP, np.int32)
  targets = random.choice(TARGETS, num_rows)
  for row, target in zip(tokens, targets, strict=True):
    num_terms = random.integers(-(-target // 9), MAX_TERMS + 1)
    terms = np.ones(num_terms, int)
    while terms.sum() < target:
      terms[random.choice(np.flatnonzero(terms < 9))] += 1
    if random.random() < 0.7:
      terms[-1] = random.integers(1, 10)
    row[0, :2 * num_terms:2] = terms
    row[0, 1:2 * num_terms - 1:2] = PLUS
  mask = np.cumsum(tokens == STOP, -1) <= 1
  return targets, tokens, mask.astype(np.float32)


def verify(targets, tokens, mask):
  """f32[N, G]: 1 where digits and plus signs alternate, then stop, and add up."""
  odd = jnp.arange(NUM_TOKENS) % 2 == 1
  length = mask.sum(-1)
  last = jnp.arange(NUM_TOKENS) == length[..., None] - 1
  expected = jnp.where(odd, jnp.where(last, tokens == STOP, tokens == PLUS), tokens < 10)
  formed = ((expected | (mask == 0)).all(-1)) & (length % 2 == 0)
  total = (tokens * mask * ~odd).sum(-1)
  return (formed & (total == targets[:, None])).astype(jnp.float32)


def prompts_of(targets, ids):
  tokens = jnp.asarray(targets - TARGETS[0] + FIRST_TARGET, jnp.int32)[:, None]
  return Prompts(tokens, jnp.ones(len(tokens), jnp.int32), jnp.asarray(ids, jnp.int32))


# --- Learning ---------------------------------------------------------------------


def make_scores(model):
  def scores(params, prompts, tokens):
    lengths = jnp.repeat(prompts.lengths[:, None], tokens.shape[1], 1)
    hidden = branch.tree_hidden(model, params, prompts.tokens, lengths, tokens)
    return token_logprobs(hidden, model.head(params), tokens)

  return scores


def fit_start(model, scores, seeds, num_steps=300, num_rows=128):
  """The start policies, stacked: each fitted to sums of its own."""
  optimizer = optim.make_optimizer(cfg.AdamW(cfg.ConstantRate(learning_rate=3e-3)), num_steps,
                                   model.specs)
  params = jax.vmap(lambda seed: P.init(model.specs, jax.random.key(seed)))(seeds)
  random = np.random.default_rng(0)
  corpora = [draw_sums(random, 4096) for _ in seeds]

  @jax.jit
  @jax.vmap
  def step(learner, targets, tokens, mask):
    def loss(params):
      logp = scores(params, prompts_of(targets, jnp.arange(num_rows)), tokens).logp
      return -objectives.token_mean(logp, mask)

    updates, opt_state = optimizer.update(jax.grad(loss)(learner.params), learner.opt_state,
                                          learner.params)
    return Learner(optax.apply_updates(learner.params, updates), opt_state)

  learner = Learner(params, jax.vmap(optimizer.init)(params))
  for _ in range(num_steps):
    rows = random.choice(4096, num_rows, replace=False)
    learner = step(learner, *(np.stack(x) for x in zip(
        *([x[rows] for x in corpus] for corpus in corpora), strict=True)))
  return learner.params


def make_step(model, scores, baseline, num_updates, optimizer):
  """step(learner, start, targets, ids, seed) → (learner, measures): one batch of each seed."""

  def loss(params, prompts, tokens, mask, old_logp, advantage):
    surrogate = objectives.ppo_clip(scores(params, prompts, tokens).logp * mask, old_logp,
                                    advantage, low=0.2, high=0.2)
    num_responses = mask.shape[0] * mask.shape[1]
    return objectives.token_sum_over(num_responses)(surrogate.terms, mask)

  def update(learner, part):
    grads = jax.grad(loss)(learner.params, *part)
    updates, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
    return Learner(optax.apply_updates(learner.params, updates), opt_state), None

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, 0, 0, None, 0))
  def step(learner, start, targets, ids, seed):
    prompts = prompts_of(targets, ids)
    drawn = groups.generate(model, learner.params, prompts, jax.random.key(seed),
                            sampler=cfg.Sampler(), num_samples=GROUP, num_tokens=NUM_TOKENS,
                            stop_ids=(STOP,))
    mask = drawn.sampled
    reward = verify(targets, drawn.tokens, mask)
    advantage = BASELINES[baseline](reward, mask.sum(-1), jnp.ones_like(reward))
    before = scores(learner.params, prompts, drawn.tokens)
    start_logp = scores(start, prompts, drawn.tokens).logp
    batch = (prompts, drawn.tokens, mask, before.logp * mask,
             jnp.broadcast_to(advantage[..., None], mask.shape))
    parts = jax.tree.map(lambda x: x.reshape(num_updates, -1, *x.shape[1:]), batch)
    learner, _ = jax.lax.scan(update, learner, parts)
    return learner, {
        'reward': reward.mean(),
        'kl': (kl.k1(before.logp, start_logp) * mask).sum(-1).mean(),
        'entropy': objectives.token_mean(before.entropy, mask),
        'length': mask.sum(-1).mean(),
        'zero_advantage': objectives.zero_advantage_groups(advantage, jnp.ones_like(reward)).mean(),
    }

  return step


def run_arm(step, start, optimizer, seeds, num_batches):
  """{measure: f64[batches, seeds]}."""
  learner = Learner(start, jax.vmap(optimizer.init)(start))
  random = np.random.default_rng(1)  # the same targets in every arm
  rows = []
  for i in range(num_batches):
    targets = np.stack([random.choice(TARGETS, NUM_PROMPTS, replace=False) for _ in seeds])
    ids = i * NUM_PROMPTS + np.arange(NUM_PROMPTS)
    learner, measures = step(learner, start, targets, ids, seeds)
    rows.append(jax.device_get(measures))
  return {name: np.array([row[name] for row in rows], float) for name in rows[0]}


# --- Comparison -------------------------------------------------------------------


def smooth(values):
  return np.convolve(values, np.ones(WINDOW) / WINDOW, 'valid')


def at_levels(curves):
  """KL, entropy and batches where the smoothed reward first reaches each level, else None."""
  reward = smooth(curves['reward'])
  found = {}
  for level in LEVELS:
    reached = np.flatnonzero(reward >= level)
    found[str(level)] = None if not len(reached) else {
        'batches': int(reached[0]) + WINDOW, **{
            name: float(smooth(curves[name])[reached[0]]) for name in ('kl', 'entropy', 'length')}}
  return found


def interval(values):
  """[mean, half width of the 95 % interval (Student's t), number of seeds]."""
  values = np.asarray(values)
  if len(values) < 2:
    return [float(values.mean()) if len(values) else None, None, len(values)]
  half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return [float(values.mean()), float(half), len(values)]


def compare(runs):
  """Each arm at each level, and paired differences over seeds that reached it in both arms."""
  levels = {arm: [at_levels(curves) for curves in runs[arm]] for arm in runs}
  arms = {arm: {str(level): {name: interval([row[str(level)][name] for row in levels[arm]
                                             if row[str(level)]])
                             for name in ('kl', 'entropy', 'length', 'batches')}
                for level in LEVELS} for arm in runs}
  one_update, *others = UPDATES
  pairs = {f'{other} − {one_update} ({name})': (f'{name}, {other}', f'{name}, {one_update}')
           for other in others for name in BASELINES}
  slow = '4 updates, rate / 4', '1 update, rate / 4'
  pairs |= {f'{slow[0]} − {slow[1]} ({name})': tuple(f'{name}, {title}' for title in slow)
            for name in BASELINES}
  pairs |= {f'length-weighted − mean ({updates})': (f'length-weighted, {updates}',
                                                    f'mean, {updates}') for updates in UPDATES}
  differences = {}
  for title, (one, other) in pairs.items():
    if one not in levels or other not in levels:
      continue
    differences[title] = {}
    for level in map(str, LEVELS):
      both = [(a[level], b[level]) for a, b in zip(levels[one], levels[other], strict=True)
              if a[level] and b[level]]
      differences[title][level] = {name: interval([a[name] - b[name] for a, b in both])
                                   for name in ('kl', 'entropy', 'batches')}
  final = {arm: {name: interval([np.mean(curves[name][-WINDOW:]) for curves in runs[arm]])
                 for name in runs[arm][0]} for arm in runs}
  return {'at_reward': arms, 'differences': differences, 'last_batches': final}


def plot(runs, path):
  figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout='constrained')
  for arm, seeds in runs.items():
    baseline, updates = arm.split(', ', 1)
    color, style = f'C{list(UPDATES).index(updates)}', '-' if baseline == 'mean' else '--'
    mean = {name: smooth(np.mean([curves[name] for curves in seeds], 0)) for name in seeds[0]}
    axes[0].plot(mean['reward'], style, color=color, label=arm)
    for axis, name in ((axes[1], 'kl'), (axes[2], 'entropy')):
      axis.plot(mean['reward'], mean[name], style, color=color, label=arm)
  axes[0].set(xlabel='rollout batches', ylabel='reward', title='mean of the seeds')
  axes[1].set(xlabel='reward', ylabel='KL to the start policy, nats a response')
  axes[2].set(xlabel='reward', ylabel='entropy, nats a token')
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=120)


def finished_arms(path, settings):
  """{arm: curves of its seeds} of an earlier run with the same settings."""
  if not path.is_file():
    return {}
  earlier = json.loads(path.read_text())
  return earlier['curves'] if earlier['settings'] == settings else {}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--batches', type=int, default=120)
  parser.add_argument('--learning_rate', type=float, default=1e-3)
  args = parser.parse_args()
  started = time.perf_counter()
  model = transformer.build(MODEL)
  scores = make_scores(model)
  seeds = jnp.arange(args.seeds)
  start = fit_start(model, scores, seeds)
  print(f'start policies after {time.perf_counter() - started:.0f} s', flush=True)
  path = HERE / 'results' / 'updates.json'
  runs = finished_arms(path, vars(args))
  for title, (num_updates, share, times) in UPDATES.items():
    for name in BASELINES:
      if f'{name}, {title}' in runs:
        continue
      num_batches = times * args.batches
      schedule = cfg.ConstantRate(learning_rate=args.learning_rate * share)
      optimizer = optim.make_optimizer(cfg.AdamW(schedule, weight_decay=0.0), num_batches,
                                       model.specs)
      step = make_step(model, scores, name, num_updates, optimizer)
      curves = run_arm(step, start, optimizer, seeds, num_batches)
      runs[f'{name}, {title}'] = [{key: np.round(values[:, i], 4).tolist()
                                   for key, values in curves.items()} for i in range(args.seeds)]
      first, last = ({key: values[rows].mean() for key, values in curves.items()}
                     for rows in (slice(0, WINDOW), slice(-WINDOW, None)))
      print(f'{name}, {title}: reward {first["reward"]:.2f} → {last["reward"]:.2f}, KL '
            f'{last["kl"]:.2f}, entropy {first["entropy"]:.2f} → {last["entropy"]:.2f}, '
            f'{time.perf_counter() - started:.0f} s', flush=True)
      result = {'settings': vars(args), 'parameters': P.count(model.specs), **compare(runs),
                'curves': runs}
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps(result) + '\n')
      plot(runs, path.with_suffix('.png'))
  result = json.loads(path.read_text())
  for title, levels in result['differences'].items():
    print(title, {level: {k: [None if x is None else round(x, 3) for x in v]
                          for k, v in row.items()} for level, row in levels.items()})


if __name__ == '__main__':
  main()
