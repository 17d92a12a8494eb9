"""What may be subtracted from an earlier answer is refused: rows, nodes, thresholds."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client.statistics_guard import Answer, StatisticsGuard, columns_of, selection_of, sketch_rows
from concord_client.store import NodeStore
from concord_shared.errors import ConsentRefusedError
from concord_shared.plan import Plan
from helpers import TABLE, plan_of

SECTION = "[statistics]\nof = ['moments', 'classes']\nbins = 10\n[privacy]\nmode = 'private'\n"
TEXT = "kind = 'statistics'\n" + TABLE[: TABLE.index("[preprocessing]")] + SECTION
PLAN = plan_of(TEXT)
KEY = b"k" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    with NodeStore(tmp_path / "node.db") as opened:
        opened.set_fact("statistics/key", "5e" * 32)  # drawn, one key in 1,024 puts a changed value into the same cell
        yield opened


def rows_of(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    raw = np.stack([rng.uniform(0, 120, count), rng.integers(0, 3, count), rng.normal(0, 1, count)], 1)
    raw[::9, 2] = np.nan
    return raw, rng.integers(0, 2, count)


def answered(
    guard: StatisticsGuard, plan: Plan = PLAN, version: str = "v1", run: str = "run-1", **changes: Any
) -> None:
    answer = Answer(run, plan.digest, "heart", "patients", version, selection_of(plan), 1, columns_of(plan))
    guard.note(replace(answer, **changes))


def known(store: NodeStore, plan: Plan = PLAN, **versions: tuple[np.ndarray, np.ndarray]) -> StatisticsGuard:
    guard = StatisticsGuard(store)
    for version, (raw, targets) in versions.items():
        guard.remember_rows(version, plan, [(raw[:100], targets[:100]), (raw[100:], targets[100:])])
    return guard


def test_the_first_question_and_the_same_one_again_are_answered(store: NodeStore) -> None:
    guard = known(store, v1=rows_of(300))
    guard.check("run-1", PLAN, "v1", 5)
    answered(guard)
    guard.check("run-2", PLAN, "v1", 5)


@pytest.mark.parametrize("less", [1, 4])
def test_a_few_rows_less_are_refused_and_enough_are_not(store: NodeStore, less: int) -> None:
    raw, targets = rows_of(300)
    guard = known(store, v1=(raw, targets), v2=(raw[less:], targets[less:]), v3=(raw[5:], targets[5:]))
    answered(guard)
    with pytest.raises(ConsentRefusedError, match=f"differ in about {less} from these: fewer than 5"):
        guard.check("run-2", PLAN, "v2", 1)
    guard.check("run-2", PLAN, "v3", 5)
    with pytest.raises(ConsentRefusedError, match="fewer than 20"):
        guard.check("run-2", PLAN, "v3", 20)


def test_one_changed_value_is_refused(store: NodeStore) -> None:
    raw, targets = rows_of(300)
    changed = raw.copy()
    changed[17, 0] += 1
    guard = known(store, v1=(raw, targets), v2=(changed, targets))
    answered(guard)
    with pytest.raises(ConsentRefusedError, match="differ in about 2"):
        guard.check("run-2", PLAN, "v2", 5)


def test_other_rows_and_the_same_rows_in_another_order_are_answered(store: NodeStore) -> None:
    raw, targets = rows_of(300)
    order = np.random.default_rng(1).permutation(300)
    guard = known(store, v1=(raw, targets), v2=rows_of(300, 5), v3=(raw[order], targets[order]))
    answered(guard)
    guard.check("run-2", PLAN, "v2", 5)
    guard.check("run-2", PLAN, "v3", 5)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("[0, 120]", "[0, 60]", "column age: these rows were asked about with another range"),
        ("bins = 10", "bins = 11", "another bins"),
    ],
)
def test_another_range_or_other_bins_are_refused(store: NodeStore, old: str, new: str, what: str) -> None:
    guard = known(store, v1=rows_of(300))
    answered(guard)
    with pytest.raises(ConsentRefusedError, match=what):
        guard.check("run-2", plan_of(TEXT.replace(old, new)), "v1", 5)


def test_the_statistics_of_a_training_plan_count_too(store: NodeStore) -> None:
    raw, targets = rows_of(300)
    training = plan_of(TABLE)
    guard = known(store, training, v1=(raw, targets))
    guard = known(store, PLAN, v2=(raw[1:], targets[1:]))
    answered(guard, training)
    with pytest.raises(ConsentRefusedError, match="differ in about 1"):
        guard.check("run-2", PLAN, "v2", 5)


def test_rows_that_were_never_looked_at_are_refused(store: NodeStore) -> None:
    with pytest.raises(ConsentRefusedError, match="approves the plan again"):
        StatisticsGuard(store).check("run-1", PLAN, "v1", 5)


def test_nodes_that_differ_in_a_few_are_refused(store: NodeStore) -> None:
    guard = known(store, v1=rows_of(300))
    answered(guard, cohort=("a", "b", "c", "d"))
    guard.check_cohort("run-2", PLAN, ("a", "b", "c", "d"), 3)
    with pytest.raises(ConsentRefusedError, match=r"differ in 1 from now \(d\)"):
        guard.check_cohort("run-2", PLAN, ("a", "b", "c"), 3)
    guard.check_cohort("run-1", PLAN, ("a", "b", "c"), 3)  # a later stage of the same run
    guard.check_cohort("run-2", PLAN, ("a", "e", "f", "g"), 3)


def test_what_is_remembered_outlives_the_process_and_can_be_forgotten_loudly(store: NodeStore, tmp_path: Path) -> None:
    raw, targets = rows_of(300)
    answered(known(store, v1=(raw, targets), v2=(raw[1:], targets[1:])))
    store.close()
    with NodeStore(tmp_path / "node.db") as again:
        guard = StatisticsGuard(again)
        with pytest.raises(ConsentRefusedError, match="differ in about 1"):
            guard.check("run-2", PLAN, "v2", 5)
        assert guard.forget("other") == 0
        assert guard.forget("patients") == 1
        guard.check("run-2", PLAN, "v2", 5)
        assert [entry.action for entry, _ in again.log_entries()] == ["statistics:forget"]


def test_a_plan_with_differential_privacy_is_the_ledgers_business(store: NodeStore) -> None:
    dp = "privacy={mode='private', dp={unit='record', epsilon=1.0, delta=1e-6, clip=1.0}}"
    StatisticsGuard(store).check("run-1", plan_of(TEXT, dp), "v1", 5)


def test_a_sketch_depends_on_the_key_and_holds_counts_alone() -> None:
    raw, targets = rows_of(300)
    one, other = (sketch_rows(PLAN.data, [(raw, targets)], key) for key in (KEY, b"o" * 32))
    assert set(one) == {"age", "city", "dose", "ill"}
    assert all(cells.sum() == 300 for cells in one.values())
    assert not np.array_equal(one["age"], other["age"])
    assert json.dumps(one["age"].tolist())
