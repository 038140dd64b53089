"""What messages, help and pages advise to install or to run exists."""

import configparser
from pathlib import Path
import re

import pytest

from jaxrl_pt import doctor

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [*(ROOT / 'jaxrl_pt').rglob('*.py'), *(ROOT / 'pallas_kernels').rglob('*.py'),
         *(ROOT / 'docs').glob('*.md'), *ROOT.glob('*.md'), *(ROOT / 'experiments').glob('*/*.md'),
         *(ROOT / 'experiments').glob('*/*.py'), *(ROOT / 'gin').rglob('*.gin')]


def _extras() -> set[str]:
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg', encoding='utf-8')
  return set(parser['options.extras_require'])


def _named(pattern: str) -> dict[str, str]:
  """What the pattern finds in any text, with one place where it stands."""
  found = {}
  for path in TEXTS:
    # A sentence may be broken over lines and string literals.
    text = re.sub(r'[\'"]?\n\s*(?:f?[\'"]|#)?', ' ', path.read_text(encoding='utf-8'))
    found.update(dict.fromkeys(re.findall(pattern, text), path.name))
  return found


@pytest.mark.parametrize('pattern', [r'jaxrl_pt\[(\w+)\]', r'`(\w+)` extra', r'extra `(\w+)`'])
def test_every_extra_named_exists(pattern):
  named = _named(pattern)
  assert named and {k: v for k, v in named.items() if k not in _extras()} == {}


def test_every_make_target_named_exists():
  targets = set(re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
  named = _named(r'`make ([a-z]+)[^`]*`')
  assert named and {k: v for k, v in named.items() if k not in targets} == {}


def test_doctor_lists_every_optional_package_that_an_extra_adds():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg', encoding='utf-8')
  extras = parser['options.extras_require']
  listed = {name for name, *_ in doctor.OPTIONAL}
  for extra in ('seqio', 'parquet', 'sentencepiece', 'hf', 'math', 'gym'):
    for line in extras[extra].split():
      assert re.split('[>=]', line)[0] in listed, line
