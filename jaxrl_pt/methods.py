"""The methods of reinforcement learning that a run can choose: equation, paper, files."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
  """One row of `jaxrl-pt methods`.

  gin: the file that chooses it; run: the tiny run that shows it, or empty where it is an
  option of others; experiment: what was measured of it, or empty.
  """

  name: str
  equation: str
  paper: str
  gin: str
  run: str = ''
  experiment: str = ''


METHODS: Sequence[Method] = (
    Method('RPT', 'r = 1 if the predicted bytes begin the text and end at a token, else 0',
           '2506.08007', 'gin/method/rpt.gin', 'gin/run/rpt_tiny.gin', 'experiments/rpt'),
    Method('RPT, shared documents', 'the same at several positions of a document, computed once',
           '2506.08007', 'gin/method/rpt_branches.gin', 'gin/run/rpt_branches_tiny.gin',
           'experiments/sampler'),
    Method('RLP', 'r = log p_θ(x_t | x_<t, c) − log p_φ(x_t | x_<t), φ ← τφ + (1 − τ)θ',
           '2510.01265', 'gin/method/rlp.gin', 'gin/run/rlp_tiny.gin', 'experiments/rpt'),
    Method('OPO', 'A = r − Σ|y|r / Σ|y|, one update a batch', '2505.23585',
           'gin/method/opo.gin', 'gin/run/opo_tiny.gin', 'experiments/rl_core'),
    Method('OPO, reasoning-gym', "the same under a host's scorer, of any of the library's tasks",
           '2505.23585', 'gin/method/opo.gin', 'gin/run/opo_gym_tiny.gin', 'experiments/rl_core'),
    Method('OPO, leave one out', 'A_i = r_i − Σ_{j≠i}|y_j|r_j / Σ_{j≠i}|y_j|', '2505.23585',
           'gin/method/opo_leave_one_out.gin', 'gin/run/opo_leave_one_out_tiny.gin',
           'experiments/opo'),
    Method('OPO, whole batch', 'A = r − Σ|y|r / Σ|y| over all groups', '2505.23585',
           'gin/method/opo_batch.gin', 'gin/run/opo_batch_tiny.gin'),
    Method('GRPO', 'A = (r − mean) / std; mean of each response; + β KL₃', '2402.03300',
           'gin/method/grpo.gin', 'gin/run/grpo_tiny.gin'),
    Method('Dr. GRPO', 'A = r − mean; Σ over tokens / token budget', '2503.20783',
           'gin/method/dr_grpo.gin', 'gin/run/dr_grpo_tiny.gin'),
    Method('DAPO', 'clip [0.8, 1.28], token mean, overlong penalty, groups drawn again',
           '2503.14476', 'gin/method/dapo.gin', 'gin/run/dapo_tiny.gin'),
    Method('RLOO', 'A_i = r_i − mean of the other r_j; r less β KL', '2402.14740',
           'gin/method/rloo.gin', 'gin/run/rloo_tiny.gin', 'experiments/opo'),
    Method('REINFORCE++', 'A_t = Σ_{s≥t} γ^(s−t) (r_s − β kl_s), whitened', '2501.03262',
           'gin/method/reinforce_plus_plus.gin', 'gin/run/reinforce_plus_plus_tiny.gin'),
    Method('REINFORCE++, baseline', 'A_t = r − mean of the group, whitened', '2501.03262',
           'gin/method/reinforce_plus_plus_baseline.gin',
           'gin/run/reinforce_plus_plus_baseline_tiny.gin'),
    Method('PPO', 'min(ρA, clip(ρ)A) with GAE: A_t = Σ_l (γλ)^l δ_{t+l}', '1707.06347',
           'gin/method/ppo.gin', 'gin/run/ppo_tiny.gin'),
    Method('GSPO', 'min(sA, clip(s)A), s = exp(mean_t log ρ_t)', '2507.18071',
           'gin/method/gspo.gin', 'gin/run/gspo_tiny.gin'),
    Method('CISPO', 'sg(clip(ρ)) A log π', '2506.13585', 'gin/method/cispo.gin',
           'gin/run/cispo_tiny.gin'),
    Method('Optimal token baseline', 'A_t = G_t − Σ G_t W_t / Σ W_t', 'verl',
           'gin/method/optimal_token_baseline.gin', 'gin/run/optimal_token_baseline_tiny.gin'),
    Method('Short-RL', 'r + 0.5 or λ if correct, within the slack, while accuracy holds',
           '2505.12284', 'gin/method/short_rl.gin', 'gin/run/short_rl_tiny.gin',
           'experiments/short_rl'),
    Method('Kimi length reward', 'r + λ if correct, r + min(0, λ) if not', '2501.12599',
           'gin/method/kimi.gin', 'gin/run/kimi_tiny.gin', 'experiments/short_rl'),
    Method('One step off-policy', 'terms times min(π_train / π_sampler, 2)', '1802.01561',
           'gin/method/one_step_off.gin', 'gin/run/opo_off_tiny.gin', 'experiments/rl_core'),
)


def table(methods: Sequence[Method] = METHODS) -> str:
  """The rows as text, columns aligned."""
  rows = [('method', 'equation', 'paper', 'gin file', 'tiny run', 'experiment')]
  rows += [(m.name, m.equation, m.paper, m.gin, m.run or '–', m.experiment or '–')
           for m in methods]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                   for row in rows)
