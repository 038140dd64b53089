"""Folders of the library PEFT: adapter_config.json and adapter_model.safetensors of a LoRA.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [r, in]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, r]

Nothing in a folder is ignored: a key of adapter_config.json is read, or does not change what the
adapter computes, or is refused where it has a value, and so is a tensor that the model has no place
for.
"""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import files
from jaxrl_pt.errors import UserError, shortened, shown
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.interop import tensor_file
from jaxrl_pt.interop.tensor_file import Entry, Planned
from jaxrl_pt.params import ParamSpec, is_spec
from jaxrl_pt.types import Array, Params

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'

_READ = frozenset('peft_type r lora_alpha target_modules use_rslora init_lora_weights'.split())
# Keys about the file, training and what other keys would switch on.
_HARMLESS = frozenset("""
    auto_mapping base_model_name_or_path eva_config inference_mode lora_dropout megatron_core
    peft_version qalora_group_size revision""".split())
# Other keys with the value at which they do nothing; at None, False or empty none does anything.
_NEUTRAL = {'bias': 'none', 'task_type': 'CAUSAL_LM'}
# With other initial values the base that the adapter belongs to is not the one that was loaded.
_KEEPS_BASE = (None, True, False, 'gaussian', 'orthogonal', 'eva')


# --- Import -----------------------------------------------------------------------


def read_settings(folder: Path) -> cfg.LoRA:
  """The settings of the adapter in a folder.

  Raises:
    UserError: the folder holds no adapter_config.json, or one of an adapter that is not covered.
  """
  path = folder / CONFIG
  found = files.read_object(path, f'give the whole folder of an adapter, with {CONFIG} and '
                            f'{TENSORS}')
  if found.get('peft_type') != 'LORA':
    raise UserError(f"{path} does not say peft_type = 'LORA': only low-rank adapters are read.")
  for key, value in found.items():
    if key in _READ | _HARMLESS or not value or value == _NEUTRAL.get(key):
      continue
    raise UserError(f'{path} says {shortened(key)} = {shown(value)}, which would change what the '
                    'adapter computes and is not covered: merge the adapter with PEFT, and import '
                    'the model.')
  if found.get('init_lora_weights') not in _KEEPS_BASE:
    raise UserError(f'{path} says init_lora_weights = {shown(found["init_lora_weights"])}, which '
                    'changed the base too: merge the adapter with PEFT, and import the model.')
  try:
    return cfg.LoRA(found.get('r', 8), found.get('lora_alpha', 8),
                    _targets(path, found.get('target_modules')), found.get('use_rslora', False))
  except UserError as e:
    raise UserError(f'{path} is not covered: {e}') from e


def _targets(path: Path, modules: Any) -> tuple[cfg.Projection, ...]:
  """The adapted projections in the order of `cfg.Projection`."""
  known = get_args(cfg.Projection)
  if modules == 'all-linear':
    modules = known
  if not isinstance(modules, list | tuple) or not modules or any(m not in known for m in modules):
    raise UserError(f'{path} says target_modules = {shown(modules)}: expected a list of names '
                    f'among {", ".join(known)}.')
  return tuple(name for name in known if name in modules)


def load(folder: Path, specs: Any, mesh: Mesh) -> Params:
  """The matrices of all adapters, with None in place of every other parameter.

  Args:
    folder: a folder of PEFT.
    specs: the tree of ParamSpec of the model with the adapters that `read_settings` found.
    mesh: the devices that the parameters are split over.

  Raises:
    UserError: the file is damaged, or a tensor is missing, has another shape or has no place.
  """
  entries = tensor_file.open_file(folder / TENSORS)
  unread = set(entries)
  for spec in _adapters(specs):
    for layer in range(spec.shape[0]):
      _check(folder, entries, spec, layer)
      unread.discard(_name(spec, layer))
  if unread:
    raise UserError(f'{folder / TENSORS} holds {len(unread)} tensors for which the model has no '
                    f'place ({", ".join(sorted(unread)[:3])}): the adapter is of another model.')

  def leaf(spec: ParamSpec) -> Array | None:
    if spec.role != 'adapter':
      return None
    return hf.stack(spec, lambda spec, i: tensor_file.read(entries[_name(spec, i)]), mesh)

  return jax.tree.map(leaf, specs, is_leaf=is_spec)


def _adapters(specs: Any) -> list[ParamSpec]:
  return [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if s.role == 'adapter']


def _name(spec: ParamSpec, layer: int) -> str:
  return _PREFIX + hf.tensor_name(spec, layer)


def _check(folder: Path, entries: dict[str, Entry], spec: ParamSpec, layer: int) -> None:
  """Checks that a tensor is there, in its shape and of a type that is read."""
  name, shape = _name(spec, layer), spec.shape[:0:-1]
  if name not in entries:
    raise UserError(f'{folder / TENSORS} has no tensor {name}: the adapter is of another model '
                    f'than the one given, or not of its {CONFIG}.')
  entry = entries[name]
  if entry.shape != shape or entry.dtype.name not in ('float32', 'float16', 'bfloat16'):
    raise UserError(f'Tensor {name} in {folder / TENSORS} is {entry.dtype}{list(entry.shape)}, and '
                    f'the model asks for floating-point numbers {list(shape)}: the adapter is of '
                    'another model.')


# --- Export -----------------------------------------------------------------------


def save(folder: Path, adapter: cfg.LoRA, specs: Any, params: Params) -> None:
  """Writes adapter_config.json and adapter_model.safetensors.

  Args:
    folder: the folder to write to.
    adapter: the model's adapter.
    specs, params: the model's trees.

  Raises:
    UserError: the folder is not writable.
  """
  leaves = zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params), strict=True)
  pairs = [(spec, x) for spec, x in leaves if spec.role == 'adapter']
  settings = {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': adapter.rank,
      'lora_alpha': adapter.alpha, 'target_modules': list(adapter.projections),
      'use_rslora': adapter.rank_stabilized, 'lora_dropout': 0.0, 'bias': 'none',
      'fan_in_fan_out': False, 'inference_mode': True, 'base_model_name_or_path': None}
  planned = [Planned(_name(spec, i), np.dtype(np.float32), spec.shape[:0:-1])
             for spec, _ in pairs for i in range(spec.shape[0])]
  try:
    tensor_file.write(folder / TENSORS, planned, _written(pairs))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
  except OSError as e:
    raise UserError(f'{folder} cannot be written ({e}): choose another folder.') from e


def _written(pairs: list[tuple[ParamSpec, Array]]) -> Iterator[np.ndarray]:
  for _, x in pairs:
    for matrix in x:
      yield np.asarray(matrix, np.float32).T
