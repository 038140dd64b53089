"""TensorBoard's event file, written by the caller's own thread.

tensorboardX writes from a thread of its own. If that thread dies on a full disk, nobody hears of it
until its queue blocks the run. Here the caller writes, and an error is raised at once. A row of
metrics is one record:

    record = length u64 · masked CRC-32C of it u32 · Event protobuf · masked CRC-32C of that u32
"""

from collections.abc import Mapping
import os
from pathlib import Path
import socket
import struct
import time

from jaxrl_pt.files import write_all, writing


class EventFile:
  """A new event file, which takes scalars by step. Final."""

  def __init__(self, directory: Path, purge_step: int) -> None:
    """Opens the file.

    Args:
      directory: the directory of the run's event files; made if absent.
      purge_step: TensorBoard drops what earlier files say of this step and of later steps.

    Raises:
      Unwritable: the directory or the file cannot be written.
    """
    # The import takes 0.3 s, which a run without TensorBoard is spared.
    from tensorboardX.proto import event_pb2, summary_pb2
    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    self._path = directory / name
    with writing(self._path):
      directory.mkdir(parents=True, exist_ok=True)
      # Without a buffer nothing is left to fail when the file is closed.
      self._file = self._path.open('wb', buffering=0)
    version = 'brain.Event:2'
    self._write(self._event(wall_time=time.time(), file_version=version).SerializeToString())
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(self._event(wall_time=time.time(), step=purge_step,
                            session_log=start).SerializeToString())

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the scalars of `step`.

    Raises:
      Unwritable: the disk does not take the scalars.
    """
    scalars = [self._summary.Value(tag=name, simple_value=value)
               for name, value in values.items()]
    event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars))
    self._write(event.SerializeToString())

  def close(self) -> None:
    """Closes the file; nothing is left to be written."""
    self._file.close()

  def _write(self, data: bytes) -> None:
    from tensorboardX.record_writer import masked_crc32c
    header = struct.pack('<Q', len(data))
    with writing(self._path):
      write_all(self._file.fileno(), header + struct.pack('<I', masked_crc32c(header)) + data
                + struct.pack('<I', masked_crc32c(data)))
