"""Safetensors files: equal to the library's, and every damaged one is a sentence."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import tensor_file

safetensors = pytest.importorskip('safetensors.numpy')

random = np.random.default_rng(0)
ARRAYS = {
    'a': random.standard_normal((3, 5)).astype(np.float32),
    'b': random.standard_normal((4, 2)).astype(np.dtype(jnp.bfloat16)),
    'c': random.integers(0, 255, (7,)).astype(np.uint8),
    'd': np.float16(random.standard_normal((2, 1, 2))), 'e': np.zeros((0, 3), np.float32),
    'f': np.array(2.5, np.float32), 'g': random.integers(-9, 9, (2, 2))}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(found[name].view(np.uint8) if x.ndim else found[name],
                                  x.view(np.uint8) if x.ndim else x)


def read_all(folder):
  return {name: tensor_file.read(e) for name, e in tensor_file.open_folder(folder).items()}


def test_reads_what_the_library_writes_and_the_other_way_round(tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors.save_file(ARRAYS, path)
  assert_equal(read_all(tmp_path), ARRAYS)
  planned = [tensor_file.Planned(name, x.dtype, x.shape) for name, x in ARRAYS.items()]
  tensor_file.write(path, planned, iter(ARRAYS.values()))
  assert_equal(read_all(tmp_path), ARRAYS)
  assert_equal(safetensors.load_file(path), ARRAYS)


def test_tensors_are_compared_by_their_bytes(tmp_path):
  x = random.standard_normal(3_000_000).astype(np.float32)  # more than a piece
  other = x.copy()
  other[-1] += 1
  safetensors.save_file({'x': x, 'same': x.copy(), 'other': other}, tmp_path / 'model.safetensors')
  entries = tensor_file.open_folder(tmp_path)
  assert tensor_file.are_equal(entries['x'], entries['same'])
  assert not tensor_file.are_equal(entries['x'], entries['other'])


def bytes_of(header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


def tensor(first, last, shape=(2,), dtype='F32'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [first, last]}


@pytest.mark.parametrize('content, words', [
    (b'', 'truncated or no safetensors'),
    (b'\x08\0\0', 'truncated or no safetensors'),
    (struct.pack('<Q', 2**60), 'its header would have 1152921504606846976 bytes'),
    (bytes_of(b'not json'), 'truncated or no safetensors'),
    (bytes_of(b'[' * 5000), 'truncated or no safetensors'),
    (bytes_of([]), 'its header is no JSON object'),
    (bytes_of(b'{"a": 1, "a": 2}'), 'names a twice'),
    (bytes_of({'a': {'dtype': 'F32'}}), 'does not describe tensor a'),
    (bytes_of({'a': 3}), 'does not describe tensor a'),
    (bytes_of({'a': tensor(0, 8, (2.0,))}, b'\0' * 8), 'tensor a sizes that are no whole'),
    (bytes_of({'a': tensor(0, 8, (-2,))}, b'\0' * 8), 'tensor a sizes that are no whole'),
    (bytes_of({'a': tensor(0, 8, dtype='F8_E4M3')}, b'\0' * 8), 'tensor a is of type F8_E4M3'),
    (bytes_of({'a': tensor(0, 8, dtype=['F32'])}, b'\0' * 8), r"tensor a is of type \['F32'\]"),
    (bytes_of({'a': tensor(0, 8)}, b'\0' * 7), 'is truncated'),
    (bytes_of({'a': tensor(0, 8)}, b'\0' * 9), 'goes on after its last tensor'),
    (bytes_of({'a': tensor(0, 4)}, b'\0' * 4), 'places tensor a at bytes 0 to 4'),
    (bytes_of({'a': tensor(0, 8), 'b': tensor(4, 12)}, b'\0' * 12), 'places tensor b'),
    (bytes_of({'a': tensor(0, 8), 'b': tensor(12, 20)}, b'\0' * 20), 'places tensor b'),
    (bytes_of({'a': tensor(8, 0)}, b''), 'places tensor a'),
])
def test_damaged_files(tmp_path, content, words):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match=words) as caught:
    tensor_file.open_folder(tmp_path)
  assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path):
  with pytest.raises(UserError, match='is missing'):
    tensor_file.open_folder(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'x')
  with pytest.raises(UserError, match=r'pytorch_model.bin may be pickled and is never read'):
    tensor_file.open_folder(tmp_path)


def test_a_file_that_becomes_shorter(tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors.save_file({'a': np.zeros(100, np.float32)}, path)
  entry = tensor_file.open_folder(tmp_path)['a']
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='become shorter'):
    tensor_file.read(entry)


ONE, TWO = np.ones(2, np.float32), np.zeros(3, np.float32)


@pytest.mark.parametrize('files, placed, words', [
    ({'1': {'a': ONE}, '2': {'b': TWO}}, {'a': '1', 'b': '../2'}, "places tensor b in '../2'"),
    ({'1': {'a': ONE}}, {'a': '/etc/passwd'}, 'no file of its own folder'),
    ({'1': {'a': ONE}}, {'a': '..'}, 'no file of its own folder'),
    ({'1': {'a': ONE}}, {'a': 3}, 'no file of its own folder'),
    ({'1': {'a': ONE}, '2': {'a': ONE, 'b': TWO}}, {'a': '1', 'b': '2'}, 'both hold a tensor a'),
    ({'1': {'a': ONE}}, {'a': '1', 'b': '1'}, 'tensor b is in 1, which has no such'),
    ({'1': {'a': ONE}, '2': {'b': TWO}}, {'a': '1', 'b': '1', 'c': '2'}, 'no such tensor'),
    ({'1': {'a': ONE, 'b': TWO}}, {'a': '1'}, 'holds a tensor b that .* does not name'),
    ({'1': {'a': ONE}}, {'a': '1', 'b': '2'}, '2 cannot be read'),
    ({}, ['a'], 'no readable weight_map'),
    ({}, None, 'no readable weight_map'),
])
def test_shards_that_do_not_fit_their_index(tmp_path, files, placed, words):
  for name, arrays in files.items():
    safetensors.save_file(arrays, tmp_path / name)
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': placed}))
  with pytest.raises(UserError, match=words) as caught:
    tensor_file.open_folder(tmp_path)
  assert '\n' not in str(caught.value)
