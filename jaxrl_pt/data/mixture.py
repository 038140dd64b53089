"""The order in which the examples of several sources are drawn, as a function of the index.

A source with share wᵢ of W = Σ w gives wᵢ of each W examples. After any number n of examples,

    | countᵢ(n) − n·wᵢ/W | < 1

for every source. The j-th example of source i may stand at the places ⌊j·W/wᵢ⌋ … ⌈(j+1)·W/wᵢ⌉ − 1.
Of those that may stand at a place, the one whose last place comes first is taken. Such a schedule
exists for all shares, and this rule finds it (Baruah, Cohen, Plaxton and Varvel, "Proportionate
progress", Algorithmica 15, 1996, for one processor).

Grain's own `MapDataset.mix` rounds weights to a hundredth of the smallest one and, with more than
two sources, may be off by more than one example.
"""

from collections.abc import Sequence
import dataclasses
import heapq

import grain
import numpy as np

# Numbers before an order ends. The length of Grain's own endless repetition, 2⁶³ − 1, overflows in
# batches of one row.
ENDLESS = 2**55


@dataclasses.dataclass(frozen=True, eq=False)
class Interleaving(grain.transforms.DatasetSelectionMap):
  """Which source example n comes from, and its number among those of this source.

  source_W: i32[W] the sources of one period.
  number_W: i32[W] how many examples of the same source come before, in this period.
  shares: the examples of each source in a period.
  """

  source_W: np.ndarray
  number_W: np.ndarray
  shares: tuple[int, ...]

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> tuple[int, int]:
    period, place = divmod(index, len(self.source_W))
    source = int(self.source_W[place])
    return source, period * self.shares[source] + int(self.number_W[place])


def interleaving(shares: Sequence[int]) -> Interleaving:
  """The schedule of the module's docstring.

  Args:
    shares: wᵢ, whole numbers of at least 1 without a common divisor.
  """
  total = sum(shares)
  source_W, number_W = np.zeros(total, np.int32), np.zeros(total, np.int32)
  counts = [0] * len(shares)
  waiting = [(0, i) for i in range(len(shares))]  # (first place of the next example, source)
  ready: list[tuple[int, int]] = []  # (place after its last one, source)
  for place in range(total):
    while waiting and waiting[0][0] <= place:
      _, i = heapq.heappop(waiting)
      heapq.heappush(ready, (-(-(counts[i] + 1) * total // shares[i]), i))
    _, i = heapq.heappop(ready)
    source_W[place], number_W[place] = i, counts[i]
    counts[i] += 1
    heapq.heappush(waiting, (counts[i] * total // shares[i], i))
  return Interleaving(source_W, number_W, tuple(shares))


def permuted(first: int, end: int, seed: int) -> grain.MapDataset:
  """The numbers from first to end − 1 in a permutation that is drawn anew each epoch, without end.

  It ends after ENDLESS numbers.
  """
  return grain.MapDataset.range(first, end).shuffle(seed=seed).repeat(ENDLESS // (end - first))


def order(num_examples: Sequence[int], shares: Sequence[int], seed: int) -> grain.MapDataset:
  """Numbers of examples without end, in which every source has its share.

  Each source's examples come in a permutation that is drawn anew whenever all have been drawn.

  Args:
    num_examples: the examples of each source, which are numbered through.
    shares: as `interleaving` takes them.
    seed: decides the permutations.
  """
  ends = np.cumsum(num_examples).tolist()
  seeds = np.random.SeedSequence(seed).generate_state(len(ends)).tolist()
  parts = [permuted(end - number, end, own)
           for end, number, own in zip(ends, num_examples, seeds, strict=True)]
  return grain.MapDataset.select_from_datasets(parts, interleaving(shares))
