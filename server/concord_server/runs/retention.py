"""Which files of runs may go, as a pure function of what is stored, its age and how much room there is; and the tidying
itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlmodel import Session, col, select

from concord_server.audit.service import record
from concord_server.models.tables import ModelVersion, ReleaseRow
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Run
from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["Stored", "removable", "tidy"]

DAY_S = 86_400


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
    """Removes what `removable` names, and notes it in the rows of the models, whose lineage stays.

    Raises:
        ArtefactError: a file cannot be removed; what was removed before it is noted.
    """
    gone = removable(_stored(session, home), int(now.timestamp()), retention_days, quota_bytes)
    if dry_run:
        return gone
    for each in gone:
        for row in session.exec(select(ModelVersion).where(ModelVersion.path == each.path)):
            row.path = ""
            session.add(row)
        try:
            (home / each.path).unlink(missing_ok=True)
        except OSError as error:
            raise ArtefactError(f"cannot remove {home / each.path}: {explain(error)}") from error
    if gone:
        record(session, "coordinator", "run:tidy", "runs", files=len(gone), bytes=sum(each.size for each in gone))
    return gone


def _stored(session: Session, home: Path) -> list[Stored]:
    """Every file that a model version names, and those of ended runs that none names."""
    states = dict(session.exec(select(Run.id, Run.state)).all())
    kept, sizes = _kept(session), dict[str, Stored]()
    for row in session.exec(select(ModelVersion).where(ModelVersion.path != "")):
        created = max(int(row.created_at.timestamp()), sizes[row.path].created_at if row.path in sizes else 0)
        sizes[row.path] = Stored(row.path, created, row.size, kept=row.path in kept)
    return [*sizes.values(), *_needless(home, states, sizes.keys())]


def _kept(session: Session) -> set[str]:
    """Paths of released models, of the last model of each run, of those that runs yet to end start from."""
    rows = session.exec(select(ModelVersion).order_by(col(ModelVersion.round), col(ModelVersion.id))).all()
    last = {row.run: row.path for row in rows}
    released = set(session.exec(select(ReleaseRow.model_digest)))
    started = set(session.exec(select(Run.start_model).where(col(Run.state).not_in(ENDED))))
    return {*last.values(), *(row.path for row in rows if row.final or row.digest in released | started)}


def _needless(home: Path, states: dict[str, str], named: Iterable[str]) -> Iterable[Stored]:
    known = set(named)
    for path in sorted((home / "runs").glob("*/**/*.safetensors")):
        name = str(path.relative_to(home))
        if states.get(Path(name).parts[1]) in ENDED and name not in known:
            about = path.stat()
            yield Stored(name, int(about.st_mtime), about.st_size, needless=True)
