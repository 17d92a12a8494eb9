"""The log of a run: what its workers wrote of it, one JSON object a line, in runs/<run>/logs/run.jsonl. A full file
becomes run.jsonl.1, in the place of the one before.
"""

import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from concord_server.logs import JsonFormatter
from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["log_path", "recording", "tail"]

LINE_BYTES_MAX = 16_384
FILE_BYTES_MAX = 4 << 20


def log_path(runs: Path, run: str) -> Path:
    """Where a worker writes the log of a run. runs: the folder of all of them."""
    return runs / run / "logs" / "run.jsonl"


@contextlib.contextmanager
def recording(runs: Path, run: str) -> Iterator[None]:
    """What this thread logs meanwhile, and no other, is written to the log of the run too. A log that cannot be written
    keeps no run from going on.
    """
    path, thread = log_path(runs, run), threading.get_ident()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = _RunLog(path, maxBytes=FILE_BYTES_MAX, backupCount=1, encoding="utf-8", delay=True)
    handler.setFormatter(_RunFormatter("worker"))
    handler.addFilter(lambda record: record.thread == thread)
    logger = logging.getLogger("concord_server")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def tail(runs: Path, run: str, limit: int) -> list[dict[str, Any]]:
    """The last lines, oldest first; empty where there are none. A line that a crash cut short is left out."""
    path, lines = log_path(runs, run), deque[bytes](maxlen=limit)
    try:
        for each in (path.with_name(f"{path.name}.1"), path):
            with contextlib.suppress(FileNotFoundError), each.open("rb") as file:
                lines.extend(line[:LINE_BYTES_MAX] for line in file)
    except OSError as error:
        raise ArtefactError(f"cannot read the log of the run {run}: {explain(error)}") from error
    return [found for line in lines if isinstance(found := _parsed(line), dict)]


class _RunLog(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        """What is lost here stands in the coordinator's log."""


class _RunFormatter(JsonFormatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's own name)
        """Everybody of the study may read it: the trace is for the coordinator's log."""
        return str(ei[0].__name__)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
