"""What the parts of run.py say together: intervals over seeds, and the plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt.evaluation.judging import wilson
from jaxrl_pt.scaling.seeds import interval

# Of held-out sums at temperature 1, of the same at 0.6, and of sums of training at 1.
_MEASURES = ('accuracy', 'swap_consistency', 'first_rate', 'tokens', 'worked', 'no_verdict')
_WITHIN = [(within, name) for within in ('cool', 'seen')
           for name in ('accuracy', 'swap_consistency')]


def summary(rows: dict[str, Any]) -> dict[str, Any]:
  """Means over seeds with 95 % intervals; simulated judges as they are.

  `… of the pairs` is Wilson's 95 % interval of a share of the pairs, which says how well one judge
  is known and nothing about other seeds.
  """
  arms: dict[str, list[Any]] = {}
  for name, row in rows.items():
    match name.split('/'):
      case ['judge', arm, steps, _]:
        arms.setdefault(f'{arm} k={steps}', []).append(row)
  return {'simulated': {name.split('/')[1]: row for name, row in rows.items()
                        if name.startswith('simulated/')},
          'judges': {name: _of_seeds(found) for name, found in sorted(arms.items())}}


def _of_seeds(seeds: list[Any]) -> dict[str, Any]:
  """The measures of one arm at one number of steps."""
  def of(get: Callable[[Any], float]) -> dict[str, float | None]:
    return interval([get(row) for row in seeds])

  entry: dict[str, Any] = {'seeds': len(seeds)}
  for when in ('before', 'after'):
    if when in seeds[0]:
      entry |= {f'{name} {when}': of(lambda row, name=name, when=when: row[when][name])
                for name in _MEASURES}
      for name in ('accuracy', 'swap_consistency'):
        mean, num = entry[f'{name} {when}']['mean'], seeds[0][when]['num_pairs']
        entry[f'{name} {when} of the pairs'] = {
            end: round(share, 3) for end, share in wilson(np.full(num, mean)).items()}
      entry |= {f'{within} {name} {when}': of(
          lambda row, name=name, when=when, within=within: row[when][within][name])
          for within, name in _WITHIN}
  if 'selection' in seeds[0]:
    entry['reward_model accuracy'] = of(lambda row: row['reward_model'])
    entry['accuracy by cap'] = {
        cap: of(lambda row, cap=cap: row['caps'][cap]) for cap in seeds[0]['caps']}
    selections = [row['selection'] for row in seeds]
    entry['oracle'] = interval([row['of_an_oracle'] for row in selections])
    entry['budgets'] = [
        {**{name: budget[name] for name in ('method', 'votes', 'comparisons')},
         'accuracy': interval([row['budgets'][i]['accuracy'] for row in selections])}
        for i, budget in enumerate(selections[0]['budgets'])]
    for way in selections[0]['simulated']:
      entry[f'best of 8, {way}'] = interval([row[way] for row in selections])
      entry[f'best of 8, {way}, simulated'] = interval(
          [row['simulated'][way] for row in selections])
  return entry


def plot(result: dict[str, Any], path: Path) -> None:
  """Accuracy and length by number of steps, by cap of the work, and choices by budget."""
  figure = Figure(figsize=(13, 3.4), dpi=130, layout='constrained', facecolor='white')
  accuracy, tokens, caps, best = figure.subplots(1, 4)
  judges = result['judges']
  for arm, colour in (('reasoning', '#0072B2'), ('direct', '#D55E00')):
    shown = [(int(name.partition('=')[2]), row) for name, row in judges.items()
             if name.startswith(f'{arm} ') and 'accuracy after' in row]
    for axes, name, style in ((accuracy, 'accuracy after', '-'), (tokens, 'tokens after', '-'),
                              (accuracy, 'seen accuracy after', ':')):
      _bars(axes, [k for k, _ in shown], [row[name] for _, row in shown], color=colour,
            linestyle=style, label=arm + (', seen sums' if style == ':' else ''))
  reasoning = {name: row for name, row in judges.items()
               if name.startswith('reasoning ') and 'budgets' in row}
  for (name, row), colour in zip(reasoning.items(), ('#56B4E9', '#0072B2', '#009E73'),
                                 strict=False):
    label = name.removeprefix('reasoning ')
    _bars(caps, [int(cap) for cap in row['accuracy by cap']],
          list(row['accuracy by cap'].values()), color=colour, label=label)
    for method, marker in (('knockout', 'o'), ('round_robin', 's')):
      own = sorted((b for b in row['budgets'] if b['method'] == method),
                   key=lambda b: b['comparisons'] * b['votes'])
      _bars(best, [b['comparisons'] * b['votes'] for b in own], [b['accuracy'] for b in own],
            color=colour, marker=marker, label=f'{label}, {method.replace("_", " ")}')
  for axes in (accuracy, caps):
    axes.axhline(0.5, color='grey', linewidth=0.8, linestyle=':')
  accuracy.set(xlabel='steps of the sum', ylabel='accuracy of verdicts', title='held-out pairs')
  tokens.set(xlabel='steps of the sum', ylabel='tokens of a response', title='thinking')
  caps.set(xlabel='most tokens of the work', ylabel='accuracy of verdicts', title='capped thinking')
  best.set(xlabel='verdicts of a query', ylabel='share of right choices', title='best of 8',
           xscale='log')
  for axes in (accuracy, tokens, caps, best):
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
  figure.savefig(path)


def _bars(axes: Any, x: list[float], rows: list[dict[str, Any]], **style: Any) -> None:
  """Means with their intervals, in the order of x."""
  order = np.argsort(x, kind='stable')
  style = {'marker': 'o', 'markersize': 4, 'capsize': 2, **style}
  axes.errorbar(np.array(x)[order], [rows[i]['mean'] for i in order],
                [rows[i]['half_width_95'] or 0.0 for i in order], **style)
