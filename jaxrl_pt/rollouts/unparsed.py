"""A word of warning where a run's first responses state hardly an answer."""


class FirstBatches:
  """Says in one line that the first batches of a run state hardly an answer. Final."""

  NUM, FEWEST = 3, 0.1

  def __init__(self) -> None:
    self._shares: list[float] = []

  @property
  def is_over(self) -> bool:
    """Whether no further batch counts."""
    return len(self._shares) >= self.NUM

  def note(self, share: float) -> str | None:
    """Takes the share of parsed responses of the next batch.

    Returns:
      The line, after the last of these batches and where there is something to say.
    """
    self._shares.append(share)
    if len(self._shares) != self.NUM or max(self._shares) > self.FEWEST:
      return None
    mean = sum(self._shares) / self.NUM
    return (f'The verifier finds an answer in {mean:.1%} of the responses of the first {self.NUM} '
            'steps, and without one nothing is earned: does the policy know the form of an answer '
            '(a warm start on demonstrations), is Rollouts.response_tokens long enough for it, '
            'and is the verifier the right one?')
