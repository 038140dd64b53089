"""What `evaluation.hybrid` found, as text, as JSON and as a plot of accuracy against tokens."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
import numpy as np

from jaxrl_pt import files

_THINK, _NO_THINK, _FREE, _GREY = '#D55E00', '#0072B2', '#009E73', '#777777'


def text(found: dict[str, Any]) -> str:
  """A table for the terminal."""
  h, equal = found['h_acc'], found['at_equal_tokens']
  lines = [f'Hybrid Accuracy  {_of(h["greedy"])} greedily, {_of(h["drawn"])} drawn; thinking is '
           f'better for {_percent(h["think_is_better"])} of {found["problems"]} problems', '',
           f'{"":16} {"problems":>8} {"P(think)":>9} {"H_acc":>7}   '
           f'{"accuracy: free":>14} {"think":>7} {"at once":>8}   '
           f'{"tokens: free":>12} {"think":>7} {"at once":>8}']
  for name, row in found['by_difficulty'].items():
    accuracy, tokens = row['accuracy'], row['tokens']
    lines.append(
        f'{name:16} {row["problems"]:8} {_percent(row["think_drawn"]["value"]):>9} '
        f'{_percent(row["h_acc_drawn"]):>7}   {_percent(accuracy["free"]):>14} '
        f'{_percent(accuracy["think"]):>7} {_percent(accuracy["no_think"]):>8}   '
        f'{_count(tokens["free"]):>12} {_count(tokens["think"]):>7} '
        f'{_count(tokens["no_think"]):>8}')
  lines += ['', f'At {_count(equal["tokens"]["value"])} tokens a response: free choice '
            f'{_of(equal["free"])}']
  for name, words in (('always_think', 'always thinking, cut at a budget'),
                      ('mixture', 'a coin between both modes'),
                      ('never_think', 'never thinking, in fewer tokens')):
    if equal[name]['value'] is None:
      lines.append(f'  {words}: takes more tokens at every budget')
    else:
      lines.append(f'  {words}: {_of(equal[name])}, so that free choice is better by '
                   f'{_of(equal[f"free_minus_{name}"])}')
  return '\n'.join(lines)


def write(path: Path, command: str, found: dict[str, Any]) -> Path:
  """Writes the results as JSON, and the plot beside them under the same name; returns its path.

  Raises:
    Unwritable: a file cannot be written.
  """
  picture = path.with_suffix('.png')
  whole = json.dumps({'command': command, **found}, indent=2, ensure_ascii=False)
  files.write_text(path, whole + '\n')
  figure = plot(found)
  canvas = FigureCanvasAgg(figure)
  with files.writing(picture):
    canvas.print_png(str(picture))
  return picture


def plot(found: dict[str, Any]) -> Figure:
  """Accuracy against mean tokens, and beside it how often each difficulty is thought about."""
  figure = Figure(figsize=(11, 4.6), dpi=120, layout='constrained')
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  _accuracy(left, found)
  _thinking(right, found)
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  return figure


def _accuracy(axes: Axes, found: dict[str, Any]) -> None:
  curve = sorted(found['curve'], key=lambda point: point['tokens'])
  whole, equal = found['by_difficulty']['all'], found['at_equal_tokens']
  axes.plot([p['tokens'] for p in curve], [p['accuracy'] for p in curve], color=_THINK, marker='o',
            markersize=4, linewidth=1.4, label='always thinks, within a budget')
  labels: dict[tuple[float, float], list[str]] = {}
  for point in curve:  # Budgets that nearly all thoughts keep within are one point.
    place = round(point['tokens'], 1), round(point['accuracy'], 2)
    labels.setdefault(place, []).append(
        'no budget' if point['budget'] is None else str(point['budget']))
  for place, names in labels.items():
    axes.annotate(', '.join(names), place, xytext=(0, -12), textcoords='offset points', fontsize=8,
                  color=_THINK, ha='center')
  ends = [(whole['tokens'][mode], whole['accuracy'][mode]) for mode in ('no_think', 'think')]
  axes.plot(*zip(*ends, strict=True), color=_GREY, linestyle=':', label='a coin between both modes')
  axes.plot(*ends[0], color=_NO_THINK, marker='s', linestyle='none', label='never thinks')
  low, high = equal['free']['interval']
  value = equal['free']['value']
  axes.errorbar(equal['tokens']['value'], value, yerr=[[value - low], [high - value]], color=_FREE,
                marker='D', markersize=7, capsize=3, linestyle='none', label='chooses itself')
  axes.set_xlabel('tokens of a response, mean')
  axes.set_title('Accuracy', loc='left', fontsize=11, fontweight='bold')
  axes.set_xlim(left=0)
  axes.set_ylim(-0.04, 1.04)
  axes.legend(frameon=False, fontsize=9)


def _thinking(axes: Axes, found: dict[str, Any]) -> None:
  rows = {name: row for name, row in found['by_difficulty'].items() if name != 'all'}
  places = np.arange(len(rows))
  drawn = [row['think_drawn'] for row in rows.values()]
  values = np.array([x['value'] for x in drawn])
  errors = np.abs(np.array([x['interval'] for x in drawn]).T - values)
  axes.bar(places - 0.2, values, 0.38, yerr=errors, capsize=3, color=_FREE, label='P(think)')
  axes.bar(places + 0.2, [row['think_is_better'] or 0 for row in rows.values()], 0.38,
           color=_THINK, alpha=0.6, label='thinking is better')
  axes.set_xticks(places, list(rows))
  axes.set_ylim(0, 1.15)
  axes.set_title('Thinking by difficulty', loc='left', fontsize=11, fontweight='bold')
  axes.legend(frameon=False, fontsize=9, loc='upper right', ncols=2)


def _of(estimate: dict[str, Any]) -> str:
  """A value and its interval."""
  low, high = estimate['interval']
  return f'{_percent(estimate["value"])} [{_percent(low)}, {_percent(high)}]'


def _percent(value: float | None) -> str:
  return '–' if value is None else f'{100 * value:.1f} %'


def _count(value: float | None) -> str:
  return '–' if value is None else f'{value:.1f}'
