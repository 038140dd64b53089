"""What this machine offers, and a self-check that really trains, decodes and saves."""

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
import functools
import importlib.metadata
import importlib.util
import math
import os
from pathlib import Path
import platform
import shutil
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Array, Batch, Params, TrainState

CORE = ('jaxrl_pt', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorstore',
        'array-record', 'gin-config', 'numpy', 'tokenizers')
# Each optional package: its distribution, its module, its purpose, and how to install it.
OPTIONAL = (
    ('libtpu', 'libtpu', 'Cloud TPU', "pip install 'jaxrl_pt[tpu]'"),
    ('jax-cuda13-plugin', 'jax_cuda13_plugin', 'NVIDIA GPU', "pip install 'jaxrl_pt[cuda]'"),
    ('seqio', 'seqio', 'seqio tasks and mixtures', "pip install 'jaxrl_pt[seqio]'"),
    ('pyarrow', 'pyarrow', 'Parquet files', "pip install 'jaxrl_pt[parquet]'"),
    ('datasets', 'datasets', "data sets in Hugging Face's layout",
     "pip install 'jaxrl_pt[datasets]'"),
    ('lm_eval', 'lm_eval', "lm-eval's tasks", "pip install 'jaxrl_pt[eval]'"),
    ('sentencepiece', 'sentencepiece', 'SentencePiece tokenizers',
     "pip install 'jaxrl_pt[sentencepiece]'"),
    ('starlette', 'starlette', 'the HTTP server', "pip install 'jaxrl_pt[serve]'"),
    ('sympy', 'sympy', 'symbolic answers', "pip install 'jaxrl_pt[math]'"),
    ('reasoning-gym', 'reasoning_gym', "reasoning-gym's tasks", "pip install 'jaxrl_pt[gym]'"),
    ('torch', 'torch', 'export --verify, parity tests', "pip install 'jaxrl_pt[hf]'"),
    ('transformers', 'transformers', 'export --verify, parity tests',
     "pip install 'jaxrl_pt[hf]'"),
    ('gguf', 'gguf', 'export --format gguf', "pip install 'jaxrl_pt[gguf]'"),
)
_MODEL = cfg.Model(num_layers=2, d_model=64, d_ff=128, num_heads=4, num_kv_heads=2, head_dim=16,
                   vocab_size=257, activation='relu2', sub_norm=True)
_OPTIMIZER = cfg.AdamW(cfg.ConstantRate(3e-3), weight_decay=0.0)
_NUM_STEPS = 8


def examine(directory: Path, device: jax.Device | None = None) -> dict[str, Any]:
  """Everything that `doctor` tells, as JSON values.

  Args:
    directory: the directory whose disk is examined.
    device: the device on which the self-check runs; None takes the first local one.

  Returns:
    platform, versions, devices, memory_bytes, disk, optional, checks; `ok` is whether every check
    passed.
  """
  checks = [*self_check(device), _check_writable(directory)]
  return {
      'ok': all(check['ok'] for check in checks),
      'platform': {'python': platform.python_version(), 'system': platform.platform(),
                   'cpus': os.cpu_count(), 'processes': jax.process_count()},
      'versions': {name: _version(name) for name in CORE},
      'devices': [_describe_device(d) for d in jax.local_devices()],
      'memory_bytes': _memory_bytes(),
      'disk': _disk(directory),
      'optional': [{'name': name, 'version': _version(name) if _present(module) else None,
                    'purpose': purpose, 'install': install}
                   for name, module, purpose, install in OPTIONAL],
      'checks': checks,
  }


def text(found: dict[str, Any]) -> str:
  """The result of `examine` as text for people."""
  machine, disk = found['platform'], found['disk']
  lines = [f'Python {machine["python"]} on {machine["system"]}, {machine["cpus"]} CPUs',
           f'memory   {_gib(found["memory_bytes"])}',
           f'disk     {_gib(disk["free_bytes"])} free of {_gib(disk["total_bytes"])} at '
           f'{disk["path"]}']
  for device in found['devices']:
    size = f', {_gib(device["memory_bytes"])}' if device['memory_bytes'] else ''
    lines.append(f'device   {device["platform"]}:{device["id"]} {device["kind"]}{size}')
  lines += ['', 'Versions']
  lines += [f'  {name:18} {version or "missing"}' for name, version in found['versions'].items()]
  lines += ['', 'Optional parts']
  for part in found['optional']:
    state = part['version'] or f'not installed ({part["install"]})'
    lines.append(f'  {part["name"]:18} {state}: {part["purpose"]}')
  lines += ['', 'Self-check']
  lines += [f'  {"ok  " if check["ok"] else "FAIL"} {check["name"]}: {check["detail"]} '
            f'({check["seconds"]:.1f} s)' for check in found['checks']]
  lines.append('All is well.' if found['ok'] else 'Something is wrong: see FAIL above.')
  return '\n'.join(lines)


# --- The machine ------------------------------------------------------------------


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _present(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


def _describe_device(device: jax.Device) -> dict[str, Any]:
  stats = device.memory_stats() or {}  # A CPU gives None.
  return {'id': device.id, 'platform': device.platform, 'kind': device.device_kind,
          'memory_bytes': stats.get('bytes_limit')}


def _memory_bytes() -> int | None:
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (OSError, ValueError):
    return None


def _disk(directory: Path) -> dict[str, Any]:
  """The disk of a directory, or of the nearest one above it that exists."""
  existing = directory.absolute()
  while not existing.exists():
    existing = existing.parent
  usage = shutil.disk_usage(existing)
  return {'path': str(existing), 'free_bytes': usage.free, 'total_bytes': usage.total}


def _check_writable(directory: Path) -> dict[str, Any]:
  """Whether the directory, or the nearest one above it that exists, takes new files."""
  started = time.perf_counter()
  existing = Path(_disk(directory)['path'])
  try:
    with tempfile.TemporaryFile(dir=existing):
      ok, detail = True, f'{existing} takes new files'
  except OSError as e:
    ok, detail = False, f'{existing} takes no new files ({e.strerror}): choose another --workdir'
  return {'name': 'work directory', 'ok': ok, 'detail': detail,
          'seconds': time.perf_counter() - started}


def _gib(num_bytes: int | None) -> str:
  return 'unknown' if num_bytes is None else f'{num_bytes / 2**30:.1f} GiB'


# --- Self-check -------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
  """A tiny ternary model after a few steps on one batch."""

  abstract: TrainState
  state: TrainState
  losses: list[float]


def self_check(device: jax.Device | None = None) -> list[dict[str, Any]]:
  """Trains, decodes and saves a tiny model on one device; an exception fails its check."""
  device = device or jax.local_devices()[0]
  trained = functools.cache(lambda: _train(device))
  checks: dict[str, Callable[[_Trained], tuple[bool, str]]] = {
      'training': _check_training, 'cache': _check_cache, 'checkpoint': _check_checkpoint}
  results = []
  with jax.default_device(device):
    for name, check in checks.items():
      started = time.perf_counter()
      try:
        ok, detail = check(trained())
      except Exception as e:  # Whatever is broken on this machine is what the check reports.
        ok, detail = False, f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'
      results.append({'name': name, 'ok': ok, 'detail': detail,
                      'seconds': time.perf_counter() - started})
  return results


def _batch(num_rows: int = 8, length: int = 64) -> Batch:
  """A batch of rows whose text is this module's docstring, as bytes."""
  data = np.frombuffer((__doc__ or '').encode() * 64, np.uint8).astype(np.int32)
  rows = np.lib.stride_tricks.sliding_window_view(data, length + 1)[::7][:num_rows]
  ones = np.ones((num_rows, length), np.int32)
  fields = (rows[:, :-1], rows[:, 1:], ones.cumsum(1, dtype=np.int32) - 1, ones,
            ones.astype(np.float32), np.arange(num_rows, dtype=np.int32))
  return Batch(*(jnp.asarray(x) for x in fields))


def _train(device: jax.Device) -> _Trained:
  quant = cfg.Quant('ternary', 'int8', hadamard=True)
  model = transformer.build(dataclasses.replace(_MODEL, quant=quant))
  optimizer = optim.make_optimizer(_OPTIMIZER, _NUM_STEPS, model.specs)
  mesh = make_mesh(cfg.Mesh(), [device])
  state = states.init_state(model, optimizer, mesh, seed=0)
  schedule = optim.learning_rate(_OPTIMIZER.schedule, _NUM_STEPS)
  step = jax.jit(make_train_step(model.specs, losses.next_token(model, 0), optimizer, schedule))
  batch, history = _batch(), []
  for _ in range(_NUM_STEPS):
    state, metrics = step(state, batch)
    history.append(float(metrics['loss'].mean()))
  return _Trained(states.abstract_state(model, optimizer, mesh), state, history)


def _check_training(trained: _Trained) -> tuple[bool, str]:
  first, last = trained.losses[0], trained.losses[-1]
  ok = all(map(math.isfinite, trained.losses)) and last < first
  return ok, f'loss {first:.3f} → {last:.3f} nats in {_NUM_STEPS} steps of a ternary model'


def _check_cache(trained: _Trained) -> tuple[bool, str]:
  # The model is not quantised here: rounding to integers would turn noise in the last bit into
  # whole steps.
  model = transformer.build(_MODEL)
  batch, params = _batch(num_rows=2, length=16), trained.state.params

  @jax.jit
  def mismatch(params: Params, batch: Batch) -> Array:
    whole = model.apply(params, batch.tokens, batch.positions, batch.segments)
    tokens, positions = batch.tokens, batch.positions
    prefill, cache = model.extend(params, tokens[:, :12], positions[:, :12],
                                  model.init_cache(2, 16))
    decode, _ = model.extend(params, tokens[:, 12:], positions[:, 12:], cache)
    return jnp.abs(jnp.concatenate([prefill, decode], 1) - whole).max()

  with jax.default_matmul_precision('highest'):
    value = float(mismatch(params, batch))
  return value < 1e-3, f'decoding differs from the whole forward by at most {value:.1e}'


def _check_checkpoint(trained: _Trained) -> tuple[bool, str]:
  with tempfile.TemporaryDirectory() as folder, \
       Checkpointer(Path(folder), cfg.Checkpoint()) as checkpointer:
    checkpointer.save(_NUM_STEPS, trained.state, {})
    restored = checkpointer.restore(trained.abstract).state
  pairs = zip(jax.tree.leaves(trained.state), jax.tree.leaves(restored), strict=True)
  equal = [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs]
  return all(equal), f'{sum(equal)} of {len(equal)} arrays came back bit for bit'
