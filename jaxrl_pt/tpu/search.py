"""Searches for settings with which a run fits a slice, by compiling it with one after another."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.tpu import compile as compiling
from jaxrl_pt.tpu.child import Row

# Tokens of each device whose logits may exist at once.
LOSS_CHUNK = 2048
MAX_TRIES = 16
# How the name of the program that draws rollouts begins.
SAMPLER = 'sampler'


def fitting(topology: str, gin_files: Sequence[str], bindings: Sequence[str],
            say: Callable[[str], None], slices: int = 1, failed: Sequence[str] = ()) -> list[str]:
  """The mildest change of the settings, of those that are tried, with which every program fits.

  Changes that keep the batch come first: rematerialisation, a loss in chunks, a state that is split
  over all devices, accumulation, tensor sharding. Then the batch is halved until it fits. Each try
  compiles the run's own programs; where much memory is lacking, the compiler says so within
  seconds. If the sampler does not fit, it first gets as many slots as do.

  Args:
    topology: the topology of a slice, e.g. 'v5e:16x16'.
    gin_files, bindings: the settings of the run.
    say: a function that gets a line for every try.
    slices: the number of slices.
    failed: the names of the programs that do not fit.

  Returns:
    The bindings to add; [] where no change that was tried is enough.
  """
  of_slots: list[str] = []
  if any(name.startswith(SAMPLER) for name in failed):
    of_slots = most_slots(topology, gin_files, bindings, say, slices)
    if of_slots and all(name.startswith(SAMPLER) for name in failed):
      return of_slots
    bindings = [*bindings, *of_slots]
  run = compiling.load(gin_files, bindings)
  tries = 0
  for added in _attempts(run, slices * num_devices(topology)):
    if tries == MAX_TRIES:
      break
    tries += 1
    say(f'try {tries}: ' + '; '.join(added))
    try:
      rows = list(compiling.compile_run(topology, gin_files, [*bindings, *added], slices))
    except UserError as e:  # For example, the batch does not divide any more.
      say(f'  not possible: {e}')
      continue
    if all(row['fits'] for row in rows):
      say('  fits' + _rows_at_once(compiling.load(gin_files, [*bindings, *added])))
      return [*of_slots, *added]
    worst = next(row for row in rows if not row['fits'])
    say(f'  does not fit: {worst["error"]}')
    if worst.get('state_too_big') and _splits_state(compiling.load(gin_files,
                                                                   [*bindings, *added]).mesh):
      least = math.ceil(worst['hbm']['arguments'] * worst['num_devices'] / worst['capacity'])
      say(f'  nor can it: even split over all devices, parameters and moments need {least} of '
          'them.')
      break
  return []


def most_slots(topology: str, gin_files: Sequence[str], bindings: Sequence[str],
               say: Callable[[str], None], slices: int = 1) -> list[str]:
  """The settings with the largest number of slots with which the sampler fits a slice.

  A slot costs the pages of the longest response. Two programs with few slots say how much that is
  and what is there besides; a third one shows that what follows from it is true.

  Args:
    topology, gin_files, bindings, say, slices: as for `fitting`.

  Returns:
    The bindings to add; [] where not even one slot fits, or where the settings give the number of
    pages themselves, of which slots take none.
  """
  run = compiling.load(gin_files, bindings)
  rollouts = run.objective.rollouts
  if rollouts is None or rollouts.slots.num_pages or rollouts.sparse != cfg.Dense():
    return []
  shards = slices * num_devices(topology) // (run.mesh.tensor * run.mesh.context)
  responses = max(1, rollouts.num_prompts // shards) * rollouts.group_size
  most = responses - 1  # With a slot for each response the settings need no number.

  def compiled(num_slots: int) -> Row:
    [row] = compiling.compile_run(topology, gin_files, [*bindings, *_slots(num_slots)], slices,
                                  SAMPLER)
    say(f'{num_slots} slots: ' + ('fits' if row['fits'] else f'does not fit: {row["error"]}'))
    return row

  if most < 1 or not (one := compiled(1))['fits']:
    return []
  if most == 1 or not (two := compiled(2))['fits']:
    return _slots(1)
  each = max(1, two['hbm']['total'] - one['hbm']['total'])
  most = min(most, 1 + (one['capacity'] - one['hbm']['total']) // each)
  while most > 2 and not compiled(most)['fits']:
    most = max(2, most - max(1, most // 16))
  return _slots(most)


def _slots(number: int) -> list[str]:
  return ['cfg.Rollouts.slots = @cfg.Slots()', f'cfg.Slots.slots = {number}']


def num_devices(topology: str) -> int:
  """The number of devices of a topology as JAX counts them: a tpu7x chip is two devices."""
  generation, _, shape = topology.partition(':')
  return math.prod(map(int, shape.split('x'))) * (2 if generation == 'tpu7x' else 1)


def _splits_state(mesh: cfg.Mesh) -> bool:
  """Whether the mesh splits parameters and moments over all devices, and does nothing else."""
  return dataclasses.replace(mesh, fsdp=0) == cfg.Mesh()


def _rows_at_once(run: cfg.Run) -> str:
  if run.objective.rollouts is not None:
    return ''
  rows = run.train.batch_size // run.train.accumulation
  return f' ({rows} rows at once: without accumulation, a batch of {rows})'


def _attempts(run: cfg.Run, devices: int) -> Iterator[list[str]]:
  """Yields lists of bindings to try, from the mildest change on."""
  added: list[str] = []
  loss_chunk = LOSS_CHUNK * devices
  if run.compute.remat == 'none':
    added = [*added, "cfg.Compute.remat = 'block'"]
  if not 0 < run.compute.loss_chunk <= loss_chunk:
    added = [*added, f'cfg.Compute.loss_chunk = {loss_chunk}']
  if added:
    yield added
  if not _splits_state(run.mesh):
    added = [*added, 'cfg.Mesh.data = 1', 'cfg.Mesh.fsdp = 0', 'cfg.Mesh.tensor = 1',
             'cfg.Mesh.context = 1']
    yield added
  rollouts = run.objective.rollouts
  if rollouts is None:
    yield from _pretraining_attempts(run, devices, added)
  else:
    yield from _halved('cfg.Rollouts.num_prompts', rollouts.num_prompts, devices, added)


def _pretraining_attempts(run: cfg.Run, devices: int, added: list[str]) -> Iterator[list[str]]:
  """Yields changes to fewer rows at once, then to heads and features over several devices."""
  rows, parts = run.train.batch_size, run.train.accumulation
  while not rows % (2 * parts * devices):
    parts *= 2
    yield [*added, f'cfg.Train.accumulation = {parts}']
  model = run.model
  for tensor in (2, 4, 8):
    sizes = (devices, model.num_heads, model.num_kv_heads, model.d_ff, model.vocab_size)
    if any(size % tensor for size in sizes) or rows % (parts * devices):
      break
    yield [*added, 'cfg.Mesh.fsdp = 0', f'cfg.Mesh.tensor = {tensor}',
           f'cfg.Train.accumulation = {rows // (devices // tensor)}']
  if rows % (parts * devices) or parts == run.train.accumulation:
    yield from _halved('cfg.Train.batch_size', rows, devices * parts, added)


def _halved(name: str, rows: int, least: int, added: list[str]) -> Iterator[list[str]]:
  """Yields changes that halve the rows, as long as every device has one."""
  while rows % 2 == 0 and rows // 2 >= least:
    rows //= 2
    yield [*added, f'{name} = {rows}']
