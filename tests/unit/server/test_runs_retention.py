"""Which files of runs may go."""

from hypothesis import given
from hypothesis import strategies as some

from concord_server.runs.retention import DAY_S, Stored, removable

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
