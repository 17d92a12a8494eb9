"""What becomes of a run: laws over everything that nodes may say, and the numbers of each rule."""

import dataclasses
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as some

from concord_server.runs.states import (
    ENDED,
    Awaited,
    Decided,
    RunWord,
    Situation,
    Verdict,
    Waiting,
    Word,
    decide,
    move,
    nodes_needed,
)
from concord_server.schedule import Schedule
from concord_shared.errors import ConflictError
from helpers import IMAGES, plan_of

SAYINGS = (*get_args(Decided), *get_args(Awaited))
NOW = 1_000_000

situations = some.builds(
    Situation,
    state=some.sampled_from(get_args(RunWord)),
    words=some.lists(some.sampled_from(SAYINGS), min_size=1, max_size=6).map(
        lambda said: tuple(Word(f"node-{index}", what) for index, what in enumerate(said))
    ),
    needed=some.integers(1, 7),
    now=some.integers(NOW - 10, NOW + 10),
    not_before=some.integers(NOW - 10, NOW),
    not_after=some.integers(NOW, NOW + 10),
    waiting_for=some.lists(
        some.builds(
            Waiting,
            node=some.sampled_from(["node-0", "node-1"]),
            what=some.sampled_from(get_args(Awaited)),
            since=some.integers(0, NOW),
        ),
        max_size=2,
    ).map(tuple),
)


def said(*words: str, state: RunWord = "waiting", needed: int = 2, **changes: object) -> Verdict:
    """The verdict over nodes a, b, c …, between not_before and not_after."""
    of_nodes = tuple(Word(name, word) for name, word in zip("abcdef", words, strict=False))  # type: ignore[arg-type]
    told = {"now": NOW, "not_before": NOW - 1, "not_after": NOW + 1} | changes
    return decide(Situation(state, of_nodes, needed, **told))  # type: ignore[arg-type]


def approved(situation: Situation) -> int:
    return sum(word.says == "approved" for word in situation.words)


# Laws


@given(situations)
def test_a_run_that_ended_stays_as_it_ended(situation: Situation) -> None:
    if situation.state in ENDED:
        assert decide(situation) == Verdict(situation.state)


@given(situations)
def test_every_verdict_is_a_step_that_a_run_may_take(situation: Situation) -> None:
    verdict = decide(situation)
    assert verdict.state == situation.state or move(situation.state, verdict.state) == verdict.state


@given(situations)
def test_only_a_worker_begins_or_ends_what_runs(situation: Situation) -> None:
    verdict = decide(situation)
    assert verdict.state not in ("running", "succeeded") or verdict.state == situation.state
    assert situation.state != "running" or verdict.state == "running"


@given(situations)
def test_a_run_is_queued_only_when_all_have_decided_and_enough_approved(situation: Situation) -> None:
    if situation.state == "waiting" and decide(situation).state == "queued":
        assert not any(word.says in get_args(Awaited) for word in situation.words)
        assert approved(situation) >= situation.needed
        assert situation.not_before <= situation.now <= situation.not_after


@given(situations)
def test_a_run_that_waits_says_for_whom(situation: Situation) -> None:
    verdict = decide(situation)
    if verdict.state == "waiting":
        assert verdict.waiting_for
        awaited = {word.node for word in situation.words if word.says in get_args(Awaited)}
        assert {each.node for each in verdict.waiting_for} == (awaited or {""})


@given(situations)
def test_a_run_that_fails_says_why(situation: Situation) -> None:
    verdict = decide(situation)
    over = situation.state == "running" and situation.now > situation.not_after
    assert bool(verdict.reason) == over or (verdict.state == "failed" and situation.state != "failed")


def test_a_run_whose_manifest_is_over_is_to_stop() -> None:
    told = Situation("running", (Word("a", "approved"),), 1, NOW, NOW - 2, NOW - 1)
    assert "its manifest is over" in decide(told).reason
    assert not decide(dataclasses.replace(told, not_after=NOW)).reason


@given(situations, some.integers(0, 5))
def test_one_more_approval_never_ends_a_run(situation: Situation, index: int) -> None:
    words = list(situation.words)
    at = index % len(words)
    words[at] = Word(words[at].node, "approved")
    better = Situation(
        situation.state, tuple(words), situation.needed, situation.now, situation.not_before, situation.not_after
    )
    if decide(situation).state not in ENDED:
        assert decide(better).state not in ENDED


@given(situations)
def test_waiting_goes_on_from_when_it_began(situation: Situation) -> None:
    """What is noted once is found again: the same situation later keeps every `since`."""
    first = decide(situation)
    if first.state == "waiting" and situation.now >= situation.not_before:
        later = Situation(
            "waiting",
            situation.words,
            situation.needed,
            situation.not_after,
            situation.not_before,
            situation.not_after,
            first.waiting_for,
        )
        assert decide(later).waiting_for == first.waiting_for


# Each rule


def test_all_have_approved() -> None:
    assert said("approved", "approved") == Verdict("queued")


def test_one_has_not_decided() -> None:
    verdict = said("approved", "approved", "approval")
    assert verdict == Verdict("waiting", waiting_for=(Waiting("c", "approval", NOW),))


def test_a_quorum_goes_without_those_who_rejected() -> None:
    assert said("approved", "rejected", "approved").state == "queued"


def test_too_many_rejected() -> None:
    verdict = said("approved", "rejected", "withdrawn")
    assert verdict.state == "failed"
    assert verdict.reason == "too few nodes can take part: 2 of 3 are needed; rejected: b; withdrawn: c"


def test_it_fails_as_soon_as_it_cannot_succeed() -> None:
    assert said("approval", "rejected", "revoked").state == "failed"


def test_a_suspended_node_is_waited_for() -> None:
    assert said("approved", "suspended").waiting_for == (Waiting("b", "suspended", NOW),)


def test_nobody_decided_in_time() -> None:
    verdict = said("approved", "approval", now=NOW + 2)
    assert verdict.state == "failed"
    assert "still undecided: b" in verdict.reason


def test_nobody_took_it_up_in_time() -> None:
    assert "before a worker took it up" in said("approved", "approved", state="queued", now=NOW + 2).reason


def test_it_waits_for_its_beginning() -> None:
    verdict = said("approved", "approved", not_before=NOW + 1)
    assert verdict == Verdict("waiting", waiting_for=(Waiting("", "start time", NOW),))


def test_what_runs_says_whom_it_lost() -> None:
    verdict = said("approved", "withdrawn", "revoked", "rejected", state="running")
    assert [(each.node, each.what) for each in verdict.waiting_for] == [("b", "withdrawn"), ("c", "revoked")]


def test_a_node_that_goes_offline_is_waited_for_since_before() -> None:
    before = (Waiting("b", "approval", NOW - 500),)
    assert said("approved", "offline", waiting_for=before).waiting_for == (Waiting("b", "offline", NOW - 500),)


def test_many_names_are_cut_short() -> None:
    words = tuple(Word(f"node-{index:02}", "rejected") for index in range(30))
    assert decide(Situation("waiting", words, 2, NOW, NOW, NOW)).reason.endswith("node-09 and 20 more")


@pytest.mark.parametrize(
    ("state", "to"),
    [
        ("waiting", "running"),
        ("queued", "waiting"),
        ("queued", "succeeded"),
        ("succeeded", "failed"),
        ("stopped", "queued"),
    ],
)
def test_steps_that_no_run_takes(state: RunWord, to: RunWord) -> None:
    with pytest.raises(ConflictError, match=f"the run is {state}; it cannot become {to}"):
        move(state, to)


# How many nodes are needed


@pytest.mark.parametrize(
    ("overrides", "nodes", "minimum", "needed"),
    [
        ((), 3, 1, 2),  # quorum 0.5 of 3
        ((), 4, 1, 2),
        ((), 4, 3, 3),  # an agreement asks for more
        (("rounds.quorum=1",), 4, 1, 1),
        (('rounds.quorum="all"',), 4, 1, 4),
        (("rounds.cohort=3",), 5, 1, 3),  # a count of nodes needs that many
        (("rounds.cohort=0.5", "rounds.quorum=1"), 6, 2, 3),  # half of 3 is 2: no round asks fewer than 2
    ],
)
def test_nodes_needed(overrides: tuple[str, ...], nodes: int, minimum: int, needed: int) -> None:
    assert nodes_needed(plan_of(IMAGES, *overrides), nodes, minimum) == needed


@given(some.integers(1, 12), some.integers(1, 6), some.sampled_from([0.3, 0.5, 0.9, 1, 2, 3, "all"]))
def test_a_run_can_begin_with_all_counts_from_the_needed_on(nodes: int, minimum: int, cohort: object) -> None:
    plan = plan_of(IMAGES, f"rounds.cohort={cohort}")
    try:
        needed = nodes_needed(plan, nodes, minimum)
    except ConflictError:
        return
    for count in range(needed, nodes + 1):
        assert len(Schedule(plan, tuple(map(str, range(count)))).step("train", 1).cohort) >= minimum


def test_not_even_all_nodes_are_enough() -> None:
    with pytest.raises(ConflictError, match="would ask 1 of 3 nodes, and an agreement wants at least 2"):
        nodes_needed(plan_of(IMAGES, "rounds.cohort=1"), 3, 2)
    with pytest.raises(ConflictError, match="the plan cannot run on 3 nodes"):
        nodes_needed(plan_of(IMAGES, "rounds.cohort=5"), 3, 1)
