"""Scenes as a reader of pictures or of words finds them, and answers from nothing but those.

Nothing here asks a scene: things are found in the raster by colour and outline, or in the text, and
the question is read from its words. So an answer that agrees was neither drawn nor told wrongly.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxrl_pt.data.spatial import base, canvas
from jaxrl_pt.data.spatial.items import Item

_AXES = ('right', 'above right', 'above', 'above left', 'left', 'below left', 'below',
         'below right')
_ORDINALS = ('first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh')


class Seen(NamedTuple):
  """A patch of one colour: its edges in units, and the shape whose outline it has ('' if none)."""

  colour: str
  shape: str
  top: float
  left: float
  bottom: float
  right: float

  @property
  def middle(self) -> tuple[float, float]:
    return (self.top + self.bottom - 1) / 2, (self.left + self.right - 1) / 2

  @property
  def name(self) -> str:
    return f'{self.colour} {self.shape}'


def look_of(item: Item) -> base.Look:
  """The look that an item was painted with, by its split."""
  return base.OTHER_LOOK if item.split == 'appearance' else base.TRAINED_LOOK


def patches(filled: np.ndarray) -> list[np.ndarray]:
  """The patches of a mask that hang together, corners included; each as pixels [P, 2]."""
  left = {(int(r), int(c)) for r, c in zip(*np.nonzero(filled), strict=True)}
  found = []
  while left:
    queue = [left.pop()]
    for row, column in queue:
      near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
      left -= near
      queue.extend(near)
    found.append(np.asarray(queue))
  return found


def in_picture(picture: np.ndarray, look: base.Look) -> list[Seen]:
  """Every patch in a picture's colours; positions in units."""
  scale = len(picture) / canvas.UNITS
  found = []
  for colour, rgb in look.colours:
    for pixels in patches((picture == rgb).all(-1)):
      low, high = pixels.min(0), pixels.max(0) + 1
      outline = np.zeros(high - low, bool)
      outline[tuple((pixels - low).T)] = True
      shape = next((name for name in look.shapes
                    if np.array_equal(canvas.mask(name, *outline.shape), outline)), '')
      found.append(Seen(colour, shape, *(low / scale), *(high / scale)))
  return found


def extents(picture: np.ndarray, look: base.Look, colour: str) -> Seen:
  """The smallest box round all pixels of a colour, in units."""
  rows, columns = np.nonzero((picture == look.rgb(colour)).all(-1))
  scale = len(picture) / canvas.UNITS
  return Seen(colour, '', rows.min() / scale, columns.min() / scale, (rows.max() + 1) / scale,
              (columns.max() + 1) / scale)


def in_words(state: str) -> list[Seen]:
  """The things that `things.listed` names; each taken for a single unit."""
  found = re.findall(r'(\w+) (\w+) at row (\d+), column (\d+)', state)
  return [Seen(colour, shape, int(row), int(column), int(row) + 1, int(column) + 1)
          for colour, shape, row, column in found]


# --- Answers ----------------------------------------------------------------------


def direction(question: str, seen: list[Seen]) -> str:
  """By comparing both offsets with the tangent of 22.5 degrees."""
  names = re.search(r'is the (\w+ \w+), seen from the (\w+ \w+)\?', question)
  assert names is not None
  (row, column), (from_row, from_column) = (
      next(t for t in seen if t.name == name).middle for name in names.groups())
  up, right = from_row - row, column - from_column
  tangent = math.tan(math.pi / 8)
  vertical = '' if abs(up) < tangent * abs(right) else 'above' if up > 0 else 'below'
  sideways = '' if abs(right) < tangent * abs(up) else 'right' if right > 0 else 'left'
  return f'{vertical} {sideways}'.strip()


def distance(question: str, seen: list[Seen]) -> str:
  """By the theorem of Pythagoras, from the colours that the question names."""
  places = {t.colour: t.middle for t in seen}
  named = re.findall(r'the (\w+) thing', question)

  def far(one: str, other: str) -> float:
    return math.dist(places[one], places[other])
  if len(named) == 2:
    return str(int(far(*named) / 48 * 100 + 0.5))
  others = sorted((far(named[0], colour), colour) for colour in places if colour != named[0])
  return others[0 if 'nearest' in question else -1][1]


def relation(a: Seen, b: Seen) -> str:
  """By the edges of two boxes."""
  if all((b.top <= a.top, a.bottom <= b.bottom, b.left <= a.left, a.right <= b.right)):
    return 'inside'
  if all((a.top <= b.top, b.bottom <= a.bottom, a.left <= b.left, b.right <= a.right)):
    return 'around'
  rows = min(a.bottom, b.bottom) - max(a.top, b.top)
  columns = min(a.right, b.right) - max(a.left, b.left)
  if rows > 0 and columns > 0:
    return 'overlapping'
  return 'touching' if max(rows, columns) > 0 and min(rows, columns) == 0 else 'apart'


def between(question: str, seen: list[Seen]) -> str:
  """By the angle under which the two ends are seen from the thing asked about."""
  names = re.search(r'Is the (\w+ \w+) on .* between the (\w+ \w+) and the (\w+ \w+)\?', question)
  assert names is not None
  p, a, b = (next(t for t in seen if t.name == name).middle for name in names.groups())
  angle = math.atan2(a[0] - p[0], a[1] - p[1]) - math.atan2(b[0] - p[0], b[1] - p[1])
  return 'yes' if abs(abs(math.degrees(angle)) % 360 - 180) < 16 else 'no'


def order(question: str, seen: list[Seen]) -> str:
  """By counting how many things lie on the side asked about, or by equal places."""
  if found := re.search(r'Which thing is (\w+) from the (\w+)\?', question):
    axis = 0 if found[2] in ('top', 'bottom') else 1
    sign = 1 if found[2] in ('top', 'left') else -1
    rank = _ORDINALS.index(found[1])
    return next(t.colour for t in seen
                if sum(sign * o.middle[axis] < sign * t.middle[axis] for o in seen) == rank)
  found = re.search(r'exactly (level|in one column) with the (\w+) thing', question)
  assert found is not None
  axis = 0 if found[1] == 'level' else 1
  origin = next(t for t in seen if t.colour == found[2])
  return next(t.colour for t in seen if t is not origin and t.middle[axis] == origin.middle[axis])


# --- The whole --------------------------------------------------------------------


def answer_from_picture(item: Item) -> str:
  """The answer to an item of relation or quantity from question and pixels alone."""
  look, picture = look_of(item), item.pictures[0]
  seen = in_picture(picture, look)
  colours = re.findall(rf'\b({"|".join(name for name, _ in look.colours)})\b', item.question)
  match item.task:
    case 'direction':
      return direction(item.question, seen)
    case 'distance':
      return distance(item.question, seen)
    case 'order':
      return order(item.question, seen)
    case 'topology' if 'panel' in item.question:
      return relation(*(extents(picture, look, colour) for colour in colours))
    case 'topology':
      return between(item.question, seen)
    case 'localise':
      return _cell_in_picture(item, picture, look, colours[0])
    case 'count' if 'bar' in item.question:
      told, other = (extents(picture, look, colour) for colour in colours)
      return f'{12 * _length(other) / _length(told):.0f}'
    case 'count':
      return str(len([t for t in seen if t.colour == colours[0]]))
  raise AssertionError(item.task)


def _length(bar: Seen) -> float:
  """Bars are 4 units thick, and 4 long if they are not longer."""
  height, width = bar.bottom - bar.top, bar.right - bar.left
  return height + width - 4


def _cell_in_picture(item: Item, picture: np.ndarray, look: base.Look, colour: str) -> str:
  faint = (picture == canvas.faint(look.background)).all(-1)
  cells = int(faint.all(1).sum()) - 1
  row, column = (int(place * cells / canvas.UNITS) for place in
                 extents(picture, look, colour).middle)
  if 'counted from 1 at the right' in item.question:
    column = cells - 1 - column
  return f'{row + 1} {column + 1}'


def answer_from_words(item: Item) -> str:
  """The answer to an item of relation or quantity from question and state."""
  seen = in_words(item.state)
  colour = re.findall(r'the (\w+) (?:thing|panel|bar)', item.question)
  match item.task:
    case 'direction':
      return direction(item.question, seen)
    case 'distance':
      return distance(item.question, seen)
    case 'order':
      return order(item.question, seen)
    case 'topology' if 'panel' in item.question:
      boxes = {name: Seen(name, '', int(top), int(left), int(bottom) + 1, int(right) + 1)
               for name, top, bottom, left, right in re.findall(
                   r'(\w+) panel over rows (\d+) to (\d+) and columns (\d+) to (\d+)', item.state)}
      return relation(boxes[colour[0]], boxes[colour[1]])
    case 'topology':
      return between(item.question, seen)
    case 'localise':
      cells = [row.split(', ') for row in item.state.split(': ')[1].removesuffix('.').split(' / ')]
      return next(f'{r + 1} {c + 1}' for r, row in enumerate(cells) for c, cell in enumerate(row)
                  if cell.startswith(colour[0]))
    case 'count' if 'bar' in item.question:
      told, other = map(int, re.findall(r'(\d+) units', item.state))
      return str(12 * other // told)
    case 'count':
      asked = re.findall(r'How many (\w+) things', item.question)[0]
      return str(sum(t.colour == asked for t in seen))
  raise AssertionError(item.task)
