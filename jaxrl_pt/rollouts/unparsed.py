"""A warning for a run whose first responses hardly state an answer."""


class FirstBatches:
  """Watches the share of parsed responses in a run's first batches. Final.

  NUM: the number of batches that count.
  FEWEST: the warning is given if no batch has a larger share of parsed responses.
  """

  NUM, FEWEST = 3, 0.1

  def __init__(self) -> None:
    self._shares: list[float] = []

  @property
  def is_over(self) -> bool:
    """Whether all batches that count have been noted."""
    return len(self._shares) >= self.NUM

  def note(self, share: float) -> str | None:
    """Notes the share of parsed responses in the next batch.

    Returns:
      The warning in one line if this was the last batch that counts and there is reason to warn,
      else None.
    """
    self._shares.append(share)
    if len(self._shares) != self.NUM or max(self._shares) > self.FEWEST:
      return None
    mean = sum(self._shares) / self.NUM
    return (f'The verifier finds an answer in {mean:.1%} of the responses of the first {self.NUM} '
            'steps, and without one nothing is earned: does the policy know the form of an answer '
            '(a warm start on demonstrations), is Rollouts.response_tokens long enough for it, '
            'and is the verifier the right one?')
