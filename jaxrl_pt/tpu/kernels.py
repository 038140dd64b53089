"""`jaxrl-pt kernels`: static reports of the Pallas kernels from the TPU compiler's schedules.

A child process compiles each case of each kernel's `arg_specs`, and its alternatives, for a
topology, and `schedule` reads what the compiler has written. The floor of a call is the largest of
issue cycles, MXU cycles and HBM cycles. It is a static prediction.
"""

from collections.abc import Iterator
import functools
import importlib
import json
from pathlib import Path
import pkgutil
import re
import shutil
import sys
import tempfile
from typing import Any

from jaxrl_pt.errors import UserError
from jaxrl_pt.tpu import child, chips, schedule
from jaxrl_pt.tpu.child import Row
import pallas_kernels
from pallas_kernels import tuning

# Every folder of pallas_kernels is a kernel.
KERNELS = tuple(module.name for module in pkgutil.iter_modules(pallas_kernels.__path__)
                if module.ispkg)


def arg_specs(kernel: str) -> Any:
  """The module with a kernel's `cases(generation)` and `candidates(generation)`.

  Raises:
    UserError: there is no such kernel.
  """
  if kernel not in KERNELS:
    raise UserError(f'There is no kernel {kernel!r}: there are {", ".join(KERNELS)}.')
  return importlib.import_module(f'pallas_kernels.{kernel}.arg_specs')


# --- The parent -------------------------------------------------------------------


def report(topology: str, kernels: list[str], only: str, keep: Path | None) -> Iterator[Row]:
  """Yields a row for each case of the kernels, as soon as it is compiled for a topology.

  Args:
    topology: the topology of a slice, e.g. 'v5e:2x2'.
    kernels: names of kernels; [] takes all.
    only: a regular expression that must match somewhere in a case's name.
    keep: the folder for the compiler's raw texts; None deletes them.

  Raises:
    UserError: a name is wrong, or libtpu is missing.
  """
  with tempfile.TemporaryDirectory() as dump:
    yield from _child_rows(topology, kernels, only, dump, str(keep.absolute()) if keep else '')


def rows_of_compiles(topology: str, kernels: list[str], only: str) -> Iterator[Row]:
  """Yields whether each case of the named kernels compiles, as a row of name, error and
  vmem_bytes. An empty list stands for all kernels."""
  yield from _child_rows(topology, kernels, only, '', '')


def _child_rows(topology: str, kernels: list[str], only: str, dump: str,
                keep: str) -> Iterator[Row]:
  chips.generation_of_topology(topology)
  for kernel in kernels:
    arg_specs(kernel)
  _check_regex(only)
  yield from child.rows('jaxrl_pt.tpu.kernels', topology, dump, keep, only,
                        *(kernels or KERNELS), dump_to=dump)


def _check_regex(pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as e:
    raise UserError(f'--only {pattern!r} is not a regular expression ({e}): write e.g. '
                    '"int4 2048x".') from e


def text(row: Row) -> str:
  """A row as a person reads it."""
  name = ' '.join(x for x in (row['kernel'], row['variant'], row['activations'], row['shape'])
                  if x)
  if row['error']:
    return f'{name}\n    does not compile for {row["topology"]}: {row["error"]}'
  ratios = ', '.join(f'{value:.2f}x below {key.removeprefix("ratio_to_")}'
                     for key, value in row.items() if key.startswith('ratio_to_'))
  slots = ', '.join(f'{unit} {100 * share:.0f}%' for unit, share in row['slots'].items()
                    if share >= 0.005)
  return (f'{name}\n    floor {row["floor"]:,} cycles ({row["bound"]}): issue '
          f'{row["issue_cycles"]:,}, MXU {row["mxu_cycles"]:,}, HBM {row["hbm_cycles"]:,}'
          f'{"; " + ratios if ratios else ""}\n    {row["floor_over_bound"]:.3f}x the bound of '
          f'its arithmetic and bytes; slots: {slots}; VMEM {row["vmem_bytes"] / 2**20:.1f} MiB'
          + (f'; {row["dynamic_loops"]} loops with run-time bounds' if row['dynamic_loops']
             else ''))


# --- The child: compiles each case and prints its row as JSON -----------------------


def _compile(call: tuning.Call, device: Any) -> int:
  """Compiles a call and returns the bytes of VMEM that its kernels take."""
  import jax
  sharding = jax.sharding.SingleDeviceSharding(device)
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      call.args)
  # Some of JAX's kernels ask for the kind of device that they are traced for.
  mesh = jax.sharding.Mesh([device], ('chip',))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(call.run).lower(*args).compile()
  used = re.findall(r'"memory_space":"1","offset":"(\d+)","size":"(\d+)"',
                    ''.join(re.findall(r'"used_scoped_memory_configs":\[[^\]]*\]',
                                       compiled.as_text() or '')))
  return max((int(size) for _, size in used), default=0)


def _empty(folder: Path) -> None:
  for path in folder.iterdir():
    if path.is_file():
      path.unlink()


def measure_call(call: tuning.Call, chip: chips.Chip, device: Any, dump: Path) -> Row:
  """Cycles, floor, slots and VMEM of a call that is compiled for `device`, in a child process.

  Args:
    call: the call.
    chip: the rates of the device.
    device: the device of a topology.
    dump: the folder to which the compiler writes its schedules, which is emptied first.
  """
  _empty(dump)
  vmem = _compile(call, device)
  schedules = schedule.read_dump(dump, call.dynamic_trips)
  issue, dynamic = schedule.total(schedules)
  mxu, hbm = chip.mxu_cycles(call.cost), chip.hbm_cycles(call.cost.hbm_bytes)
  cycles, bound = schedule.floor(issue, mxu, hbm)
  slots = {unit: sum(s.slots[unit] * s.issue_cycles for s in schedules) / max(1, issue)
           for unit in (schedules[0].slots if schedules else ())}
  return {'issue_cycles': issue, 'mxu_cycles': round(mxu), 'hbm_cycles': round(hbm),
          'floor': cycles, 'bound': bound, 'slots': slots, 'dynamic_loops': dynamic,
          'vmem_bytes': vmem}


def measure(case: tuning.Case, chip: chips.Chip, topology: str, device: Any, dump: Path,
            keep: Path | None, alternatives: dict[str, Row]) -> Row:
  """The row of a case; `alternatives` keeps the rows of alternatives for the cases to come."""
  labels = {'kernel': case.kernel, 'variant': case.variant, 'activations': case.activations,
            'shape': case.shape, 'topology': topology}
  try:
    row = measure_call(case.call, chip, device, dump)
  except Exception as e:  # A refusal of the compiler is a result of the report.
    return {**labels, 'error': _first_line(e)}
  if keep:
    shutil.copytree(dump, keep / re.sub(r'\W+', '_', f'{case.name} {topology}'),
                    dirs_exist_ok=True)
  least = max(chip.mxu_cycles(case.call.cost), chip.hbm_cycles(case.minimum_bytes))
  row = {**labels, 'error': '', **row, 'floor_over_bound': row['floor'] / least}
  for name, call in case.alternatives.items():
    key = f'{name} {[(x.shape, str(x.dtype)) for x in call.args]}'
    if key not in alternatives:
      alternatives[key] = measure_call(call, chip, device, dump)
    other = alternatives[key]
    row[f'{name}_floor'] = other['floor']
    row[f'ratio_to_{name}'] = other['floor'] / row['floor']
  return row


def _only_compile(case: tuning.Case, device: Any) -> Row:
  try:
    return {'name': case.name, 'error': '', 'vmem_bytes': _compile(case.call, device)}
  except Exception as e:  # A refusal of the compiler is a result.
    return {'name': case.name, 'error': _first_line(e), 'vmem_bytes': 0}


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).splitlines()[0][:500]}'


def main(topology: str, dump: str, keep: str, only: str, *kernels: str) -> None:
  """The child process: prints one JSON row for each case."""
  generation = chips.generation_of_topology(topology)
  chip = chips.chip(generation)
  say = functools.partial(print, flush=True)
  try:
    device = chips.topology_devices(topology)[0]
  except UserError as e:
    say(json.dumps({'user_error': str(e)}))
    return
  alternatives: dict[str, Row] = {}
  for kernel in kernels:
    for case in arg_specs(kernel).cases(generation):
      if not re.search(only, case.name):
        continue
      row = (measure(case, chip, topology, device, Path(dump), Path(keep) if keep else None,
                     alternatives) if dump else _only_compile(case, device))
      say(json.dumps(row))


if __name__ == '__main__':
  main(*sys.argv[1:])
