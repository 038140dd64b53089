"""What a policy does on held-out sums in both modes, and when it chooses itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import modes, problems
from jaxrl_pt.evaluation.hybrid_accuracy import better_mode
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.sampling.groups import make_sampler
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.types import Params
from jaxrl_pt.verifiers import exact

MODES = cfg.HybridModes('\x01', '\x03')
PROMPT, LONGEST = 16, 24
SUMS = cfg.Problems(cfg.HybridSums(40000), held_out=0.2)
LEVELS = ('easy', 'hard')
MOST = 96  # held-out sums of each level
MARGIN = 0.05  # of Hybrid Accuracy: within it, the shorter mode is the right one


def answering(policy: Policy, at_once: int, k: int) -> Callable[..., Any]:
  """Compiles answer(params, problems, batch) → what came of k answers in each forced mode.

  Its results are 'correct', 'length' and 'logp' (of the mode's token), f[N, 2, k], and the tokens
  i32[N, 2k, S]. `batch` addresses the noise.
  """
  tokenizer = policy.session.data.tokenizer
  rollouts = cfg.Rollouts(at_once, 2 * k, PROMPT, LONGEST, modes=MODES)
  sample = jax.jit(make_sampler(policy.model, 0, rollouts, tokenizer.stop_ids,
                                mode_ids=modes.token_ids(tokenizer, MODES)))
  table = token_table(tokenizer.token_bytes(), policy.model.config.vocab_size)
  verify = jax.jit(exact.device_verifier(table, b'#', tokenizer.stop_ids))

  def answer(params: Params, chosen: list[problems.Problem], batch: int
             ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    encoded = problems.encode(chosen, tokenizer, PROMPT)
    found: dict[str, list[np.ndarray]] = {'correct': [], 'length': [], 'logp': []}
    tokens = []
    for start in range(0, len(chosen), at_once):
      rows = np.minimum(np.arange(start, start + at_once), len(chosen) - 1)
      prompts, _ = encoded.prompts(rows)
      answers = sample(params, prompts, jnp.int32(batch + start), jnp.int32(0))
      verdict = verify(prompts, answers)
      for name, value in (('correct', verdict.correct), ('length', answers.lengths()),
                          ('logp', answers.logp[..., 0])):
        found[name].append(np.asarray(value).reshape(at_once, 2, k))
      tokens.append(np.where(answers.in_response > 0, answers.tokens, -1))
    whole = {name: np.concatenate(parts)[:len(chosen)] for name, parts in found.items()}
    return whole, np.concatenate(tokens)[:len(chosen)]

  return answer


def held_out() -> list[problems.Problem]:
  """The first held-out sums of each level."""
  _, rest = problems.load(SUMS)
  return [p for level in LEVELS for p in [p for p in rest if p.level == level][:MOST]]


def numbers(answers: dict[str, np.ndarray], levels: list[str]) -> dict[str, dict[str, float]]:
  """Means over easy sums, over hard ones, and over both levels with equal weight.

  Args:
    answers: from `answering`.
    levels: of the N problems.
  """
  score, length = answers['correct'].mean(-1), answers['length'].mean(-1)  # [N, 2]
  p = np.exp(answers['logp'][:, :, 0])
  p_mode = p / p.sum(-1, keepdims=True)
  best = better_mode(answers['correct'], answers['length'], np.ones_like(answers['length']), MARGIN)
  right = np.take_along_axis(p_mode, best[:, None], 1)[:, 0]
  of_each = {
      'think': p_mode[:, 0], 'neither': 1 - p.sum(-1), 'accuracy': (p_mode * score).sum(-1),
      'tokens': (p_mode * length).sum(-1), 'accuracy/think': score[:, 0],
      'accuracy/no_think': score[:, 1], 'tokens/think': length[:, 0],
      'tokens/no_think': length[:, 1], 'h_acc': (p_mode.argmax(-1) == best).astype(float),
      'h_acc_drawn': right, 'think_is_right': (best == 0).astype(float)}
  rows = {level: {name: float(values[np.array(levels) == level].mean())
                  for name, values in of_each.items()} for level in LEVELS}
  rows['all'] = {name: (rows['easy'][name] + rows['hard'][name]) / 2 for name in of_each}
  return {level: {k: round(v, 4) for k, v in row.items()} for level, row in rows.items()}
