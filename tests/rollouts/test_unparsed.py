"""The word of warning where the first responses of a run state hardly an answer."""

import pytest

from jaxrl_pt.rollouts.unparsed import FirstBatches


@pytest.mark.parametrize('shares, says', [
    ([0.0, 0.1, 0.02], True), ([0.0, 0.2, 0.0], False)])
def test_first_batches_without_answers_are_said_once(shares, says):
  beginning = FirstBatches()
  *before, last = [beginning.note(share) for share in shares]
  assert before == [None, None] and (last is not None) == says and beginning.is_over
  assert not says or 'an answer in 4.0% of the responses of the first 3 steps' in last
  assert beginning.note(0.0) is None
