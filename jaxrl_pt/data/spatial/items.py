"""Items of the tasks, and the controls that show whether an answer came from the picture.

A scene belongs to one part of the splits by what it holds, so that no scene is in training and in a
held-out split, whatever the seeds. An item and its twin are in the same part.
"""

from collections.abc import Sequence
import hashlib
import re
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt.data.spatial import (
    base,
    count,
    direction,
    distance,
    folding,
    localise,
    maze,
    order,
    perspective,
    polyomino,
    program,
    topology,
    views,
    walk,
)
from jaxrl_pt.data.spatial.base import Capability, Grade, Process, Split, Task
from jaxrl_pt.errors import UserError, shown

# In the order of the table in docs/spatial.md.
TASKS: tuple[Task, ...] = (
    direction.TASK, distance.TASK, topology.TASK, order.TASK, localise.TASK, polyomino.TASK,
    program.TASK, folding.TASK, perspective.TASK, views.TASK, maze.TASK, walk.TASK, count.TASK)
MIN_SIDE, MAX_SIDE = 48, 1024
GREY = 127
# Which fifths of all scenes a split may hold. Levels tell `size` from the other ones that are held
# out, a look of its own `appearance`, and operations that are never trained on `composition`.
_PARTS: dict[str, tuple[int, ...]] = {
    'train': (0, 1, 2), 'held_out': (3,), 'size': (4,), 'composition': (3,), 'appearance': (3,)}
_TRIES = 10_000
_TWINS = 8
# What a mirror makes of words: each is replaced by the other of its pair.
_MIRRORED = {one: other for pair in (('left', 'right'), ('west', 'east'),
                                     ('clockwise', 'counterclockwise'))
             for one, other in (pair, pair[::-1])}
_PATH = re.compile(r'[UDLR\s]+', re.IGNORECASE)
_MIRRORED_STEP = str.maketrans('LRlr', 'RLrl')
# Letters in a picture do not survive a mirror, nor do some of the operations.
_WITHOUT_MIRROR = ('program', 'folding')
_MIRRORED_WORD = re.compile(rf'\b({"|".join(_MIRRORED)})\b', re.IGNORECASE)
# One more of these among the options changes right answers of some models, arXiv 2606.01914.
_SPATIAL_WORDS = ('beyond', 'opposite', 'beneath', 'alongside', 'underneath', 'diagonal', 'nearby')


class Item(NamedTuple):
  """A question on pictures and all that is known of it.

  pictures: u8[N, side, side, 3].
  state: the scene in words or symbols; '' where a control takes it away.
  is_mirrored: pictures and words are mirrored, and the scene is not.
  """

  task: str
  level: int
  split: str
  index: int  # type: ignore[assignment]  # It hides tuple.index, which nobody needs here.
  pictures: np.ndarray
  question: str
  answer: str
  options: tuple[str, ...]
  state: str
  scene: Any
  capability: Capability
  process: Process
  is_mirrored: bool = False


# --- Items ------------------------------------------------------------------------


def named(name: str) -> Task:
  """The task of this name.

  Raises:
    UserError: there is none.
  """
  for task in TASKS:
    if task.name == name:
      return task
  raise UserError(f'There is no task {shown(name)} of spatial reasoning: choose one of '
                  f'{", ".join(task.name for task in TASKS)}.')


def levels(task: Task, split: Split) -> range:
  """The levels of a task that a split holds."""
  if split == 'size':
    return range(base.NUM_TRAINED_LEVELS + 1, task.num_levels + 1)
  if split == 'composition':
    return range(2, base.NUM_TRAINED_LEVELS + 1)  # One operation is no composition.
  return range(1, base.NUM_TRAINED_LEVELS + 1)


def item(task: Task, level: int, split: Split, seed: int, index: int, side: int,
         twin: bool = False) -> Item:
  """Item `index` of a task, or its twin, whose scene differs in one thing and in the answer.

  Raises:
    UserError: a split without this level, an index below 0, or a side out of bounds.
  """
  _check(task, level, split, index, side)
  scene = scenes(task, level, split, seed, index)[twin]
  return Item(task.name, level, split, index, task.pictures(scene, side), task.question(scene),
              task.answer(scene), task.options(scene), task.describe(scene), scene,
              task.capability, task.process)


def _check(task: Task, level: int, split: Split, index: int, side: int) -> None:
  if split not in _PARTS:
    raise UserError(f'There is no split {shown(split)} of spatial reasoning: choose one of '
                    f'{", ".join(_PARTS)}.')
  held = levels(task, split)
  if level not in held:
    raise UserError(f'The split {split} of {task.name} has levels {held[0]} to {held[-1]}, not '
                    f'{shown(level)}: choose one of them or another split.')
  if not MIN_SIDE <= side <= MAX_SIDE:
    raise UserError(f'A picture is {MIN_SIDE} to {MAX_SIDE} pixels wide, not {shown(side)}: '
                    'choose another side.')
  if not 0 <= index < 2**63:
    raise UserError(f'Items are counted from 0, and {shown(index)} is none: choose another index.')


def part(scene: Any) -> int:
  """Which fifth of all scenes a scene belongs to."""
  return int.from_bytes(hashlib.blake2b(repr(scene).encode(), digest_size=8).digest()) % 5


def scenes(task: Task, level: int, split: Split, seed: int, index: int) -> tuple[Any, Any]:
  """The scene of an item and its twin's: the first that are drawn in a part of the split."""
  rng = base.generator(seed, split, task.name, level, index)
  look = base.OTHER_LOOK if split == 'appearance' else base.TRAINED_LOOK
  for _ in range(_TRIES):
    scene = task.draw(rng, level, look, split == 'composition')
    if part(scene) not in _PARTS[split]:
      continue
    for _ in range(_TWINS):
      twin = task.twin(rng, scene)
      if twin is None:
        break
      if part(twin) in _PARTS[split]:
        return scene, twin
  raise AssertionError(f'{task.name} has scenes with twins in each part')


def prompt(shown_item: Item) -> str:
  """The question with its options, which are all that may be said of an item in words."""
  if not shown_item.options:
    return shown_item.question
  return f'{shown_item.question} Options: {", ".join(shown_item.options)}.'


def grade(asked: Item, text: str) -> Grade:
  """Grades an answer's text, that to a mirrored picture too."""
  if asked.is_mirrored and len(text) <= base.MAX_ANSWER_CHARS:
    text = mirrored_words(text)
  return named(asked.task).grade(asked.scene, text)


def chance(asked: Item) -> float:
  """The expected score of the best answer that does not look at the pictures."""
  return named(asked.task).chance(asked.scene)


# --- Controls ---------------------------------------------------------------------


def grey(original: Item) -> Item:
  """Pictures of one grey, the same for every item: the mean of a picture could tell a count."""
  return original._replace(pictures=np.full_like(original.pictures, GREY), state='')


def shuffled_patches(original: Item, patch: int, rng: np.random.Generator) -> Item:
  """Each picture's patches in an order that is drawn.

  Raises:
    UserError: patches of this size do not fill a picture.
  """
  num, side = original.pictures.shape[:2]
  if patch < 1 or side % patch:
    raise UserError(f'Patches of {shown(patch)} pixels do not fill a picture of {side}: choose a '
                    'size that divides it.')
  per_side = side // patch
  patches = original.pictures.reshape(num, per_side, patch, per_side, patch, 3)
  patches = patches.swapaxes(2, 3).reshape(num, per_side**2, patch, patch, 3)
  moved = np.stack([picture[rng.permutation(per_side**2)] for picture in patches])
  moved = moved.reshape(num, per_side, per_side, patch, patch, 3).swapaxes(2, 3)
  return original._replace(pictures=moved.reshape(original.pictures.shape), state='')


def question_only(original: Item) -> Item:
  """The question without pictures."""
  return original._replace(pictures=original.pictures[:0], state='')


def text_state(original: Item) -> Item:
  """The scene in words before the question, instead of pictures."""
  return original._replace(pictures=original.pictures[:0],
                           question=f'{original.state} {original.question}')


def mirrored(original: Item) -> Item:
  """Pictures flipped left to right, and every left and right in words with them.

  Whoever looks answers as before, but for left and right; whoever does not cannot tell.

  Raises:
    UserError: the task's pictures hold letters.
  """
  if original.task in _WITHOUT_MIRROR:
    raise UserError(f'The pictures of {original.task} hold letters, which a mirror spoils: leave '
                    'the task out of this control.')
  return original._replace(
      pictures=original.pictures[:, :, ::-1], question=mirrored_words(original.question),
      answer=mirrored_words(original.answer),
      options=tuple(map(mirrored_words, original.options)), state='',
      is_mirrored=not original.is_mirrored)


def mirrored_words(text: str) -> str:
  """A text about a picture as a text about its mirror image; paths of letters U, D, L, R too."""
  if _PATH.fullmatch(text):
    return text.translate(_MIRRORED_STEP)
  def other(found: re.Match[str]) -> str:
    word = _MIRRORED[found[0].lower()]
    return word.capitalize() if found[0][0].isupper() else word
  return _MIRRORED_WORD.sub(other, text)


def permuted_options(original: Item, rng: np.random.Generator) -> Item:
  """The options in an order that is drawn."""
  order_O: Sequence[int] = rng.permutation(len(original.options)).tolist()
  return original._replace(options=tuple(original.options[k] for k in order_O))


def with_distractor_option(original: Item, rng: np.random.Generator) -> Item:
  """One more option, a spatial word that is never right, at a place that is drawn.

  An item without options stays as it is.
  """
  if not original.options:
    return original
  word = _SPATIAL_WORDS[int(rng.integers(len(_SPATIAL_WORDS)))]
  place = int(rng.integers(len(original.options) + 1))
  return original._replace(options=(*original.options[:place], word, *original.options[place:]))
