"""A run's report: plots of its metrics in `plots/` and a self-contained page, `report.html`."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import html
import math
from pathlib import Path
import re
import statistics
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, ScalarFormatter

from jaxrl_pt import files, metrics
from jaxrl_pt.errors import Unwritable

Rows = Sequence[metrics.Row]
FILE = 'report.html'


@dataclass(frozen=True)
class Section:
  """A part of the page: paragraphs of plain text, then a table. All text is escaped.

  rows: the table's rows, of which the first is the header; line breaks in cells are kept.
  text: paragraphs, which blank lines separate.
  """

  title: str
  rows: Sequence[Sequence[str]] = ()
  text: str = ''


# --- What is drawn --------------------------------------------------------------------


@dataclass(frozen=True)
class _Plot:
  """One figure, which is drawn if any of its metrics has values."""

  name: str
  title: str
  unit: str
  series: Mapping[str, str]  # {metric's key: legend}
  ticks: Literal['plain', 'percent', 'thousands', 'power'] = 'plain'


_DIFFICULTIES = ('easy', 'medium', 'hard')
_LOSS = _Plot('loss', 'Loss', 'nats per token',
              {'loss': 'training', 'validation/loss': 'validation'})
_RL_LOSS = _Plot('loss', 'Surrogate loss', 'loss of the policy gradient', {'loss': 'training'})
_PLOTS = (
    _LOSS,
    _Plot('bits_per_byte', 'Bits per byte', 'bits per byte of validation text',
          {'validation/bits_per_byte': 'validation'}),
    _Plot('reward', 'Reward', 'mean reward', {'reward': 'training'}),
    _Plot('held_out', 'Held-out accuracy, sampled', 'correct next tokens',
          {f'validation/{d}_sampled': d for d in _DIFFICULTIES}, 'percent'),
    _Plot('held_out_argmax', 'Held-out accuracy, argmax', 'correct next tokens',
          {f'validation/{d}_argmax': d for d in _DIFFICULTIES}, 'percent'),
    _Plot('accuracy', 'Accuracy', 'correct predictions',
          {'accuracy': 'training', 'validation/accuracy': 'validation'}, 'percent'),
    _Plot('entropy', 'Entropy of the policy', 'nats per token', {'entropy': 'training'}),
    _Plot('mismatch', 'Sampler–trainer mismatch', 'mean exp |Δ log p|', {'mismatch': 'training'}),
    _Plot('kl', 'Distance to the reference policy', 'KL, nats per token', {'kl': 'training'}),
    _Plot('response_length', 'Length of responses', 'tokens',
          {'response_length': 'training', 'validation/response_length': 'validation'}),
    _Plot('gate_open', 'Length gate open', 'steps', {'gate_open': 'training'}, 'percent'),
    _Plot('zero_advantage_groups', 'Groups without a signal', 'groups of equal rewards',
          {'zero_advantage_groups': 'training'}, 'percent'),
    _Plot('grad_norm', 'Gradient norm', 'global L2 norm before clipping',
          {'grad_norm': 'training'}),
    _Plot('learning_rate', 'Learning rate', 'learning rate', {'learning_rate': 'schedule'},
          'power'),
    _Plot('throughput', 'Throughput', 'tokens per second',
          {'time/tokens_per_second': 'measured'}, 'thousands'),
)

_WIDTH, _HEIGHT = 6.4, 3.5  # inches
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7')
_SMOOTH_FROM = 60  # a curve with fewer points is not smoothed


def _points(rows: Rows, key: str) -> tuple[list[int], list[float]]:
  """Steps and values of a metric, without those that are not finite."""
  points = [(int(r['step']), float(r[key])) for r in rows if key in r and math.isfinite(r[key])]
  return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float], width: int) -> list[float]:
  """Running median that drops single outliers; at both ends its window shrinks to 5 values."""
  smooth = []
  for i in range(len(values)):
    half = max(min(width // 2, i, len(values) - 1 - i), min(width // 2, 4))
    smooth.append(statistics.median(values[max(0, i - half):i + half + 1]))
  return smooth


def _draw(axes: Axes, plot: _Plot, rows: Rows) -> None:
  for (key, label), colour in zip(plot.series.items(), _COLOURS, strict=False):
    steps, values = _points(rows, key)
    if not steps:
      continue
    if plot.ticks == 'power':
      axes.plot(steps, values, color=colour, label=label, linewidth=1.6)
    elif len(steps) < _SMOOTH_FROM:
      axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker='o', markersize=4)
    else:
      axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
      axes.plot(steps, _smooth(values, max(9, len(values) // 20)), color=colour, linewidth=1.8,
                label=f'{label} (running median)')
  # The power of ten of all tick labels stands beside the title, which need not make way for it.
  axes.yaxis.get_offset_text().set_x(-0.1)
  axes.set_title(plot.title, loc='left', y=1.0, fontsize=11, fontweight='bold')
  axes.set_ylabel(plot.unit)
  axes.set_xlabel('optimiser step')
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
  axes.yaxis.set_major_formatter(_formatter(plot))
  if plot.ticks in ('thousands', 'power'):
    axes.set_ylim(bottom=0)
  labels = axes.get_legend_handles_labels()[1]
  if len(labels) > 1 or 'median' in labels[0]:  # The legend stands above the axes, clear of curves.
    axes.legend(frameon=False, fontsize=9, ncols=len(labels), loc='lower right',
                bbox_to_anchor=(1, 1), borderaxespad=0, columnspacing=1.2, handlelength=1.4)


def _formatter(plot: _Plot) -> Formatter:
  match plot.ticks:
    case 'percent':
      return FuncFormatter(lambda value, _: f'{100 * value:.4g} %')
    case 'thousands':
      return FuncFormatter(lambda value, _: f'{value:,.10g}')
    case 'power':
      return FuncFormatter(lambda value, _: f'{value:.1e}'.replace('e-0', 'e-') if value else '0')
    case _:
      return ScalarFormatter(useOffset=False)


def _figure(plot: _Plot, rows: Rows) -> Figure:
  figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=144, facecolor='white')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#e3e6ea', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=9)
  _draw(axes, plot, rows)
  figure.subplots_adjust(left=_left_margin(axes) / _WIDTH, right=1 - 0.1 / _WIDTH,
                         bottom=0.48 / _HEIGHT, top=1 - 0.3 / _HEIGHT)
  return figure


def _left_margin(axes: Axes) -> float:
  """Inches for the unit and the longest tick label, of 9 points a character 0.6 times as wide.

  matplotlib's own layouts know the exact width, and take twice as long as drawing itself.
  """
  labels = axes.yaxis.get_major_formatter().format_ticks(axes.yaxis.get_majorticklocs().tolist())
  return 0.45 + 9 / 72 * 0.64 * max(map(len, labels), default=0)


def _is_rl(rows: Rows) -> bool:
  """Whether the rows are those of a run of reinforcement learning."""
  return any('reward' in row for row in rows)


def write_plots(rows: Rows, directory: Path, prefix: str = '') -> list[Path]:
  """Draws every plot for whose metrics the rows have values.

  Args:
    rows: the rows from `metrics.read_rows`; non-finite values are left out.
    directory: receives `<prefix><name>.png`; made if absent.
    prefix: what the files' names begin with.

  Returns:
    The paths of the plots, in the order of the page.
  """
  directory.mkdir(parents=True, exist_ok=True)
  paths = []
  for plot in _PLOTS:
    if plot is _LOSS and _is_rl(rows):
      plot = _RL_LOSS
    if any(_points(rows, key)[0] for key in plot.series):
      path = directory / f'{prefix}{plot.name}.png'
      _figure(plot, rows).savefig(path)
      paths.append(path)
  return paths


# --- The page -------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #f6f7f9; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 26px; margin: 0 0 24px } h2 { font-size: 19px; margin: 0 0 12px }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 10px; padding: 20px 24px;
  margin: 0 0 20px }
table { border-collapse: collapse; font-size: 14px; margin: 4px 0 }
.wide { overflow-x: auto }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid #e3e6ea; text-align: left;
  vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
th { color: #5b6775; font-weight: 600 } .number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: 1fr; gap: 16px; margin-top: 16px }
@media (min-width: 860px) { .plots { grid-template-columns: 1fr 1fr } }
figure { margin: 0 } img { width: 100%; height: auto } p { margin: 0 0 12px }
details { margin-top: 16px }
summary { cursor: pointer; color: #0072b2 }
pre { background: #f6f7f9; padding: 12px; overflow-x: auto; font-size: 13px }
"""

_NUMERIC = re.compile(r'[+\-−]?[\d.,]+( ?(%|s|steps|tokens/s))?|–')


def _table(rows: Sequence[Sequence[str]]) -> str:
  if not rows:
    return ''
  body = rows[1:]
  numeric = [bool(body) and all(i < len(r) and _NUMERIC.fullmatch(r[i].strip()) for r in body)
             for i in range(max(len(r) for r in rows))]

  def line(row: Sequence[str], tag: str) -> str:
    cells = (f'<{tag}{" class=number" if numeric[i] else ""}>{html.escape(cell)}</{tag}>'
             for i, cell in enumerate(row))
    return f'<tr>{"".join(cells)}</tr>'
  header, lines = line(rows[0], 'th'), ''.join(line(r, 'td') for r in body)
  return f'<div class=wide><table><thead>{header}</thead><tbody>{lines}</tbody></table></div>'


def _paragraphs(text: str) -> str:
  parts = (p.strip() for p in re.split(r'\n\s*\n', text))
  return ''.join(f'<p>{html.escape(p)}</p>' for p in parts if p)


def _image(path: Path) -> str:
  data = base64.b64encode(path.read_bytes()).decode()
  name, kind = html.escape(path.stem.replace('_', ' ')), path.suffix.removeprefix('.')
  return f'<figure><img alt="{name}" src="data:image/{kind};base64,{data}"></figure>'


def _section(title: str, body: str) -> str:
  return f'<section><h2>{html.escape(title)}</h2>{body}</section>'


# Keys, labels and formats of the metrics in the summary, which shows their first and last values.
_SUMMARY = (
    ('loss', 'training loss, nats per token', '{:.4f}'),
    ('validation/loss', 'validation loss, nats per token', '{:.4f}'),
    ('validation/bits_per_byte', 'validation bits per byte', '{:.4f}'),
    ('validation/accuracy', 'validation next-token accuracy', '{:.2%}'),
    ('reward', 'reward', '{:.4f}'),
    ('entropy', 'entropy, nats per token', '{:.4f}'),
    ('mismatch', 'sampler–trainer mismatch', '{:.5f}'),
)


def summary_rows(rows: Rows) -> list[list[str]]:
  """The summary's table: a header, and for each metric its first and its last value."""
  table = [['', 'first', 'last']]
  for key, label, form in _SUMMARY:
    _, values = _points(rows, key)
    if values and not (key == 'loss' and _is_rl(rows)):  # A surrogate's size says nothing.
      table.append([label, *(form.format(v).replace('%', ' %') for v in (values[0], values[-1]))])
  return table


def _pace(rows: Rows) -> str:
  """One sentence on how far and how fast the run went."""
  if not rows:
    return 'This run has no finished step.'
  sentence = f'{int(rows[-1]["step"]):,} optimiser steps'
  _, seconds = _points(rows, 'time/seconds')
  _, speed = _points(rows, 'time/tokens_per_second')
  if seconds:
    sentence += f' in {sum(seconds):,.0f} s of training'
  if speed:
    sentence += f', at a median of {statistics.median(speed):,.0f} tokens/s'
  return sentence + '.'


def _stage(title: str, directory: Path, workdir: Path, prefix: str) -> str:
  """The page's section on the run in `directory`, whose plots go to `workdir`."""
  rows = metrics.read_rows(directory / metrics.FILE)
  images = write_plots(rows, workdir / 'plots', prefix)
  body = _paragraphs(_pace(rows)) + (_table(summary_rows(rows)) if len(rows) > 0 else '')
  body += f'<div class=plots>{"".join(map(_image, images))}</div>'
  config = directory / 'config.gin'
  if config.is_file():
    text = html.escape(config.read_text(encoding='utf-8', errors='replace'))
    body += f'<details><summary>All settings of this run</summary><pre>{text}</pre></details>'
  return _section(title, body)


def write_report(workdir: Path, *, stages: Mapping[str, Path] | None = None,
                 sections: Sequence[Section] = ()) -> Path:
  """Writes `plots/*.png` and `report.html`, which needs no other file and no network.

  Args:
    workdir: receives the plots and the page.
    stages: {title: work directory of a run}; None takes the run in `workdir`.
    sections: tables and texts of the caller, which stand above the plots.

  Returns:
    The page's path.

  Raises:
    UserError: a run has no readable metrics.
    Unwritable: the plots or the page cannot be written.
  """
  single = stages is None
  runs = {'Training': workdir} if stages is None else stages
  try:
    parts = [_section(s.title, _paragraphs(s.text) + _table(s.rows)) for s in sections]
    parts += [_stage(title, directory, workdir, '' if single else _slug(title) + '_')
              for title, directory in runs.items()]
    page = workdir / FILE
    files.write_text(page, _page(f'{workdir.resolve().name}: report', parts))
  except OSError as error:
    raise Unwritable(f'cannot write the report to {workdir} ({error.strerror})') from error
  return page


def write_page(page: Path, title: str, sections: Sequence[Section],
               pictures: Sequence[tuple[str, Path]]) -> None:
  """Writes a page of tables and texts, and below them pictures with their titles.

  Raises:
    Unwritable: the page cannot be written.
  """
  parts = [_section(s.title, _paragraphs(s.text) + _table(s.rows)) for s in sections]
  parts += [_section(name, _image(path)) for name, path in pictures]
  files.write_text(page, _page(title, parts))


def _page(title: str, parts: Sequence[str]) -> str:
  """A self-contained page of sections in HTML."""
  title = html.escape(title)
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'<style>{_STYLE}</style></head><body><main><h1>{title}</h1>\n'
          + '\n'.join(parts) + '\n</main></body></html>\n')


def _slug(title: str) -> str:
  return re.sub(r'[^a-z0-9]+', '_', title.lower()).strip('_') or 'run'
