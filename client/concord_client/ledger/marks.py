"""Where the ledger once stood, remembered outside of it: a file beside it, and what the coordinator was told.

A restored backup is whole and consistent, and yet it would give back what was spent since. So the newest entry is noted
elsewhere after each addition, and a ledger that does not hold a noted entry is refused.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from concord_client.ledger.words import NO_HASH
from concord_shared.errors import LedgerDamagedError
from concord_shared.files import explain, write_atomically

__all__ = ["BEGINNING", "Mark", "read_mark", "write_mark"]


@dataclass(frozen=True)
class Mark:
    """An entry by its place and hash."""

    sequence: int
    hash: str


BEGINNING = Mark(0, NO_HASH)


def read_mark(path: Path) -> Mark:
    """Raises: LedgerDamagedError: it cannot be read."""
    try:
        return Mark(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return BEGINNING
    except OSError as error:
        raise LedgerDamagedError(f"cannot read {path}: {explain(error)}") from error
    except (ValueError, TypeError) as error:
        raise LedgerDamagedError(f"{path} is damaged. Restore it, or see: concord-node ledger repair --help") from error


def write_mark(path: Path, mark: Mark) -> None:
    write_atomically(path, json.dumps(asdict(mark)))
