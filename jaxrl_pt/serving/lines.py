"""Lines that a person types, or that come through a pipe. Nothing heavy is imported here."""

from collections.abc import Iterator
import contextlib
import sys

from jaxrl_pt.errors import UserError


def read_lines(prompt: str) -> Iterator[str]:
  """Yields the lines that are typed at the terminal, or those of standard input, to its end.

  Ctrl-C drops the line that is being typed and says how to leave.
  """
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # Gives `input` its line editing.
  while True:
    try:
      yield input(prompt) if sys.stdin.isatty() else _line_of_pipe()
    except KeyboardInterrupt:
      print('\n(Ctrl-D leaves.)')
    except EOFError:
      return


def _line_of_pipe() -> str:
  line = sys.stdin.buffer.readline()
  if not line:
    raise EOFError
  try:
    return line.decode('utf-8').rstrip('\r\n')
  except UnicodeDecodeError as e:
    raise UserError(f'Standard input is not UTF-8 text (byte {e.start} of a line): convert it '
                    'first.') from e
