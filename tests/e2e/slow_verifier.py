"""Verifiers of the end-to-end tests: one that takes its time, one that breaks when told to."""

import os
from pathlib import Path
import time

from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict, answer


def verify(response: str, reference: str) -> ResponseVerdict:
  """Pays for a digit, after 20 ms in which the process may be killed."""
  del reference
  time.sleep(0.02)
  return answer(Outcome.CORRECT if any(map(str.isdigit, response)) else Outcome.WRONG)


def breaking(response: str, reference: str) -> ResponseVerdict:
  """Fails once the run has a checkpoint of step 4."""
  if (Path(os.environ['TEST_WORKDIR']) / 'checkpoints' / '4').exists():
    raise ConnectionError('the licence server is gone')
  return answer(Outcome.WRONG)


def has_two_words(response: str, reference: str) -> ResponseVerdict:
  """Pays for two words, at once."""
  del reference
  return answer(Outcome.CORRECT if len(response.split()) > 1 else Outcome.WRONG)
