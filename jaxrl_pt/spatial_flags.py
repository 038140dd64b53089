"""The flags of `jaxrl-pt spatial`. This module imports little, as `flags`."""

import argparse
from collections.abc import Callable

from jaxrl_pt.flag_types import SEED, add_json, add_switches, at_least, path, text

SPLITS = ('train', 'held_out', 'size', 'composition', 'appearance')


def add_spatial(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  """Adds `spatial`."""
  spatial = add('spatial', 'A question of spatial reasoning on drawn pictures, with its exact '
                'answer; grades yours.',
                'jaxrl-pt spatial --task direction --level 2 --index 5 --picture direction.png\n'
                '  jaxrl-pt spatial --task count --split size --answer 12\n'
                '  jaxrl-pt spatial --task distance --twin --side 96 --picture twin.png\n'
                '  jaxrl-pt spatial --task all --picture sheet.png')
  spatial.add_argument('--task', type=text, required=True, metavar='NAME',
                       help='which task, such as direction or maze; all for one item of each')
  spatial.add_argument('--level', type=at_least(1), metavar='L',
                       help="how difficult (default the split's first level)")
  spatial.add_argument('--split', choices=SPLITS, default='train', help='train and held_out have '
                       'levels 1 to 3, size the ones above; composition has operations that were '
                       'never trained on, appearance other colours and shapes (default '
                       '%(default)s)')
  spatial.add_argument('--index', type=at_least(0), default=0, metavar='I',
                       help='which item (default %(default)s)')
  spatial.add_argument('--seed', type=SEED, default=0, help='of all items (default %(default)s)')
  spatial.add_argument('--side', type=at_least(1), default=48, metavar='PIXELS',
                       help='the width of a picture, 48 to 1024 (default %(default)s)')
  add_switches(spatial, ('twin', 'show its twin, which differs in one thing and in the answer'))
  spatial.add_argument('--answer', type=text, metavar='TEXT', help='grade this answer')
  spatial.add_argument('--picture', type=path, metavar='FILE', help='write the pictures here, '
                       'side by side, or a sheet of all tasks (.png)')
  add_json(spatial)
