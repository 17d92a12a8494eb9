"""Every error that concord raises on purpose.

    ConcordError                  exit code 1
    ├── UsageError                exit code 2: the caller asked for something that cannot be
    │   └── PlanError             a plan, or an override of it, is not valid
    ├── DataError                 data cannot be read, or breaks the plan's data contract
    ├── ConsentRefusedError       a node refuses a message: unknown plan, foreign round, policy
    ├── TrainingDivergedError     NaN or Inf while training
    ├── UpdateRefusedError        the coordinator refuses one node's reply
    ├── RoundAbortedError         a round has no usable result; the model is unchanged
    ├── RunFailedError            a run ended without its model
    ├── RunStoppedError           a person stopped a run; it can be resumed
    └── ArtefactError             a run directory, checkpoint or file cannot be written or trusted

A message says what happened, what was expected and got, and what to do next.
"""


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


class ConsentRefusedError(ConcordError):
    """A node refuses to act on a message."""


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
