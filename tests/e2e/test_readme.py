"""The README's Python runs as printed."""

from pathlib import Path
import re

import pytest

from tests.e2e.conftest import Job


def test_the_readme_python_lowers_the_loss(pretrained: Job, capsys: pytest.CaptureFixture[str]):
  text = (Path(__file__).parents[2] / 'README.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert 'runs/quickstart/pretrain' in code
  exec(code.replace('runs/quickstart/pretrain', str(pretrained.workdir)), {})
  before, after = map(float, capsys.readouterr().out.split('\n')[-2].split())
  assert after < before
