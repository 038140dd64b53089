"""Items for people: in words, and as pictures with question and answer below."""

from collections.abc import Sequence
import io
from pathlib import Path
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxrl_pt import files
from jaxrl_pt.data.spatial import items
from jaxrl_pt.data.spatial.base import Split, Task
from jaxrl_pt.data.spatial.items import Item
from jaxrl_pt.errors import UserError

_PICTURE = 240  # Pixels of a picture on a sheet, at least.
_GAP = 6
_COLUMNS = 4
_MOST_OPTIONS = 9  # More are not listed.
_FONT, _LINE, _LINE_CHARS = 12, 15, 62
_PAPER, _INK, _ANSWER = (255, 255, 255), (40, 40, 40), (0, 90, 160)


def chosen(name: str, level: int | None, split: Split, seed: int, index: int, side: int,
           twin: bool) -> list[Item]:
  """The item of one task, or of each task that the split has, where `name` is 'all'.

  Without a level the split's first one is meant.
  """
  def of(task: Task) -> Item:
    first = items.levels(task, split)[0]
    return items.item(task, first if level is None else level, split, seed, index, side, twin)
  if name != 'all':
    return [of(items.named(name))]
  if split == 'composition':
    return [of(items.named('program'))]  # No other task composes operations.
  return [of(task) for task in items.TASKS]


def facts(shown: Item, answer: str | None) -> dict[str, Any]:
  """All that is known of an item but its pictures, with the grade of an answer if there is one."""
  found = {'task': shown.task, 'level': shown.level, 'split': shown.split, 'index': shown.index,
           'capability': shown.capability, 'process': shown.process,
           'pictures': len(shown.pictures), 'question': shown.question,
           'options': list(shown.options), 'state': shown.state, 'answer': shown.answer,
           'chance': items.chance(shown)}
  return found if answer is None else found | {'grade': items.grade(shown, answer)._asdict()}


def text(shown: Item, answer: str | None) -> str:
  """The facts in lines."""
  known = facts(shown, answer)
  kind = f'{known["capability"]}, {known["process"].replace("_", " ")}'
  lines = [f'{shown.task}, level {shown.level}, {shown.split}, item {shown.index} ({kind}; '
           f'pictures: {known["pictures"]})',
           f'question  {shown.question}',
           f'options   {", ".join(shown.options) or "a number or a path"}',
           f'state     {shown.state}',
           f'answer    {shown.answer} (by chance {known["chance"]:.3f})']
  if answer is not None:
    grade = known['grade']
    what = 'correct' if grade['correct'] else 'wrong' if grade['valid'] else 'not an answer'
    lines.append(f'grade     {what}, score {grade["score"]:.2f}')
  return '\n'.join(lines).replace('\n\n', '\n')


def write(path: Path, shown: Sequence[Item]) -> None:
  """Writes the pictures of one item side by side, or a sheet of several with their questions.

  Raises:
    UserError: another name than *.png, or the file cannot be written.
  """
  if path.suffix != '.png':
    raise UserError(f'{path} is no picture: name it *.png.')
  picture = _strip(shown[0], len(shown[0].pictures)) if len(shown) == 1 else _sheet(shown)
  buffer = io.BytesIO()
  picture.save(buffer, 'PNG', optimize=True)
  files.write_bytes(path, buffer.getvalue())


def _strip(shown: Item, per_row: int) -> Image.Image:
  """An item's pictures in rows, enlarged by a whole factor."""
  num, side = shown.pictures.shape[:2]
  wanted = _PICTURE if len(shown.pictures) == per_row else _PICTURE // per_row
  scale = max(wanted // side, 1)
  large = shown.pictures.repeat(scale, 1).repeat(scale, 2)
  step = side * scale + _GAP
  strip = Image.new('RGB', (step * per_row - _GAP, step * -(-num // per_row) - _GAP), _PAPER)
  for k, picture in enumerate(large):
    strip.paste(Image.fromarray(np.ascontiguousarray(picture)),
                (k % per_row * step, k // per_row * step))
  return strip


def _sheet(shown: Sequence[Item]) -> Image.Image:
  """A cell for each item, in rows of four."""
  cells = [_cell(one) for one in shown]
  width = max(cell.width for cell in cells) + 2 * _GAP
  columns = min(_COLUMNS, len(cells))
  rows = [cells[start:start + columns] for start in range(0, len(cells), columns)]
  heights = [max(cell.height for cell in row) + 2 * _GAP for row in rows]
  sheet = Image.new('RGB', (width * columns, sum(heights)), _PAPER)
  for number, row in enumerate(rows):
    for column, cell in enumerate(row):
      sheet.paste(cell, (column * width + _GAP, sum(heights[:number]) + _GAP))
  return sheet


def _cell(shown: Item) -> Image.Image:
  """An item's pictures, its name, its question and its answer."""
  num = len(shown.pictures)
  pictures = _strip(shown, num if num <= 2 else 3 if num <= 9 else 6)
  asked = items.prompt(shown) if len(shown.options) <= _MOST_OPTIONS else shown.question
  wrapped = [f'{shown.task}, level {shown.level}', *textwrap.wrap(asked, _LINE_CHARS)]
  answer = textwrap.wrap(f'Answer: {shown.answer}', _LINE_CHARS)
  font = ImageFont.load_default(_FONT)
  width = max(pictures.width, *(int(font.getlength(line)) for line in wrapped + answer))
  cell = Image.new('RGB', (width, pictures.height + 4 + _LINE * len(wrapped + answer)), _PAPER)
  cell.paste(pictures, (0, 0))
  drawing = ImageDraw.Draw(cell)
  for k, line in enumerate(wrapped + answer):
    colour = _INK if k < len(wrapped) else _ANSWER
    drawing.text((0, pictures.height + 4 + _LINE * k), line, fill=colour, font=font)
  return cell
