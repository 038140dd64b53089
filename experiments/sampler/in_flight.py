"""Rollouts in flight against on-policy rollouts, where the lengths of responses have a long tail.

    python experiments/sampler/in_flight.py

A tiny random policy learns to repeat the letter of its prompt: the reward is the share of the
response's letters that are this one. Its stop token is as likely as any other at first, so that
lengths are geometric: the longest response of a batch is several times as long as the mean. Each
arm decodes 16 of a batch's 64 responses at a time. Counted are decode steps, which do not depend on
the machine; three seeds. Results go to results/in_flight.json and .png.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import groups, in_flight, slots
from jaxrl_pt.sampling.requests import Vocabulary
from jaxrl_pt.sampling.state import init
from jaxrl_pt.train import optim, update
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, TrainState, Verdict

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # After the choice of its backend.

RESULT = Path(__file__).parent / 'results' / 'in_flight.json'
VOCAB, STOP, PROMPTS, GROUP, PROMPT, LENGTH, STEPS, SEEDS = 16, 0, 8, 8, 2, 128, 60, 3
SIZES = cfg.Model(num_layers=1, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16,
                  vocab_size=VOCAB)
MODEL = transformer.build(SIZES)
ROLLOUTS = cfg.Rollouts(PROMPTS, GROUP, PROMPT, LENGTH,
                        slots=cfg.Slots(slots=16, page_size=16, prefill_tokens=64))
ARMS = {'on-policy': 0, 'in flight, K = 1': 1, 'in flight, K = 2': 2}


def prompts_of(seed: int, batch: int) -> Prompts:
  letters = np.random.default_rng([seed, batch]).integers(1, VOCAB, (PROMPTS, 1))
  each = jnp.arange(PROMPTS, dtype=jnp.int32)
  return Prompts(jnp.asarray(np.repeat(letters, PROMPT, 1), jnp.int32), each * 0 + PROMPT, each)


def verify(prompts: Prompts, rollouts) -> Verdict:
  counted = rollouts.in_response * (rollouts.tokens != STOP)
  same = (rollouts.tokens == prompts.tokens[:, :1, None]) * counted
  # An empty response gets what a random letter gets, so that no length pays.
  share = (same.sum(-1) + 1 / (VOCAB - 1)) / (counted.sum(-1) + 1)
  return Verdict(share, jnp.ones_like(share), share)


def draw_on_policy(seed: int, params, prompts: Prompts, batch):
  """`groups.generate` with the number of decode steps and of slots that they extended."""
  shape = groups.shape_of(VOCAB, prompts, GROUP, LENGTH, ROLLOUTS.sampler, ROLLOUTS.slots)
  queue = groups.queue_of(prompts, GROUP, LENGTH, (STOP,))
  key = jax.random.fold_in(jax.random.key(seed), batch)
  state = slots.advance(
      MODEL, shape, Vocabulary(), params, key, batch, queue,
      init(MODEL, shape, Vocabulary(), jnp.float32), groups.most_turns(shape, has_all_pages=True))
  return groups.rollouts_of(state.responses, PROMPTS, (STOP,), batch), state.counters


def new_learner():
  """The first state of a seed, and the compiled update."""
  algorithm = cfg.Algorithm(advantage=cfg.RLOO(), correction=cfg.TokenTIS(),
                            aggregation=cfg.SequenceMeanTokenMean())
  run = cfg.Run(
      seed=0, model=SIZES, objective=cfg.RPT('start', rollouts=ROLLOUTS, algorithm=algorithm),
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01), weight_decay=0.0),
      train=cfg.Train(num_steps=STEPS, batch_size=PROMPTS))
  optimizer = optim.make_optimizer(run.optimizer, STEPS, MODEL.specs)
  method = states.new_method(ROLLOUTS, algorithm, SIZES.d_model)

  def start(seed: int) -> TrainState:
    params = P.init(MODEL.specs, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), method)

  def learn(state, prompts, rollouts):
    verdict = verify(prompts, rollouts)
    return learner(state, prompts, rollouts, verdict, jnp.zeros_like(rollouts.logp))

  learner = update.make_learner(MODEL, optimizer, run, ROLLOUTS, algorithm)
  return start, jax.jit(learn)


def run_arm(staleness: int, seed: int, start, learn) -> dict[str, list[float]]:
  """Curves of one seed."""
  state, curve = start(seed), {}
  if staleness:
    config = dataclasses.replace(ROLLOUTS, mode=cfg.InFlight(staleness))
    enqueue, draw = map(jax.jit, in_flight.make_sampler(MODEL, seed, config, (STOP,)))
    sampler = jax.jit(functools.partial(in_flight.init, MODEL, config))()
  else:
    draw = jax.jit(functools.partial(draw_on_policy, seed))
  for batch in range(STEPS):
    prompts, number = prompts_of(seed, batch), jnp.asarray(batch)
    if staleness:
      for entering in in_flight.entering(config, batch):
        sampler = enqueue(sampler, prompts_of(seed, entering), jnp.asarray(entering))
      sampler, rollouts, drawn = draw(state.params, sampler, number, number)
      row = {name: float(value.mean()) for name, value in drawn.items()}
      row['busy'] = float(drawn['slot_occupancy'].sum)
    else:
      rollouts, counters = draw(state.params, prompts, number)
      row = {'decode_steps': float(counters.steps), 'busy': float(counters.busy)}
    state, metrics = learn(state, prompts, rollouts)
    row |= {name: float(metrics[name].mean()) for name in ('reward', 'response_length')}
    row['longest'] = float(rollouts.lengths().max())
    for name, value in row.items():
      curve.setdefault(name, []).append(value)
  return curve


def summary(curves: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
  """Means over steps, and their range over seeds."""
  slots_in_all = ROLLOUTS.slots.slots
  of = {'decode steps a step': lambda c: np.mean(c['decode_steps']),
        'slots busy': lambda c: sum(c['busy']) / (sum(c['decode_steps']) * slots_in_all),
        'decode steps for 1,000 tokens': lambda c: 1000 * sum(c['decode_steps']) / sum(c['busy']),
        'mean length': lambda c: np.mean(c['response_length']),
        'longest of a batch': lambda c: np.mean(c['longest']),
        'reward, first 5 steps': lambda c: np.mean(c['reward'][:5]),
        'reward, last 10 steps': lambda c: np.mean(c['reward'][-10:])}
  if 'versions_behind' in curves[0]:
    of |= {'versions behind, mean': lambda c: np.mean(c['versions_behind']),
           'versions behind, most': lambda c: np.max(c['most_versions_behind']),
           'carried responses': lambda c: np.mean(c['carried_responses'])}
  values = {name: [float(f(c)) for c in curves] for name, f in of.items()}
  return {name: {'mean': float(np.mean(v)), 'least': min(v), 'most': max(v)}
          for name, v in values.items()}


def main() -> None:
  start, learn = new_learner()
  curves = {name: [] for name in ARMS}
  for seed in range(SEEDS):
    for name, staleness in ARMS.items():
      curves[name].append(run_arm(staleness, seed, start, learn))
      print(seed, name, {k: round(v['mean'], 3)
                         for k, v in summary(curves[name][-1:]).items()}, flush=True)
  rows = {name: summary(c) for name, c in curves.items()}
  RESULT.write_text(json.dumps({'summary': rows, 'curves': curves}, indent=1) + '\n')
  plot(curves)


def plot(curves: dict[str, list[dict[str, list[float]]]]) -> None:
  """Rewards over steps, and over decode steps."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
  for name, of_seeds in curves.items():
    steps = np.cumsum(np.mean([c['decode_steps'] for c in of_seeds], 0))
    rewards = np.mean([c['reward'] for c in of_seeds], 0)
    left.plot(np.arange(STEPS) + 1, rewards, label=name)
    right.plot(steps, rewards, label=name)
  left.set(xlabel='step', ylabel='reward, mean of three seeds')
  right.set(xlabel='decode steps of the sampler')
  right.locator_params(axis='x', nbins=5)
  left.legend(frameon=False)
  figure.savefig(RESULT.with_suffix('.png'), dpi=120)


if __name__ == '__main__':
  main()
