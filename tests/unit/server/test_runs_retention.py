"""Which files of runs may go, and that they go after their rows say so."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from sqlalchemy import create_engine, event
from sqlmodel import Session, col, select

from concord_server.database import all_tables
from concord_server.models.tables import ModelVersion, ReleaseRow
from concord_server.runs.retention import DAY_S, Stored, removable, tidy
from concord_server.runs.tables import Run

NOW = 100 * DAY_S

files = some.lists(
    some.builds(
        Stored,
        path=some.uuids().map(str),
        created_at=some.integers(0, NOW),
        size=some.integers(1, 100),
        kept=some.booleans(),
        needless=some.booleans(),
    ).filter(lambda each: not (each.kept and each.needless)),
    max_size=12,
    unique_by=lambda each: each.path,
)


@given(files, some.integers(1, 100), some.integers(0, 500))
def test_what_must_be_kept_is_never_removed(stored: list[Stored], days: int, quota: int) -> None:
    assert not any(each.kept for each in removable(stored, NOW, days, quota))


@given(files, some.integers(1, 100), some.integers(0, 500))
def test_the_quota_holds_unless_what_must_be_kept_exceeds_it(stored: list[Stored], days: int, quota: int) -> None:
    gone = set(removable(stored, NOW, days, quota))
    left = [each for each in stored if each not in gone]
    assert sum(each.size for each in left) <= quota or all(each.kept for each in left)


@given(files, some.integers(1, 100), some.integers(0, 500))
def test_nothing_young_goes_while_something_older_could(stored: list[Stored], days: int, quota: int) -> None:
    gone = set(removable(stored, NOW, days, quota))
    left = [each.created_at for each in stored if each not in gone and not each.kept]
    assert all(each.created_at <= min(left, default=NOW) for each in gone if not each.needless)


@given(files, some.integers(1, 100), some.integers(0, 500))
def test_tidying_twice_removes_nothing_more(stored: list[Stored], days: int, quota: int) -> None:
    gone = set(removable(stored, NOW, days, quota))
    assert removable([each for each in stored if each not in gone], NOW, days, quota) == ()


def test_old_ones_go_and_the_oldest_first() -> None:
    stored = [Stored(str(age), NOW - age * DAY_S, 10) for age in (1, 40, 31, 30)]
    assert [each.path for each in removable(stored, NOW, 30, 1000)] == ["40", "31"]


def test_the_quota_takes_no_more_than_it_needs() -> None:
    stored = [Stored(str(age), NOW - age, 10) for age in (4, 3, 2, 1)]
    assert [each.path for each in removable(stored, NOW, 30, 25)] == ["4", "3"]


def test_what_nothing_names_goes_at_any_age() -> None:
    assert removable([Stored("a", NOW, 1, needless=True)], NOW, 30, 1000)


class Shelf:
    """Runs with their checkpoints of 10 bytes, one a day, the last of them made today: rows and files."""

    def __init__(self, home: Path, session: Session) -> None:
        self.home, self.session = home, session
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def run(self, name: str, state: str, checkpoints: int, **told: Any) -> None:
        standing = {"version": checkpoints, "tensors": f"round-{checkpoints}.safetensors"}
        self.session.add(
            Run(
                id=name,
                study="s",
                plan_digest="p",
                organisation="o",
                sequence=len(name),
                manifest={},
                not_before=0,
                not_after=0,
                created_by="c",
                state=state,
                **{"checkpoint": standing, **told},
            )
        )
        for number in range(1, checkpoints + 1):
            made = self.now - timedelta(days=checkpoints - number)
            path = self.file(name, number)
            self.session.add(
                ModelVersion(
                    digest=f"{name}-{number}",
                    run=name,
                    plan_digest="p",
                    round=number,
                    path=path,
                    sha256="",
                    size=10,
                    created_at=made,
                )
            )
        self.session.commit()

    def file(self, run: str, number: int) -> str:
        path = self.home / "runs" / run / f"round-{number}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
        return str(path.relative_to(self.home))

    def tidy(self, days: int = 1000, quota: int = 1000) -> None:
        tidy(self.session, self.home, self.now, days, quota)
        self.session.commit()

    def files(self, run: str) -> list[int]:
        """Those that there are."""
        return sorted(int(each.stem.partition("-")[2]) for each in (self.home / "runs" / run).glob("*.safetensors"))

    def named(self, run: str) -> list[int]:
        """Those that a row names."""
        query = select(ModelVersion.round).where(ModelVersion.run == run, ModelVersion.path != "")
        return list(self.session.exec(query.order_by(col(ModelVersion.round))))


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    engine = create_engine("sqlite://")
    all_tables().create_all(engine)
    with Session(engine) as session:
        yield Shelf(tmp_path, session)
    engine.dispose()


def test_old_checkpoints_go_and_the_last_of_each_run_stays(shelf: Shelf) -> None:
    shelf.run("live", "running", 6)
    shelf.run("ended", "succeeded", 6)
    shelf.tidy(days=3)
    assert shelf.files("live") == shelf.named("live") == [3, 4, 5, 6]
    shelf.tidy(quota=0)
    assert shelf.files("live") == shelf.named("live") == [6]
    assert shelf.files("ended") == shelf.named("ended") == [6]
    lineage = shelf.session.exec(select(ModelVersion.digest).where(ModelVersion.run == "live")).all()
    assert len(lineage) == 6


def test_what_is_released_or_somebody_starts_from_stays(shelf: Shelf) -> None:
    shelf.run("first", "succeeded", 4)
    shelf.run("second", "queued", 0, start_model="first-2", checkpoint=None)
    shelf.session.add(ReleaseRow(model_digest="first-1", run="first", study="s", organisation="o", envelope={}))
    shelf.session.commit()
    shelf.tidy(quota=0)
    assert shelf.files("first") == shelf.named("first") == [1, 2, 4]


def test_where_a_run_stands_stays_whatever_the_rows_say(shelf: Shelf) -> None:
    """Its last model may be one that it had before: the file of the checkpoint is named by the checkpoint alone."""
    shelf.run("live", "running", 4, checkpoint={"version": 3, "tensors": "round-3.safetensors"})
    shelf.tidy(quota=0)
    assert shelf.files("live") == [3, 4]


def test_what_no_row_names_goes_but_for_what_a_run_has_just_written(shelf: Shelf) -> None:
    shelf.run("live", "running", 3)
    shelf.file("live", 4)  # the next checkpoint, whose row is about to be stored
    shelf.file("ended", 7)
    shelf.run("ended", "failed", 1)
    for row in shelf.session.exec(select(ModelVersion).where(ModelVersion.round == 2)):
        shelf.session.delete(row)  # as where a round changed nothing, and the row names the later file
    shelf.session.commit()
    shelf.tidy()
    assert shelf.files("live") == [1, 3, 4]
    assert shelf.files("ended") == [1]


def test_a_commit_that_fails_loses_no_file(shelf: Shelf) -> None:
    shelf.run("live", "running", 3)

    def fail(_: object) -> None:
        raise OSError("no space for the database")

    event.listen(shelf.session, "before_commit", fail)
    with pytest.raises(OSError, match="no space"):
        shelf.tidy(quota=0)
    shelf.session.rollback()
    event.remove(shelf.session, "before_commit", fail)
    assert shelf.files("live") == shelf.named("live") == [1, 2, 3]
    shelf.tidy(quota=0)
    assert shelf.files("live") == shelf.named("live") == [3]


def test_a_file_that_cannot_be_removed_is_tried_again(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.run("live", "running", 3)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as locked:
        locked.setattr(Path, "unlink", refuse)
        shelf.tidy(quota=0)
    assert (shelf.files("live"), shelf.named("live")) == ([1, 2, 3], [3])
    shelf.tidy(quota=0)
    assert shelf.files("live") == [3]


def test_a_dry_run_removes_nothing(shelf: Shelf) -> None:
    shelf.run("live", "running", 3)
    gone = tidy(shelf.session, shelf.home, shelf.now, 1000, 0, dry_run=True)
    shelf.session.commit()
    assert [each.path for each in gone] == ["runs/live/round-1.safetensors", "runs/live/round-2.safetensors"]
    assert shelf.files("live") == shelf.named("live") == [1, 2, 3]
