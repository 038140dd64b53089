"""What `evaluation.game_worlds` found: text, JSON, plots, film strips, an animation and a page."""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
import numpy as np

from jaxrl_pt import files, report
from jaxrl_pt.evaluation.game_rollouts import Batch
from jaxrl_pt.evaluation.game_worlds import Found
from jaxrl_pt.game import base, film
from jaxrl_pt.game.games import open_game

# Name, what it says, and whether it is a share.
MEASURES = (
    ('act_acc', 'moves as the action says', True),
    ('num_con', 'F1 of changes of the display', True),
    ('score_exact', 'shows the true score', True),
    ('score_exact_at', 'the same, in one late frame', True),
    ('digit_acc', 'shows the ledger', True),
    ('spa_con_all', 'cells seen before', True),
    ('spa_con_reentry', 'cells that come back', True),
    ('spa_con_chance', 'the same by chance', True),
    ('bare', 'bare ground', True),
    ('bare_reentry', 'bare ground that comes back', True),
    ('event_acc', 'LogicNet, all frames', True),
    ('event_recall', 'LogicNet, events', True),
    ('unreadable', 'frames that cannot be read', True),
    ('misplaced', 'frames taken to be elsewhere', True),
    ('localisation_error', 'by how many cells', False))
_BLUE, _ORANGE, _GREY = '#0072B2', '#D55E00', '#777777'
_NOTHING_KNOWN = (0.86, 0.87, 0.89)
_FILMS = 2  # games that are shown as strips
_GAP = 2  # pixels between the true frame and the model's


class Pictures(NamedTuple):
  """The files that `write` has written beside the JSON."""

  plots: Path
  films: tuple[Path, ...]
  animation: Path
  page: Path


# --- Text -------------------------------------------------------------------------


def text(results: dict[str, Any]) -> str:
  """A table for the terminal."""
  lines = [_title(results), '']
  lines += [f'{name:20} {value:>22}   {about}' for name, value, about in _rows(results)]
  for size, timed in results['frame_time'].items():
    lines.append(f'{"frame, " + size + " at once":20} {1000 * timed["seconds"]:17.2f} ms   '
                 f'{timed["frames_per_second"]:.0f} frames/s; '
                 f'{timed["ratio"]:.3f} × the model alone')
  return '\n'.join(lines)


def _title(results: dict[str, Any]) -> str:
  step = '' if results['step'] is None else f', step {results["step"]}'
  return (f'{results["game"]}, {results["model"]} model{step}: {results["episodes"]} games of '
          f'{results["frames"]} frames')


def _rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
  """(name, value with its interval, what it says) of every measure that was asked about."""
  rows = [(name, _of(results['measures'][name], is_share), about)
          for name, about, is_share in MEASURES if results['measures'][name]['asked']]
  known = {name: (about, is_share) for name, about, is_share in MEASURES}
  for name, estimate in results.get('after_edit', {}).items():
    about, is_share = known.get(name, ('painted cells in view', True))
    rows.append((f'{name}, edited', _of(estimate, is_share), f'{about}, after the edit'))
  return rows


def _of(estimate: dict[str, Any], is_share: bool) -> str:
  if estimate['value'] is None:
    return '–'
  low, high = estimate['interval']
  value = (estimate['value'], low, high)
  if is_share:
    return '{:.1f} % [{:.1f}, {:.1f}]'.format(*(100 * x for x in value))
  return '{:.3f} [{:.3f}, {:.3f}]'.format(*value)


# --- Files ------------------------------------------------------------------------


def write(path: Path, command: str, found: Found) -> Pictures:
  """Writes the results as JSON, and pictures and a page beside them under the same name.

  Raises:
    Unwritable: a file cannot be written.
  """
  game = open_game(found.game)
  name = lambda ending: path.with_name(path.stem + ending)
  shown = min(_FILMS, len(found.first.progress.frames))
  pictures = Pictures(name('.png'), tuple(name(f'_film_{n + 1}.png') for n in range(shown)),
                      name('.gif'), name('.html'))
  whole = {'command': command, **found.results}
  files.write_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + '\n')
  canvas = FigureCanvasAgg(plot(game, found))
  with files.writing(pictures.plots):
    canvas.print_png(str(pictures.plots))
  for row, film_path in enumerate(pictures.films):
    files.write_bytes(film_path, film.strip(*pair(game, found.first, row)))
  files.write_bytes(pictures.animation, film.animation(*pair(game, found.first, 0)))
  _write_page(pictures, command, found.results)
  return pictures


def _write_page(pictures: Pictures, command: str, results: dict[str, Any]) -> None:
  rows = [['measure', 'value [95 %]', 'what']] + [list(row) for row in _rows(results)]
  timed = [['games at once', 'ms a frame', 'frames/s', '× the model alone']] + [
      [size, f'{1000 * t["seconds"]:.2f}', f'{t["frames_per_second"]:.0f}', f'{t["ratio"]:.3f}']
      for size, t in results['frame_time'].items()]
  settings = json.dumps(results['settings'], indent=1, ensure_ascii=False)
  sections = [report.Section(_title(results), rows, command),
              report.Section('Speed', timed),
              report.Section('Settings', [['as JSON'], [settings]])]
  films = [(f'Game {n + 1}: the true game above, the model below', path)
           for n, path in enumerate(pictures.films)]
  report.write_page(pictures.page, _title(results), sections,
                    [('Measures, re-entry and maps', pictures.plots),
                     ('Game 1, animated', pictures.animation), *films])


# --- Films ------------------------------------------------------------------------


def pair(game: base.Game, batch: Batch, row: int) -> tuple[np.ndarray, list[str]]:
  """Frames u8[T + 1, 2 H + gap, W, 3] of the true game above the model's, and their captions.

  The true game has had the same actions; its new buildings have colours of their own. A caption has
  the action, and behind an exclamation mark what is wrong: an unreadable frame, the numbers (what
  the frame shows / what is true), or how many cells differ from what they showed first.
  """
  progress, episodes = batch.progress, batch.episodes
  true = np.asarray(episodes.frames[row])
  model = np.concatenate([true[:1], np.asarray(progress.frames[row])])
  gap = np.full((len(true), _GAP, true.shape[2], 3), 255, np.uint8)
  readings, claims = (_row(tree, row) for tree in (progress.played.readings,
                                                   progress.played.claims))
  captions = [_caption(game, number, episodes.actions[row, number], readings, claims)
              for number in range(len(true))]
  return np.concatenate([true, gap, model], 1), captions


def _row(tree: Any, row: int) -> Any:
  return tree.replace(**{name: np.asarray(value)[row] for name, value in vars(tree).items()})


def _caption(game: base.Game, number: int, action: Any, readings: Any, claims: Any) -> str:
  said = f'{number} {game.actions[action]}' if number else '0'
  if not claims.counts[number]:
    return f'{said} · over'
  wrong = []
  if not readings.readable[number]:
    wrong.append('unreadable')
  elif (readings.counters[number] != claims.counters[number]).any():
    shown, true = (':'.join(map(str, numbers.tolist()))
                   for numbers in (readings.counters[number], claims.counters[number]))
    wrong.append(f'{shown}/{true}')
  cells = claims.due[number] & (readings.cells[number] != claims.cells[number])
  if readings.readable[number] and cells.any():
    wrong.append(f'{cells.sum()} cells')
  return said + (' ! ' + ' '.join(wrong) if wrong else '')


# --- Plots ------------------------------------------------------------------------


def plot(game: base.Game, found: Found) -> Figure:
  """All measures, re-entry against the return delay, and what the map has at the end."""
  has_map = bool(game.contents)
  figure = Figure(figsize=(11, 7.2) if has_map else (7, 4.6), dpi=120, layout='constrained')
  if not has_map:
    _measures(figure.subplots(), found.results)
    return figure
  grid = figure.add_gridspec(2, 2, height_ratios=(3, 1.6), width_ratios=(1, 1.1))
  _measures(figure.add_subplot(grid[0, 0]), found.results)
  _delays(figure.add_subplot(grid[0, 1]), found.results)
  _maps(figure, grid[1, :], game, found.first)
  return figure


def _measures(axes: Axes, results: dict[str, Any]) -> None:
  rows = [(name, results['measures'][name]) for name, _, is_share in MEASURES
          if is_share and results['measures'][name]['asked']]
  rows += [(f'{name}, edited', estimate) for name, estimate in
           results.get('after_edit', {}).items() if estimate['asked']]
  values = np.array([row['value'] for _, row in rows])
  ends = np.abs(np.array([row['interval'] for _, row in rows]).T - values)
  places = np.arange(len(rows))
  bad = [name.split(',')[0] in ('unreadable', 'misplaced') for name, _ in rows]
  axes.barh(places, values, 0.62, xerr=ends, color=[_ORANGE if b else _BLUE for b in bad],
            error_kw={'ecolor': '#333333', 'capsize': 2, 'elinewidth': 1})
  for place, value in zip(places, values, strict=True):
    axes.annotate(f'{100 * value:.1f} %', (1.02, place), va='center', fontsize=8,
                  annotation_clip=False)
  axes.set_yticks(places, [name for name, _ in rows], fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_title(_title(results), loc='left', fontsize=10, fontweight='bold')


def _delays(axes: Axes, results: dict[str, Any]) -> None:
  points = results['by_delay']
  if points:
    delays = [p['delay'] for p in points]
    low, high = np.array([p['interval'] for p in points]).T
    axes.fill_between(delays, low, high, color=_BLUE, alpha=0.2, linewidth=0)
    axes.plot(delays, [p['value'] for p in points], color=_BLUE, marker='o', markersize=4,
              linewidth=1.4, label='the same as before')
    axes.bar(delays, np.array([p['asked'] for p in points]) / max(p['asked'] for p in points) / 8,
             color=_GREY, alpha=0.35, label='how often it happened')
    axes.legend(frameon=False, fontsize=9, ncols=2, loc='lower right', bbox_to_anchor=(1, 1),
                borderaxespad=0)
  axes.set_ylim(0, 1.04)
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axes.set_xlabel('frames that a cell was out of view')
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_title('Cells that come back', loc='left', fontsize=10, fontweight='bold')


def _maps(figure: Figure, place: Any, game: base.Game, batch: Batch) -> None:
  """For some games what their frames showed first of each cell, and what the map has."""
  progress = batch.progress
  shown = min(_FILMS, len(progress.frames))
  parts = place.subgridspec(2, shown) if game.world_shape[0] == 1 else place.subgridspec(
      1, 2 * shown)
  for row in range(shown):
    past = progress.carry.past
    is_bare = np.asarray((past.sightings.last[row] >= 0) & (past.since[row] < 0))
    vacant = game.tiles.vacant
    world = np.where(is_bare & vacant.any(), vacant.argmax(), np.asarray(past.world[row]))
    known = np.asarray(progress.carry.dream.map.known[row])
    pictures = (('shown first', _painted(world != base.UNKNOWN, game.tiles.colours[world])),
                ('map' if known.any() else 'no map',
                 _painted(known, np.asarray(progress.carry.dream.map.colours[row]))))
    some = ((world != base.UNKNOWN) | known).any(0).nonzero()[0]
    span = slice(some.min(), some.max() + 1) if len(some) else slice(0, 1)
    for number, (title, picture) in enumerate(pictures):
      where = parts[number, row] if game.world_shape[0] == 1 else parts[0, 2 * row + number]
      axes = figure.add_subplot(where)
      axes.imshow(picture[:, span], aspect='auto' if game.world_shape[0] == 1 else 'equal',
                  interpolation='nearest')
      axes.set_xticks([])
      axes.set_yticks([])
      axes.set_title(f'game {row + 1}: {title}', loc='left', fontsize=9)


def _painted(known: np.ndarray, colours: np.ndarray) -> np.ndarray:
  """f[rows, columns, 3]: grey where nothing is known."""
  return np.where(known[..., None], colours, np.array(_NOTHING_KNOWN))


def summary_line(pictures: Pictures, path: Path) -> str:
  """Where the files are."""
  beside: Sequence[Path] = (pictures.page, pictures.plots, *pictures.films, pictures.animation)
  return f'Written: {path} and {", ".join(p.name for p in beside)}'
