"""The tasks of relation and quantity against readers of their pictures and of their words."""

import pytest

from jaxrl_pt.data.spatial import canvas, items
from tests.data.spatial import seen

TASKS = [items.named(name) for name in
         ('direction', 'distance', 'topology', 'order', 'localise', 'count')]
NUM = 8
BOTH = pytest.mark.parametrize('task', TASKS, ids=lambda task: task.name)


def cases(task, num=3, side=48, splits=('train', 'size', 'appearance')):
  """Items of every level of three splits, and their twins."""
  for split in splits:
    for level in items.levels(task, split):
      for index in range(num):
        yield items.item(task, level, split, 3, index, side)
        yield items.item(task, level, split, 3, index, side, twin=True)


@BOTH
def test_the_answer_follows_from_pixels_and_from_words(task):
  _assert_follows(cases(task))


@pytest.mark.slow
@BOTH
def test_the_answer_follows_in_many_items(task):
  _assert_follows(cases(task, 100))


def _assert_follows(found):
  for item in found:
    assert seen.answer_from_picture(item) == item.answer, item.question
    assert seen.answer_from_words(item) == item.answer, item.question


@BOTH
@pytest.mark.parametrize('side', [61, 96])
def test_the_answer_follows_from_pixels_at_other_sides(task, side):
  """At sides that are no multiple of 48 units are uneven, and only lengths may come out rounded."""
  for item in cases(task, 1, side):
    found = seen.answer_from_picture(item)
    if item.options:
      assert found == item.answer, item.question
    else:
      assert items.grade(item, found).score >= (0.8 if side % 48 else 1.0), item.question


@BOTH
def test_a_mirror_flips_left_and_right_and_leaves_the_rest(task):
  num_flipped = 0
  for item in cases(task, 4, splits=('train', 'appearance')):
    mirrored = items.mirrored(item)
    assert seen.answer_from_picture(mirrored) == mirrored.answer, mirrored.question
    assert items.grade(mirrored, mirrored.answer).correct
    flips = 'left' in item.answer or 'right' in item.answer
    assert (mirrored.answer != item.answer) == flips
    assert items.grade(mirrored, item.answer).correct != flips
    num_flipped += flips
  assert (num_flipped > 10) == (task.name == 'direction')


@BOTH
def test_a_twin_differs_in_one_thing(task):
  for index in range(NUM):
    item, twin = (items.item(task, 2, 'train', 5, index, 48, twin) for twin in (False, True))
    assert (item.question, item.options) == (twin.question, twin.options)
    parts, changed = (set(_parts(one.state)) for one in (item, twin))
    assert len(parts - changed) == len(changed - parts) == 1, (item.state, twin.state)
    found, others = (sorted((t.colour, t.shape) for t in seen.in_picture(
        one.pictures[0], seen.look_of(one))) for one in (item, twin))
    if task.name in ('direction', 'distance', 'order', 'localise'):
      assert found == others  # Something moved, and nothing else became of it.


def _parts(state):
  """What a state says of each thing; of a grid, the cells that hold one with their places."""
  if ' / ' not in state:
    return state.removesuffix('.').replace('right. ', 'right; ').replace('way. ', 'way; ').replace(
        ', the', '; the').replace(' units long', '').replace(' units', '').replace('The', 'the'
        ).split('; ')
  rows = state.split(': ')[1].removesuffix('.').split(' / ')
  return [(r, c, cell) for r, row in enumerate(rows) for c, cell in enumerate(row.split(', '))
          if cell != '.']


def test_what_is_asked_about_shows_its_outline():
  """Every thing in a picture without overlaps is found with the shape that words give it."""
  for task in TASKS[:2]:
    for item in cases(task, 2):
      found = {(t.name, t.middle) for t in seen.in_picture(item.pictures[0], seen.look_of(item))}
      assert found == {(t.name, t.middle) for t in seen.in_words(item.state)}


def test_margins_hold_in_pixels():
  """Gaps between panels are as wide as their level says."""
  task = items.named('topology')
  for level, gap in ((1, 6), (3, 3), (4, 2), (5, 1)):
    split = 'train' if level < 4 else 'size'
    for index in range(12):
      item = items.item(task, level, split, 0, index, canvas.UNITS)
      if item.answer == 'apart':
        a, b = (seen.extents(item.pictures[0], seen.look_of(item), panel.colour)
                for panel in (item.scene.a, item.scene.b))
        assert max(b.top - a.bottom, a.top - b.bottom, b.left - a.right, a.left - b.right) >= gap
