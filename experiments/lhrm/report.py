"""The table and the plot of runs.jsonl."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt.scaling.seeds import finished_rows, interval

SHOWN = ('think', 'accuracy', 'tokens', 'accuracy/think', 'accuracy/no_think', 'tokens/think',
         'tokens/no_think', 'h_acc', 'h_acc_drawn', 'think_is_right', 'neither')
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#999999')


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
  starts = {row['seed']: row for row in arms.get('hft', [])}
  found = {arm: _of_arm(rows, starts) for arm, rows in arms.items()}
  results.mkdir(exist_ok=True)
  curves = {arm: [[step['think'] for step in row['curve']] for row in rows]
            for arm, rows in arms.items() if rows[0]['curve']}
  (results / 'lhrm.json').write_text(json.dumps(
      {'arms': found, 'think, step by step': curves}, indent=1) + '\n', encoding='utf-8')
  for arm, row in found.items():
    cell = lambda level, name, row=row: (
        '{mean:.3f} ± {half_width_95:.3f}'.format(**row[level][name]))
    print(f'| {arm} | {cell("easy", "think")} | {cell("hard", "think")} | {cell("all", "h_acc")} '
          f'| {cell("all", "accuracy")} | {cell("all", "accuracy minus always thinking")} '
          f'| {cell("all", "tokens saved")} | {cell("three easy to one hard", "tokens saved")} |')
  _plot(found, arms).savefig(results / 'lhrm.png', dpi=120)


def _plot(found: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> Figure:
  figure = Figure(figsize=(11, 4.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  for number, (arm, row) in enumerate(found.items()):
    colour, total = COLOURS[number % len(COLOURS)], row['all']
    left.errorbar(total['tokens']['mean'], total['accuracy']['mean'],
                  xerr=total['tokens']['half_width_95'], yerr=total['accuracy']['half_width_95'],
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
  left.set(xlabel='tokens of a response', ylabel='accuracy on held-out sums',
           title='Where the policy chooses its mode')
  left.legend(fontsize=8)
  right.axhspan(0.8, 1, xmax=0.2, color='#009E73', alpha=0.15)
  right.set(xlabel='P(think | easy)', ylabel='P(think | hard)', xlim=(0, 1), ylim=(0, 1),
            title='What is thought about (shaded: the aim)')
  return figure
