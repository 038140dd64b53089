"""What to change when a run does not fit a slice: tries settings until the compiler agrees."""

from collections.abc import Callable, Iterator, Sequence
import math

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.tpu import compile as compiling

# Tokens of a device whose logits exist at once.
LOSS_CHUNK = 2048
MAX_TRIES = 12


def fitting(topology: str, gin_files: Sequence[str], bindings: Sequence[str],
            say: Callable[[str], None]) -> list[str]:
  """The first bindings, from the mildest change on, under which every program fits.

  Settings that only cost time come first (rematerialisation, loss in chunks, a state split
  over all chips, accumulation); then the batch is halved until it fits, so that what is found
  is the largest such batch. Each try is a compile of the run's own program.

  Args:
    say: receives a line for every try.

  Returns:
    bindings to add; empty where nothing that was tried fits.
  """
  run = compiling.load(gin_files, bindings)
  loss_chunk = LOSS_CHUNK * math.prod(int(n) for n in topology.split(':')[1].split('x'))
  for number, added in enumerate(_attempts(run, loss_chunk), 1):
    if number > MAX_TRIES:
      break
    say(f'try {number}: ' + '; '.join(added))
    try:
      rows = compiling.compile_run(topology, gin_files, [*bindings, *added])
    except UserError as e:  # A batch that no longer divides, say.
      say(f'  not possible: {e}')
      continue
    if all(row['fits'] for row in rows):
      return added
    say('  does not fit: ' + next(row['error'] for row in rows if not row['fits']))
  return []


def _attempts(run: cfg.Run, loss_chunk: int) -> Iterator[list[str]]:
  """Bindings to try, each list a whole answer."""
  added: list[str] = []
  if run.compute.remat == 'none':
    added = [*added, "cfg.Compute.remat = 'block'"]
  if not 0 < run.compute.loss_chunk <= loss_chunk:
    added = [*added, f'cfg.Compute.loss_chunk = {loss_chunk}']
  if added:
    yield added
  if run.mesh != cfg.Mesh():
    added = [*added, 'cfg.Mesh.data = 1', 'cfg.Mesh.fsdp = 0', 'cfg.Mesh.tensor = 1',
             'cfg.Mesh.context = 1']
    yield added
  match run.objective:
    case cfg.NextToken():
      parts = run.train.accumulation
      while parts * 2 <= run.train.batch_size:
        parts *= 2
        yield [*added, f'cfg.Train.accumulation = {parts}']
        if parts >= 16 * run.train.accumulation:
          break
      rows = run.train.batch_size
      while rows > 1:
        rows //= 2
        yield [*added, f'cfg.Train.batch_size = {rows}']
    case cfg.RPT() as rpt:
      prompts = rpt.num_prompts
      while prompts > 1:
        prompts //= 2
        yield [*added, f'cfg.RPT.num_prompts = {prompts}']
