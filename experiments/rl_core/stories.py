"""RL from a real trained policy: stories260K learns to write short stories with a given word.

    python experiments/rl_core/stories.py --data ../shared/data

The policy writes 96 tokens after the beginning of a story. A verifiable reward of three parts,
a third each: the word "happy" occurs; a length window holds (30 to 50 words); no run of three
words occurs twice. OPO with k3 to the reference policy, from which it starts, in the loss, 8
prompts × 8 samples a step. Reported with each step: reward by part, KL; at start and end: samples
of held-out beginnings, and how likely the start policy finds the text (nats a token), which says
whether it is still a story. Results go to results/stories.json and .png.
"""

import argparse
import functools
import json
from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import splits
from jaxrl_pt.interop import llama2c
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling.groups import make_sampler
from jaxrl_pt.train import fused, optim, state, update
from jaxrl_pt.types import Prompts, RolloutBatch, Verdict

RESULT = Path(__file__).parent / 'results' / 'stories.json'
NEW, PROMPTS, SAMPLES, WIDTH = 96, 8, 8, 24
WORD = 'happy'
STARTS = ('Once upon a time', 'One day, Tom', 'Lily was', 'There was a little', 'Sue and Ben',
          'In the park', 'A big cat', 'The sun was')
HELD_OUT = ('One sunny day', 'Tim had a', 'Mia saw a', 'A small boy')
PARTS = ('word', 'length', 'no_repetition')


def verify(text: str) -> tuple[float, float, float]:
  """The reward's parts, 0 or 1 each; any text has an answer."""
  words = re.findall(r"[a-z']+", text.lower())
  triples = list(zip(words, words[1:], words[2:], strict=False))
  return (float(WORD in words), float(30 <= len(words) <= 50),
          float(len(set(triples)) == len(triples)))


def prompts_of(tokenizer: Any, starts: list[str], ids: list[int]) -> Prompts:
  tokens, lengths = np.zeros((len(starts), WIDTH), np.int32), []
  for row, text in zip(tokens, starts, strict=True):
    encoded = tokenizer.encode(text)
    row[:len(encoded)] = encoded
    lengths.append(len(encoded))
  return Prompts(jnp.asarray(tokens), jnp.array(lengths), jnp.array(ids))


def texts(tokenizer: Any, drawn: RolloutBatch) -> list[list[str]]:
  tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.in_response)
  cut = lambda t, m: [i for i in t[m > 0].tolist() if i != llama2c.BOS]
  return [[tokenizer.decode([llama2c.BOS, *cut(tokens[n, g], mask[n, g])])
           for g in range(tokens.shape[1])] for n in range(len(tokens))]


def train(data: Path, seed: int, num_steps: int) -> dict[str, Any]:
  weights = data / 'weights-stories260k'
  model_config, start = llama2c.load_model(weights / 'stories260K.bin')
  tokenizer = llama2c.load_tokenizer(weights / 'tok512.bin')
  rollouts = cfg.Rollouts(num_prompts=PROMPTS, group_size=SAMPLES, prompt_len=WIDTH,
                          response_tokens=NEW)
  method = cfg.Algorithm(advantage=cfg.OPO(), kl=cfg.KLInLoss(coef=0.05))
  run = cfg.Run(
      seed=seed, model=model_config, data=cfg.Data(cfg.PythonStdlib(), cfg.Bytes(), WIDTH + NEW),
      objective=cfg.RPT('unread', rollouts=rollouts, algorithm=method),
      optimizer=cfg.AdamW(cfg.ConstantRate(3e-4), weight_decay=0.0),
      train=cfg.Train(num_steps=num_steps, batch_size=PROMPTS))
  model = transformer.build(run.model, run.compute)
  optimizer = optim.make_optimizer(run.optimizer, num_steps, model.specs)
  mesh = make_mesh(run.mesh)
  new_method = lambda params: state.new_method(rollouts, method, run.model.d_model)
  now = state.state_of(model, start, optimizer,
                       state.abstract_state(model, optimizer, mesh, new_method), new_method)
  # BOS is what this model writes between stories: a story may end before its last token.
  sample = jax.jit(make_sampler(model, seed, rollouts, (llama2c.BOS,)))
  compare = jax.jit(functools.partial(fused.reference_logp, model, sampler=rollouts.sampler,
                                      loss_chunk=0))
  learn = jax.jit(update.make_learner(model, optimizer, run, rollouts, method), donate_argnums=0)
  rng = np.random.default_rng(seed)
  splits.refuse_overlap(STARTS, HELD_OUT, 'beginnings')
  # Four distinct beginnings, each with two groups of its own noise.
  held_out = prompts_of(tokenizer, [*HELD_OUT] * 2, list(range(1000, 1008)))
  far = jnp.int32(2**31 - 1)  # The held-out beginnings meet the same noise every time.

  def examine(params: Any) -> dict[str, Any]:
    drawn = sample(params, held_out, far, jnp.int32(0))
    written = texts(tokenizer, drawn)
    parts = np.array([[verify(f'{HELD_OUT[n % 4]}{t}') for t in group]
                      for n, group in enumerate(written)])
    logp = compare(start, held_out, drawn)
    mask = np.asarray(drawn.sampled)
    nll = -float((np.asarray(logp) * mask).sum() / mask.sum())
    return {'reward': float(parts.mean()), 'nats_a_token_under_start': nll,
            **{name: float(parts[..., i].mean()) for i, name in enumerate(PARTS)},
            'samples': [f'{HELD_OUT[n]}{written[n][0]}' for n in range(4)]}

  before, rows = examine(now.params), []
  for step in range(num_steps):
    chosen = rng.integers(0, len(STARTS), PROMPTS)
    prompts = prompts_of(tokenizer, [STARTS[i] for i in chosen],
                         [step * PROMPTS + i for i in range(PROMPTS)])
    drawn = sample(now.params, prompts, jnp.int32(step), jnp.int32(step))
    parts = np.array([[verify(STARTS[i] + t) for t in group]
                      for i, group in zip(chosen, texts(tokenizer, drawn), strict=True)])
    reward = jnp.asarray(parts.mean(-1), jnp.float32)
    verdict = Verdict(reward, jnp.ones_like(reward), (reward == 1).astype(jnp.float32), {})
    reference = compare(start, prompts, drawn)
    now, values = learn(now, prompts, drawn, verdict, reference)
    mask = np.asarray(drawn.sampled)
    u = np.where(mask > 0, np.asarray(reference) - np.asarray(drawn.logp), 0.0)
    rows.append({'reward': float(reward.mean()),
                 **{name: float(parts[..., i].mean()) for i, name in enumerate(PARTS)},
                 'kl': float(((np.exp(u) - u - 1) * mask).sum() / mask.sum()),
                 'entropy': float(values['entropy'].mean()),
                 'mismatch': float(values['mismatch'].mean())})
    if (step + 1) % 10 == 0:
      print(f'seed {seed} step {step + 1}: ' + '  '.join(
          f'{k} {np.mean([r[k] for r in rows[-10:]]):.3f}' for k in rows[0]), flush=True)
  return {'seed': seed, 'before': before, 'after': examine(now.params), 'steps': rows}


def draw(results: list[dict[str, Any]]) -> None:
  figure = Figure(figsize=(9, 3), layout='constrained')
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  for name in ('reward', *PARTS):
    curves = np.array([[r[name] for r in one['steps']] for one in results])
    smooth = np.array([np.convolve(c, np.ones(5) / 5, 'valid') for c in curves])
    left.plot(smooth.mean(0), label=name, lw=2.5 if name == 'reward' else 1)
    left.fill_between(range(smooth.shape[1]), smooth.min(0), smooth.max(0), alpha=0.15)
  left.set(title=f'Reward and its parts, {len(results)} seeds', xlabel='step')
  left.legend()
  right.plot(np.mean([[r['kl'] for r in one['steps']] for one in results], 0))
  right.set(title='KL to the reference policy (k3)', xlabel='step', ylabel='nats a token')
  figure.savefig(RESULT.with_suffix('.png'), dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--data', type=Path, default=Path('../shared/data'))
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  results = [train(args.data, seed, args.steps) for seed in range(args.seeds)]
  RESULT.write_text(json.dumps(results, indent=1) + '\n')
  draw(results)
  for one in results:
    print(f'seed {one["seed"]}: ' + '  '.join(
        f'{k} {one["before"][k]:.3f} → {one["after"][k]:.3f}'
        for k in ('reward', *PARTS, 'nats_a_token_under_start')))


if __name__ == '__main__':
  main()
