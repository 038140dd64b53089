"""Reads a feature of a serialised tf.train.Example, without TensorFlow."""

from collections.abc import Iterator


def feature(record: bytes, name: str) -> bytes:
  """The first bytes value of one feature of a serialised tf.train.Example.

  Example{1: Features{1: map entry{1: name, 2: Feature{1: BytesList{1: value}}}}}

  Raises:
    KeyError: no such feature. ValueError: not an Example, or the feature holds no bytes.
  """
  seen = []
  for features in _fields(record, 1):
    for entry in _fields(features, 1):
      key = b''.join(_fields(entry, 1)).decode('utf-8', 'replace')
      seen.append(key)
      if key == name:
        values = [value for feature in _fields(entry, 2) for bytes_list in _fields(feature, 1)
                  for value in _fields(bytes_list, 1)]
        if not values:
          raise ValueError('the feature holds numbers, not text')
        return values[0]
  raise KeyError(f'no feature of that name among {seen}')


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    if at >= len(data) or shift > 63:
      raise ValueError('not a tf.train.Example')
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _fields(data: bytes, number: int) -> Iterator[bytes]:
  """Yields the length-delimited fields `number` of a protobuf message."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    match tag & 7:
      case 0:
        _, at = _varint(data, at)
      case 1:
        at += 8
      case 2:
        length, at = _varint(data, at)
        if at + length > len(data):
          raise ValueError('not a tf.train.Example')
        if tag >> 3 == number:
          yield data[at:at + length]
        at += length
      case 5:
        at += 4
      case _:
        raise ValueError('not a tf.train.Example')
