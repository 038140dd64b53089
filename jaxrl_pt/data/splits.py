"""Refuses measuring on what has been trained on, by counting what two sides share.

A split by a hash of the content (`pack.hold_out`) keeps equal texts on one side. Two sides that
were made apart, such as two sets of files, or a policy's corpus and the problems that it is
measured on, may share texts: whoever puts them together calls `refuse_overlap`.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from jaxrl_pt.errors import UserError, shortened


@dataclass(frozen=True)
class Apart:
  """Two sides that share nothing.

  num_training: items trained on, repetitions included.
  num_held_out: distinct items that are held out.
  """

  what: str
  num_training: int
  num_held_out: int

  def __str__(self) -> str:
    return (f'{self.what}: none of the {self.num_held_out} distinct held-out ones is among the '
            f'{self.num_training} trained on')


def refuse_overlap(training: Iterable[Hashable], held_out: Iterable[Hashable], what: str,
                   advice: str = 'leave them out of one side.') -> Apart:
  """Counts the distinct items that two sides share, and allows none.

  Args:
    training: what is trained on, gone through once: texts, or tokens as bytes or tuples.
    held_out: what is measured on, of the same kind; kept in memory.
    what: names the items in the plural, e.g. 'documents'.
    advice: what to do about an overlap; it ends the message.

  Returns:
    The counts; `str` of it is a line to print.

  Raises:
    UserError: an item is on both sides. The message says how many of how many, and quotes one.
  """
  measured, shared, num_training = set(held_out), set(), 0
  for item in training:
    num_training += 1
    if item in measured:
      shared.add(item)
  if shared:
    example = shortened(min(map(repr, shared)), 60)
    raise UserError(
        f'{len(shared)} of the {len(measured)} distinct held-out {what} '
        f'({len(shared) / len(measured):.0%}) are trained on too, such as {example}: {advice}')
  return Apart(what, num_training, len(measured))
