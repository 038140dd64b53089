"""What all environments share: the verdict that a host waits for."""

import numpy as np
import pytest

from jaxrl_pt.environments.base import settled
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Verdict


def test_a_step_in_which_nothing_was_verified_stops_the_run():
  class Pending:
    valid = np.zeros((2, 2), np.float32)

    def result(self) -> Verdict:
      return Verdict(self.valid, self.valid, self.valid)

    def parsed(self) -> float:
      return 1.0

    def last_words(self) -> str:
      return 'ImportError: no module named horse'

  with pytest.raises(UserError, match='gave no verdict on any of 4 responses: ImportError: no '
                                      'module named horse. This step is not learned from'):
    settled(Pending())
  pending = Pending()
  pending.valid = np.array([[0, 0], [0, 1]], np.float32)
  assert settled(pending).valid.sum() == 1
