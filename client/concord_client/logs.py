"""The node's own log: one JSON object a line, to standard error and to a file that is rotated.

Never data, parameters, keys or tokens. It stays at the node, and is not the egress log.
"""

import contextlib
import json
import logging
import logging.handlers
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["about", "start_logging"]

FILE_BYTES_MAX = 10 << 20
FILES = 5
_KNOWN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
_subject: ContextVar[dict[str, Any]] = ContextVar("subject", default={})  # noqa: B039 - never changed in place


@contextlib.contextmanager
def about(**subject: Any) -> Iterator[None]:
    """What every line within is about: run, round, node."""
    token = _subject.set({**_subject.get(), **subject})
    try:
        yield
    finally:
        _subject.reset(token)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
            **_subject.get(),
            **{key: value for key, value in record.__dict__.items() if key not in _KNOWN},
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def start_logging(directory: Path, level: str = "info") -> None:
    """To standard error and to `directory`/node.log.

    Raises:
        ArtefactError: the file cannot be written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            directory / "node.log", maxBytes=FILE_BYTES_MAX, backupCount=FILES - 1, encoding="utf-8"
        )
    except OSError as error:
        raise ArtefactError(f"cannot write the log in {directory}: {explain(error)}") from error
    root = logging.getLogger()
    for handler in (logging.StreamHandler(), file):
        handler.setFormatter(JsonFormatter())
        root.addHandler(handler)
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "flwr"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
