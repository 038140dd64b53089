"""Chooses the kernels' block sizes by static cycles, and keeps the choices as data.

    python tools/tune_kernels.py --topology v5e:2x2 --kernel ternary_matmul

Every candidate of every tuning key is compiled for the topology; the one with the smallest
static floor (then the fewest issue cycles, then the least VMEM) goes to
pallas_kernels/<kernel>/tuned/<generation>.json. Keys that were not searched stay as they are.
"""

import argparse
import json
from pathlib import Path
import re
import subprocess
import sys
import tempfile

from jaxrl_pt.tpu import child, chips, kernels

ROOT = Path(__file__).resolve().parents[1]


def search(topology: str, kernel: str, only: str, dump: Path) -> dict[str, dict]:
  """The best choice of each key. Only in a process of `tpu.child`."""
  generation = chips.generation_of_topology(topology)
  chip, device = chips.chip(generation), chips.topology_devices(topology)[0]
  best: dict[str, dict] = {}
  for key, choices in kernels.arg_specs(kernel).candidates(generation).items():
    if not re.search(only, key):
      continue
    results = []
    for choice, case in choices:
      try:
        row = kernels.measure_call(case.call, chip, device, dump)
      except Exception as e:  # Too large for VMEM, say: this choice is out.
        print(f'  {key} {choice}: {str(e).splitlines()[0][:120]}', flush=True)
        continue
      print(f'  {key} {choice}: floor {row["floor"]:,} ({row["bound"]}), issue '
            f'{row["issue_cycles"]:,}, VMEM {row["vmem_bytes"] / 2**20:.1f} MiB', flush=True)
      results.append(((row['floor'], row['issue_cycles'], row['vmem_bytes']), choice))
    if results:
      best[key] = min(results, key=lambda result: result[0])[1]
      print(f'{key}: {best[key]}', flush=True)
  return best


def save(kernel: str, generation: str, best: dict[str, dict]) -> Path:
  path = ROOT / 'pallas_kernels' / kernel / 'tuned' / f'{generation}.json'
  path.parent.mkdir(exist_ok=True)
  known = json.loads(path.read_text()) if path.is_file() else {}
  lines = (f' {json.dumps(key)}: {json.dumps(choice)}'
           for key, choice in sorted((known | best).items()))
  path.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  return path


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topology', required=True)
  parser.add_argument('--kernel', choices=kernels.KERNELS, required=True)
  parser.add_argument('--only', default='', help='regular expression over the keys')
  parser.add_argument('--dump', type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  child.check_libtpu()
  if args.dump is None:  # The compiler wants its environment before jax is imported.
    with tempfile.TemporaryDirectory() as dump:
      done = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--dump', dump],
                            env=child.environment(dump), check=False)
    sys.exit(done.returncode)
  best = search(args.topology, args.kernel, args.only, args.dump)
  path = save(args.kernel, chips.generation_of_topology(args.topology), best)
  print(f'{len(best)} keys written to {path.relative_to(ROOT)}')


if __name__ == '__main__':
  main()
