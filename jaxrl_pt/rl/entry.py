"""One row of a table of methods."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Function = TypeVar('Function')


@dataclass(frozen=True)
class Entry(Generic[Function]):
  """What one config type stands for.

  compute: the function, whose first argument is the config value.
  equation: of the function, as `jaxrl-pt methods` prints it.
  paper: arXiv id, or the code that it comes from.
  title, gin: the method that is known for this choice, and the stem of its file in gin/method;
  empty for a choice that methods share.
  needs_policy: whether `compute` reads scores of the policy before the update.
  learns_modes: whether the token of a response's mode is learned from even if it was forced.
  modes_even: whether the old policy of that token is the even draw of the modes, instead of the
  policy before the update.
  """

  compute: Function
  equation: str
  paper: str
  title: str = ''
  gin: str = ''
  needs_policy: bool = False
  learns_modes: bool = False
  modes_even: bool = False
