"""Figures, programs and folds: read from pixels, against plain definitions of their own."""

import re

import numpy as np
import pytest

from jaxrl_pt.data.spatial import base, boards, canvas, folding, polyomino, program
from jaxrl_pt.errors import UserError

LOOKS = base.TRAINED_LOOK, base.OTHER_LOOK


def drawn(task, num=12, is_composed=False, levels=None):
  """Scenes of all levels in both looks, and their twins."""
  for level in levels or range(1, task.num_levels + 1):
    for index in range(num):
      rng = base.generator(3, 'test', task.name, level, index)
      scene = task.draw(rng, level, LOOKS[index % 2], is_composed)
      yield from (scene, task.twin(rng, scene))


def colours_at(picture, top, left, size, num_cells):
  """The colours at the first pixel of each cell of a board."""
  ends = slice(top, top + size * num_cells, size), slice(left, left + size * num_cells, size)
  return picture[ends]


# --- Polyominoes ------------------------------------------------------------------


def _cropped(filled):
  rows, columns = np.nonzero(filled)
  return filled[rows.min():rows.max() + 1, columns.min():columns.max() + 1]


def _is_congruent(one, other):
  """Whether any of the four turns of a figure is the other one, wherever they lie."""
  return any(np.array_equal(np.rot90(_cropped(one), k), _cropped(other)) for k in range(4))


def test_figures_in_pixels_are_the_same_or_mirrored():
  for scene in drawn(polyomino.TASK, 12):
    picture = polyomino.pictures(scene, 48)[0]
    left, right = ((colours_at(picture, 14, x, 4, 5) != scene.look.background).any(-1)
                   for x in (1, 27))
    assert left.sum() == right.sum() > 3
    is_same, is_mirrored = _is_congruent(left, right), _is_congruent(left, right[:, ::-1])
    assert is_same != is_mirrored
    assert polyomino.answer(scene) == ('same' if is_same else 'mirrored')


def test_canonical_forms_count_the_one_sided_polyominoes():
  figures = {((0, 0),)}
  for count in (1, 2, 7, 18, 60):  # OEIS A000988 from two cells on.
    figures = {polyomino.canonical(frozenset({*figure, (r + dr, c + dc)}))
               for figure in figures for r, c in figure
               for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)) if (r + dr, c + dc) not in figure}
    assert len(figures) == count


def test_a_mirrored_twin_stays_in_its_outline():
  for index in range(20):
    rng = base.generator(0, 'test', 'polyomino', 2, index)
    scene = polyomino.draw(rng, 2, LOOKS[0], False)
    twin = polyomino.twin(rng, scene)
    assert twin.first == scene.first
    one, other = (np.nonzero(np.array(s.second)) for s in (scene, twin))
    assert [(a.min(), a.max()) for a in one] == [(a.min(), a.max()) for a in other]


# --- Programs ---------------------------------------------------------------------

_OPERATIONS = {
    'turn right': lambda b: np.rot90(b, -1), 'turn left': np.rot90,
    'half turn': lambda b: b[::-1, ::-1], 'flip sideways': np.fliplr, 'flip upside down': np.flipud,
    'shift right': lambda b: np.roll(b, 1, 1), 'shift left': lambda b: np.roll(b, -1, 1),
    'shift down': lambda b: np.roll(b, 1, 0)}


def test_programs_run_on_pixels():
  assert set(_OPERATIONS) == set(program.NAMES)
  for scene in drawn(program.TASK, 12):
    picture = program.pictures(scene, 48)[0]
    board = colours_at(picture, 18, 1, 4, 3)
    for name in re.search(r'left: (.*)\. Which', program.question(scene))[1].split(', '):
      board = _OPERATIONS[name](board)
    results = [colours_at(picture, top, left, 5, 3) for top, left in ((7, 16), (7, 33), (31, 16),
                                                                      (31, 33))]
    right = [np.array_equal(board, result) for result in results]
    assert sum(right) == 1 and program.answer(scene) == 'ABCD'[right.index(True)]


def test_traces_of_programs_end_in_the_answer():
  for scene in drawn(program.TASK, 6):
    trace = program.trace(scene)
    board = np.array(scene.start)
    for name, after in zip(scene.program, trace, strict=True):
      board = _OPERATIONS[name](board)
      assert np.array_equal(board, after)
    assert trace[-1] == scene.results['ABCD'.index(program.answer(scene))]
    lines = program.trace_text(scene).split('\n')
    assert [line.split(':')[0] for line in lines] == list(scene.program)
    assert lines[-1].endswith(boards.text(trace[-1], scene.colours))


@pytest.mark.parametrize('is_composed', [False, True])
def test_unseen_pairs_are_in_every_composition_and_nowhere_else(is_composed):
  firsts, seconds = set(), set()
  for scene in drawn(program.TASK, 30, is_composed, range(2, 6)):
    pairs = set(zip(scene.program, scene.program[1:]))
    assert bool(pairs & program.UNSEEN) == is_composed
    firsts |= {a for a, _ in pairs}
    seconds |= {b for _, b in pairs}
  assert firsts == seconds == set(program.NAMES)  # Only pairs are new, never operations.
  assert len(program.UNSEEN) == 16


def test_a_program_of_one_step_composes_nothing():
  with pytest.raises(UserError, match='level 1, whose programs have one step'):
    program.draw(np.random.default_rng(0), 1, LOOKS[0], True)


def test_twins_of_programs_differ_in_one_step():
  for level in (1, 3, 5):
    rng = base.generator(0, 'test', 'program', level, 0)
    scene = program.draw(rng, level, LOOKS[0], False)
    twin = program.twin(rng, scene)
    assert sum(a != b for a, b in zip(scene.program, twin.program)) == 1
    assert (twin.start, twin.results) == (scene.start, scene.results)


# --- Folds ------------------------------------------------------------------------


def _sheets(picture, scene):
  """The four sheets of a picture: 0 folded away, 1 paper, 2 a hole; None where there is none."""
  ground, size = scene.look.background, 4 if scene.size == 4 else 3
  kinds = {canvas.faint(ground): 0, scene.look.rgb(scene.colour): 1, ground: 2}
  found = [np.array([[kinds[tuple(cell)] for cell in row] for row in colours_at(
      picture, top + 6, left + 3, size, scene.size).tolist()])
           for top in (0, 24) for left in (0, 24)]
  return [sheet if (sheet < 2).any() else None for sheet in found]


def _layers(steps):
  """Where each cell of the sheet lies after each fold, i32[K + 1, n, n, 2], from pictures of it.

  The flap is what the next picture no longer shows; its middle tells the side it comes from.
  """
  size = len(steps[0])
  places = [np.stack(np.meshgrid(range(size), range(size), indexing='ij'), -1)]
  for before, after in zip(steps, steps[1:]):
    flap = np.argwhere((before > 0) & (after == 0))
    rest = np.argwhere(after > 0)
    axis = int(np.argmax(np.abs(flap.mean(0) - rest.mean(0))))
    is_first = flap.mean(0)[axis] < rest.mean(0)[axis]
    line = rest.min(0)[axis] - 0.5 if is_first else rest.max(0)[axis] + 0.5
    moved = places[-1].copy()
    beyond = moved[..., axis] < line if is_first else moved[..., axis] > line
    moved[..., axis] = np.where(beyond, 2 * line - moved[..., axis], moved[..., axis])
    places.append(moved)
  return places


def test_holes_go_through_every_layer():
  for scene in drawn(folding.TASK, 6):
    both = folding.pictures(scene, 48)
    steps = [sheet for sheet in _sheets(both[0], scene) if sheet is not None]
    assert len(steps) == len(scene.recipe.folds) + 1
    places = _layers(steps)
    punched = {tuple(cell) for cell in np.argwhere(steps[-1] == 2).tolist()}
    assert punched
    holed = np.array([[tuple(place) in punched for place in row] for row in places[-1].tolist()])
    results = [sheet == 2 for sheet in _sheets(both[1], scene)]
    right = [np.array_equal(holed, result) for result in results]
    assert sum(right) == 1 and folding.answer(scene) == 'ABCD'[right.index(True)]
    # What a trace shows after each step is what all layers of a cell have in common.
    trace = folding.trace(scene)
    assert len(trace) == len(scene.recipe.folds)
    for board, place in zip(trace, places[-2::-1]):
      shown = np.zeros((scene.size, scene.size), int)
      shown[tuple(place.reshape(-1, 2).T)] = 1 + holed.reshape(-1)
      assert np.array_equal(shown, board)
      layers = np.array(board)[tuple(place.reshape(-1, 2).T)]
      assert np.array_equal(layers == 2, holed.reshape(-1))
    assert folding.trace_text(scene).count('\n') == len(trace) - 1


def test_twins_of_folds_differ_in_one_fold_or_one_punch():
  for level in (1, 3, 5):
    for index in range(8):
      rng = base.generator(0, 'test', 'folding', level, index)
      scene = folding.draw(rng, level, LOOKS[0], False)
      one, other = scene.recipe, folding.twin(rng, scene).recipe
      folds = sum(a != b for a, b in zip(one.folds, other.folds))
      assert folds + len(set(one.punches) - set(other.punches)) == 1


def test_impossible_folds_are_none():
  fold = folding.Fold('left', 2)
  assert folding.areas(4, (fold, folding.Fold('right', 2))) is None
  assert not folding.is_possible(4, folding.Recipe((fold,), ((0, 1),)))
  assert folding.is_possible(4, folding.Recipe((fold,), ((0, 2),)))
