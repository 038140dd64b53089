"""Fixtures that several files of these tests share."""

from pathlib import Path

import pytest

from jaxrl_pt.main import main


@pytest.fixture(scope='module')
def workdir(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A work directory imported from a file's own `source`."""
  path = tmp_path_factory.mktemp('imported') / 'run'
  assert main(['import', str(source), '--workdir', str(path)]) == 0
  return path
