"""What holds for every task: addresses, splits, twins, balance, grades and controls."""

from collections import Counter, defaultdict
import functools
import math
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_pt.data.spatial import base, canvas, direction, items
from jaxrl_pt.errors import UserError

EACH = pytest.mark.parametrize('task', items.TASKS, ids=lambda task: task.name)
NUM = 8
HOSTILE = ('', ' ', '\x00', 'nan', 'NaN', 'inf', '-inf', '1e400', '9' * 10**6, '-1', '1/2', '0x10',
           '１２', '٣', 'None', '{}', '(' * 10**6, 'x' * 10**6, '1_0', '+3', '3 3 3', '...')


@functools.cache
def sample(task, level=2, split='train', twin=False):
  return [items.item(task, level, split, 7, index, 48, twin) for index in range(NUM)]


# --- Addresses and splits ---------------------------------------------------------


@EACH
def test_an_item_is_a_function_of_its_address(task):
  forwards = sample(task)
  for index in (NUM - 1, 3, 0):
    again = items.item(task, 2, 'train', 7, index, 48)
    assert again._replace(pictures=0) == forwards[index]._replace(pictures=0)
    np.testing.assert_array_equal(again.pictures, forwards[index].pictures)
  assert len({repr(item.scene) for item in forwards}) > NUM - 3
  assert items.item(task, 2, 'train', 8, 0, 48).scene != forwards[0].scene


def test_items_are_the_same_in_another_process():
  code = ('from jaxrl_pt.data.spatial import items\n'
          'for task in items.TASKS:\n'
          '  print(repr(items.item(task, 1, "train", 7, 2, 48).scene))')
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True, text=True,
                         env={'PYTHONHASHSEED': '5', 'PYTHONPATH': ':'.join(sys.path)})
  assert found.stdout.splitlines() == [repr(items.item(task, 1, 'train', 7, 2, 48).scene)
                                       for task in items.TASKS]


@EACH
def test_no_scene_is_in_two_splits(task):
  """Whatever the seed; a scene is what is seen and asked, not only its record."""
  shown = defaultdict(set)
  for split in ('train', 'held_out', 'size', 'appearance'):
    level = items.levels(task, split)[0]
    for seed in (0, 1):
      for index in range(6):
        for scene in items.scenes(task, level, split, seed, index):
          key = task.question(scene), task.pictures(scene, 48).tobytes()
          shown[key].add(split)
          assert items.part(scene) in {'train': (0, 1, 2), 'size': (4,)}.get(split, (3,))
  assert {len(splits) for splits in shown.values()} == {1}


@EACH
def test_appearance_shares_no_colour_with_training(task):
  def colours(split):
    return {tuple(rgb) for index in range(10) for rgb in np.unique(
        items.item(task, 2, split, 0, index, 48).pictures.reshape(-1, 3), axis=0).tolist()}
  assert colours('appearance').isdisjoint(colours('train'))


def test_looks_share_neither_names_nor_shapes():
  one, other = base.TRAINED_LOOK, base.OTHER_LOOK
  assert {name for name, _ in one.colours}.isdisjoint(name for name, _ in other.colours)
  assert {rgb for _, rgb in one.colours}.isdisjoint(rgb for _, rgb in other.colours)
  assert set(one.shapes).isdisjoint(other.shapes) and repr(one) != repr(other)
  for look in (one, other):
    tones = [*(rgb for _, rgb in look.colours), look.background, canvas.faint(look.background),
             canvas.ink(look.background)]
    assert min(math.dist(a, b) for k, a in enumerate(tones) for b in tones[:k]) > 45


# --- Pictures, words and twins ----------------------------------------------------


@EACH
@pytest.mark.parametrize('side', [48, 49, 130])
def test_pictures_have_the_side_asked_for(task, side):
  for split in ('train', 'size', 'appearance'):
    item = items.item(task, items.levels(task, split)[-1], split, 0, 0, side)
    assert item.pictures.dtype == np.uint8
    assert item.pictures.shape[1:] == (side, side, 3)
    assert 1 <= len(item.pictures) <= task.num_pictures


@EACH
def test_every_text_is_plain_and_the_answer_is_an_option(task):
  for item in sample(task):
    assert all(text.strip() == text != '' for text in (item.question, item.answer, item.state))
    assert not item.options or item.options.count(item.answer) == 1
    assert len(set(item.options)) == len(item.options)
    assert items.grade(item, item.answer) == base.Grade(True, 1.0, True)
    assert items.grade(item, f'  {item.answer.upper()}\n') == base.Grade(True, 1.0, True)
    assert 0 <= items.chance(item) < 1
    assert hash(item.scene) is not None


@EACH
def test_a_twin_has_another_picture_or_question_and_another_answer(task):
  for item, twin in zip(sample(task), sample(task, twin=True), strict=True):
    assert item.answer != twin.answer and item.options == twin.options
    assert not items.grade(twin, item.answer).correct
    assert not items.grade(item, twin.answer).correct
    differs = not np.array_equal(item.pictures, twin.pictures)
    assert differs != (item.question != twin.question)
    assert item.pictures.shape == twin.pictures.shape


# --- Balance and grades -----------------------------------------------------------


def _kind(task, scene):
  return len(task.options(scene)), task.question(scene).split()[0]


@EACH
def test_no_constant_answer_is_better_than_chance(task):
  _assert_balanced(task, 2, 80)


@pytest.mark.slow
@EACH
def test_no_constant_answer_is_better_than_chance_in_many_items(task):
  for level in range(1, task.num_levels + 1):
    _assert_balanced(task, level, 600)


def _assert_balanced(task, level, num):
  split = 'train' if level <= base.NUM_TRAINED_LEVELS else 'size'
  kinds = defaultdict(list)
  for index in range(num):
    scene = items.scenes(task, level, split, 11, index)[0]
    kinds[_kind(task, scene)].append(scene)
  for scenes in kinds.values():
    answers = Counter(map(task.answer, scenes))
    chance = float(np.mean([task.chance(scene) for scene in scenes]))
    best = max(float(np.mean([task.grade(scene, answer).score for scene in scenes]))
               for answer, _ in answers.most_common(8))
    noise = math.sqrt(max(chance, 0.02) * (1 - chance) / len(scenes))
    assert best <= chance + 4 * noise, (answers.most_common(3), chance)


@EACH
def test_hostile_answers_score_nothing(task):
  for item in sample(task)[:4]:
    several = [' '.join(item.options), ', '.join(item.options), '\n'.join(item.options),
               f'{item.answer}, {item.answer}', f'{item.answer} or {item.answer}',
               f'answer: {item.answer}', f'<answer>{item.answer}</answer>',
               ' '.join([item.answer] * 10**5), item.answer + ' ' * 10**6, f'{item.answer}\x00',
               f'"{item.answer}"']
    for text in (*HOSTILE, *several):
      if text.strip().casefold() == item.answer.casefold() and len(text) < 1000:
        continue
      assert items.grade(item, text) in (base.INVALID, base.WRONG), text[:50]


@pytest.mark.parametrize('answer', [1, 7, 20, 119])
def test_a_number_is_graded_by_mean_relative_accuracy(answer):
  for tenths in range(0, 3 * answer * 10, max(answer // 7, 1)):
    given = f'{tenths // 10}.{tenths % 10}'
    hits = [abs(tenths - 10 * answer) * 100 <= 10 * answer * percent
            for percent in (50, 45, 40, 35, 30, 25, 20, 15, 10, 5)]
    grade = base.grade_number(answer, given)
    assert grade == base.Grade(tenths == 10 * answer, sum(hits) / 10, True), given
  assert base.grade_number(20, '18').score == 0.9 and base.grade_number(20, '19').score == 1.0
  assert base.grade_number(20, '18').correct is False


def test_the_best_constant_is_found():
  assert base.best_constant([1, 1, 2]) == pytest.approx((1 + 1 + 0.1) / 3)
  answers = list(range(1, 8))
  assert base.best_constant(answers) == max(
      sum(base.grade_number(a, str(g)).score for a in answers) / 7 for g in range(1, 100))


# --- Controls ---------------------------------------------------------------------


@EACH
def test_grey_and_the_question_alone_tell_nothing_of_the_scene(task):
  for item, twin in zip(sample(task), sample(task, twin=True), strict=True):
    greys = [items.grey(one) for one in (item, twin)]
    assert (greys[0].pictures == items.GREY).all()
    np.testing.assert_array_equal(greys[0].pictures, greys[1].pictures)
    alone = [items.question_only(one) for one in (item, twin)]
    for control in (*greys, *alone):
      assert control.state == '' and control.answer in (item.answer, twin.answer)
    assert alone[0].pictures.size == 0
    if item.question == twin.question:
      assert items.prompt(alone[0]) == items.prompt(alone[1])


@EACH
def test_the_state_as_text_stands_before_the_question(task):
  item = sample(task)[0]
  control = items.text_state(item)
  assert control.question == f'{item.state} {item.question}' and control.pictures.size == 0
  assert item.state not in items.prompt(item)


def test_shuffled_patches_are_the_same_patches_elsewhere():
  item = sample(direction.TASK)[0]
  control = items.shuffled_patches(item, 6, np.random.default_rng(0))

  def patches(pictures):
    return Counter(pictures[0, r:r + 6, c:c + 6].tobytes()
                   for r in range(0, 48, 6) for c in range(0, 48, 6))
  assert patches(control.pictures) == patches(item.pictures)
  assert not np.array_equal(control.pictures, item.pictures) and control.state == ''
  moved = items.shuffled_patches(item._replace(
      pictures=np.arange(48 * 48 * 3, dtype=np.uint16).reshape(1, 48, 48, 3)), 6,
      np.random.default_rng(0))
  assert len(np.unique(moved.pictures)) == 48 * 48 * 3
  with pytest.raises(UserError, match='do not fill a picture of 48'):
    items.shuffled_patches(item, 5, np.random.default_rng(0))


@EACH
def test_mirrored_twice_is_the_item_but_for_its_state(task):
  for item in sample(task)[:5]:
    if task.name in ('program', 'folding'):
      with pytest.raises(UserError, match='hold letters'):
        items.mirrored(item)
      continue
    once, twice = items.mirrored(item), items.mirrored(items.mirrored(item))
    assert once.is_mirrored and items.grade(once, once.answer).correct
    np.testing.assert_array_equal(once.pictures, item.pictures[:, :, ::-1])
    assert twice._replace(pictures=0, state='') == item._replace(pictures=0, state='')


def test_words_are_mirrored():
  assert items.mirrored_words('Left of it, right away: above right') == (
      'Right of it, left away: above left')
  assert items.mirrored_words('U D L R') == 'U D R L' and items.mirrored_words('llr') == 'rrl'
  assert items.mirrored_words('bright leftover') == 'bright leftover'


@EACH
def test_options_are_permuted_or_joined_by_one_that_is_never_right(task):
  rng = np.random.default_rng(1)
  for item in sample(task)[:5]:
    permuted = items.permuted_options(item, rng)
    assert sorted(permuted.options) == sorted(item.options)
    more = items.with_distractor_option(item, rng)
    added = set(more.options) - set(item.options)
    assert len(more.options) == len(item.options) + len(added)
    assert len(added) == (1 if item.options else 0)
    for word in added:
      assert not items.grade(more, word).correct and word in items.prompt(more)
  orders = {items.permuted_options(sample(direction.TASK)[0], rng).options for _ in range(20)}
  assert len(orders) > 10


# --- Mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize('changed, expected', [
    ({'level': 4}, 'levels 1 to 3, not 4'), ({'split': 'size'}, 'levels 4 to 5, not 1'),
    ({'split': 'test'}, 'no split .test.'), ({'index': -1}, 'counted from 0'),
    ({'side': 47}, '48 to 1024 pixels wide, not 47'), ({'side': 2000}, '48 to 1024'),
    ({'split': 'composition', 'level': 2}, 'only program composes operations')])
def test_an_item_that_is_not_there_is_a_mistake(changed, expected):
  asked = {'level': 1, 'split': 'train', 'seed': 0, 'index': 0, 'side': 48} | changed
  with pytest.raises(UserError, match=expected):
    items.item(direction.TASK, **asked)


def test_a_task_is_found_by_its_name():
  assert all(items.named(task.name) is task for task in items.TASKS)
  assert len({task.name for task in items.TASKS}) == len(items.TASKS)
  with pytest.raises(UserError, match="no task 'chess'.*choose one of direction, distance"):
    items.named('chess')
