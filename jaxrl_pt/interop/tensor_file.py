"""Reads and writes safetensors files one tensor at a time, and never unpickles anything.

A file is a little-endian u64, that many bytes of JSON, and the data of all tensors one after the
other. The JSON names dtype, shape and [begin, end) of each tensor, counted from the first byte of
data. A checkpoint in several files has an index that says which file a tensor is in.
"""

from collections.abc import Iterable, Iterator
import json
import math
import os
from pathlib import Path
import struct
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.errors import UserError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_LENGTH = struct.Struct('<Q')
_LONGEST_HEADER = 100_000_000
_DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
           'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'U8': 'uint8',
           'BOOL': 'bool'}
_NAMES = {name: code for code, name in _DTYPES.items()}
_ALIGNMENT = 64  # bytes; JAX uses such memory on a CPU as it is, and copies any other
_PIECE = 1 << 22  # bytes that are compared at once


class Entry(NamedTuple):
  """A tensor's place on disk."""

  path: Path
  dtype: np.dtype[Any]
  shape: tuple[int, ...]
  begin: int  # bytes from the start of the file

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


# --- Finding ----------------------------------------------------------------------


def open_folder(folder: Path) -> dict[str, Entry]:
  """Every tensor of a checkpoint by its name; reads the headers only.

  Raises:
    UserError: a file is missing, truncated or no safetensors file, two files hold one tensor, or
      the index and the files disagree.
  """
  index = folder / INDEX
  if not index.exists():
    return _single(folder)
  placed = _weight_map(index)
  entries: dict[str, Entry] = {}
  for name in sorted(set(placed.values())):
    for tensor, entry in open_file(folder / name).items():
      if tensor in entries:
        raise UserError(f'{entries[tensor].path} and {entry.path} both hold a tensor {tensor}: '
                        'download the checkpoint again.')
      entries[tensor] = entry
  for tensor, name in placed.items():
    if tensor not in entries or entries[tensor].path.name != name:
      raise UserError(f'{index} says that tensor {tensor} is in {name}, which has no such tensor: '
                      'download the checkpoint again.')
  for tensor, entry in entries.items():
    if tensor not in placed:
      raise UserError(f'{entry.path} holds a tensor {tensor} that {index.name} does not name: '
                      'download the checkpoint again.')
  return entries


def _single(folder: Path) -> dict[str, Entry]:
  path = folder / SINGLE
  if not path.exists():
    pickled = sorted(p.name for p in folder.glob('*.bin'))
    hint = (f'{pickled[0]} may be pickled and is never read, so convert it to safetensors first'
            if pickled else 'download it again')
    raise UserError(f'{path} is missing and so is an index of several files: {hint}.')
  return open_file(path)


def _weight_map(index: Path) -> dict[str, str]:
  """{tensor: name of its file}, of files that lie beside the index."""
  try:
    found = json.loads(index.read_text(encoding='utf-8'), object_pairs_hook=_without_repeats)
    placed = found['weight_map']
    pairs = list(placed.items())
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f'{index} has no readable weight_map ({e}): download it again.') from e
  for tensor, name in pairs:
    if not isinstance(name, str) or name in ('', '.', '..') or '\0' in name or (
        Path(name).name != name):
      raise UserError(f'{index} places tensor {tensor} in {name!r}, which is no file of its own '
                      'folder: download it again.')
  return dict(pairs)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; refuses one with a repeated key, of which Python would keep the last."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    repeated = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'it names {repeated} twice')
  return found


def open_file(path: Path) -> dict[str, Entry]:
  """The tensors of one file, whose data must fill the file without gaps.

  Raises:
    UserError: it cannot be read, is truncated, or is no safetensors file.
  """
  try:
    with path.open('rb') as file:
      size = os.fstat(file.fileno()).st_size
      header, begin = _header(file, size)
  except OSError as e:
    raise UserError(f'{path} cannot be read ({e.strerror}): download it again.') from e
  except (ValueError, RecursionError, struct.error) as e:
    raise UserError(f'{path} is truncated or no safetensors file ({e}): download it again.') from e
  entries, end = {}, 0
  for name, (dtype, shape, (first, last)) in sorted(header.items(), key=lambda x: x[1][2]):
    entry = Entry(path, np.dtype(jnp.dtype(dtype)), shape, begin + first)
    if first != end or last - first != entry.num_bytes:
      raise UserError(f'{path} places tensor {name} at bytes {first} to {last}, where bytes {end} '
                      f'to {end + entry.num_bytes} are its own: download it again.')
    entries[name], end = entry, last
  if begin + end != size:
    what = 'is truncated' if begin + end > size else 'goes on after its last tensor'
    raise UserError(f'{path} {what}: its header describes {begin + end} bytes and it has {size}; '
                    'download it again.')
  return entries


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
  """({name: (dtype, shape, offsets)}, where the data begin)."""
  length, = _LENGTH.unpack(file.read(_LENGTH.size))
  if length > min(size - _LENGTH.size, _LONGEST_HEADER):
    raise ValueError(f'its header would have {length} bytes')
  found = json.loads(file.read(length), object_pairs_hook=_without_repeats)
  if not isinstance(found, dict):
    raise ValueError('its header is no JSON object')
  found.pop('__metadata__', None)
  return {name: _checked(name, value) for name, value in found.items()}, _LENGTH.size + length


def _checked(name: str, value: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
  try:
    dtype, shape, (first, last) = value['dtype'], tuple(value['shape']), value['data_offsets']
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'its header does not describe tensor {name}') from e
  if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
    raise ValueError(f'its header gives tensor {name} sizes that are no whole numbers')
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise ValueError(f'tensor {name} is of type {dtype}, which is not known here')
  return _DTYPES[dtype], shape, (first, last)


# --- Reading ----------------------------------------------------------------------


def read(entry: Entry) -> np.ndarray:
  """The tensor, in memory of its own that JAX can use as it is.

  Raises:
    UserError: the file cannot be read, or has become shorter.
  """
  raw = np.empty(entry.num_bytes + _ALIGNMENT, np.uint8)
  first = -raw.ctypes.data % _ALIGNMENT
  raw = raw[first:first + entry.num_bytes]
  try:
    with entry.path.open('rb', buffering=0) as file:
      file.seek(entry.begin)
      _fill(file, raw.data)
  except (OSError, EOFError) as e:
    raise UserError(f'{entry.path} cannot be read to its end ({e}): download it again.') from e
  return raw.view(entry.dtype).reshape(entry.shape)


def _fill(file: Any, view: memoryview) -> None:
  while view:
    count = file.readinto(view)
    if not count:
      raise EOFError('it has become shorter')
    view = view[count:]


def are_equal(a: Entry, b: Entry) -> bool:
  """Whether two tensors have the same bytes, which are read in small pieces."""
  if (a.dtype, a.shape) != (b.dtype, b.shape):
    return False
  pieces = range(0, a.num_bytes, _PIECE)

  def piece(entry: Entry, first: int) -> np.ndarray:
    length = min(_PIECE, entry.num_bytes - first)
    return read(Entry(entry.path, np.dtype(np.uint8), (length,), entry.begin + first))

  return all(np.array_equal(piece(a, first), piece(b, first)) for first in pieces)


# --- Writing ----------------------------------------------------------------------


class Planned(NamedTuple):
  """A tensor that will be written."""

  name: str
  dtype: np.dtype[Any]
  shape: tuple[int, ...]


def write(path: Path, planned: Iterable[Planned], arrays: Iterator[np.ndarray]) -> None:
  """Writes a file of tensors, of which only one is in memory at a time.

  Args:
    path: the file.
    planned: what `arrays` will yield, in its order.
    arrays: the tensors.

  Raises:
    OSError: the file cannot be written.
  """
  planned = list(planned)
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, dtype, shape in planned:
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': _NAMES[dtype.name], 'shape': list(shape), 'data_offsets': [begin, end]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # The data begin at a multiple of 8 bytes.
  with path.open('wb') as file:
    file.write(_LENGTH.pack(len(text)) + text)
    for (name, dtype, shape), array in zip(planned, arrays, strict=True):
      assert (array.dtype, array.shape) == (dtype, shape), name
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
