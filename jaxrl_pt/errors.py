"""The exceptions that `main` answers with one sentence and an exit code of their own.

Every other exception is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
  """A mistake the user can mend: the message says what, where and what to do. Exit code 2."""


class Preempted(Exception):
  """A run was told to stop before its last step, and has saved. Exit code 75.

  That is EX_TEMPFAIL, "try again later", which schedulers do not take for a finished run.
  """
