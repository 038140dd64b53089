from pathlib import Path


def write(rows: Path, results: Path) -> None:
  pass
