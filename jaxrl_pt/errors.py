"""The one exception type that stands for a user's mistake.

`main` prints the message as a single sentence and exits with code 2; every
other exception is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
  """A mistake the user can mend: the message says what, where and what to do."""
