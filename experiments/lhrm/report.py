"""The table and the plot of runs.jsonl."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt.scaling.seeds import finished_rows, interval, shown

SHOWN = ('think', 'accuracy', 'tokens', 'accuracy/think', 'accuracy/no_think', 'tokens/think',
         'tokens/no_think', 'h_acc', 'h_acc_drawn', 'think_is_right', 'neither')
COLOURS = matplotlib.colormaps['tab20'].colors


def _of_arm(rows: list[dict[str, Any]], starts: dict[int, dict[str, Any]]) -> dict[str, Any]:
  """Means with intervals over the seeds, and what changed from each seed's HFT policy."""
  values = lambda level, name: [row[level][name] for row in rows]
  found: dict[str, Any] = {'seeds': [row['seed'] for row in rows], 'steps': rows[0]['steps'],
                           'rate': rows[0]['rate'], 'seconds': [row['seconds'] for row in rows]}
  for level in ('easy', 'hard', 'all'):
    found[level] = {name: interval(values(level, name)) for name in SHOWN}
  found['all']['accuracy minus always thinking'] = interval(
      np.subtract(values('all', 'accuracy'), values('all', 'accuracy/think')))
  found['all']['tokens saved'] = interval(
      1 - np.divide(values('all', 'tokens'), values('all', 'tokens/think')))
  # What a mix of three easy sums to one hard one makes of the same answers: of equal shares, the
  # half that needs its thought bounds what can be saved.
  mixed = lambda name: (3 * np.array(values('easy', name)) + values('hard', name)) / 4
  found['three easy to one hard'] = {
      'accuracy minus always thinking': interval(mixed('accuracy') - mixed('accuracy/think')),
      'tokens saved': interval(1 - mixed('tokens') / mixed('tokens/think'))}
  if all(row['seed'] in starts for row in rows):
    found['all']['h_acc minus HFT'] = interval(
        [row['all']['h_acc'] - starts[row['seed']]['all']['h_acc'] for row in rows])
  return found


def write(path: Path, results: Path) -> None:
  """Writes results/lhrm.json and results/lhrm.png, and prints a table."""
  arms: dict[str, list[dict[str, Any]]] = {}
  for row in finished_rows(path):
    arms.setdefault(row['arm'], []).append(row)
  arms = {arm: sorted(rows, key=lambda row: row['seed']) for arm, rows in sorted(arms.items())}
  starts = {row['seed']: row for row in arms.get('hft', [])}
  found = {arm: _of_arm(rows, starts) for arm, rows in arms.items()}
  results.mkdir(exist_ok=True)
  curves = {arm: [[step['think'] for step in row['curve']] for row in rows]
            for arm, rows in arms.items() if rows[0]['curve']}
  (results / 'lhrm.json').write_text(json.dumps(
      {'arms': found, 'think, step by step': curves}, indent=1) + '\n',
      encoding='utf-8')
  for arm, row in found.items():
    cell = lambda level, name, row=row: shown(row[level][name])
    print(f'| {arm} | {cell("easy", "think")} | {cell("hard", "think")} | {cell("all", "h_acc")} '
          f'| {cell("all", "accuracy")} | {cell("all", "accuracy minus always thinking")} '
          f'| {cell("all", "tokens saved")} | {cell("three easy to one hard", "tokens saved")} |')
  _plot(found, arms).savefig(results / 'lhrm.png', dpi=120)


def _plot(found: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> Figure:
  figure = Figure(figsize=(15, 4.8), layout='constrained')
  left, right, margins = figure.subplots(1, 3)
  _plot_margins(margins, found)
  shown = {arm: row for arm, row in found.items() if '_margin_' not in arm}
  for number, (arm, row) in enumerate(shown.items()):
    colour, total = COLOURS[number % len(COLOURS)], row['all']
    left.errorbar(total['tokens']['mean'], total['accuracy']['mean'],
                  xerr=total['tokens']['half_width_95'] or 0.0,
                  yerr=total['accuracy']['half_width_95'] or 0.0,
                  fmt='o', color=colour, capsize=2, label=arm.replace('_', ' '))
    both = [row[level]['think']['mean'] for level in ('easy', 'hard')]
    right.plot(both[0], both[1], 'o', color=colour)
    for each in arms[arm]:
      right.plot(each['easy']['think'], each['hard']['think'], '.', color=colour, alpha=0.4)
  if 'hft' in found:
    total = found['hft']['all']
    for mode, mark in (('think', '^'), ('no_think', 'v')):
      left.plot(total[f'tokens/{mode}']['mean'], total[f'accuracy/{mode}']['mean'], mark,
                color='black', mfc='none', label=f'HFT, always {mode.replace("_", " ")}')
  left.set(xlabel='tokens of a response', xlim=(3, 20), ylabel='accuracy on held-out sums',
           title='Where the policy chooses its mode')
  left.legend(fontsize=7, loc='lower right')
  right.fill_between([0, 0.2], 0.8, 1, color='#009E73', alpha=0.15)
  right.set(xlabel='P(think | easy)', ylabel='P(think | hard)', xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02), title='What is thought about (shaded: the aim)')
  return figure


def _plot_margins(axes: Axes, found: dict[str, Any]) -> None:
  """P(think) against δ, for groups of 4 and of 16."""
  for size, style in ((4, 'o-'), (16, 's--')):
    rows = sorted((float(arm.split('_')[-1]), row) for arm, row in found.items()
                  if arm.startswith(f'n{size}_margin_'))
    for level, colour in (('easy', '#56B4E9'), ('hard', '#D55E00')):
      axes.plot([margin for margin, _ in rows], [row[level]['think']['mean'] for _, row in rows],
                style, color=colour, label=f'{level} sums, {size} responses')
  axes.set(xlabel='margin δ', ylabel='P(think)', ylim=(-0.02, 1.02), title='The margin')
  axes.legend(fontsize=8)
