"""`jaxrl-pt preflight`: does a run fit a TPU slice, and what bounds its step?

A child process compiles the programs that the run's loop dispatches (`jobs.open.programs`) with the
TPU compiler for a named topology. A program that does not fit is a result, after which `search`
looks for settings that fit. Speeds are static predictions.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import math
import re
import sys
import time
from typing import Any

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import open as jobs
from jaxrl_pt.jobs.kind import Program
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.tpu import child, chips, hlo, roofline
from jaxrl_pt.tpu.child import Row
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Generation

# Bytes of HBM that the compiler offers a program on a device, as its errors say.
_OFFERED: dict[Generation, float] = {
    'v4': 30.75 * 2**30, 'v5e': 15.75 * 2**30, 'v5p': 95.74 * 2**30, 'v6e': 31.25 * 2**30,
    'tpu7x': 94.75 * 2**30}


# --- The parent -------------------------------------------------------------------


def load(gin_files: Sequence[str], bindings: Sequence[str]) -> cfg.Run:
  """The run, whose data need not exist.

  Raises:
    UserError: the settings have a mistake.
  """
  return gin_bindings.resolve(gin_files, bindings, without_data=True)[0]


def compile_run(topology: str, gin_files: Sequence[str], bindings: Sequence[str],
                slices: int = 1, only: str = '') -> Iterator[Row]:
  """Yields a row for each program of the run, as soon as a child process has compiled it.

  Args:
    topology: the topology of a slice, e.g. 'v5e:16x16'.
    gin_files, bindings: the settings of the run.
    slices: the number of slices.
    only: what the names of the programs in question begin with.

  Raises:
    UserError: libtpu is missing, the topology is wrong, or the run's mesh does not cover it.
  """
  chips.generation_of_topology(topology)
  yield from child.rows('jaxrl_pt.tpu.compile', topology, json.dumps(list(gin_files)),
                        json.dumps(list(bindings)), str(slices), only)


# --- The child ----------------------------------------------------------------------


def main(topology: str, gin_files: str, bindings: str, slices: str, only: str) -> None:
  """The child process: prints one JSON row for each program.

  Args:
    topology: the topology of a slice.
    gin_files, bindings: the settings of the run, as JSON lists.
    slices: the number of slices.
    only: what the names of the programs in question begin with.
  """
  try:
    run = load(json.loads(gin_files), json.loads(bindings))
    devices = chips.topology_devices(topology, int(slices))
    mesh = make_mesh(run.mesh, devices)
    chip = chips.chip(chips.generation_of_topology(topology))
    for program in jobs.programs(run, mesh):
      if not program.name.startswith(only):
        continue
      row = _examine(program, run, chip, len(devices))
      print(json.dumps({'program': program.name, 'topology': topology,
                        'num_devices': len(devices), 'num_slices': int(slices), **row}),
            flush=True)
  except UserError as e:
    print(json.dumps({'user_error': str(e)}), flush=True)


def _examine(program: Program, run: cfg.Run, chip: chips.Chip,
             num_devices: int) -> Row:
  """The row of a program.

  It is not compiled if its arguments, with the arrays that the loop keeps beside it, are too large.
  """
  capacity = round(_OFFERED[chip.generation])
  argument_bytes, beside = (sum(_shard_bytes(x) for x in jax.tree.leaves(tree))
                            for tree in (program.args, program.beside))
  row: Row = {'fits': False, 'error': '', 'capacity': capacity, 'hbm': {
      'arguments': argument_bytes}, 'buffers': _argument_rows(program)}
  if argument_bytes + beside > capacity:
    kept = f' and what is kept beside them ({_size(beside)})' if beside else ' alone'
    return {**row, 'error': f'the arguments{kept} take {_size(argument_bytes + beside)} of '
            f'{_size(capacity)} a device', 'state_too_big': argument_bytes > capacity}
  started = time.monotonic()
  with dispatch.noting() as left_to_xla:
    traced = program.run.trace(*program.args)
  row['left_to_xla'] = left_to_xla
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    row['buffers'] = _largest(row['buffers'] + _traced_rows(traced.jaxpr.jaxpr, num_devices))
    return {**row, **_refusal(str(e)), 'compile_seconds': time.monotonic() - started}
  seconds = time.monotonic() - started
  memory = compiled.memory_analysis()
  used = {'arguments': memory.argument_size_in_bytes, 'outputs': memory.output_size_in_bytes,
          'aliased': memory.alias_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
          'code': memory.generated_code_size_in_bytes, 'kept_beside': beside}
  total = sum(used.values()) - 2 * used['aliased']
  module = hlo.parse(compiled.as_text() or '')
  fits = total <= capacity
  return {**row, 'fits': fits, 'hbm': {**used, 'total': total,
                                       'alive_at_peak': memory.peak_memory_in_bytes},
          'error': '' if fits else (
              f'needs {_size(total)} of {_size(capacity)} a device as it is laid out '
              f'({_size(memory.peak_memory_in_bytes)} alive at peak, which the compiler accepts)'),
          'buffers': [dataclasses.asdict(b) for b in hlo.biggest(module)],
          'compile_seconds': seconds,
          **_speeds(module, traced.jaxpr.jaxpr, run, program, chip, num_devices)}


def _speeds(module: hlo.Module, jaxpr: Any, run: cfg.Run, program: Program, chip: chips.Chip,
            num_devices: int) -> Row:
  """Collectives, kernels, FLOPs and the roofline of a compiled program."""
  collectives = hlo.collectives(module)
  of_one = roofline.multiply_adds(jaxpr)
  macs = type(of_one)({kind: n * program.copies for kind, n in of_one.items()})
  per_device = type(macs)({kind: n / num_devices for kind, n in macs.items()})
  hbm_bytes = hlo.hbm_bytes(module)
  bound = roofline.estimate(chip, per_device, hbm_bytes, sum(c.wire_bytes for c in collectives))
  kind = jobs.kind(run.objective)
  flops, tokens = program.share * kind.model_flops(run), kind.num_tokens(run)
  peak = 2 * chip.macs_per_second['bf16'] * num_devices
  return {
      'collectives': [dataclasses.asdict(c) for c in collectives],
      'bytes_between_slices': hlo.bytes_between_slices(module),
      'kernels': {name: {'calls': calls, 'times': times}
                  for name, (calls, times) in hlo.kernels(module).items()},
      'flops': {'model': flops, 'program': 2 * macs.total(),
                'program_by_operand': {kind: 2 * n for kind, n in macs.items()}},
      'hbm_traffic': hbm_bytes,
      'tokens': tokens,
      'static_prediction': {
          'mxu_seconds': bound.mxu, 'hbm_seconds': bound.hbm, 'ici_seconds': bound.ici,
          'seconds': bound.seconds, 'bound': bound.bound,
          'tokens_per_second_per_chip': tokens / bound.seconds / num_devices,
          'mfu': flops / bound.seconds / peak}}


def _shard_bytes(x: Any) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _argument_rows(program: Program) -> list[Row]:
  """The largest arguments of one device."""
  rows: list[Row] = []
  for path, x in jax.tree_util.tree_flatten_with_path(program.args)[0]:
    shape = ','.join(map(str, x.sharding.shard_shape(x.shape)))
    rows.append({'num_bytes': _shard_bytes(x), 'type': f'{x.dtype.name}[{shape}]',
                 'opcode': 'argument', 'op_name': jax.tree_util.keystr(path), 'count': 1})
  return _largest(rows)


def _largest(rows: list[Row], limit: int = 8) -> list[Row]:
  return sorted(rows, key=lambda row: row['num_bytes'], reverse=True)[:limit]


def _traced_rows(jaxpr: Any, num_devices: int) -> list[Row]:
  """The largest results of products and loops in a program that was not compiled.

  Their sizes are those after a split over all devices, which a device holds at least.
  """
  results: dict[str, Row] = {}
  for eqn, devices in _equations(jaxpr, num_devices):
    if eqn.primitive.name in ('scan', 'dot_general'):
      for x in (v.aval for v in eqn.outvars):
        name = f'{eqn.primitive.name} {eqn.source_info.name_stack}'
        share = f' / {devices}' if devices > 1 else ''
        results[f'{x.str_short()} {name}'] = {
            'num_bytes': x.size * x.dtype.itemsize // devices, 'opcode': 'traced',
            'type': x.str_short() + share, 'op_name': name, 'count': 1}
  return list(results.values())


def _equations(jaxpr: Any, num_devices: int) -> Iterator[tuple[Any, int]]:
  """Yields every equation outside kernels, and over how many devices its arrays may be split."""
  for eqn in jaxpr.eqns:
    yield eqn, num_devices
    if eqn.primitive.name != 'pallas_call':
      local = eqn.primitive.name == 'shard_map'  # The shapes inside are those of one device.
      for inner in roofline.inner(eqn):
        yield from _equations(inner, 1 if local else num_devices)


# --- The compiler's refusals ----------------------------------------------------------


def _refusal(message: str) -> Row:
  """The part of a row that an error of the compiler gives.

  It has sizes and allocations if the program is out of HBM, else the first line of the error.
  """
  first = message.splitlines()[0][:500]
  sizes = (re.search(r'HLO temporaries \(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)',
                     message)
           or re.search(r'Used ([\d.]+\w?) of ([\d.]+\w?) hbm', message))
  if not sizes:
    return {'error': f'does not compile: {first}', 'refused': True}
  needed, available = map(_parse_size, sizes.groups())
  row: Row = {'error': f'needs at least {_size(needed)} of {_size(available)} a device',
              'capacity': available, 'hbm': {'total': needed}}
  allocations = re.findall(r'Size: ([\d.]+\w?)\n(?:.*op_name="([^"]*)".*\n)?.*Shape: (\S+)',
                           message)
  if allocations:
    row['buffers'] = [{'num_bytes': _parse_size(size), 'type': shape.split('{')[0],
                       'opcode': 'allocation', 'op_name': name, 'count': 1}
                      for size, name, shape in allocations[:8]]
  return row


def _parse_size(text: str) -> int:
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  return round(float(text.rstrip('KMGTB')) * units.get(text[-1], 1))


def _size(num_bytes: float) -> str:
  for unit, name in ((2**40, 'TiB'), (2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if num_bytes >= unit:
      return f'{num_bytes / unit:.2f} {name}'
  return f'{num_bytes:.0f} B'


# --- Rows as text -----------------------------------------------------------------


def text(row: Row) -> str:
  """The row of a program as a person reads it."""
  slices = f'{row["num_slices"]} slices of ' if row['num_slices'] > 1 else ''
  lines = [f'{row["program"]} on {slices}{row["topology"]} ({row["num_devices"]} devices): '
           + ('fits' if row['fits'] else f'DOES NOT FIT: {row["error"]}')]
  hbm = row['hbm']
  if 'total' in hbm:
    parts = ', '.join(f'{name} {_size(value)}' for name, value in hbm.items() if name != 'total')
    lines.append(f'  HBM a device   {_size(hbm["total"])} of {_size(row["capacity"])}'
                 + (f': {parts}' if parts else ''))
  lines.append('  biggest arrays of a device')
  lines += [f'    {_size(b["num_bytes"]):>11}  {b["type"]}  {b["opcode"]}'
            f'{" ×" + str(b["count"]) if b["count"] > 1 else ""}  {b["op_name"][-90:]}'
            for b in row['buffers']]
  if 'static_prediction' in row:
    lines += _speed_lines(row)
  return '\n'.join(lines)


def _speed_lines(row: Row) -> list[str]:
  flops, bound = row['flops'], row['static_prediction']
  kinds = ', '.join(f'{n:.3g} {kind}' for kind, n in flops['program_by_operand'].items())
  lines = ['  collectives a step, of one device (bytes of the whole arrays; bytes it sends)']
  lines += [f'    {c["kind"]:<18} {c["count"]:>7,}  {_size(c["num_bytes"]):>11}  '
            f'{_size(c["wire_bytes"]):>11}' for c in row['collectives']] or ['    none']
  if row['num_slices'] > 1:
    lines.append(f'    to other slices {_size(row["bytes_between_slices"])} over the network of '
                 'the data centre, which no bound below counts')
  lines.append('  Pallas kernels in the program: ' + (', '.join(
      f'{name} ({k["calls"]} calls, {k["times"]} a step)'
      for name, k in row['kernels'].items()) or 'none'))
  lines += [f'    without its kernel: {line}' for line in row['left_to_xla']]
  lines.append(f'  FLOPs a step   model {flops["model"]:.4g}; products of the program '
               f'{flops["program"]:.4g} ({kinds}; recomputation included)')
  lines.append(f'  static prediction (a bound, no time on a TPU): {bound["seconds"]:.4g} s a step, '
               f'set by {bound["bound"].upper()}: MXU {bound["mxu_seconds"]:.4g}, HBM '
               f'{bound["hbm_seconds"]:.4g}, ICI {bound["ici_seconds"]:.4g};')
  lines.append(f'    at most {bound["tokens_per_second_per_chip"]:,.0f} tokens/s a device, MFU '
               f'{bound["mfu"]:.1%}')
  lines.append(f'  compiled in {row["compile_seconds"]:.0f} s')
  return lines


if __name__ == '__main__':
  main(*sys.argv[1:])
