"""Directions as seen by somebody: exact arithmetic on integer vectors, without angles.

A heading h and a vector v are (down, right) on a map. With the dot product f = h · v, positive in
front, and the cross product s = h × v, positive to the right, v lies

    in front if f > |s|, behind if −f > |s|, to the right if s > |f|, to the left if −s > |f|.

An answer is clear if v is at most about 30 degrees away from one of the four axes, so that 15
degrees and more lie between it and the next sector.
"""

Vector = tuple[int, int]  # down, right

FRONT, RIGHT, BEHIND, LEFT = SIDES = ('front', 'right', 'behind', 'left')
# How somebody turns; to the right and left by a quarter.
TURNS = ('straight', 'right', 'left', 'around')


def turned(heading: Vector, turn: str) -> Vector:
  """The heading after one of `TURNS`."""
  down, right = heading
  match turn:
    case 'right':
      return right, -down
    case 'left':
      return -right, down
    case 'around':
      return -down, -right
    case _:
      return heading


def seen(heading: Vector, vector: Vector) -> Vector:
  """A vector in the frame of somebody with a heading: how far to the front and to the right.

  Both are multiplied by the length of the heading. This is the rotation by an integer matrix that
  takes the heading to the front.
  """
  (h_down, h_right), (down, right) = heading, vector
  return h_down * down + h_right * right, h_down * -right + h_right * down


def side(heading: Vector, vector: Vector) -> str | None:
  """Which of `SIDES` a vector lies on, or None where that is not clear."""
  front, right = seen(heading, vector)
  most, least = max(abs(front), abs(right)), min(abs(front), abs(right))
  if most == 0 or 7 * least > 4 * most:  # tan 29.7° = 4/7.
    return None
  if abs(front) == most:
    return FRONT if front > 0 else BEHIND
  return RIGHT if right > 0 else LEFT
