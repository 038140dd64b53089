"""What to change when a run does not fit a slice: tries settings until the compiler agrees."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.tpu import compile as compiling

# Tokens of a device whose logits exist at once.
LOSS_CHUNK = 2048
MAX_TRIES = 16


def fitting(topology: str, gin_files: Sequence[str], bindings: Sequence[str],
            say: Callable[[str], None], slices: int = 1) -> list[str]:
  """The first bindings, from the mildest change on, under which every program fits.

  Settings that keep the batch come first (rematerialisation, loss in chunks, a state split
  over all devices, accumulation, tensor sharding); then the batch is halved until it fits, so
  that what is found is the largest such batch. Each try is a compile of the run's own
  program; where memory is short by far the compiler says so within seconds.

  Args:
    topology, gin_files, bindings, slices: as in `compile_run`.
    say: receives a line for every try.

  Returns:
    bindings to add; empty where nothing that was tried fits.
  """
  run = compiling.load(gin_files, bindings)
  tries = 0
  for added in _attempts(run, slices * num_devices(topology)):
    if tries == MAX_TRIES:
      break
    tries += 1
    say(f'try {tries}: ' + '; '.join(added))
    try:
      rows = list(compiling.compile_run(topology, gin_files, [*bindings, *added], slices))
    except UserError as e:  # A batch that no longer divides, say.
      say(f'  not possible: {e}')
      continue
    if all(row['fits'] for row in rows):
      say('  fits' + _rows_at_once(compiling.load(gin_files, [*bindings, *added])))
      return added
    worst = next(row for row in rows if not row['fits'])
    say(f'  does not fit: {worst["error"]}')
    if worst.get('state_too_big') and _splits_state(compiling.load(gin_files,
                                                                   [*bindings, *added]).mesh):
      least = math.ceil(worst['hbm']['arguments'] * worst['num_devices'] / worst['capacity'])
      say(f'  nor can it: even split over all devices, parameters and moments need {least} of '
          'them.')
      break
  return []


def num_devices(topology: str) -> int:
  """Devices of a topology as JAX counts them: a tpu7x chip is two."""
  generation, _, shape = topology.partition(':')
  return math.prod(map(int, shape.split('x'))) * (2 if generation == 'tpu7x' else 1)


def _splits_state(mesh: cfg.Mesh) -> bool:
  """Whether parameters and moments are split over all devices, with nothing else on top."""
  return dataclasses.replace(mesh, fsdp=0) == cfg.Mesh()


def _rows_at_once(run: cfg.Run) -> str:
  if run.objective.rollouts is not None:
    return ''
  rows = run.train.batch_size // run.train.accumulation
  return f' ({rows} rows at once: without accumulation, a batch of {rows})'


def _attempts(run: cfg.Run, devices: int) -> Iterator[list[str]]:
  """Bindings to try, each list a whole answer."""
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
  """Fewer rows at once, then the rows' heads and features over several devices."""
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
  """Half the rows as long as every device has one."""
  while rows % 2 == 0 and rows // 2 >= least:
    rows //= 2
    yield [*added, f'{name} = {rows}']
