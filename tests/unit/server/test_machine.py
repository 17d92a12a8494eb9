from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concord_server.machine import (
    Abandon,
    Answered,
    Ask,
    Begin,
    Command,
    Event,
    Failed,
    Finish,
    RunState,
    Settle,
    Settled,
    Tick,
    advance,
    begin_at,
    wake_at,
)
from concord_server.schedule import Schedule
from concord_shared.plan.schema import Plan
from helpers import REGRESSION, plan_of

TIMES = ["rounds.grace_s=10", "rounds.deadline_s=100"]


class Run:
    """A machine that is fed by hand; `said` holds its commands in words."""

    def __init__(self, *overrides: str, nodes: str = "abcd", aborts_max: int = 3) -> None:
        self.schedule = Schedule(plan_of(REGRESSION, *TIMES, *overrides), tuple(nodes))
        self.aborts_max = aborts_max
        self.state = begin_at(self.schedule.first())
        self.said: list[str] = []

    def feed(self, *events: Event) -> list[str]:
        start = len(self.said)
        for event in events:
            self.state, commands = advance(self.schedule, self.aborts_max, self.state, event)
            self.said += [in_words(command) for command in commands]
        return self.said[start:]

    def round_of(self, answered: str, failed: str, at_s: float) -> list[str]:
        return self.feed(*(Answered(n, at_s) for n in answered), *(Failed(n, at_s) for n in failed))


def in_words(command: Command) -> str:
    match command:
        case Ask(step):
            return f"ask {step.kind} {step.number}"
        case Settle(step, survivors):
            return f"settle {step.kind} {step.number}: {' '.join(survivors)}"
        case Abandon(step):
            return f"abandon {step.kind} {step.number}"
        case Finish(outcome):
            return outcome


class TestByHand:
    def test_a_run_where_everybody_answers(self) -> None:
        run = Run("rounds.count=2")
        run.feed(Begin(0))
        for _ in range(4):
            run.round_of("dbca", "", 1)
            run.feed(Settled(2))
        assert run.said == [
            "ask train 1",
            "settle train 1: a b c d",
            "ask evaluate 1",
            "settle evaluate 1: a b c d",
            "ask train 2",
            "settle train 2: a b c d",
            "ask evaluate 2",
            "settle evaluate 2: a b c d",
            "succeeded",
        ]
        assert run.state.phase == "ended"

    def test_the_last_answer_or_failure_settles_at_once(self) -> None:
        run = Run()
        run.feed(Begin(0))
        assert run.round_of("ab", "d", 1) == []
        assert run.feed(Failed("c", 1)) == ["settle train 1: a b"]

    def test_grace_starts_with_the_quorum(self) -> None:
        run = Run()
        run.feed(Begin(0), Answered("a", 20))
        assert wake_at(run.state) == 100
        run.feed(Answered("b", 30))
        assert wake_at(run.state) == 40
        run.feed(Answered("c", 39))  # a later answer does not prolong it
        assert wake_at(run.state) == 40
        assert run.feed(Tick(39.9)) == []
        assert run.feed(Tick(40)) == ["settle train 1: a b c"]

    def test_grace_never_goes_beyond_the_deadline(self) -> None:
        run = Run()
        run.feed(Begin(5), Answered("a", 95), Answered("b", 101))
        assert wake_at(run.state) == 105
        assert run.feed(Tick(105)) == ["settle train 1: a b"]

    def test_deadline_without_quorum_goes_on_with_the_model_unchanged(self) -> None:
        run = Run("evaluation.every=0")
        run.feed(Begin(0), Answered("a", 1))
        assert run.feed(Tick(99.9)) == []
        assert run.feed(Tick(100)) == ["abandon train 1", "ask train 2"]
        assert (run.state.answered, run.state.failed, run.state.opened_at_s) == (frozenset(), frozenset(), 100)

    def test_too_many_failures_end_a_round_at_once(self) -> None:
        run = Run("evaluation.every=0")
        run.feed(Begin(0), Failed("a", 1), Failed("b", 1))
        assert run.feed(Failed("c", 1)) == ["abandon train 1", "ask train 2"]

    def test_the_reason_names_who_failed_and_who_was_silent(self) -> None:
        run = Run("rounds.quorum=all")
        run.feed(Begin(0), Answered("b", 1))
        _, commands = advance(run.schedule, 3, run.state, Failed("c", 2))
        assert isinstance(commands[0], Abandon)
        assert commands[0].reason == ("train round 1: 1 of 4 nodes answered, the quorum is 4; failed: c; silent: a, d")

    def test_abandoned_rounds_in_a_row_fail_the_run(self) -> None:
        run = Run("evaluation.every=0", aborts_max=2)
        run.feed(Begin(0))
        run.round_of("", "abc", 1)
        assert run.round_of("", "abc", 2) == ["abandon train 2", "failed"]
        assert run.state.phase == "ended"

    def test_a_settled_round_forgets_the_abandoned_ones_before_it(self) -> None:
        run = Run("evaluation.every=0", aborts_max=2)
        run.feed(Begin(0))
        for number in range(1, 8, 2):
            assert run.round_of("", "abc", number) == [f"abandon train {number}", f"ask train {number + 1}"]
            run.round_of("abcd", "", number)
            run.feed(Settled(number))
        assert run.state.aborts == 0

    def test_without_statistics_there_is_no_run(self) -> None:
        run = Run("preprocessing={scope='federated', standardise=true}", aborts_max=9)
        run.feed(Begin(0))
        assert run.round_of("", "abc", 1) == ["abandon statistics 1", "failed"]

    def test_resuming_keeps_the_abandoned_rounds(self) -> None:
        run = Run("evaluation.every=0")
        run.state = begin_at(run.schedule.step("train", 4), aborts=2)
        assert run.feed(Begin(0)) == ["ask train 4"]
        assert run.round_of("", "abc", 1) == ["abandon train 4", "failed"]

    def test_an_abandoned_evaluation_is_no_abandoned_training(self) -> None:
        run = Run(aborts_max=3)
        run.feed(Begin(0))
        run.round_of("", "abc", 1)
        assert run.state.aborts == 1
        run.round_of("", "abc", 2)
        assert (run.state.step.kind, run.state.step.number, run.state.aborts) == ("train", 2, 1)

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_run_that_applied_no_round_has_not_succeeded(self, count: int) -> None:
        run = Run(f"rounds.count={count}", "evaluation.every=0", aborts_max=3)
        run.feed(Begin(0))
        for number in range(1, count + 1):
            run.round_of("", "abc", number)
        run.round_of("abcd", "", 9)
        run.feed(Settled(10))
        assert run.state.phase == "ended"
        assert run.said[-1] == "failed"


OVERRIDES = st.fixed_dictionaries(
    {
        "rounds.count": st.integers(1, 3),
        "rounds.quorum": st.sampled_from(["all", 1, 0.5, 0.75]),
        "rounds.cohort": st.sampled_from(["all", 0.7, 1]),
        "evaluation.every": st.integers(0, 2),
        "preprocessing.standardise": st.sampled_from(["true", "false"]),
    }
)
NODES = "abcde"
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["answer", "answer", "answer", "fail", "tick", "settled", "begin"]),
        st.sampled_from(NODES + "z"),
        st.floats(0, 120),
    ),
    max_size=60,
)


def machine_of(overrides: dict[str, Any], nodes: int, aborts_max: int) -> Run:
    settings_ = [f"{key}={value}" for key, value in overrides.items()]
    return Run("preprocessing.scope=federated", *settings_, nodes=NODES[:nodes], aborts_max=aborts_max)


def event_of(kind: str, node: str, now: float) -> Event:
    match kind:
        case "answer":
            return Answered(node, now)
        case "fail":
            return Failed(node, now)
        case "tick":
            return Tick(now)
        case "settled":
            return Settled(now)
    return Begin(now)


def check(before: RunState, after: RunState, commands: tuple[Command, ...], plan: Plan) -> None:
    """What must hold after any event in any state."""
    step = before.step
    assert after.answered | after.failed <= set(after.step.cohort)
    assert not after.answered & after.failed
    for command in commands:
        if isinstance(command, Settle):
            assert before.phase == "collecting"
            assert command.step == step
            assert command.survivors == tuple(sorted(after.answered))
            assert step.quorum <= len(command.survivors) <= len(step.cohort)
        if isinstance(command, Abandon):
            assert command.step == step
            assert len(after.answered if after.step == step else before.answered) < step.quorum
    kinds = [type(command) for command in commands]
    assert kinds in ([], [Ask], [Settle], [Finish], [Abandon, Ask], [Abandon, Finish])
    assert (after.phase == "ended") == (before.phase == "ended" or Finish in kinds)
    if Ask in kinds:
        assert (after.phase, after.step, after.answered, after.failed) == (
            "collecting",
            commands[-1].step,  # type: ignore[union-attr]
            frozenset(),
            frozenset(),
        )
        assert after.step.number <= plan.rounds.count + (after.step.kind == "statistics")
    if before.phase == "ended":
        assert (after, commands) == (before, ())


@settings(max_examples=300)
@given(OVERRIDES, st.integers(1, 5), st.integers(1, 3), EVENTS)
def test_every_sequence_of_events_ends_and_never_settles_below_the_quorum(
    overrides: dict[str, Any], nodes: int, aborts_max: int, events: list[tuple[str, str, float]]
) -> None:
    run, now = machine_of(overrides, nodes, aborts_max), 0.0
    commands_seen: list[Command] = []

    def feed(event: Event) -> None:
        before = run.state
        run.state, commands = advance(run.schedule, aborts_max, before, event)
        check(before, run.state, commands, run.schedule.plan)
        commands_seen.extend(commands)

    for kind, node, seconds in events:
        now += seconds
        feed(event_of(kind, node, now))
    left = 3 * (2 * run.schedule.plan.rounds.count + 3)  # steps, with a wait and a settlement each
    while run.state.phase != "ended":
        assert (left := left - 1) >= 0
        wake = wake_at(run.state)
        now = max(now, wake) if wake is not None else now
        feed({"ready": Begin(now), "settling": Settled(now)}.get(run.state.phase, Tick(now)))
    assert [type(command) for command in commands_seen].count(Finish) == 1
    assert isinstance(commands_seen[-1], Finish)
    asked = [(c.step.kind, c.step.number) for c in commands_seen if isinstance(c, Ask)]
    assert len(asked) == len(set(asked))


@settings(max_examples=200)
@given(OVERRIDES, st.integers(1, 5), EVENTS, st.floats(0, 50))
def test_late_duplicate_and_foreign_events_change_nothing(
    overrides: dict[str, Any], nodes: int, events: list[tuple[str, str, float]], later: float
) -> None:
    run, now = machine_of(overrides, nodes, 3), 0.0
    for kind, node, seconds in events:
        now += seconds
        run.feed(event_of(kind, node, now))
        awaited = set(run.state.step.cohort) - run.state.answered - run.state.failed
        silent = set(NODES + "z") - (awaited if run.state.phase == "collecting" else set())
        unfit: list[Event] = [event(n, now + later) for n in sorted(silent) for event in (Answered, Failed)]
        unfit += [Begin(now)] * (run.state.phase != "ready")
        unfit += [Settled(now)] * (run.state.phase != "settling")
        unfit += [Tick(now + later)] * (run.state.phase != "collecting")
        for event in unfit:
            assert advance(run.schedule, 3, run.state, event) == (run.state, ())


@given(st.permutations(NODES), st.sets(st.sampled_from(NODES), max_size=2))
def test_survivors_do_not_depend_on_the_order_of_arrival(order: list[str], failing: set[str]) -> None:
    run = Run("rounds.quorum=3", nodes=NODES)
    run.feed(Begin(0))
    said = run.feed(*(Failed(n, 1) if n in failing else Answered(n, 1) for n in order))
    assert said == [f"settle train 1: {' '.join(sorted(set(NODES) - failing))}"]


@given(EVENTS)
def test_is_pure(events: list[tuple[str, str, float]]) -> None:
    one, other = Run(), Run()
    for kind, node, seconds in events:
        state = one.state
        one.feed(event_of(kind, node, seconds))
        assert advance(one.schedule, 3, state, event_of(kind, node, seconds))[0] == one.state
        other.feed(event_of(kind, node, seconds))
    assert (one.state, one.said) == (other.state, other.said)
