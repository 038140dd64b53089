"""What flags take: whole numbers, texts and paths, each refused in one sentence.

The flags that most commands have stand here too.

This module imports little, so that `--help` answers at once.
"""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from jaxrl_pt.errors import UserError


class Parser(argparse.ArgumentParser):
  """A parser that tells a wrong flag in one sentence, like every other mistake."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message[:1].upper()}{message[1:].rstrip(".")}: see {self.prog} --help.')


def at_least(low: int, high: int = 2**31 - 1) -> Any:
  """The type of a flag that takes a whole number from `low` to `high`."""
  def whole_number(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = low - 1
    if value < low:
      raise argparse.ArgumentTypeError(f'expected a whole number of at least {low}, not {text!r}')
    if value > high:
      raise argparse.ArgumentTypeError(f'expected a whole number of at most {high}, not {text!r}')
    return value
  return whole_number


# JAX makes a key of a seed's lower 32 bits, so a larger seed would repeat a smaller one.
SEED = at_least(0, 2**32 - 1)


def text(text: str) -> str:
  """The type of a flag that takes text, which must be possible to write as UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise argparse.ArgumentTypeError(f'expected UTF-8 text, not {text!r}') from e
  return text


def path(text: str) -> Path:
  """The type of a flag that takes a path: not the empty text, which Path takes for '.'."""
  if not text or '\0' in text:
    raise argparse.ArgumentTypeError(f'expected a path, not {text!r}')
  return Path(text)


def glob(text: str) -> str:
  """The type of a flag that takes a glob."""
  path(text)
  return text


def add_gin(parser: argparse.ArgumentParser, purpose: str = 'what to run') -> None:
  """Adds the flags of gin files and bindings."""
  parser.add_argument('--gin_file', action='append', default=[], metavar='FILE',
                      help=f'{purpose}, as a gin file; may be repeated, later ones win')
  parser.add_argument('--gin_bindings', action='append', default=[], metavar='BINDING',
                      help='one setting on top of the files, e.g. "cfg.Run.seed = 1"; may be '
                      'repeated')


def add_workdir(parser: argparse.ArgumentParser, default: str | None = None) -> None:
  """Adds --workdir, required unless it has a default."""
  parser.add_argument('--workdir', type=path, default=default and Path(default), metavar='DIR',
                      required=default is None, help='where the run lives'
                      + (f' (default {default})' if default else ''))


def add_json(parser: argparse.ArgumentParser) -> None:
  """Adds --json."""
  parser.add_argument('--json', action='store_true', help='print JSON')


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
  """Adds --workdir and --step."""
  add_workdir(parser)
  parser.add_argument('--step', type=at_least(0), help='which checkpoint (default the newest)')


def add_files(parser: argparse.ArgumentParser, *names: tuple[str, str]) -> None:
  """Adds flags that each take the path of a file: (name, what it is for)."""
  for name, about in names:
    parser.add_argument(f'--{name}', type=path, metavar='FILE', help=f'where {about}')


def add_switches(parser: argparse.ArgumentParser, *switches: tuple[str, str]) -> None:
  """Adds flags without a value: (name, what it does)."""
  for name, about in switches:
    parser.add_argument(f'--{name}', action='store_true', help=about)
