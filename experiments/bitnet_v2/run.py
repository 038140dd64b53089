"""Does the Hadamard rotation of BitNet v2 (2504.18415) carry a ternary model from A8 to A4?

    python experiments/bitnet_v2/run.py --data ../shared/data/text-wikitext2

Small models are trained on WikiText-2 with int8 activations and branch over the last 5 % of the
steps into 4-bit ones (late_int4.py): once as they are, once with outlier channels planted in their
SubLN gains, and once with twice the steps. Each setting and seed that is finished is a row of
runs.jsonl in the work directory, so the command may be interrupted and repeated. Results go to
results/bitnet_v2.json and results/bitnet_v2.png; README.md reads them.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import late_int4 as arms
import numpy as np

from jaxrl_pt.scaling import seeds as seeds_of

HERE = Path(__file__).parent
RESULTS = HERE / 'results'
MODELS = {'natural': ('A8', 'A8 + Hadamard'),
          'planted': ('planted: A8', 'planted: A8 + Hadamard'),
          'longer': ('longer: A8', 'longer: A8 + Hadamard')}
# Settings of side questions, which get fewer seeds.
SIDE = {*MODELS['longer'], *(name for name in arms.SETTINGS if ', rate ' in name)}
# Nats that the paper's table gives: A4 − A8 with Hadamard, by size.
PAPER_GAPS = {'400M': 0.0205, '1.3B': 0.0169, '3B': 0.0133, '7B': 0.0109}


def run_all(text: arms.Text, work: Path, args: argparse.Namespace) -> list[dict]:
  """The rows of all settings and seeds, those that are missing trained first."""
  path = work / 'runs.jsonl'
  wanted = [(name, seed, round(setting.length * args.steps))
            for name, setting in arms.SETTINGS.items() if name in args.settings
            for seed in (args.side_seeds if name in SIDE else args.seeds)]
  found = {(row['setting'], row['seed'], row['steps']): row
           for row in seeds_of.finished_rows(path)}
  for name, seed, steps in wanted:
    if (name, seed, steps) not in found:
      found[name, seed, steps] = row = arms.train(name, seed, steps, text)
      seeds_of.append_row(path, row)
      ends = ', '.join(f'{k or name} {v:.4f}' for k, v in row['at_end'].items())
      print(f'{name}, seed {seed}: {ends} nats a token', flush=True)
  return [found[key] for key in wanted]


# --- What they say ------------------------------------------------------------------


interval = functools.partial(seeds_of.interval, digits=5)


def verdict(found: dict[str, Any], bound: float) -> str:
  """Whether a difference is at most `bound`: 'yes', 'no', or 'not decided' by its interval."""
  if found['half_width_95'] is None:
    return 'not decided'
  low, high = (found['mean'] + sign * found['half_width_95'] for sign in (-1, 1))
  return 'yes' if high <= bound else 'no' if low > bound else 'not decided'


class Losses:
  """Nats per token by setting, branch and moment, an array over seeds each.

  models: the pairs of MODELS of which both settings were trained.
  """

  def __init__(self, rows: list[dict]) -> None:
    self._rows = {}
    for row in rows:
      self._rows.setdefault(row['setting'], []).append(row)
    self.models = {model: pair for model, pair in MODELS.items() if self.has(*pair)}

  def has(self, *settings: str) -> bool:
    return all(setting in self._rows for setting in settings)

  def at(self, setting: str, branch: str = '', moment: str = 'at_end') -> np.ndarray:
    return np.array([row[moment][branch] for row in self._rows[setting]])

  def gap(self, setting: str, branch: str, moment: str = 'at_end') -> np.ndarray:
    """A branch minus the A8 branch of the same model."""
    return self.at(setting, branch, moment) - self.at(setting, 'A8', moment)


def gaps(losses: Losses) -> dict[str, Any]:
  """What each quantiser costs over int8, by setting, at the switch and at the end."""
  return {f'{name}, {branch}': {moment: interval(losses.gap(name, branch, moment))
                                for moment in ('at_switch', 'at_end')}
          for name, branches in arms.BRANCHES.items() if losses.has(name)
          for branch in branches if branch != 'A8'}


def thresholds(losses: Losses) -> dict[str, Any]:
  """The claims that would fail the paper, each with its number and its verdict."""
  found: dict[str, Any] = {}
  for model, (plain, rotated) in losses.models.items():
    difference = losses.at(rotated, 'A8') - losses.at(plain, 'A8')
    with_h, without = losses.gap(rotated, 'A4'), losses.gap(plain, 'A4')
    # |mean| and its interval: 'yes' only if both ends lie inside.
    change = interval(difference)
    both = [verdict({**change, 'mean': sign * change['mean']}, 0.02) for sign in (1, -1)]
    inside = 'no' if 'no' in both else 'yes' if both == ['yes', 'yes'] else 'not decided'
    ratio = interval(5 * with_h - without)
    found[model] = {
        'A8 with Hadamard minus without': {**change, 'within 0.02': inside},
        'A4 minus A8, with Hadamard': {**interval(with_h),
                                       'at most 0.05': verdict(interval(with_h), 0.05)},
        'A4 minus A8, without': interval(without),
        'ratio of the means': round(float(without.mean() / with_h.mean()), 1),
        'five times the gap with Hadamard minus the gap without':
            {**ratio, 'at most 0': verdict(ratio, 0.0)},
        'A4 with Hadamard minus without': interval(losses.at(rotated, 'A4')
                                                   - losses.at(plain, 'A4')),
    }
  if 'planted' not in found:
    return found
  plain, _ = MODELS['planted']
  found['planted']['A4 with a permutation minus without'] = interval(
      losses.at(plain, 'A4 + permutation') - losses.at(plain, 'A4'))
  return found


# Where the loss of a recipe is found: (setting, branch).
RECIPES = {'full precision': ('full precision', ''), 'W1.58A8': ('A8', 'A8'),
           'W1.58A8 + Hadamard': ('A8 + Hadamard', 'A8'), 'W1.58A4 late': ('A8', 'A4'),
           'W1.58A4 late + Hadamard': ('A8 + Hadamard', 'A4'),
           'W1.58A4 from the start': ('A4 from the start', ''),
           'W1.58A4 from the start + Hadamard': ('A4 + Hadamard from the start', '')}


def recipes(losses: Losses) -> dict[str, Any]:
  """Nats per token of every recipe, and minus full precision where that was trained."""
  found: dict[str, Any] = {}
  for name, (setting, branch) in RECIPES.items():
    if losses.has(setting):
      values = losses.at(setting, branch)
      found[name] = {'loss': interval(values)}
      if losses.has('full precision'):
        found[name]['minus full precision'] = interval(values - losses.at('full precision'))
  return found


def by_rate(losses: Losses) -> dict[str, Any]:
  """Nats per token of both models at 8 bits by their peak rate, and each at its best one."""
  values: dict[str, dict[float, np.ndarray]] = {}
  for name in MODELS['natural']:
    settings = {arms.RATE: (name, 'A8'), **{r: (f'{name}, rate {r}', '') for r in arms.RATES}}
    values[name] = {rate: losses.at(*place) for rate, place in sorted(settings.items())
                    if losses.has(place[0])}
  if any(not of for of in values.values()):
    return {}
  # Those seeds that all of them have.
  shared = min(len(v) for of in values.values() for v in of.values())
  values = {name: {rate: v[:shared] for rate, v in of.items()} for name, of in values.items()}
  found: dict[str, Any] = {name: {str(rate): interval(v) for rate, v in of.items()}
                           for name, of in values.items()}
  plain, rotated = (min(of.values(), key=np.mean) for of in values.values())
  found['Hadamard minus without, each at its best rate'] = interval(rotated - plain)
  return found


def inputs(rows: list[dict]) -> dict[str, Any]:
  """Means over layers and seeds of the statistics of W_o's and W_down's inputs."""
  found: dict[str, Any] = {}
  for name in dict.fromkeys(row['setting'] for row in rows if 'inputs' in row):
    mine = [row['inputs'] for row in rows if row['setting'] == name]
    found[name] = {place: {key: round(float(np.mean([layer[key] for m in mine
                                                     for layer in m[place]])), 4)
                           for key in mine[0][place][0]}
                   for place in mine[0]}
  return found


# --- Report -------------------------------------------------------------------------


def plot(losses: Losses, rows: list[dict]) -> None:
  """Gaps of the branches at the end, and kurtosis before and after the rotation."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(12, 4.2), layout='constrained')
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  bars = [(model, label, name, branch) for model, (plain, rotated) in losses.models.items()
          for label, name, branch in (
              ('A4', plain, 'A4'), ('A4 absmax', plain, 'A4 absmax'),
              ('A4 but\nW_o, W_down', plain, 'A4 but W_o, W_down'),
              ('A4 +\nHadamard', rotated, 'A4'))]
  if 'planted' in losses.models:
    bars.append(('planted', 'A4 +\npermutation', 'planted: A8', 'A4 + permutation'))
  bars = [bar for bar in bars if bar[3] in arms.BRANCHES[bar[2]]]
  for place, (model, _, name, branch) in enumerate(bars):
    colour = {'natural': 'C0', 'planted': 'C1', 'longer': 'C2'}[model]
    for moment, marker, shift in (('at_switch', 'o', -0.12), ('at_end', 's', 0.12)):
      values = losses.gap(name, branch, moment)
      left.plot([place + shift] * len(values), values, marker, color=colour, markersize=4,
                fillstyle='none' if moment == 'at_switch' else 'full')
  left.axhspan(min(PAPER_GAPS.values()), max(PAPER_GAPS.values()), color='0.85', zorder=0,
               label='paper, A4 with Hadamard, 400M to 7B')
  for marker, style, label in (('o', 'none', 'at the switch'), ('s', 'full', 'after 5 % at A4')):
    left.plot([], [], marker, color='0.3', fillstyle=style, markersize=4, label=label)
  for colour, model, label in (('C0', 'natural', 'models as they are'),
                               ('C1', 'planted', 'planted outliers'),
                               ('C2', 'longer', 'twice the steps')):
    if model in losses.models:
      left.plot([], [], '-', color=colour, label=label)
  left.set_xticks(range(len(bars)), [label for _, label, _, _ in bars], fontsize=6)
  left.set(ylabel='nats per token over A8', title='What 4 bits cost, each seed')
  left.set_yscale('symlog', linthresh=1e-3)
  left.set_ylim(-1e-3, 20)  # Room for the legend.
  left.legend(fontsize=7, ncols=2, loc='upper left')
  for place, values in enumerate(inputs(rows).values()):
    for shift, (what, mark) in enumerate((('wo', 'o'), ('w_down', 's'))):
      ends = [values[f'{what} {when}']['kurtosis'] for when in ('before', 'after')]
      x, colour = place + 0.3 * (shift - 0.5), f'C{shift + 2}'
      right.plot([x, x], ends, '-', color=colour, linewidth=1)
      right.plot([x], ends[:1], mark, color=colour,
                 label={'wo': 'W_o', 'w_down': 'W_down'}[what] if place == 0 else None)
      right.plot([x], ends[1:], mark, color=colour, fillstyle='none')
  right.axhline(3, color='0.6', linewidth=1)
  right.set_xticks(range(len(inputs(rows))),
                   [name.replace(' + ', '\n+ ').replace(': ', ':\n') for name in inputs(rows)],
                   fontsize=6)
  right.set(yscale='log', ylabel='kurtosis', title='Inputs before (full) and after Hadamard',
            ylim=(1.5, 300))
  right.legend(fontsize=7)
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.savefig(RESULTS / 'bitnet_v2.png', dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=Path, required=True, help='folder of train.txt.gz, valid.txt')
  parser.add_argument('--work', type=Path, default=Path('runs/bitnet_v2'))
  parser.add_argument('--steps', type=int, default=240)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--side_seeds', type=int, nargs='+', default=[0, 1],
                      help='of the models with twice the steps, and of those with another rate')
  parser.add_argument('--settings', choices=arms.SETTINGS, nargs='+', default=list(arms.SETTINGS),
                      help='what is trained and reported; all by default')
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str((args.work / 'compiled').absolute()))
  text = arms.open_text(args.data, args.work / 'data')
  rows = run_all(text, args.work, args)
  losses = Losses(rows)
  report = {
      'command': f'python experiments/bitnet_v2/run.py --data DIR --steps {args.steps} --seeds '
                 + ' '.join(map(str, args.seeds)),
      'settings': args.settings, 'held out': text.apart,
      'tokens of a run': args.steps * arms.BATCH * arms.LENGTH,
      'bytes per token': round(text.packed.validation.num_bytes
                               / text.packed.validation.num_targets, 4),
      'paper, A4 minus A8 with Hadamard, nats': PAPER_GAPS,
      'thresholds': thresholds(losses), 'minus A8': gaps(losses),
      'recipes': recipes(losses), 'rates': by_rate(losses), 'inputs': inputs(rows), 'runs': rows}
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'bitnet_v2.json').write_text(json.dumps(report, indent=1, ensure_ascii=False) + '\n')
  plot(losses, rows)
  print(json.dumps({k: report[k] for k in ('thresholds', 'minus A8', 'recipes', 'rates', 'inputs')},
                   indent=1, ensure_ascii=False))


if __name__ == '__main__':
  main()
