"""The table of the methods of reinforcement learning: equation, paper and files of each.

Most methods are a choice in `config.Algorithm`, and their equations are in the tables of `rl`. The
other methods, which change the prompts or how responses are drawn, are listed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_pt.rl import tables
from jaxrl_pt.rl.entry import Entry


@dataclass(frozen=True)
class Method:
  """A row of the table that `jaxrl-pt methods` prints.

  gin: the stem of the file in gin/method that chooses the method.
  run: the stem of the tiny run in gin/run that shows it; '' if it is that of `gin`.
  experiment: the folder in experiments where it was measured; '' if there is none.
  """

  name: str
  equation: str
  paper: str
  gin: str
  run: str = ''
  experiment: str = ''


# Methods that are in no table of `rl`.
_OTHERS = (
    Method('RPT', 'r = 1 if the predicted bytes begin the text and end at a token, else 0',
           '2506.08007', 'rpt'),
    Method('RPT, shared documents', 'the same at several positions of a document, computed once',
           '2506.08007', 'rpt_branches'),
    Method('RLP', 'r = log p_θ(x_t | x_<t, c) − log p_φ(x_t | x_<t), φ ← τφ + (1 − τ)θ',
           '2510.01265', 'rlp'),
    Method('OPO, reasoning-gym', "the same under a host's scorer, of any of the library's tasks",
           '2505.23585', 'opo', 'opo_gym'),
    Method('OPO, several turns', 'the same of episodes with an environment that answers',
           '2505.23585', 'opo', 'guess'),
    Method('RRM', 'r = 1 if the verdict names the better response, else −1; GRPO', '2505.14674',
           'rrm', 'rrm'),
    Method('RRM, direct judge', 'the same of a judge that states its verdict without reasoning',
           '2505.14674', 'rrm', 'rrm_direct'),
    Method('RRM, judge as reward', 'r_i = 1 / (G − 1) Σ_{j ≠ i} σ(θ_i − θ_j) of a tournament; GRPO',
           '2505.14674', 'grpo', 'judge_reward'),
    Method('LoRA', 'Y = X W + (alpha / r) (X A) B, of which A and B are trained', '2106.09685',
           'lora', 'opo_lora'),
    Method('in flight', "term × min(π_train / π_version, cap), with each token's own version",
           '2509.19128', 'in_flight', 'opo_in_flight'),
)
# Stem of a method's gin file → the folder in experiments where the method was measured.
_EXPERIMENTS: Mapping[str, str] = {
    'rpt': 'rpt', 'rpt_branches': 'sampler', 'rlp': 'rpt', 'opo': 'rl_core',
    'opo_leave_one_out': 'opo', 'rloo': 'opo', 'short_rl': 'short_rl', 'kimi': 'short_rl',
    'one_step_off': 'rl_core',
    'in_flight': 'sampler', 'hgpo': 'lhrm',
}
_RUNS: Mapping[str, str] = {'one_step_off': 'opo_off'}


def methods() -> list[Method]:
  """All methods: first those that are in no table of `rl`, then those of each table."""
  kinds: tuple[Mapping[type, Entry[Any]], ...] = (
      tables.ADVANTAGES, tables.SURROGATES, tables.SHAPINGS, tables.CORRECTIONS)
  known = [Method(entry.title, entry.equation, entry.paper, entry.gin)
           for kind in kinds for entry in kind.values() if entry.gin]
  return [Method(m.name, m.equation, m.paper, m.gin, m.run or _RUNS.get(m.gin, m.gin),
                 _EXPERIMENTS.get(m.gin, '')) for m in (*_OTHERS, *known)]


def table(rows: Sequence[Method] | None = None) -> str:
  """The rows as text with aligned columns; None for all methods."""
  texts = [('method', 'equation', 'paper', 'gin file', 'tiny run', 'experiment')]
  texts += [(m.name, m.equation, m.paper, f'gin/method/{m.gin}.gin', f'gin/run/{m.run}_tiny.gin',
             f'experiments/{m.experiment}' if m.experiment else '–')
            for m in (methods() if rows is None else rows)]
  widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                   for row in texts)
