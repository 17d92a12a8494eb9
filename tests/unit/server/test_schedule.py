import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_server.schedule import Schedule, Step
from concord_shared.errors import UsageError
from helpers import REGRESSION, TABLE, plan_of

NODES = tuple(f"node-{i:02d}" for i in range(10))


def schedule_of(*overrides: str, text: str = REGRESSION, nodes: tuple[str, ...] = NODES) -> Schedule:
    return Schedule(plan_of(text, *overrides), nodes)


def walk(schedule: Schedule) -> list[str]:
    names, step = [], schedule.first()
    while step is not None:
        names.append(f"{step.kind} {step.number}")
        step = schedule.after(step)
    return names


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rounds.count=1"], "train 1, evaluate 1"),
        (["rounds.count=3"], "train 1, evaluate 1, train 2, evaluate 2, train 3, evaluate 3"),
        (["rounds.count=3", "evaluation.every=0"], "train 1, train 2, train 3, evaluate 3"),
        (["rounds.count=3", "evaluation.every=2"], "train 1, train 2, evaluate 2, train 3, evaluate 3"),
        (["rounds.count=2", "evaluation.every=9"], "train 1, train 2, evaluate 2"),
        (
            ["rounds.count=1", "preprocessing={scope='federated', standardise=true}"],
            "statistics 1, statistics 2, train 1, evaluate 1",
        ),
        (["rounds.count=1", "preprocessing={scope='per-node', standardise=true}"], "train 1, evaluate 1"),
        (["rounds.count=1", "preprocessing={scope='federated'}"], "train 1, evaluate 1"),
    ],
)
def test_order_of_steps(overrides: list[str], expected: str) -> None:
    assert ", ".join(walk(schedule_of(*overrides))) == expected


def test_imputing_needs_statistics_too() -> None:
    steps = walk(schedule_of("rounds.count=1", "preprocessing.standardise=false", text=TABLE))
    assert steps[:2] == ["statistics 1", "statistics 2"]


def test_a_step_is_known_by_its_name() -> None:
    schedule = schedule_of("rounds.cohort=4")
    step = schedule.first()
    assert schedule.step(step.kind, step.number) == step


class TestCohort:
    @given(st.integers(1, 10), st.integers(1, 1000), st.integers(0, 2**63 - 1), st.permutations(NODES))
    def test_is_a_public_function_of_seed_round_and_names(
        self, size: int, number: int, seed: int, order: list[str]
    ) -> None:
        overrides = [f"rounds.cohort={size}", f"seed={seed}", "rounds.count=1000"]
        cohort = schedule_of(*overrides).step("train", number).cohort
        assert len(set(cohort)) == size
        assert set(cohort) <= set(NODES)
        if size < len(NODES):
            assert cohort == tuple(sorted(cohort))
        assert set(schedule_of(*overrides, nodes=tuple(order)).step("train", number).cohort) == set(cohort)

    def test_changes_with_round_and_seed(self) -> None:
        cohorts = {schedule_of("rounds.cohort=5").step("train", r).cohort for r in range(1, 11)}
        assert len(cohorts) > 5
        other = schedule_of("rounds.cohort=5", "seed=1")
        assert [other.step("train", r).cohort for r in range(1, 11)] != [
            schedule_of("rounds.cohort=5").step("train", r).cohort for r in range(1, 11)
        ]

    def test_asks_everyone_equally_often(self) -> None:
        schedule = schedule_of("rounds.cohort=3", "rounds.count=1000")
        asked = [node for r in range(1, 1001) for node in schedule.step("train", r).cohort]
        assert all(230 < asked.count(node) < 370 for node in NODES)

    def test_evaluation_and_statistics_ask_everybody(self) -> None:
        schedule = schedule_of("rounds.cohort=2", "rounds.quorum=2")
        assert schedule.step("evaluate", 1).cohort == NODES
        assert schedule.step("statistics", 1).cohort == NODES


@pytest.mark.parametrize(
    ("cohort", "quorum", "expected"),
    [("all", "all", (10, 10)), ("all", "3", (10, 3)), ("0.4", "0.5", (4, 2)), ("4", "all", (4, 4)), ("1", "1", (1, 1))],
)
def test_quorum_is_of_the_cohort(cohort: str, quorum: str, expected: tuple[int, int]) -> None:
    step = schedule_of(f"rounds.cohort={cohort}", f"rounds.quorum={quorum}").first()
    assert (len(step.cohort), step.quorum) == expected


def test_waits_are_those_of_the_plan() -> None:
    step = schedule_of("rounds.grace_s=1.5", "rounds.deadline_s=7").first()
    assert step == Step("train", 1, NODES, 5, 1.5, 7.0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rounds.cohort=11"], r"rounds\.cohort = 11 asks for more nodes than there are \(10\)"),
        (["rounds.cohort=4", "rounds.quorum=5"], r"rounds\.quorum = 5 is above the cohort of 4 nodes"),
    ],
)
def test_refuses_more_than_there_are(overrides: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        schedule_of(*overrides)


class TestRobust:
    FOUR = ("privacy={mode='robust', attackers=4}",)

    def test_a_round_needs_twice_the_attackers_and_one(self) -> None:
        step = schedule_of(*self.FOUR, "rounds.quorum=0.1").first()
        assert (step.kind, step.quorum) == ("train", 9)
        assert schedule_of(*self.FOUR, "rounds.quorum='all'").first().quorum == 10
        assert schedule_of(*self.FOUR, "rounds.quorum=0.1").step("evaluate", 1).quorum == 1

    @pytest.mark.parametrize(("nodes", "cohort"), [(8, "'all'"), (10, "0.8")])
    def test_refuses_a_cohort_that_cannot_outvote_the_attackers(self, nodes: int, cohort: str) -> None:
        with pytest.raises(UsageError, match=r"a round of 8 nodes cannot outvote .* = 4: expected at least 9"):
            schedule_of(*self.FOUR, f"rounds.cohort={cohort}", nodes=NODES[:nodes])
