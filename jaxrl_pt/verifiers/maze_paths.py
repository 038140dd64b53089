"""The verifier of paths through mazes as a function of arrays, for whole batches of boards.

It equals `follow` of `jaxrl_pt.data.spatial.maze`, where exact match, progress rate and the
transition reward of Visual Planning (arXiv 2505.11409) are defined. Distances to the goal are

    d(goal) = 0,  d(c) = 1 + min over free neighbours of c of d,

found by relaxing all cells together until none changes.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array

# Actions 0 to 3 are up, down, left and right: how far down and right they go.
STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.int32)
SHORTER, FORBIDDEN = 1.0, -5.0


@struct.dataclass
class PathVerdict:
  """What the actions of B paths do, up to the length of each; beyond it nothing is true."""

  valid: Array  # bool[B, T] the action moves
  shorter: Array  # bool[B, T] it comes closer to the goal
  reward: Array  # f32[B, T] 1 if it is shorter, 0 if it is only valid, −5 if it is invalid
  exact: Array  # bool[B] EM
  progress: Array  # f32[B] PR


def verify_paths(holes: Array, starts: Array, goals: Array, actions: Array, lengths: Array
                 ) -> PathVerdict:
  """Follows actions through mazes.

  Args:
    holes: bool[B, N, N]; boards with fewer rows and columns are padded with holes.
    starts: i32[B, 2] the row and column of the start.
    goals: i32[B, 2] those of the goal, which can be reached from the start.
    actions: i32[B, T] numbers of `STEPS`; any other number is an invalid action.
    lengths: i32[B] how many actions each path has.
  """
  assert holes.ndim == 3 and holes.shape[1] == holes.shape[2] and actions.ndim == 2
  # One more row and column of holes on each side, so that no step leaves the array.
  holes = jnp.pad(holes, ((0, 0), (1, 1), (1, 1)), constant_values=True)
  starts, goals = starts + 1, goals + 1
  return jax.vmap(_verify_path)(holes, starts, goals, actions, lengths)


def distances(holes: Array, goal: Array) -> Array:
  """i32[N, N]: steps to the goal from each cell of bool[N, N] with holes at its edges.

  Holes, and cells from which there is no way, are N² away.
  """
  far = holes.size
  first = jnp.where(_is_at(holes.shape, goal), 0, far)

  def relax(state: tuple[Array, Array]) -> tuple[Array, Array]:
    before, _ = state
    # Cells at the edges are holes, so that what rolls over from the other side is far.
    near = jnp.stack([jnp.roll(before, shift, axis) for shift in (1, -1) for axis in (0, 1)])
    after = jnp.where(holes, far, jnp.minimum(before, near.min(0) + 1))
    return after, (after != before).any()

  return jax.lax.while_loop(lambda state: state[1], relax, (first, jnp.asarray(True)))[0]


def _is_at(shape: tuple[int, ...], cell: Array) -> Array:
  return (jnp.arange(shape[0])[:, None] == cell[0]) & (jnp.arange(shape[1]) == cell[1])


def _verify_path(holes: Array, start: Array, goal: Array, actions: Array, length: Array
                 ) -> PathVerdict:
  distance = distances(holes, goal)

  def step(cell: Array, action: Array) -> tuple[Array, tuple[Array, Array]]:
    other = cell + jnp.asarray(STEPS)[jnp.clip(action, 0, len(STEPS) - 1)]
    is_valid = (action >= 0) & (action < len(STEPS)) & ~holes[other[0], other[1]]
    after = jnp.where(is_valid, other, cell)
    is_shorter = distance[after[0], after[1]] < distance[cell[0], cell[1]]
    return after, (is_valid, is_shorter)

  _, (valid, shorter) = jax.lax.scan(step, start, actions)
  there = jnp.arange(actions.shape[0]) < length
  valid, shorter = valid & there, shorter & there
  prefix = jnp.cumprod(shorter.astype(jnp.int32)).sum()
  num_steps = distance[start[0], start[1]]
  reward = jnp.where(shorter, SHORTER, jnp.where(valid | ~there, 0.0, FORBIDDEN))
  return PathVerdict(valid, shorter, reward, (prefix == num_steps) & (length == num_steps),
                     prefix / num_steps)
