"""What the parts of run.py say together: each threshold beside what was measured, and the plots."""

from collections.abc import Callable, Iterator, Sequence
import json
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import arms
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
import numpy as np

from jaxrl_pt.scaling.seeds import interval

BEYOND = 32  # frames, the longest history of a rival
CHANCE = 1 / 6  # of guessing the colour of a building
COLOURS = {'both': '#0072B2', 'spatial': '#56B4E9', 'numerical': '#009E73', 'none': '#777777',
           'none_8': '#E69F00', 'none_32': '#D55E00', 'recurrent': '#CC79A7'}
# Pictures of the first seed's evaluations that are kept beside the plots.
FILMS = 'none-{}/main', 'both-{}/main', 'both-{}/paint', 'both-{}/ledger', 'both-{}/drift'
_AT_LEAST, _AT_MOST = '≥', '≤'


class Claim(NamedTuple):
  """A threshold, and what was measured.

  test, text: which test it belongs to, and what is claimed.
  sign, bound: the threshold.
  found: 'mean' and 'half_width_95' over seeds, or 'interval' of what has no seeds; {} if it has not
    been measured.
  """

  test: str
  text: str
  sign: str
  bound: float
  found: dict[str, Any]

  @property
  def ends(self) -> tuple[float, float] | None:
    """The ends of the interval, if there is one."""
    if self.found.get('interval') is not None:
      return tuple(self.found['interval'])
    half = self.found.get('half_width_95')
    return None if half is None else (self.found['mean'] - half, self.found['mean'] + half)

  @property
  def verdict(self) -> str:
    """Whether the whole interval is on the right side of the threshold."""
    if not self.found:
      return 'not run'
    if self.ends is None:
      return 'not decided (one seed)'
    low, high = self.ends
    worst, best = (low, high) if self.sign == _AT_LEAST else (-high, -low)
    bound = self.bound if self.sign == _AT_LEAST else -self.bound
    return 'reached' if worst >= bound else 'not reached' if best < bound else 'not decided'


class Rows:
  """The results of parts by name. Final."""

  def __init__(self, results: dict[str, Any]) -> None:
    self._results = results

  def seeds(self, first: str) -> dict[str, Any]:
    """The results of first/SEED by seed."""
    found = {name.rpartition('/')[2]: result for name, result in self._results.items()
             if name.rpartition('/')[0] == first}
    return dict(sorted(found.items()))

  def of(self, first: str, name: str, within: str = 'measures') -> dict[str, float]:
    """A measure of the results of first/SEED by seed, without seeds in which it is not defined."""
    found = {seed: result[within][name]['value'] for seed, result in self.seeds(first).items()}
    return {seed: value for seed, value in found.items() if value is not None}

  def get(self, name: str) -> Any:
    """The result of a part, or None."""
    return self._results.get(name)


def _mean(values: dict[str, float]) -> dict[str, Any]:
  return interval(list(values.values())) if values else {}


def _less(first: dict[str, float], second: dict[str, float]) -> dict[str, Any]:
  """The paired difference of two arms, over the seeds that both have."""
  return _mean({seed: first[seed] - second[seed] for seed in first if seed in second})


# --- Claims -------------------------------------------------------------------------


def claims(rows: Rows) -> list[Claim]:
  """Every threshold; those of the acceptance tests that state none are marked as our own."""
  return [*_main(rows), *_controls(rows), *_rivals(rows), *_places(rows), *_others(rows)]


def _main(rows: Rows) -> Iterator[Claim]:
  score = lambda arm: rows.of(f'arm/{arm}', 'score_exact_at')
  for arm in arms.FOUR:
    back = _mean(rows.of(f'arm/{arm}', 'spa_con_reentry'))
    sign, bound = (_AT_LEAST, 0.95) if arms.ARMS[arm].map else (_AT_MOST, 0.35)
    yield Claim('G1', f'{arm}: cells that come back are the same (SpaCon-reentry)', sign, bound,
                back)
  for arm in 'numerical', 'both':
    yield Claim('G1', f'{arm}: true score at the last frame (ScoreExact)', _AT_LEAST, 0.95,
                _mean(score(arm)))
  for arm, without in (('numerical', 'none'), ('both', 'spatial')):
    yield Claim('G1', f'{arm} − {without}: the same', _AT_LEAST, 0.15,
                _less(score(arm), score(without)))
  for arm in 'numerical', 'spatial', 'both':
    yield Claim('G1', f'none − {arm}: moves as the action says (ActAcc)', _AT_MOST, 0.01,
                _less(rows.of('arm/none', 'act_acc'), rows.of(f'arm/{arm}', 'act_acc')))
  for arm in 'spatial', 'both':
    yield Claim('G1', f'{arm}: bare ground that comes back is bare (our bound)', _AT_LEAST, 0.95,
                _mean(rows.of(f'arm/{arm}', 'bare_reentry')))
  yield Claim('G1', 'both: LogicNet is right (EventAcc; our bound)', _AT_LEAST, 0.99,
              _mean(rows.of('arm/both', 'event_acc')))
  speed = rows.get('speed')
  for number, size in enumerate(arms.AT_ONCE):
    yield Claim('G1', f'both / none: time of a frame, {size} at once', _AT_MOST, 1.15,
                {'mean': speed[number]['ratio'], 'interval': speed[number]['ratio_interval']}
                if speed else {})


def _controls(rows: Rows) -> Iterator[Claim]:
  yield Claim('G2', 'map of another game: cells that come back are the same, less chance (our '
              'bound)', _AT_MOST, 0.05, _less(rows.of('control/shuffled', 'spa_con_reentry'),
                                    rows.of('control/shuffled', 'spa_con_chance')))
  yield Claim('G2', '+37: the display shows it (DigitAcc after the edit)', _AT_LEAST, 0.98,
              _mean(rows.of('control/ledger', 'digit_acc', 'after_edit')))
  yield Claim('G2', 'painted cells in view are shown (our bound)', _AT_LEAST, 0.95,
              _mean(rows.of('control/paint', 'painted', 'after_edit')))
  for name, what in (('none', 'stands still'), ('every_step', 'climbs every step')):
    yield Claim('G2', f'LogicNet forced to {name}: the display {what} (DigitAcc; our bound)',
                _AT_LEAST, 0.98, _mean(rows.of(f'control/events_{name}', 'digit_acc')))


def _rivals(rows: Rows) -> Iterator[Claim]:
  for arm in COLOURS:
    if arm in ('both', 'none', *arms.RIVALS):
      sign, bound = (_AT_LEAST, 0.95) if arms.ARMS[arm].map else (_AT_MOST, 0.35)
      later = {seed: value for seed, result in rows.seeds(f'delay/{arm}').items()
               if (value := _beyond(result)) is not None}
      yield Claim('G3', f'{arm}: cells out of view for more than {BEYOND} frames are the same (our '
                  'bound)', sign, bound, _mean(later))


def _beyond(result: Any) -> float | None:
  """The share of cells that are the same after more than BEYOND frames out of view."""
  points = [point for point in result['by_delay'] if point['delay'] > BEYOND]
  asked = sum(point['asked'] for point in points)
  return sum(point['value'] * point['asked'] for point in points) / asked if asked else None


def _places(rows: Rows) -> Iterator[Claim]:
  for model in 'renderer', 'trained':
    for world, sign, bound in (('one_colour', _AT_LEAST, 0.5), ('six_colours', _AT_MOST, 0.05)):
      for margin, error in (('0', '0'), ('0', '0.1'), ('0.005', '0.1'), ('0.005', '0')):
        if world == 'one_colour' and (margin, error) == ('0.005', '0'):
          sign, bound = _AT_MOST, 0.05  # Nothing is lost where nothing looks better elsewhere.
        found = rows.get(f'place/{model}/{world}/{margin}/{error}')
        one = found and found['measures']['misplaced']
        yield Claim('G4', f'{model}, {world}, margin {margin}, pose off in {error}: frames '
                    'misplaced (our bound)', sign, bound,
                    {'mean': one['value'], 'interval': one['interval']} if one else {})


def _others(rows: Rows) -> Iterator[Claim]:
  yield Claim('G5', '500 frames: cannot be read', _AT_MOST, 0.01,
              _mean(rows.of('drift', 'unreadable')))
  yield Claim('G5', '500 frames: cells that come back are the same', _AT_LEAST, 0.95,
              _mean(rows.of('drift', 'spa_con_reentry')))
  yield Claim('G6', 'Pong, numerical − none: F1 of changes (NumCon; our bound)', _AT_LEAST, 0.0,
              _less(rows.of('arm/pong_numerical', 'num_con'), rows.of('arm/pong_none', 'num_con')))
  for name in 'spa_con_all', 'spa_con_reentry':
    yield Claim('G6', f'Pac-Man, both − none: pellets persist ({name}; our bound)', _AT_LEAST, 0.0,
                _less(rows.of('arm/pacman_both', name), rows.of('arm/pacman_none', name)))
  one = rows.get('speed')
  yield Claim('Speed', 'frames a second for one player', _AT_LEAST, 20.0, {
      'mean': one[0]['frames_per_second'],
      'interval': [one[0]['frames_per_second']] * 2} if one else {})


# --- Text ---------------------------------------------------------------------------


def _shown(claim: Claim) -> str:
  if not claim.found:
    return '–'
  mean, ends = claim.found['mean'], claim.ends
  return f'{mean:.3f}' + ('' if ends is None else f' [{ends[0]:.3f}, {ends[1]:.3f}]')


def text(found: Sequence[Claim], rows: Rows) -> str:
  """The claims and the measures of all arms, as tables of Markdown."""
  lines = ['| test | what | threshold | measured [95 %] | |', '|---|---|---|---|---|']
  lines += [f'| {c.test} | {c.text} | {c.sign} {c.bound:g} | {_shown(c)} | {c.verdict} |'
            for c in found]
  names = ('spa_con_reentry', 'spa_con_chance', 'spa_con_all', 'bare_reentry', 'score_exact_at',
           'score_exact', 'digit_acc', 'num_con', 'act_acc', 'event_acc', 'unreadable')
  lines += ['', f'| arm | seeds | {" | ".join(names)} |', '|---' * (len(names) + 2) + '|']
  for arm in arms.ARMS:
    seeds = rows.seeds(f'arm/{arm}')
    if seeds:
      values = [_mean(rows.of(f'arm/{arm}', name)) for name in names]
      cells = [_shown(Claim('', '', _AT_LEAST, 0.0, value)) for value in values]
      lines.append(f'| {arm} | {len(seeds)} | {" | ".join(cells)} |')
  speed = rows.get('speed')
  if speed:
    lines += ['', '| games at once | ms a frame: both | none | frames/s: both | parameters: both, '
              'none |', '|---|---|---|---|---|']
    lines += [f'| {one["games"]} | {1000 * one["seconds"]["both"]:.2f} | '
              f'{1000 * one["seconds"]["none"]:.2f} | {one["frames_per_second"]:.0f} | '
              f'{one["parameters"]["both"]:,}, {one["parameters"]["none"]:,} |' for one in speed]
  lines += ['', '| arm | rate: loss of the last tenth of training | best | in use |',
            '|---|---|---|---|']
  for arm, best in rates(rows).items():
    tried = ', '.join(f'{rate:g}: {loss:.5f}' for rate, loss in best.items())
    chosen = min(best, key=lambda rate: best[rate])
    lines.append(f'| {arm} | {tried} | {chosen:g} | {arms.ARMS[arm].rate:g} |')
  return '\n'.join(lines) + '\n'


def rates(rows: Rows) -> dict[str, dict[float, float]]:
  """The loss of training of each arm at the rates that were tried."""
  found = {arm: {rate: rows.get(f'rate/{arm}/{rate:g}') for rate in arms.TRIED}
           for arm in arms.ARMS}
  return {arm: {rate: row['loss'] for rate, row in tried.items() if row}
          for arm, tried in found.items() if any(tried.values())}


def write(results: dict[str, Any], root: Path, directory: Path) -> None:
  """Writes maag.json, maag.md, plots, and the films that there are, and prints the tables."""
  rows = Rows(results)
  found = claims(rows)
  directory.mkdir(parents=True, exist_ok=True)
  said = text(found, rows)
  (directory / 'maag.md').write_text(said, encoding='utf-8')
  (directory / 'maag.json').write_text(json.dumps({
      'claims': [{**claim._asdict(), 'verdict': claim.verdict} for claim in found],
      'parts': results}, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
  for name, draw in (('bars', bars), ('delays', delays), ('drift', drift)):
    figure = draw(rows)
    if figure is not None:
      figure.savefig(directory / f'{name}.png')
  seeds = rows.seeds('arm/both')
  for film in FILMS:
    of, _, name = film.format(next(iter(seeds), 0)).partition('/')
    source = root / of / 'evaluations' / f'{name}_film_1.png'
    if source.is_file():
      shutil.copyfile(source, directory / f'film_{film.partition("-")[0]}_{name}.png')
  print(said)


# --- Plots --------------------------------------------------------------------------


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
  figure = Figure(figsize=(4.2 * columns, 3.4), dpi=130, layout='constrained', facecolor='white')
  axes = list(np.atleast_1d(figure.subplots(1, columns)))
  for one in axes:
    one.spines[['top', 'right']].set_visible(False)
    one.yaxis.set_major_formatter(PercentFormatter(1.0))
    one.set_ylim(0, 1.04)
  return figure, axes


def bars(rows: Rows) -> Figure | None:
  """The 2 × 2: what the modules change, a dot for each seed."""
  names = [arm for arm in arms.FOUR if rows.seeds(f'arm/{arm}')]
  if not names:
    return None
  measures = (('spa_con_reentry', 'cells that come back', (0.35, 0.95)),
              ('score_exact_at', 'true score, last frame', (0.95,)),
              ('act_acc', 'moves as commanded', ()))
  figure, columns = _figure(len(measures))
  for axes, (measure, title, bounds) in zip(columns, measures, strict=True):
    for place, arm in enumerate(names):
      values = list(rows.of(f'arm/{arm}', measure).values())
      if values:
        axes.bar(place, np.mean(values), 0.62, color=COLOURS[arm], alpha=0.75)
        axes.plot([place] * len(values), values, 'o', color='#222222', markersize=3)
    for bound in bounds:
      axes.axhline(bound, color='#222222', linewidth=0.8, linestyle=':')
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_title(title, loc='left', fontsize=10, fontweight='bold')
  return figure


def delays(rows: Rows) -> Figure | None:
  """Cells that come back, against how long they were out of view; means over seeds."""
  shown = {arm: curve for arm in COLOURS if (curve := _curve(rows.seeds(f'delay/{arm}').values()))}
  if not shown:
    return None
  figure, (axes,) = _figure(1)
  figure.set_size_inches(6.4, 3.6)
  for arm, curve in shown.items():
    axes.plot(list(curve), list(curve.values()), color=COLOURS[arm], marker='o', markersize=3,
              linewidth=1.2, label=arm)
  axes.axhline(CHANCE, color='#222222', linewidth=0.8, linestyle=':')
  axes.set_xlabel('frames that a cell was out of view')
  axes.set_title('Cells that come back show what they showed', loc='left', fontsize=10,
                 fontweight='bold')
  axes.legend(frameon=False, fontsize=8, loc='center right')
  return figure


def _curve(results: Sequence[Any]) -> dict[int, float]:
  """The share by delay, of all seeds together."""
  right: dict[int, float] = {}
  asked: dict[int, float] = {}
  for result in results:
    for point in result['by_delay']:
      delay = point['delay']
      right[delay] = right.get(delay, 0.0) + point['value'] * point['asked']
      asked[delay] = asked.get(delay, 0.0) + point['asked']
  return {delay: right[delay] / asked[delay] for delay in sorted(asked)}


def drift(rows: Rows) -> Figure | None:
  """Long games: what stays true and can be read, stretch by stretch, a line for each seed."""
  seeds = rows.seeds('drift')
  if not seeds:
    return None
  figure, columns = _figure(2)
  values: Callable[[Any, str], list[float]] = lambda result, name: [
      np.nan if point[name] is None else point[name] for point in result['by_time']]
  for axes, shown in zip(columns, (('spa_con_reentry', 'score_exact'), ('unreadable',)),
                         strict=True):
    for name, colour in zip(shown, ('#0072B2', '#009E73'), strict=False):
      for number, result in enumerate(seeds.values()):
        axes.plot([point['frame'] for point in result['by_time']], values(result, name),
                  color=colour, marker='o', markersize=3, linewidth=1.1,
                  label=None if number else name)
    axes.set_xlabel('frame')
    axes.legend(frameon=False, fontsize=8)
  columns[1].set_ylim(0, max(0.02, *(value for result in seeds.values()
                                     for value in values(result, 'unreadable'))))
  columns[1].axhline(0.01, color='#222222', linewidth=0.8, linestyle=':')
  return figure
