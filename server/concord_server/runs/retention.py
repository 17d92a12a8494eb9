"""Which files of runs may go, as a pure function of what is stored, its age and how much room there is; and the tidying
itself.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import event, update
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from concord_server.audit.service import record
from concord_server.models.tables import ModelVersion, ReleaseRow
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Run

__all__ = ["Stored", "removable", "tidy"]

log = logging.getLogger(__name__)
DAY_S = 86_400
Checkpoints = Mapping[str, Mapping[str, Any] | None]
"""Where each run stands; None of one that ended."""
VERSION = re.compile(r"round-([0-9]+)\.safetensors")


@dataclass(frozen=True)
class Stored:
    """One file, below the coordinator's directory.

    kept: never removed: a released model, the last of its run, one that a run yet to end starts from.
    needless: nothing names it any more, so it goes at any age.
    """

    path: str
    created_at: int
    size: int
    kept: bool = False
    needless: bool = False


def removable(stored: Iterable[Stored], now: int, retention_days: int, quota_bytes: int) -> tuple[Stored, ...]:
    """What goes, oldest first: what is needless, what is older than `retention_days`, then as much as the quota asks
    for. What must be kept may alone exceed the quota.
    """
    everything = sorted(stored, key=lambda each: (not each.needless, each.created_at, each.path))
    total = sum(each.size for each in everything)
    gone = []
    for each in everything:
        old = now - each.created_at > retention_days * DAY_S
        if not each.kept and (each.needless or old or total > quota_bytes):
            gone.append(each)
            total -= each.size
    return tuple(gone)


def tidy(
    session: Session, home: Path, now: datetime, retention_days: int, quota_bytes: int, *, dry_run: bool = False
) -> tuple[Stored, ...]:
    """Notes in the rows of the models, whose lineage stays, that what `removable` names is gone; the files go once that
    is committed. A file that cannot be removed then is logged, and is needless by the next time.
    """
    gone = removable(_stored(session, home), int(now.timestamp()), retention_days, quota_bytes)
    if dry_run or not gone:
        return gone
    for each in gone:
        session.execute(update(ModelVersion).where(col(ModelVersion.path) == each.path).values(path=""))
    record(session, "coordinator", "run:tidy", "runs", files=len(gone), bytes=sum(each.size for each in gone))
    event.listen(session, "after_commit", lambda _: _remove(home, gone), once=True)
    return gone


def _remove(home: Path, gone: Iterable[Stored]) -> None:
    for each in gone:
        try:
            (home / each.path).unlink(missing_ok=True)
        except OSError as error:
            log.error("a file cannot be removed", extra={"file": each.path, "reason": str(error)})


def _stored(session: Session, home: Path) -> list[Stored]:
    """Every file that a model version names, and those below runs/ that none names any more."""
    runs = session.exec(select(Run.id, Run.state, Run.checkpoint))
    checkpoints = {run: None if state in ENDED else checkpoint or {} for run, state, checkpoint in runs}
    query = select(ModelVersion).where(ModelVersion.path != "").options(defer(col(ModelVersion.metrics)))  # type: ignore[arg-type]
    rows = session.exec(query.order_by(col(ModelVersion.round), col(ModelVersion.id))).all()
    kept, found = _kept(session, rows, checkpoints), dict[str, Stored]()
    for row in rows:
        created = max(int(row.created_at.timestamp()), found[row.path].created_at if row.path in found else 0)
        found[row.path] = Stored(row.path, created, row.size, kept=row.path in kept)
    return [*found.values(), *_needless(home, checkpoints, kept | found.keys())]


def _kept(session: Session, rows: Iterable[ModelVersion], checkpoints: Checkpoints) -> set[str]:
    """Paths of released models, of the last model of each run, of those that runs yet to end start from or stand at."""
    last = {row.run: row.path for row in rows}
    stand = {f"runs/{run}/{each['tensors']}" for run, each in checkpoints.items() if each and "tensors" in each}
    released = set(session.exec(select(ReleaseRow.model_digest)))
    started = set(session.exec(select(Run.start_model).where(col(Run.state).not_in(ENDED))))
    models = {row.path for row in rows if row.final or row.digest in released | started}
    return {*last.values(), *stand, *models}


def _needless(home: Path, checkpoints: Checkpoints, known: set[str]) -> Iterable[Stored]:
    """Files that nothing names: all of an ended run; of one that goes on those before its checkpoint, as the next is
    written before anything names it.
    """
    for path in sorted((home / "runs").glob("*/**/*.safetensors")):
        name = str(path.relative_to(home))
        run, version = Path(name).parts[1], VERSION.fullmatch(path.name)
        if name in known or run not in checkpoints:
            continue
        checkpoint = checkpoints[run]
        if checkpoint is None or (version and int(version[1]) < checkpoint.get("version", 0)):
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                about = path.stat()
                yield Stored(name, int(about.st_mtime), about.st_size, needless=True)
