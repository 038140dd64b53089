"""What a policy does on held-out sums in both modes, and when it chooses itself."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import modes, problems
from jaxrl_pt.run.policy import Policy, load_policy
from jaxrl_pt.sampling.groups import make_sampler
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.verifiers import exact

MODES = cfg.HybridModes('\x01', '\x03')
LONGEST = 24


def drawn(policy: Policy, chosen: list[problems.Problem], at_once: int, k: int, seed: int
          ) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Answers to problems, k in each forced mode, with temperature 1.

  Returns:
    'correct', 'length' and 'logp' (of the mode's token), f[N, 2, k]; and the tokens i32[N, 2k, S].
  """
  tokenizer = policy.session.data.tokenizer
  encoded = problems.encode(chosen, tokenizer, 16)
  rollouts = cfg.Rollouts(at_once, 2 * k, 16, LONGEST, modes=MODES)
  sample = jax.jit(make_sampler(policy.model, seed, rollouts, tokenizer.stop_ids,
                                mode_ids=modes.token_ids(tokenizer, MODES)))
  table = token_table(tokenizer.token_bytes(), policy.model.config.vocab_size)
  verify = jax.jit(exact.device_verifier(table, b'#', tokenizer.stop_ids))
  found: dict[str, list[np.ndarray]] = {'correct': [], 'length': [], 'logp': []}
  tokens = []
  for start in range(0, len(chosen), at_once):
    rows = np.minimum(np.arange(start, start + at_once), len(chosen) - 1)
    prompts, _ = encoded.prompts(rows)
    answers = sample(policy.params, prompts, jnp.int32(start), jnp.int32(0))
    verdict = verify(prompts, answers)
    for name, value in (('correct', verdict.correct), ('length', answers.lengths()),
                        ('logp', answers.logp[..., 0])):
      found[name].append(np.asarray(value).reshape(at_once, 2, k))
    tokens.append(np.where(answers.in_response > 0, answers.tokens, -1))
  whole = {name: np.concatenate(parts)[:len(chosen)] for name, parts in found.items()}
  return whole, np.concatenate(tokens)[:len(chosen)]


def policy(workdir: Path, slips: str, most: int, at_once: int, k: int, margin: float, seed: int
           ) -> dict[str, Any]:
  """Numbers of easy and of hard sums, and of both together."""
  del slips  # They change demonstrations alone.
  loaded = load_policy(workdir)
  source = cfg.Problems(cfg.HybridSums(40000), held_out=0.2)
  _, held_out = problems.load(source)
  levels = ('easy', 'hard')
  chosen = [p for level in levels for p in [p for p in held_out if p.level == level][:most // 2]]
  answers, _ = drawn(loaded, chosen, at_once, k, 10_000 + seed)
  score, length = answers['correct'].mean(-1), answers['length'].mean(-1)  # [N, 2]
  p = np.exp(answers['logp'][:, :, 0])
  p_mode = p / p.sum(-1, keepdims=True)
  # The mode that is worth more, and within the margin the shorter one.
  shorter = length.argmin(-1)
  best = np.where(np.abs(score[:, 0] - score[:, 1]) <= margin, shorter, score.argmax(-1))
  right = np.take_along_axis(p_mode, best[:, None], 1)[:, 0]
  rows = {}
  for level in (*levels, 'all'):
    at = np.array([level in (q.level, 'all') for q in chosen])
    mean = lambda x, at=at: round(float(x[at].mean()), 4)
    rows[level] = {
        'think': mean(p_mode[:, 0]), 'neither': mean(1 - p.sum(-1)),
        'accuracy': mean((p_mode * score).sum(-1)), 'tokens': mean((p_mode * length).sum(-1)),
        'accuracy/think': mean(score[:, 0]), 'accuracy/no_think': mean(score[:, 1]),
        'tokens/think': mean(length[:, 0]), 'tokens/no_think': mean(length[:, 1]),
        'h_acc': mean((p_mode.argmax(-1) == best).astype(float)), 'h_acc_drawn': mean(right),
        'think_is_right': mean((best == 0).astype(float))}
  return rows
