"""What the rows of run.py say together: a table as JSON, and one picture."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt.scaling.seeds import interval

NAMES = {'true': 'the true game', 'both': 'a model with ledger and map',
         'none': 'a model alone', 'none_changes': 'a model alone,\nany change paid',
         'every_step': 'a model whose\nledger counts wrongly'}
COLOURS = {'true': '#777777', 'both': '#0072B2', 'none': '#E69F00', 'none_changes': '#D55E00',
           'every_step': '#CC79A7'}
_BESIDE = 'random_return', 'wander_return', 'out_and_back_return'
_OF_MODEL = ('model_return', 'model_true_return', 'model_gap', 'model_unreadable',
             'model_false_events')


def write(found: Mapping[str, Any], folder: Path, size: Mapping[str, Any]) -> None:
  """Writes policies.json and policies.png into a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  by_arm = {arm: {name.split('/')[1]: row for name, row in found.items()
                  if name.split('/')[0] == arm} for arm in NAMES}
  summary = {arm: _summary(rows) for arm, rows in by_arm.items() if rows}
  text = json.dumps({'size': size, 'summary': summary, 'rows': dict(found)}, indent=1)
  (folder / 'policies.json').write_text(text + '\n', encoding='utf-8')
  _picture(by_arm).savefig(folder / 'policies.png', dpi=110)
  print(json.dumps(summary, indent=1))


def _summary(rows: Mapping[str, Any]) -> dict[str, Any]:
  """Means over seeds with half widths; of a single seed the interval over its worlds too."""
  evaluations = [row['evaluation'] for row in rows.values()]
  names = [name for name in ('return', 'sampled_return', *_BESIDE, *_OF_MODEL)
           if name in evaluations[0]]
  result: dict[str, Any] = {name: interval([one[name] for one in evaluations]) for name in names}
  for name in ('return', 'model_gap'):
    if name in names:
      result[name]['worlds'] = {seed: [round(row['evaluation'][f'{name}_{end}'], 3)
                                       for end in ('low', 'high')] for seed, row in rows.items()}
  return result


def _picture(by_arm: Mapping[str, Mapping[str, Any]]) -> Figure:
  inside = [arm for arm in list(NAMES)[1:] if by_arm[arm]]
  figure = Figure((4.5 + 3 * len(inside), 4), layout='constrained')
  bars, *curves = figure.subplots(1, 1 + len(inside), width_ratios=(1.6, *[1] * len(inside)))
  _bars(bars, by_arm)
  for axes, arm in zip(curves, inside, strict=True):
    _curves(axes, arm, by_arm[arm])
  return figure


def _bars(axes: Axes, by_arm: Mapping[str, Mapping[str, Any]]) -> None:
  """Return of sampled actions in the true game; a dot is a seed."""
  shown = [arm for arm in NAMES if by_arm[arm]]
  for place, arm in enumerate(shown):
    values = [row['evaluation']['sampled_return'] for row in by_arm[arm].values()]
    axes.bar(place, np.mean(values), color=COLOURS[arm], width=0.65)
    axes.plot([place] * len(values), values, 'o', color='black', markersize=4)
  first = next(iter(by_arm[shown[0]].values()))['evaluation'] if shown else {}
  for name, style in zip(_BESIDE, (':', '--', '-.'), strict=True):
    if name in first:
      axes.axhline(first[name], color='black', linestyle=style, linewidth=1,
                   label=name.removesuffix('_return').replace('_', ' '))
  axes.set_xticks(range(len(shown)), shown, fontsize=8, rotation=20)
  axes.set_title('return in the true game, by arm', fontsize=9)
  axes.set_ylabel('points a game')
  axes.set_ylim(0, 34)
  axes.legend(fontsize=8, title='scripted policies', title_fontsize=8, loc='upper right', ncols=3)


def _curves(axes: Axes, arm: str, rows: Mapping[str, Any]) -> None:
  """Reward as paid, and what the same actions earn in the true game, along training."""
  for seed, row in rows.items():
    curve, steps = row['curve'], np.arange(1, len(row['curve']['reward']) + 1)
    is_first = seed == next(iter(rows))
    axes.plot(steps, curve['reward'], color=COLOURS[arm], linewidth=1.2,
              label='paid in the model' if is_first else None)
    axes.plot(steps, curve['true_reward'], color='black', linewidth=1, linestyle='--',
              label='the true game, same actions' if is_first else None)
  axes.set_title(f'{arm}:\n' + NAMES[arm].replace('\n', ' '), fontsize=8)
  axes.set_xlabel('step')
  axes.set_ylim(-17, 34)
  axes.legend(fontsize=8, loc='upper right')
