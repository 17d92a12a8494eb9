"""The log of a run: what its workers wrote of it, one JSON object a line, in runs/<run>/logs/run.jsonl."""

import json
from collections import deque
from pathlib import Path
from typing import Any

from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["log_path", "tail"]

LINE_BYTES_MAX = 16_384


def log_path(runs: Path, run: str) -> Path:
    """Where a worker writes the log of a run. runs: the folder of all of them."""
    return runs / run / "logs" / "run.jsonl"


def tail(runs: Path, run: str, limit: int) -> list[dict[str, Any]]:
    """The last lines, oldest first; empty where there are none. A line that a crash cut short is left out."""
    try:
        with log_path(runs, run).open("rb") as file:
            lines = deque((line[:LINE_BYTES_MAX] for line in file), maxlen=limit)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArtefactError(f"cannot read the log of the run {run}: {explain(error)}") from error
    return [found for line in lines if isinstance(found := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
