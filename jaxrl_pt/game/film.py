"""Pictures of episodes: a strip of frames as PNG, or an animation as GIF."""

from collections.abc import Sequence
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jaxrl_pt import files
from jaxrl_pt.errors import UserError
from jaxrl_pt.game.games import open_game
from jaxrl_pt.game.trajectories import Source

_WIDTH = 128  # pixels of a frame in a picture
_GAP = 4
_CAPTION = 14
_COLUMNS = 8
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_FRAME_MS = 140


def write(path: Path, source: Source, index: int) -> None:
  """Writes an episode as a picture, whose kind the name of the file says.

  Raises:
    UserError: another name than *.png or *.gif, or the file cannot be written.
  """
  if path.suffix not in ('.png', '.gif'):
    raise UserError(f'{path} is neither a strip nor an animation: name it *.png or *.gif.')
  game = open_game(source.config.game)
  found = source.batch([index])
  labels = [_caption(number, game.actions[action] if number else '', game.events[event])
            for number, (action, event) in enumerate(
                zip(found.actions[0], np.asarray(found.truth.event)[0], strict=True))]
  picture = strip if path.suffix == '.png' else animation
  files.write_bytes(path, picture(np.asarray(found.frames)[0], labels))


def _caption(number: int, action: str, event: str) -> str:
  return ' '.join(filter(None, (str(number), action, '' if event == 'none' else f'· {event}')))


def strip(frames: np.ndarray, captions: Sequence[str]) -> bytes:
  """A PNG of frames u8[T, H, W, 3] in rows of eight, each with its caption below."""
  cells = [_cell(frame, caption) for frame, caption in zip(frames, captions, strict=True)]
  width, height = cells[0].width + _GAP, cells[0].height + _GAP
  rows = -(-len(cells) // _COLUMNS)
  sheet = Image.new('RGB', (width * min(_COLUMNS, len(cells)) + _GAP, height * rows + _GAP), _PAPER)
  for number, cell in enumerate(cells):
    row, column = divmod(number, _COLUMNS)
    sheet.paste(cell, (_GAP + column * width, _GAP + row * height))
  return _saved(sheet.quantize(64, dither=Image.Dither.NONE), 'PNG', optimize=True)


def animation(frames: np.ndarray, captions: Sequence[str]) -> bytes:
  """A GIF of frames u8[T, H, W, 3], each with its caption below."""
  first, *others = (_cell(frame, caption)
                    for frame, caption in zip(frames, captions, strict=True))
  return _saved(first, 'GIF', save_all=True, append_images=others, duration=_FRAME_MS, loop=0)


def _cell(frame: np.ndarray, caption: str) -> Image.Image:
  """A frame in pixels that a person can see, with its caption below."""
  scale = _WIDTH // frame.shape[1]
  large = np.asarray(frame).repeat(scale, 0).repeat(scale, 1)
  cell = Image.new('RGB', (large.shape[1], large.shape[0] + _CAPTION), _PAPER)
  cell.paste(Image.fromarray(large), (0, 0))
  ImageDraw.Draw(cell).text((1, large.shape[0] + 1), caption, fill=_INK)
  return cell


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return buffer.getvalue()
