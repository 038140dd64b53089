"""What the processes of a pool do: verify responses, or play environments.

The pool (`processes.py`), the supervisor (`child.py`) and the worker (`worker.py`) know only
requests and answers, which are JSON. A service says what they mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# (request) → answer, both JSON, in a worker. It may loop, crash or eat memory.
Handle = Callable[[Any], Any]


@dataclass(frozen=True)
class Kind:
  """A kind of service.

  module: the module whose `python -m` is its supervisor.
  noun: what its processes are called in messages.
  """

  module: str
  noun: str


class Failure(Exception):
  """A worker that gave no answer to a request.

  reason: 'timeout', 'crash', or 'raised' where the handler raised an exception and lives on.
  """

  def __init__(self, reason: str, detail: str) -> None:
    super().__init__(detail)
    self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Role:
  """One worker process of each supervisor.

  make: makes the worker's handler, before it enters its sandbox. It may raise UserError.
  is_tight: whether it runs in `sandbox.enter_tight`, else in `sandbox.enter_open`.
  """

  make: Callable[[], Handle]
  is_tight: bool


class Service(Protocol):
  """A service in its supervisor, which runs no handler itself."""

  kind: Kind
  max_answer: int  # bytes of a worker's answer

  def roles(self) -> Sequence[Role]:
    """The worker processes that serve together."""

  def preload(self) -> None:
    """Imports what the handlers need, once for all workers that are forked later.

    Raises:
      UserError: an extra is missing.
    """

  def serve(self, ask: Callable[[int, Any], Any], request: Any) -> dict[str, Any]:
    """The answer to a request of the pool.

    Args:
      ask: (number of a role, request) → answer of its worker; it may raise Failure.
      request: as the pool sent it.

    Raises:
      Failure: a worker gave no answer.
      ValueError: a worker's answer has no meaning.
    """

  def failed(self, failure: Failure) -> dict[str, Any]:
    """The answer to a request on which a worker failed."""

  def is_spent(self, request: Any) -> bool:
    """Whether the workers that have answered this request must not answer another."""
