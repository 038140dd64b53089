"""Gradient variance under OPO's baseline and its rivals, with a transformer's own gradients.

    python experiments/opo/variance.py

The policy is a small transformer over {stop, a, b} whose responses have at most 7 tokens: all
255 of them are enumerated, each with its probability and its score z = ∇θ log π(y) by
autograd. So every population number is exact. Groups of K responses are drawn by Monte Carlo;
their advantages are those of `jaxrl_pt.rl.advantages`. Writes results/variance.json and .png.
"""

import argparse
import itertools
import json
from pathlib import Path
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.rl import advantages
from jaxrl_pt.sampling import policies

matplotlib.use('Agg')
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
MAX_TOKENS = 7
STOP, START = 0, 3  # tokens; 1 and 2 are the letters
MODEL = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=4)
SAMPLER = cfg.Sampler(banned=(START,))
SCALES = (4.0, 10.0)  # of the embedding: policies with opinions, and sharp ones
REGIMES = ('longest succeed', 'long succeed', 'short succeed', 'unrelated')
ESTIMATORS = {
    'mean': lambda r, y, v: advantages.mean_centred(r, v),
    'RLOO': lambda r, y, v: advantages.leave_one_out(r, v),
    'OPO': advantages.length_weighted,
    'OPO leave-one-out': advantages.length_weighted_leave_one_out,
}


# --- The policy, enumerated -------------------------------------------------------


def all_responses():
  """i32[255, 7] tokens padded with stops, f32[255, 7] mask."""
  rows = []
  for num_letters in range(MAX_TOKENS + 1):
    for letters in itertools.product((1, 2), repeat=num_letters):
      length = min(num_letters + 1, MAX_TOKENS)
      rows.append((list(letters) + [STOP] * (MAX_TOKENS - num_letters), length))
  tokens = np.array([tokens for tokens, _ in rows], np.int32)
  lengths = np.array([length for _, length in rows])
  return tokens, (np.arange(MAX_TOKENS) < lengths[:, None]).astype(np.float32)


def make_scores(tokens, mask):
  """scores(seed, scale) → probabilities f64[255], scores f64[255, parameters] of a policy."""
  model = transformer.build(MODEL)
  positions, ones = jnp.arange(MAX_TOKENS)[None], jnp.ones((1, MAX_TOKENS), jnp.int32)

  def logp(params, tokens, mask):
    inputs = jnp.concatenate([jnp.array([START]), tokens[:-1]])[None]
    hidden = model.apply(params, inputs, positions, ones)
    scored = token_logprobs(hidden, model.head(params), tokens[None],
                            transform=lambda x, y: policies.learner_logits(x, y, SAMPLER))
    return (scored.logp[0] * mask).sum()

  both = jax.jit(jax.vmap(jax.value_and_grad(logp), (None, 0, 0)))

  def scores(seed, scale):
    params = P.init(model.specs, jax.random.key(seed))
    # A fresh model is near uniform; a larger embedding, the head too, gives it opinions.
    values, grads = both({**params, 'embed': params['embed'] * scale}, tokens, mask)
    flat = [np.asarray(x, np.float64).reshape(len(tokens), -1) for x in jax.tree.leaves(grads)]
    return np.exp(np.asarray(values, np.float64)), np.concatenate(flat, 1)

  return scores


def rewards(regime, lengths, random):
  """f64[255] in {0, 1}: of the favoured responses nine in ten succeed, of the others one.

  The longest, 7 tokens, are one in ten under a typical policy, and all of them succeed.
  """
  if regime == 'longest succeed':
    return (lengths == MAX_TOKENS).astype(float)
  favoured = {'long succeed': lengths >= 4, 'short succeed': lengths < 4,
              'unrelated': random.random(len(lengths)) < 0.5}[regime]
  return (random.random(len(lengths)) < np.where(favoured, 0.9, 0.1)).astype(float)


# --- Population -------------------------------------------------------------------


def population(probability, z, reward, lengths):
  """Exact variance of (r − b) z relative to the best b, and checks of the theory."""
  norm = np.square(z).sum(1)
  mean = lambda x: float(probability @ x)
  best = mean(norm * reward) / mean(norm)
  baselines = {'0': 0.0, 'mean': mean(reward), 'length': mean(lengths * reward) / mean(lengths),
               'optimal': best}
  signal = np.square((probability * reward) @ z).sum()
  power = {name: mean(np.square(reward - b) * norm) for name, b in baselines.items()}
  # Q(b) − Q(b*) = E‖z‖² (b − b*)², by two routes.
  identity = max(abs(power[name] - power['optimal'] - mean(norm) * (b - best)**2)
                 / power['optimal'] for name, b in baselines.items())
  centred = lengths - mean(lengths), norm - mean(norm)
  correlation = mean(centred[0] * centred[1]) / np.sqrt(
      mean(centred[0]**2) * mean(centred[1]**2))
  variance = {name: (q - signal) / (power['optimal'] - signal) for name, q in power.items()}
  return {'variance': variance, 'identity_error': identity, 'correlation': correlation,
          'success_rate': mean(reward), 'mean_length': mean(lengths),
          'score_mean': float(np.linalg.norm(probability @ z) / np.sqrt(mean(norm))),
          'signal_share': float(signal / power['optimal'])}


# --- Groups of K ------------------------------------------------------------------


def finite(probability, gram, reward, lengths, size, num_groups, random):
  """Variance of (1/K) Σ A_i z_i at unit signal, relative to RLOO, and its direction."""
  draws = random.choice(len(probability), (num_groups, size), p=probability / probability.sum())
  r, y = (jnp.asarray(x[draws], jnp.float32) for x in (reward, lengths))
  truth = probability * reward  # its gradient is truth @ z, here and below through the Gram matrix
  pairs = gram[draws[:, :, None], draws[:, None, :]]
  results = {}
  for name, estimator in ESTIMATORS.items():
    a = np.asarray(estimator(r, y, jnp.ones_like(r)), np.float64) / size
    expected = np.bincount(draws.ravel(), a.ravel(), len(probability)) / num_groups
    power = np.einsum('nk,nkj,nj->n', a, pairs, a).mean()
    # Monte Carlo inflates |E g|² by variance / groups; taken out again.
    squared = expected @ gram @ expected
    squared = (squared - power / num_groups) / (1 - 1 / num_groups)
    along = (expected @ gram @ truth) / (truth @ gram @ truth)
    cosine = along * np.sqrt((truth @ gram @ truth) / squared)
    results[name] = {'variance': (power - squared) / along**2, 'cosine': cosine}
  reference = results['RLOO']['variance']
  return {name: {'variance': x['variance'] / reference, 'cosine': x['cosine']}
          for name, x in results.items()}


# --- Report -----------------------------------------------------------------------


def summarise(rows, ratio=False):
  """Equal nested dicts of numbers → one dict of [mean, low, high], a 95 % interval of the mean.

  Normal approximation over seeds; of ratios the mean is geometric.
  """
  if isinstance(rows[0], dict):
    return {key: summarise([row[key] for row in rows], ratio or key == 'variance')
            for key in rows[0]}
  values = np.log(rows) if ratio else np.asarray(rows)
  half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
  bounds = values.mean() + half * np.array([0, -1, 1])
  return [float(x) for x in (np.exp(bounds) if ratio else bounds)]


def points(axis, summary, offset, label, pick):
  mean, low, high = np.array([pick(summary[regime]) for regime in REGIMES]).T
  axis.errorbar(np.arange(len(REGIMES)) + offset, mean, [mean - low, high - mean], fmt='o',
                capsize=3, label=label)


def plot(summary, path):
  """Of one policy scale: population baselines, then finite groups."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
  for i, name in enumerate(('mean', 'length')):
    points(axes[0], summary, (i - 0.5) * 0.2, name,
           lambda part, name=name: part['population']['variance'][name])
  axes[0].set(ylabel='variance / optimal baseline', title='population baselines')
  for i, (size, name) in enumerate(itertools.product((4, 8), ('OPO', 'OPO leave-one-out'))):
    points(axes[1], summary, (i - 1.5) * 0.15, f'{name}, K = {size}',
           lambda part, name=name, size=size: part[f'K={size}'][name]['variance'])
  axes[1].set(ylabel='variance / RLOO', title='groups of K responses', ylim=(0.6, 1.4))
  for axis in axes:
    axis.axhline(1, color='black', linewidth=0.8)
    axis.set_xticks(range(len(REGIMES)), REGIMES, fontsize=8)
    axis.legend(fontsize=8)
  figure.savefig(path, dpi=120)


def measure(scores, scale, lengths, num_seeds, num_groups):
  """Everything about policies of one scale."""
  rows = {regime: [] for regime in REGIMES}
  error = 0.0
  for seed in range(num_seeds):
    probability, z = scores(seed, scale)
    error = max(error, abs(probability.sum() - 1))
    gram = z @ z.T
    for regime in REGIMES:
      random = np.random.default_rng([seed, REGIMES.index(regime)])
      reward = rewards(regime, lengths, random)
      row = {'population': population(probability, z, reward, lengths)}
      for size in (4, 8):
        row[f'K={size}'] = finite(probability, gram, reward, lengths, size, num_groups, random)
      rows[regime].append(row)
  flat = [row['population'] for regime in REGIMES for row in rows[regime]]
  wins = {regime: sum(row['population']['variance']['length']
                      < row['population']['variance']['mean'] for row in rows[regime])
          for regime in REGIMES}
  return {'probability_error': float(error),
          'identity_error': float(max(row['identity_error'] for row in flat)),
          'seeds_where_length_beats_mean': {k: int(v) for k, v in wins.items()},
          'seeds_where_OPO_loses_to_RLOO_at_K=4': {
              regime: int(sum(row['K=4']['OPO']['variance'] > 1 for row in rows[regime]))
              for regime in REGIMES},
          'summary': {regime: summarise(rows[regime]) for regime in REGIMES}}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seeds', type=int, default=20)
  parser.add_argument('--groups', type=int, default=40_000)
  args = parser.parse_args()
  started = time.perf_counter()
  tokens, mask = all_responses()
  scores = make_scores(tokens, mask)
  result = {'seeds': args.seeds, 'groups': args.groups, 'scales': {
      str(scale): measure(scores, scale, mask.sum(1), args.seeds, args.groups)
      for scale in SCALES}}
  result['seconds'] = time.perf_counter() - started
  (HERE / 'results').mkdir(exist_ok=True)
  (HERE / 'results' / 'variance.json').write_text(json.dumps(result, indent=1) + '\n')
  plot(result['scales'][str(SCALES[0])]['summary'], HERE / 'results' / 'variance.png')
  show(result)


def show(result):
  for scale, part in result['scales'].items():
    print('scale', scale, {k: v for k, v in part.items() if k != 'summary'})
    for regime, numbers in part['summary'].items():
      flat = numbers['population']['variance']
      print(f'  {regime}: correlation {numbers["population"]["correlation"][0]:.2f}',
            {k: np.round(v, 3).tolist() for k, v in flat.items()})
      for size in (4, 8):
        print('    K', size, {k: [*np.round(v['variance'], 3).tolist(), round(v['cosine'][0], 4)]
                              for k, v in numbers[f'K={size}'].items()})


if __name__ == '__main__':
  main()
