"""The exceptions that `main` answers with one sentence and an exit code of their own.

Every other exception is a defect of ours and keeps its traceback.
"""

from typing import Any


class UserError(Exception):
  """A mistake the user can mend: the message says what, where and what to do. Exit code 2."""


class Preempted(Exception):
  """A run was told to stop before its last step, and has saved. Exit code 75.

  That is EX_TEMPFAIL, "try again later", which schedulers do not take for a finished run.
  """


class Unwritable(UserError):
  """A file of a run that cannot be written any more, whatever the reason.

  problem: what and why, without advice, for whoever knows the last good checkpoint.
  """

  def __init__(self, problem: str) -> None:
    super().__init__(f'{problem}: free some space or choose another work directory, then resume.')
    self.problem = problem


class MissingFileError(UserError):
  """The files that data are made of are not there."""


def shown(value: Any, most: int = 100) -> str:
  """A wrong value as a message quotes it: as Python writes it, or its first `most` characters."""
  if isinstance(value, int) and value.bit_length() > 1000:  # Python may refuse to write it.
    return f'a whole number of {value.bit_length()} bits'
  try:
    return shortened(repr(value), most)
  except RecursionError:
    return 'a value that is nested too deeply'


def shortened(text: str, most: int = 100) -> str:
  """A text, or its first `most` characters."""
  return text if len(text) <= most else f'{text[:most]}…'
