"""Every error that concord raises on purpose.

    ConcordError                  exit code 1
    ├── UsageError                exit code 2: the caller asked for something that cannot be
    │   └── PlanError             a plan, or an override of it, is not valid
    ├── DataError                 data cannot be read, or breaks the plan's data contract
    │   ├── ContractError         rows differ from the contract: every difference, by names and counts
    │   └── SourceError           a source cannot be read: gone, changed meanwhile, too large, no UTF-8
    ├── ConsentRefusedError       a node refuses a message: unknown plan, foreign round, policy
    │   ├── MaskingRefusedError   a party refuses a message of a masked step
    │   └── BudgetRefusedError    a node's privacy ledger has no room for a plan, or for a round of it
    ├── TrainingDivergedError     NaN or Inf while training
    ├── UpdateRefusedError        the coordinator refuses one node's reply
    ├── RoundAbortedError         a round has no usable result; the model is unchanged
    ├── RunFailedError            a run ended without its model
    ├── RunStoppedError           a person stopped a run; it can be resumed
    ├── ArtefactError             a run directory, checkpoint or file cannot be written or trusted
    │   └── LedgerDamagedError    a privacy ledger was altered, cut or rolled back
    ├── DocumentRefusedError      a signed document is not what it claims to be
    │   ├── LogBrokenError        an entry of a log was altered, removed, reordered or cut
    │   └── LogForkedError        a log is not the one of before: cut, rewritten or forked, and signed anew
    ├── UnreachableError          the other side cannot be reached, or is of another protocol version
    └── ApiError                  the coordinator's answer to a request that it did not carry out
        ├── NotAllowedError       403: not this caller's to do
        │   └── NotSignedInError  401: no token or certificate, or one that does not hold (any more)
        ├── NotFoundError         404
        ├── ConflictError         409: it does not fit the present state
        ├── TooManyError          429: too many requests
        └── UnavailableError      503: the coordinator cannot do it just now

A message says what happened, what was expected and got, and what to do next.
"""

from collections.abc import Sequence
from typing import Any


class ConcordError(Exception):
    """Base of all errors with a message for a person; the command line prints it without a trace."""

    exit_code = 1


class UsageError(ConcordError):
    """The request cannot be carried out as it was written."""

    exit_code = 2


class PlanError(UsageError):
    """A plan file or an override is not valid."""


class DataError(ConcordError):
    """Data cannot be read, or it breaks the plan's data contract. Never carries a value of a row."""


class ContractError(DataError):
    """Rows differ from the plan's data contract. differences: all of them, each with `name`, `what` and `count`."""

    def __init__(self, message: str, differences: Sequence[Any]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class SourceError(DataError):
    """A source of rows cannot be read. reason: why, without the place; it may be told to others."""

    def __init__(self, source: object, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.reason = reason


class ConsentRefusedError(ConcordError):
    """A node refuses to act on a message."""


class MaskingRefusedError(ConsentRefusedError):
    """A party refuses a message of a masked step. check: which of its checks, for counts and logs."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check


class BudgetRefusedError(ConsentRefusedError):
    """A node's privacy ledger has no room for a plan, or holds no reservation for a round."""

    check = "budget"


class TrainingDivergedError(ConcordError):
    """The loss or the parameters became NaN or Inf."""


class UpdateRefusedError(ConcordError):
    """The coordinator refuses a reply; the round goes on without it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class RoundAbortedError(ConcordError):
    """A round ended without a usable result."""


class RunFailedError(ConcordError):
    """A run ended without a model."""


class RunStoppedError(ConcordError):
    """A person stopped the run; nothing before the last checkpoint is lost."""


class ArtefactError(ConcordError):
    """A file or directory of a run cannot be written, read or trusted."""


class LedgerDamagedError(ArtefactError):
    """A privacy ledger is not what it was: altered, cut, or rolled back to an earlier state."""


class DocumentRefusedError(ConcordError):
    """A signed document lacks a signature, is not canonical, or says something else than expected."""


class LogBrokenError(DocumentRefusedError):
    """A log's file is not as it was written. entry: the number of the first entry concerned, where one can be named."""

    def __init__(self, reason: str, entry: int | None) -> None:
        super().__init__(reason)
        self.entry = entry


class LogForkedError(DocumentRefusedError):
    """A log's owner shows another log than before."""


class UnreachableError(ConcordError):
    """The other side cannot be reached, or speaks another version of the protocol."""


class ApiError(ConcordError):
    """A request that the coordinator refused; `status` is that of HTTP, `code` names the problem."""

    status = 400
    code = "invalid"


class NotAllowedError(ApiError):
    """Not this caller's to do."""

    status = 403
    code = "not-allowed"


class NotSignedInError(NotAllowedError):
    """No token or certificate, or one that is unknown, expired or revoked: which of them is not said."""

    status = 401
    code = "not-signed-in"


class NotFoundError(ApiError):
    """No such thing, or none that the caller may know of."""

    status = 404
    code = "not-found"


class ConflictError(ApiError):
    """What was asked does not fit the present state; nothing was changed."""

    status = 409
    code = "conflict"


class TooManyError(ApiError):
    """Too many requests; `Retry-After` says when to come back."""

    status = 429
    code = "too-many"


class UnavailableError(ApiError):
    """The coordinator cannot do it just now: its database or disk fails. Nothing was changed; try again."""

    status = 503
    code = "unavailable"
