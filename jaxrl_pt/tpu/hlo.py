"""Reads a compiled program's HLO text: collectives, HBM traffic, biggest arrays, kernels.

The text is the TPU compiler's after scheduling: shapes are those of one device, layouts name their
tiles, and `S(1)` puts an array into VMEM. The body of a loop counts as often as it is run, which is
read from the constant that the loop's condition compares the counter with. A loop that may end
earlier therefore counts the largest number of its trips. Both branches of a conditional count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
import functools
import math
import re
from typing import NamedTuple

_BITS = {'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
         'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64,
         'c64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8, 'f8e4m3': 8, 'f4e2m1fn': 4, 'token': 0}
_ARRAY = re.compile(r'\b([a-z]+[0-9a-z]*)\[([0-9,]*)\](?:\{([0-9,]*)(?::([^}]*))?\})?')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'(ROOT )?%?([\w.\-]+) = ')
_CALLED = re.compile(r'(?:calls|to_apply|body|true_computation|false_computation|'
                     r'branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)')
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
                'collective-permute', 'collective-broadcast')
KERNEL = 'tpu_custom_call'
# Instructions that write a part of their first operand, and which operand that part is.
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}
# Opcodes that name, select or wait for what another instruction computes.
_NO_TRAFFIC = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
               'conditional', 'call', 'after-all', 'partition-id', 'replica-id', 'copy-done',
               'slice-done', 'async-update', 'optimization-barrier', 'opt-barrier'}


class Instruction(NamedTuple):
  """A line of the text: `name = type opcode(operands), rest`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str  # attributes and metadata, and the value of a constant or the number of a parameter

  @property
  def op_name(self) -> str:
    """The place in the Python program that it comes from, '' where the text has none."""
    match = re.search(r'op_name="([^"]*)"', self.rest)
    return match[1].replace("\\'", "'") if match else ''


class Array(NamedTuple):
  """An array type."""

  text: str
  num_bytes: int  # bytes of the values
  padded_bytes: int  # bytes of the tiled layout
  in_hbm: bool


Computation = dict[str, Instruction]  # The instructions by name, in order.


@dataclass(frozen=True)
class Module:
  """A program: its computations by name, and the name of the one that it starts with."""

  computations: dict[str, Computation]
  entry: str


@dataclass(frozen=True)
class Run:
  """An instruction of a computation that the program runs `times` times a step."""

  instruction: Instruction
  computation: Computation
  times: int


@dataclass(frozen=True)
class Collective:
  """All collectives of one kind in a step of one device.

  kind: the kind, e.g. 'all-gather'.
  count: how many run.
  num_bytes: the bytes of the whole arrays.
  wire_bytes: the bytes that the device sends: with n devices in a group (n − 1)/n of num_bytes, and
    twice this for all-reduce.
  """

  kind: str
  count: int
  num_bytes: int
  wire_bytes: int


# --- Parsing ----------------------------------------------------------------------


def parse(text: str) -> Module:
  """The module that `compiled.as_text()` describes.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    line = line.strip()
    header = _COMPUTATION.match(line)
    if header and ' = ' not in line.split('(')[0]:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line == '}':
      current = None
    elif current is not None and _INSTRUCTION.match(line):
      instruction = _instruction(line)
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('no ENTRY computation: this is not the text of an HLO module')
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  match = _INSTRUCTION.match(line)
  assert match
  type_text, rest = _balanced(line[match.end():], ' ')
  opcode, _, rest = rest.lstrip().partition('(')
  inside, rest = _balanced('(' + rest, '')
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  return Instruction(match[2], type_text, opcode, operands, rest if operands else inside + rest)


def _balanced(text: str, end: str) -> tuple[str, str]:
  """The text up to the first `end` outside all brackets, and the rest.

  With '' for `end` the first part ends with the bracket that closes the first one.
  """
  depth = 0
  for index, letter in enumerate(text):
    if letter in '([{':
      depth += 1
    elif letter in ')]}':
      depth -= 1
      if not depth and not end:
        return text[:index + 1], text[index + 1:]
    elif letter == end and not depth:
      return text[:index], text[index:]
  return text, ''


@functools.cache
def arrays(type_text: str) -> tuple[Array, ...]:
  """The arrays of a type, which for a tuple are its leaves."""
  return tuple(_array(match[1], match[2], match[3], match[4], match.group())
               for match in _ARRAY.finditer(type_text) if match[1] in _BITS)


def _array(dtype: str, dims: str, order: str | None, layout: str | None, text: str) -> Array:
  shape = [int(n) for n in dims.split(',') if n]
  minor = [int(n) for n in (order or '').split(',') if n] or list(reversed(range(len(shape))))
  padded = [shape[axis] for axis in reversed(minor)]  # The most major axis comes first.
  tile = re.match(r'T\(([\d,*]+)\)', layout or '')
  if tile and '*' not in tile[1]:
    sizes = [int(n) for n in tile[1].split(',')]
    padded = [1] * (len(sizes) - len(padded)) + padded
    for place, size in enumerate(sizes, len(padded) - len(sizes)):
      padded[place] = -(-padded[place] // size) * size
  bits = _BITS[dtype]
  space = re.search(r'S\((\d+)\)', layout or '')
  return Array(text, math.ceil(math.prod(shape) * bits / 8),
               math.ceil(math.prod(padded) * bits / 8), not space or space[1] == '0')


def _hbm_bytes(type_text: str) -> int:
  return sum(x.padded_bytes for x in arrays(type_text) if x.in_hbm)


# --- Which instructions run, and how often ------------------------------------------


def runs(module: Module) -> list[Run]:
  """Every instruction outside fusions, with the number of times that a step runs it."""
  visited: list[Run] = []

  def visit(name: str, times: int) -> None:
    computation = module.computations[name]
    for instruction in computation.values():
      visited.append(Run(instruction, computation, times))
      if instruction.opcode == 'while':
        known = in_all(instruction.op_name.removesuffix('/while'))
        trips = trip_count(module, computation, instruction)
        visit(_called(instruction)[0], times * trips if known is None else known)
      elif instruction.opcode in ('call', 'conditional'):
        for called in _called(instruction):
          visit(called, times)

  visit(module.entry, 1)
  return visited


def in_all(name: str) -> int | None:
  """How often a loop runs in all if the last scope of its name says so (`sampling.slots.in_all`).

  Args:
    name: the scopes round the loop, with slashes between them.
  """
  found = re.search(r'(?:^|/)at_most_(\d+)_in_all$', name)
  return int(found[1]) if found else None


def _called(instruction: Instruction) -> list[str]:
  return [name for group in _CALLED.findall(instruction.rest)
          for name in re.findall(r'%([\w.\-]+)', group)]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
  """The largest number of trips of a while loop whose counter rises by one.

  It is 1 where the loop's condition does not show it.
  """
  condition = re.search(r'condition=%([\w.\-]+)', loop.rest)
  assert condition
  test = module.computations[condition[1]]
  for instruction in test.values():
    if instruction.opcode != 'compare' or 'direction=LT' not in instruction.rest:
      continue
    counter, bound = (test.get(name) for name in instruction.operands)
    if counter and bound and bound.opcode == 'constant':
      start = _initial(computation, loop, counter)
      return max(0, int(re.findall(r'-?\d+', bound.rest)[0]) - start)
  for instruction in test.values():  # The comparison may be inside a fusion.
    if instruction.opcode == 'fusion':
      inner = module.computations[_called(instruction)[0]]
      bounds = [_constant(inner, name, test, instruction) for compare in inner.values()
                if compare.opcode == 'compare' and 'direction=LT' in compare.rest
                for name in compare.operands[1:]]
      if any(bound is not None for bound in bounds):
        return max(bound for bound in bounds if bound is not None)
  return 1


def _constant(inner: Computation, name: str, outer: Computation,
              fusion: Instruction) -> int | None:
  """The value of a constant inside a fusion or among its operands, else None."""
  found = inner.get(name)
  while found and found.opcode in ('bitcast', 'broadcast', 'copy'):
    found = inner.get(found.operands[0])
  if found and found.opcode == 'parameter':
    number = int(re.findall(r'\d+', found.rest)[0])
    found = outer.get(fusion.operands[number])
  if found is None or found.opcode != 'constant':
    return None
  return int(re.findall(r'-?\d+', found.rest)[0])


def _initial(computation: Computation, loop: Instruction, counter: Instruction) -> int:
  """The first value of the loop's counter: 0 unless the text shows a constant."""
  index = re.search(r'index=(\d+)', counter.rest)
  state = computation.get(loop.operands[0])
  if not index or state is None or state.opcode != 'tuple':
    return 0
  start: Instruction | None = computation[state.operands[int(index[1])]]
  while start and start.opcode in ('copy', 'bitcast', 'copy-done', 'copy-start'):
    start = computation.get(start.operands[0])
  return int(re.findall(r'-?\d+', start.rest)[0]) if start and start.opcode == 'constant' else 0


# --- Collectives ----------------------------------------------------------------------


def collectives(module: Module) -> list[Collective]:
  """The collectives of a step by kind, those that send the most bytes first.

  If the compiler spreads a collective over several fusions, its pieces have one channel and count
  once.
  """
  totals: dict[str, list[int]] = {}
  seen = set()
  for run in runs(module):
    for kind, instruction in _collectives_of(module, run.instruction):
      channel = re.search(r'channel_id=(\d+)', instruction.rest)
      key = (id(run.computation), channel[1] if channel else run.instruction.name)
      if key in seen:
        continue
      seen.add(key)
      size, group = _collective_bytes(instruction), _group_size(instruction.rest)
      sent = size if kind == 'collective-permute' else size * (group - 1) / group
      wire = round(2 * sent if kind == 'all-reduce' else sent)
      total = totals.setdefault(kind, [0, 0, 0])
      for index, value in enumerate((1, size, wire)):
        total[index] += run.times * value
  rows = [Collective(kind, *total) for kind, total in totals.items()]
  return sorted(rows, key=lambda row: -row.wire_bytes)


def bytes_between_slices(module: Module) -> int:
  """Bytes that a device sends to other slices in a step, over the data centre's network."""
  return sum(run.times * arrays(run.instruction.type)[0].num_bytes for run in runs(module)
             if run.instruction.opcode == 'send')


def _collectives_of(module: Module,
                    instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
  """Yields (kind, instruction) of an instruction's collectives, also inside fusions and asyncs."""
  kind = instruction.opcode.removesuffix('-start')
  if kind in _COLLECTIVES:
    yield kind, instruction
  if instruction.opcode in ('fusion', 'async-start'):
    for name in _called(instruction):
      scattered = 'all-reduce-scatter' in f'{name} {instruction.name}'
      for inner in module.computations[name].values():
        for kind, collective in _collectives_of(module, inner):
          yield 'reduce-scatter' if scattered else kind, collective


def _collective_bytes(instruction: Instruction) -> int:
  """Bytes of the whole arrays: after they are gathered, or before they are scattered."""
  sizes = [x.num_bytes for x in arrays(instruction.type)]
  if instruction.opcode == 'all-gather-start':
    return sum(sizes[len(instruction.operands):])
  if instruction.opcode == 'collective-permute-start':
    return sizes[1]
  if instruction.opcode == 'reduce-scatter':
    return sum(sizes) * _group_size(instruction.rest)
  return sum(sizes)


def _group_size(rest: str) -> int:
  """The number of devices in one group of a collective, from any of the three notations."""
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  iota = re.search(r'replica_groups=\[\d+,(\d+)\]<=', rest)
  if iota:
    return int(iota[1])
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  if listed:
    return len(listed[1].split(','))
  return 1


# --- HBM ------------------------------------------------------------------------------


def hbm_bytes(module: Module) -> int:
  """Bytes that a step reads from and writes to HBM: the operands and results of all instructions.

  Arrays in VMEM cost nothing, a slice costs the part that it takes of its operand, and an update in
  place costs the part that it writes. A kernel costs what it says itself (`pl.CostEstimate`), or
  else each of its operands and results once.
  """
  return sum(run.times * _traffic(module, run) for run in runs(module))


def _traffic(module: Module, run: Run) -> int:
  it, scope = run.instruction, run.computation
  if it.opcode in _NO_TRAFFIC or (it.opcode == 'custom-call' and KERNEL not in it.rest):
    return 0
  if it.opcode.endswith('-done'):
    return 0
  result = _hbm_bytes(it.type)
  stated = re.search(r'"bytes_accessed":"(\d+)"', it.rest) if it.opcode == 'custom-call' else None
  if stated and int(stated[1]) > 0:
    return int(stated[1])
  match it.opcode:
    case 'copy-start':
      return sum(x.padded_bytes for x in arrays(it.type)[:2] if x.in_hbm)
    case 'slice-start':
      moved = arrays(it.type)[-2]
      source = _hbm_bytes(scope[it.operands[0]].type)
      return moved.padded_bytes * ((source > 0) + moved.in_hbm)
    case 'dynamic-slice' | 'slice' | 'gather':
      return 2 * result
    case 'dynamic-update-slice' | 'scatter':
      return 2 * _hbm_bytes(scope[it.operands[_UPDATES[it.opcode]]].type)
    case 'fusion':
      return _fusion_traffic(module, it, scope)
  return result + sum(_hbm_bytes(scope[name].type) for name in it.operands)


def _fusion_traffic(module: Module, it: Instruction, scope: Computation) -> int:
  total = _hbm_bytes(it.type)
  inside = module.computations[_called(it)[0]]
  for name, parameter in zip(it.operands, _parameters(inside), strict=True):
    whole, uses = _hbm_bytes(scope[name].type), list(_uses(module, inside, parameter))
    if whole and uses and all(use.opcode in ('dynamic-slice', 'slice', 'gather')
                              for use, _, _ in uses):
      total += min(whole, sum(_padded(use.type) for use, _, _ in uses))
      continue
    if whole and len(uses) == 1:
      use, read_as, place = uses[0]
      if use.opcode in _UPDATES and use.operands[0] == read_as:
        # It updates in place: only the update is written of the result, which `total` has whole.
        total += _padded(place[use.operands[_UPDATES[use.opcode]]].type) - whole
        continue
    total += whole
  return max(total, 0)


def _parameters(computation: Computation) -> list[Instruction]:
  """The parameters of a computation in the order of the operands that it is called with."""
  unordered = [i for i in computation.values() if i.opcode == 'parameter']
  return sorted(unordered, key=lambda i: int(re.findall(r'\d+', i.rest)[0]))


def _uses(module: Module, computation: Computation, value: Instruction
          ) -> Iterator[tuple[Instruction, str, Computation]]:
  """Yields who reads a value, by which name, and in which computation.

  Bitcasts and inner fusions are looked through.
  """
  for user in computation.values():
    if value.name not in user.operands:
      continue
    if user.opcode == 'bitcast':
      yield from _uses(module, computation, user)
    elif user.opcode == 'fusion':
      inside = module.computations[_called(user)[0]]
      for name, parameter in zip(user.operands, _parameters(inside), strict=True):
        if name == value.name:
          yield from _uses(module, inside, parameter)
    else:
      yield user, value.name, computation


def _padded(type_text: str) -> int:
  return sum(x.padded_bytes for x in arrays(type_text))


@dataclass(frozen=True)
class Buffer:
  """An array in HBM, or several that are alike."""

  num_bytes: int  # padded bytes of one of them
  type: str
  opcode: str  # of the instruction that makes it
  op_name: str  # place in the Python program
  count: int  # how many are alike


def biggest(module: Module, limit: int = 8) -> list[Buffer]:
  """The largest arrays in HBM, arguments included; arrays that are alike are counted together.

  They are the arrays that the program names, without updates in place. The compiler may let several
  of them share a place.
  """
  buffers: dict[tuple[str, str, str], Buffer] = {}
  for run in runs(module):
    it = run.instruction
    if it.opcode == 'parameter' and run.computation is not module.computations[module.entry]:
      continue
    if it.opcode in _NO_TRAFFIC - {'parameter'} or it.opcode.endswith(('-start', '-done')):
      continue
    if it.opcode == 'dynamic-update-slice' or _updates_in_place(module, it):
      continue
    for array in arrays(it.type):
      if array.in_hbm and array.padded_bytes:
        key = array.text.split('{')[0], it.opcode, it.op_name
        count = buffers[key].count + 1 if key in buffers else 1
        buffers[key] = Buffer(array.padded_bytes, key[0], it.opcode, it.op_name, count)
  return sorted(buffers.values(), key=lambda b: -b.num_bytes)[:limit]


def _updates_in_place(module: Module, it: Instruction) -> bool:
  """Whether it is a fusion whose result is its operand with a part written anew."""
  return it.opcode == 'fusion' and (
      list(module.computations[_called(it)[0]].values())[-1].opcode in _UPDATES)


def kernels(module: Module) -> dict[str, tuple[int, int]]:
  """The Pallas kernels of a step: {name: (calls in the program's text, calls in a step)}."""
  counts: dict[str, tuple[int, int]] = {}
  for run in runs(module):
    it = run.instruction
    if it.opcode == 'custom-call' and f'"{KERNEL}"' in it.rest:
      name = kernel_name(it)
      calls, times = counts.get(name, (0, 0))
      counts[name] = calls + 1, times + run.times
  return dict(sorted(counts.items()))


def kernel_name(call: Instruction) -> str:
  """The name that `pallas_call` was given."""
  scopes = [s for s in call.op_name.split('/') if s and s != 'pallas_call']
  return scopes[-1] if scopes else re.sub(r'\.\d+$', '', call.name)
