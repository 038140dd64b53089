"""RPT's step as one program against the same step verified on the host, in one process.

    python experiments/rl_core/fused.py [--rounds 30]

The shapes are those of gin/run/rpt_tiny.gin (32 prompts × 16 samples of one token), the same with
predictions of four tokens, and a quarter and a sixteenth of that batch; the weights are new, since
a step costs the same.
The host's path draws, fetches the tokens, verifies their bytes with the definition of the reward
and learns: once with the verifier pool, once by a plain Python loop, which has no protection from
a verifier that hangs. Of the one program there is also the form in which sampler and learner each
compute the prompts. Rounds alternate, and every round checks that the rewards are equal.
"""

import argparse
import functools
import json
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.environments.next_token import continuation_len
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.train import optim, programs
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, Verdict
from jaxrl_pt.verifiers import host, next_token, pool
from jaxrl_pt.verifiers.base import DeviceVerifier

RESULT = Path(__file__).parent / 'results' / 'fused.json'
SHAPES = (32, 16, 1), (32, 16, 4), (16, 8, 4), (8, 4, 4)  # prompts, samples, tokens


def draw_prompts(method: cfg.RPT, vocab_size: int) -> Prompts:
  """Random contexts and truths."""
  rng = np.random.default_rng(0)
  shape = method.rollouts.num_prompts, method.rollouts.prompt_len
  width = continuation_len(method)
  truth = rng.integers(0, vocab_size, (shape[0], width)).astype(np.int32)
  full = lambda value: np.full(shape[0], value, np.int32)
  return Prompts(rng.integers(0, vocab_size, shape).astype(np.int32), full(shape[1]),
                 np.arange(shape[0], dtype=np.int32),
                 extras={'continuation': truth, 'continuation_lengths': full(width),
                         'entropy': np.ones(shape[0], np.float32)})


def measure(num_prompts: int, group_size: int, num_tokens: int, rounds: int) -> dict[str, Any]:
  run, _ = gin_bindings.load(['gin/run/rpt_tiny.gin'], [
      f'cfg.Rollouts.response_tokens = {num_tokens}',
      f'cfg.Rollouts.num_prompts = {num_prompts}', f'cfg.Rollouts.group_size = {group_size}',
      f'cfg.Train.batch_size = {num_prompts}'])
  method, mesh = run.objective, make_mesh(cfg.Mesh())
  vocab_size = run.model.vocab_size
  # One byte a token, of two values, so that predictions are sometimes right.
  token_bytes = [bytes([97 + i % 2]) for i in range(vocab_size)]
  table = token_table(token_bytes, vocab_size)
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps, model.specs)
  state = states.init_state(model, optimizer, mesh, 0)
  state = state.replace(method=states.new_method(
      method.rollouts, method.algorithm, run.model.d_model))
  start = jax.tree.map(jnp.copy, state.params)
  prompts = draw_prompts(method, vocab_size)
  truths = [[token_bytes[t] for t in row] for row in prompts.extras['continuation']]
  references = [json.dumps([b.hex() for b in row]) for row in truths]
  prompts = jax.tree.map(jnp.asarray, prompts)
  decode = lambda ids: b''.join(token_bytes[i] for i in ids).hex()

  verify = next_token.device_verifier(table)
  one = programs.fused_step(run, mesh, method, optimizer, DeviceVerifier(verify), 0)
  sample = programs.sampler(run, mesh, method.rollouts, 0)
  learn = programs.learner_step(run, mesh, optimizer, method.rollouts, method.algorithm)

  @functools.partial(jax.jit, donate_argnums=0)
  def each_computes(state, prompts):
    rollouts = sample(state.params, prompts, state.step, state.step)
    verdict = verify(prompts, rollouts)
    return learn(state, prompts, rollouts, verdict, jnp.zeros_like(rollouts.logp))[0], verdict

  def by_pool(rollouts):
    return host.PoolVerifier(verifiers, decode).submit(prompts, rollouts, references).result()

  def by_loop(rollouts):
    reward = np.array([[next_token.prefix_match(bytes.fromhex(decode(t[m > 0].tolist())), truth)
                        for t, m in zip(tokens, mask, strict=True)]
                       for tokens, mask, truth in zip(rollouts.tokens, rollouts.in_response,
                                                      truths, strict=True)], np.float32)
    return Verdict(reward, np.ones_like(reward), reward)

  def on_host(verify):
    def step(state):
      rollouts = sample(state.params, prompts, state.step, state.step)
      fetched = jax.tree.map(np.asarray, rollouts)
      verdict = jax.tree.map(jnp.asarray, verify(fetched))
      state, _ = learn(state, prompts, rollouts, verdict, jnp.zeros_like(rollouts.logp))
      return state, verdict
    return step

  def fused(state):
    state, _, _, verdict = one(state, start, prompts)
    return state, verdict

  ways = {'one program': fused,
          'one program, prompts computed twice': lambda state: each_computes(state, prompts),
          'host, pool': on_host(by_pool), 'host, plain loop': on_host(by_loop)}
  settings = cfg.PythonVerifier('experiments.rl_core.prefix:verify')
  with pool.Pool(settings, cfg.VerifierPool()) as verifiers:
    seconds = {name: [] for name in ways}
    for i in range(rounds + 2):
      rewards = []
      for name, step in ways.items():
        copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        started = time.perf_counter()
        after, verdict = jax.block_until_ready(step(copy))
        if i >= 2:  # The first rounds compile.
          seconds[name].append(time.perf_counter() - started)
        rewards.append(np.asarray(verdict.reward))
      for other in rewards[1:]:
        np.testing.assert_array_equal(rewards[0], other)
      state = after
  found = {name: {'median_seconds': statistics.median(values), 'range': [min(values), max(values)]}
           for name, values in seconds.items()}
  base = found['one program']['median_seconds']
  for name in list(found)[1:]:
    ratios = [b / a for a, b in zip(seconds['one program'], seconds[name], strict=True)]
    found[name]['times_one_program'] = found[name]['median_seconds'] / base
    found[name]['median_ratio_of_rounds'] = statistics.median(ratios)
  return {'prompts': num_prompts, 'samples': group_size, 'tokens': num_tokens, **found,
          'mean_reward': float(rewards[0].mean())}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=30)
  args = parser.parse_args()
  found = [measure(*shape, args.rounds) for shape in SHAPES]
  RESULT.parent.mkdir(exist_ok=True)
  RESULT.write_text(json.dumps(found, indent=1) + '\n')
  print(json.dumps(found, indent=1))


if __name__ == '__main__':
  main()
