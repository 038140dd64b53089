"""Static floors of every kernel at every shape, against XLA and JAX's own kernels.

    python experiments/kernels/run.py --topology v5e:2x2 --topology v6e:2x2

Needs libtpu (`make libtpu`) and no TPU. The rows of `jaxrl-pt kernels --json` go to
results/<generation>.json: predictions from the compiler's schedules, never times.
"""

import argparse
import json
from pathlib import Path

from jaxrl_pt.tpu import kernels

RESULTS = Path(__file__).parent / 'results'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topology', action='append', required=True)
  args = parser.parse_args()
  RESULTS.mkdir(exist_ok=True)
  for topology in args.topology:
    rows = []
    for row in kernels.report(topology, [], '', None):
      print(kernels.text(row), flush=True)
      rows.append(row)
    path = RESULTS / f'{topology.partition(":")[0]}.json'
    path.write_text('[\n' + ',\n'.join(json.dumps(row) for row in rows) + '\n]\n')


if __name__ == '__main__':
  main()
