"""Short-RL on a task with superfluous checks: lengths at equal accuracy, and each gate taken away.

    python experiments/short_rl/run.py

Task (`cfg.RedundantChecks`): add up 2 to 5 digits modulo 10, writing one step a digit, then as
many checks as one likes, then the answer. The answer needs its steps; checks change nothing.
The start policy is fitted to demonstrations of which half stop before the last step. Arms share
the start policy, the prompts, the seeds and the noise of sampling; the seeds of an arm are one
program (`vmap`). A tenth of all prompts, by a hash of their text, is neither demonstrated nor
asked in training. Writes results/short_rl.json and .png.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
import re
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy import stats

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import generated, pack, problems, splits
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.models import transformer
from jaxrl_pt.rl import shaping
from jaxrl_pt.sampling import groups
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.train import losses, optim, update
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import TrainState, Verdict
from jaxrl_pt.verifiers import exact

matplotlib.use('Agg')
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
TOKENIZER = ByteTokenizer()
MARKER, STEP, STOP = ord(generated.MARKER), ord('+'), TOKENIZER.eos_id
TABLE = token_table(TOKENIZER.token_bytes(), TOKENIZER.vocab_size)
SOURCE = cfg.RedundantChecks(size=4000, min_steps=1, max_steps=4, max_checks=10, noise=0.5)
MODEL = cfg.Model(num_layers=2, d_model=64, d_ff=128, num_heads=4, num_kv_heads=2, head_dim=16,
                  vocab_size=TOKENIZER.vocab_size)
HELD_OUT = 0.1
PROMPT_LEN, RESPONSE_LEN, GROUP = 7, 40, 8
SLACK_TOKENS, SLACK_ACCURACY = 4, 0.05
# What a right, a wrong and an unparsed answer earn: the paper's format and answer together, and
# a plain 1, beside which the length weighs more.
PAPER, PLAIN = (3.0, -0.5, -3.0), (1.0, 0.0, 0.0)


# --- What an arm adds to the reward -------------------------------------------------
# (reference accuracy, lengths, correct) → (bonus, gate open, new reference)


def standard(reference, lengths, correct):
  return jnp.zeros_like(lengths), jnp.zeros(()), reference


def kimi(reference, lengths, correct):
  return shaping.kimi(lengths, correct, jnp.ones_like(correct)), jnp.ones(()), reference


def short_rl(reference, lengths, correct, slack_tokens=SLACK_TOKENS,
             slack_accuracy=SLACK_ACCURACY, ema=0.0):
  return shaping.short_rl(reference, lengths, correct, jnp.ones_like(correct),
                          slack_tokens=slack_tokens, slack_accuracy=slack_accuracy, ema=ema)


def without_correctness(reference, lengths, correct):
  ones = jnp.ones_like(correct)
  is_open, new = shaping.accuracy_gate(reference, correct.mean(), SLACK_ACCURACY)
  return shaping.correct_and_short(lengths, ones, ones, SLACK_TOKENS) * is_open, is_open, new


# Arm → (bonus, what an answer earns).
ARMS = {
    'standard': (standard, PAPER),
    'Kimi from step 0': (kimi, PAPER),
    'Short-RL': (short_rl, PAPER),
    'without correctness': (without_correctness, PAPER),
    'without slack': (functools.partial(short_rl, slack_tokens=0), PAPER),
    'without accuracy gate': (functools.partial(short_rl, slack_accuracy=1.0), PAPER),
    'standard, answer 1': (standard, PLAIN),
    'Kimi from step 0, answer 1': (kimi, PLAIN),
    'Short-RL, answer 1': (short_rl, PLAIN),
    'without correctness, answer 1': (without_correctness, PLAIN),
}
SMALL_BATCH = {  # the gate at a quarter of the prompts
    'Short-RL': (short_rl, PAPER),
    'Short-RL, average': (functools.partial(short_rl, ema=0.9), PAPER),
}


# --- The start policy ---------------------------------------------------------------


def demonstrations():
  """Problems with their worked responses, none of them of a held-out prompt."""
  source = dataclasses.replace(SOURCE, size=30_000, seed=1)
  return [p for p in (generated.problem(source, i) for i in range(source.size))
          if pack.hold_out(p.prompt) >= HELD_OUT]


def fit_start(model, worked, num_steps, seed=0, num_rows=32):
  """A policy fitted to demonstrations: prompt and response, half of them stopping too early."""
  documents = (np.array(TOKENIZER.encode(p.prompt + p.demonstration), np.int32) for p in worked)
  rows = np.stack(list(pack.pack(documents, pack.Ends(TOKENIZER.bos_id, STOP), 128)))
  settings = cfg.AdamW(cfg.Cosine(peak_rate=4e-3, warmup_steps=20, end_rate=1e-4))
  optimizer = optim.make_optimizer(settings, num_steps, model.specs)
  params = P.init(model.specs, jax.random.key(seed))
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {})
  step = jax.jit(make_train_step(model.specs, losses.next_token(model, 0), optimizer,
                                 optim.learning_rate(settings.schedule, num_steps)),
                 donate_argnums=0)
  random = np.random.default_rng(seed)
  for _ in range(num_steps):
    chosen = random.choice(len(rows), num_rows, replace=False)
    state, metrics = step(state, pack.to_batch(rows[chosen], chosen))
  return state.params, float(metrics['loss'].mean())


# --- One arm ------------------------------------------------------------------------


def make_step(model, arm, num_prompts, num_steps, learning_rate):
  """step(state, reference, prompts, key) → (state, reference, measures), over the seeds."""
  bonus_of, (right, wrong, unparsed) = arm
  rollouts = cfg.Rollouts(num_prompts, GROUP, PROMPT_LEN, RESPONSE_LEN)
  algorithm = cfg.Algorithm(advantage=cfg.ReinforcePlusPlus(), aggregation=cfg.TokenMean())
  settings = cfg.AdamW(cfg.ConstantRate(learning_rate=learning_rate), weight_decay=0.0)
  run = cfg.Run(seed=0, model=MODEL, data=cfg.Data(cfg.PythonStdlib(), cfg.Bytes(), 64),
                objective=cfg.RL('start', cfg.Problems(SOURCE), cfg.AnswerMatch(),
                                 rollouts=rollouts, algorithm=algorithm),
                optimizer=settings, train=cfg.Train(num_steps=num_steps))
  optimizer = optim.make_optimizer(settings, num_steps, model.specs)
  learn = update.make_learner(model, optimizer, run, rollouts, algorithm)
  verify = exact.device_verifier(TABLE, generated.MARKER.encode(), (STOP,))

  def one(state, reference, prompts, key):
    drawn = groups.generate(model, state.params, prompts, key, sampler=rollouts.sampler,
                            num_samples=GROUP, num_tokens=RESPONSE_LEN, stop_ids=(STOP,))
    correct, lengths = verify(prompts, drawn).correct, drawn.lengths()
    written = jnp.where(drawn.in_response > 0, drawn.tokens, -1)
    parsed = (written == MARKER).any(-1) & (written == STOP).any(-1)
    reward = jnp.where(correct > 0, right, jnp.where(parsed, wrong, unparsed))
    bonus, is_open, reference = bonus_of(reference, lengths, correct)
    ones = jnp.ones_like(correct)
    state, metrics = learn(state, prompts, drawn, Verdict(reward + bonus, ones, correct),
                           jnp.zeros_like(drawn.logp))
    needed = prompts.lengths[:, None] - 3  # beginning, digits, colon: a step less than digits
    too_few = (written == STEP).sum(-1) < needed
    return state, reference, {
        'accuracy': correct.mean(), 'length': lengths.mean(), 'open': is_open,
        'too_few': too_few.mean(), 'mismatch': metrics['mismatch'].mean(),
        'entropy': metrics['entropy'].mean()}

  start_state = lambda params: TrainState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params),
      states.new_method(rollouts, algorithm, MODEL.d_model))
  return start_state, jax.jit(jax.vmap(one))


def run_arm(model, start, arm, training, seeds, num_prompts, num_steps, learning_rate):
  """The seeds of an arm: measures f[steps, seeds], and the final parameters of each seed."""
  start_state, advance = make_step(model, arm, num_prompts, num_steps, learning_rate)
  state = jax.tree.map(lambda x: jnp.stack([x] * len(seeds)), start_state(start))
  reference, measures = jnp.zeros(len(seeds)), []
  for number in range(num_steps):
    drawn = [problems.step_prompts(training, num_prompts, seed, number)[0] for seed in seeds]
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), number) for seed in seeds])
    prompts = jax.tree.map(lambda *x: np.stack(x), *drawn)
    state, reference, measured = advance(state, reference, prompts, keys)
    measures.append(measured)
  measures = {name: np.array([m[name] for m in measures]) for name in measures[0]}
  return measures, state.params


def evaluate(model, params, held_out):
  """Accuracy, length and share with too few steps of held-out problems, by steps needed: the
  mean over seeds of an arm and all of them, f[seeds] by name."""
  prompts, _ = held_out.prompts(np.arange(len(held_out)))

  @jax.jit
  @jax.vmap
  def draw(params):
    return groups.generate(model, params, prompts, jax.random.key(99), sampler=cfg.Sampler(),
                           num_samples=1, num_tokens=RESPONSE_LEN, stop_ids=(STOP,))

  drawn = draw(params)
  verify = jax.vmap(exact.device_verifier(TABLE, generated.MARKER.encode(), (STOP,)), (None, 0))
  correct = np.asarray(verify(prompts, drawn).correct)[..., 0]
  lengths = np.asarray(drawn.in_response.sum(-1))[..., 0]
  written = np.where(np.asarray(drawn.in_response) > 0, drawn.tokens, -1)[:, :, 0]
  needed = np.asarray(prompts.lengths) - 3
  too_few = (written == STEP).sum(-1) < needed
  found = {'accuracy': correct.mean(-1), 'length': lengths.mean(-1), 'too_few': too_few.mean(-1)}
  for n in np.unique(needed):
    rows = needed == n
    found[f'accuracy/{n}'] = correct[:, rows].mean(-1)
    found[f'length/{n}'] = lengths[:, rows].mean(-1)
    found[f'too_few/{n}'] = too_few[:, rows].mean(-1)
  return found


# --- Results ------------------------------------------------------------------------


def interval(values):
  """[mean, half-width of the 95 % t-interval]."""
  values = np.asarray(values, float)
  half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values)**0.5
  return [round(float(values.mean()), 4), round(float(half), 4)]


def summarise(runs, evals, num_steps):
  """Per arm: step-averaged length, accuracies, gate; and against `standard`, seed by seed."""
  early, table = num_steps // 4, {}
  for arm, m in runs.items():
    against = 'standard' + arm[len(arm.removesuffix(', answer 1')):]
    base = runs[against]
    relative = m['length'].mean(0) / base['length'].mean(0) - 1
    table[arm] = {
        'step_averaged_length': interval(m['length'].mean(0)),
        'length_against_standard': interval(relative),
        'held_out_accuracy': interval(evals[arm]['accuracy']),
        'held_out_accuracy_against_standard': interval(
            evals[arm]['accuracy'] - evals[against]['accuracy']),
        'held_out_length': interval(evals[arm]['length']),
        'early_accuracy': interval(m['accuracy'][:early].mean(0)),
        'early_accuracy_against_standard': interval(
            (m['accuracy'][:early] - base['accuracy'][:early]).mean(0)),
        'too_few_steps': interval(evals[arm]['too_few']),
        'hardest_accuracy': interval(evals[arm]['accuracy/4']),
        'hardest_too_few_steps': interval(evals[arm]['too_few/4']),
        'gate_open': interval(m['open'].mean(0)),
        'mismatch_max': round(float(m['mismatch'].max()), 5)}
  return table


def plot(runs, path):
  figure, axes = plt.subplots(2, 3, figsize=(13, 8), sharex=True)
  for arm, m in runs.items():
    row = axes[int(arm.endswith(', answer 1'))]
    for axis, name in zip(row, ('length', 'accuracy', 'too_few'), strict=True):
      smooth = np.apply_along_axis(lambda x: np.convolve(x, np.ones(9) / 9, 'valid'), 0, m[name])
      mean = smooth.mean(1)
      x = np.arange(len(mean)) + 5
      line, = axis.plot(x, mean, label=arm)
      axis.fill_between(x, smooth.min(1), smooth.max(1), alpha=0.12, color=line.get_color())
  titles = 'response length, bytes', 'accuracy of the batch', 'share with too few steps'
  for row, rewards in zip(axes, (PAPER, PLAIN), strict=True):
    for axis, title in zip(row, titles, strict=True):
      axis.set_title(f'{title}; right, wrong, unparsed earn {rewards}', fontsize=8)
      axis.set_xlabel('step')
    row[0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--num_steps', type=int, default=150)
  parser.add_argument('--num_seeds', type=int, default=5)
  parser.add_argument('--num_prompts', type=int, default=8)
  parser.add_argument('--learning_rate', type=float, default=2e-4)
  parser.add_argument('--start_steps', type=int, default=2000)
  args = parser.parse_args()
  started = time.time()
  model = transformer.build(MODEL, cfg.Compute(unroll=0))
  sides, worked = problems.load(cfg.Problems(SOURCE, held_out=HELD_OUT)), demonstrations()
  apart = splits.refuse_overlap((p.prompt for p in (*worked, *sides[0])),
                                (p.prompt for p in sides[1]), 'prompts')
  print(apart, flush=True)
  training, held_out = (problems.encode(side, TOKENIZER, PROMPT_LEN) for side in sides)
  start, loss = fit_start(model, worked, args.start_steps)
  before = {name: float(v[0]) for name, v in evaluate(
      model, jax.tree.map(lambda x: x[None], start), held_out).items()}
  print(f'start policy: loss {loss:.3f}, {before}, {time.time() - started:.0f} s', flush=True)
  seeds = list(range(args.num_seeds))
  runs, evals = {}, {}
  for arm, what in ARMS.items():
    runs[arm], params = run_arm(model, start, what, training, seeds, args.num_prompts,
                                args.num_steps, args.learning_rate)
    evals[arm] = evaluate(model, params, held_out)
    print(arm, {k: v.mean().round(3) for k, v in evals[arm].items() if '/' not in k},
          f'{time.time() - started:.0f} s', flush=True)
  small = {arm: run_arm(model, start, what, training, seeds, args.num_prompts // 4,
                        args.num_steps, args.learning_rate)[0]
           for arm, what in SMALL_BATCH.items()}
  result = {
      'settings': {**vars(args), 'group': GROUP, 'slack_tokens': SLACK_TOKENS,
                   'slack_accuracy': SLACK_ACCURACY, 'held_out': len(held_out)},
      'start_policy': {k: round(v, 4) for k, v in before.items()},
      'arms': summarise(runs, evals, args.num_steps),
      'gate_open': {f'{n * GROUP} responses a batch, {name}': interval(m['open'].mean(0))
                    for n, group in ((args.num_prompts, {'maximum': runs['Short-RL']}),
                                     (args.num_prompts // 4, {
                                         'maximum': small['Short-RL'],
                                         'average': small['Short-RL, average']}))
                    for name, m in group.items()},
      'seconds': round(time.time() - started)}
  folder = HERE / 'results'
  folder.mkdir(exist_ok=True)
  (folder / 'short_rl.json').write_text(json.dumps(result, indent=2) + '\n')
  plot(runs, folder / 'short_rl.png')
  print(re.sub(r'\[\s+(\S+)\s+(\S+)\s+\]', r'[\1 \2]', json.dumps(result, indent=2)))


if __name__ == '__main__':
  main()
