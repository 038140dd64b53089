"""A module whose import fails as often as a file, named in the environment, has letters."""

import os
from pathlib import Path

from jaxrl_pt.verifiers.response_verdict import ResponseVerdict
from tests.verifiers import misbehaving

_path = Path(os.environ['TEST_FAILING_STARTS'])
_left = _path.read_text(encoding='utf-8') if _path.exists() else ''
if _left:
  _path.write_text(_left[1:], encoding='utf-8')
  raise OSError('no luck this time')


def verify(response: str, reference: str) -> ResponseVerdict:
  return misbehaving.verify(response, reference)
