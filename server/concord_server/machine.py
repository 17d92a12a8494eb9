"""The round machine: pure, `(state, event) → (state, commands)`. No I/O, no clock, no Flower, no tensors.

    ready ──Begin──► collecting ──enough answers──► settling ──Settled──► collecting (next step) … ──► ended
                         │
                         ├──quorum out of reach, or deadline──► next step with the model unchanged
                         └──masked: enough answers to a stage──► collecting its next stage, of those who answered

Quorum, grace and deadline decide when collecting ends:
  all of the cohort answered or failed             → settle at once if the quorum is met, else abandon
  quorum met, and grace_s passed since             → settle
  deadline_s passed since the offer                → settle if the quorum is met, else abandon
  too many failed for the quorum                   → abandon at once
A masked step collects several times, each stage from those who answered the one before; who is in the sum is decided by
those who sent their masked Update, whoever falls silent afterwards.
One site's failure never fails a run that still has its quorum. Times are seconds of any one monotonic clock.
"""

from dataclasses import dataclass, replace
from typing import Literal

from concord_server.schedule import Schedule, Stage, Step

__all__ = [
    "Abandon",
    "Answered",
    "Ask",
    "Begin",
    "Command",
    "Event",
    "Failed",
    "Finish",
    "Lost",
    "RunState",
    "Settle",
    "Settled",
    "Tick",
    "advance",
    "awaits",
    "begin_at",
    "wake_at",
]


@dataclass(frozen=True)
class RunState:
    """stage: of a step, by index. asked: whom it asks; answered, failed: of these. survivors: who is in the masked sum.

    aborts: train rounds abandoned in a row; applied: any was settled.
    """

    step: Step
    phase: Literal["ready", "collecting", "settling", "ended"] = "ready"
    stage: int = 0
    asked: frozenset[str] = frozenset()
    answered: frozenset[str] = frozenset()
    survivors: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    opened_at_s: float = 0.0
    quorum_at_s: float | None = None
    aborts: int = 0
    applied: bool = False


# Events: what happened.
@dataclass(frozen=True)
class Begin:
    at_s: float


@dataclass(frozen=True)
class Answered:
    """A reply of `node` was accepted."""

    node: str
    at_s: float


@dataclass(frozen=True)
class Failed:
    """`node` declined, vanished, or its reply was refused."""

    node: str
    at_s: float


@dataclass(frozen=True)
class Tick:
    at_s: float


@dataclass(frozen=True)
class Settled:
    """The `Settle` command was carried out and its result is durable."""

    at_s: float


@dataclass(frozen=True)
class Lost:
    """The `Settle` command found no result in what was collected: the masks cannot be taken off."""

    at_s: float
    reason: str


Event = Begin | Answered | Failed | Tick | Settled | Lost


# Commands: what to do, in this order.
@dataclass(frozen=True)
class Ask:
    """Send a stage's offers of the step to `nodes` (in name order)."""

    step: Step
    stage: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settle:
    """Make the step's result from the answers of `survivors` (in name order), store it, report `Settled`."""

    step: Step
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Abandon:
    """Drop what was collected; the model stays as it is."""

    step: Step
    reason: str


@dataclass(frozen=True)
class Finish:
    outcome: Literal["succeeded", "failed"]
    reason: str = ""


Command = Ask | Settle | Abandon | Finish
Result = tuple[RunState, tuple[Command, ...]]


def begin_at(step: Step, aborts: int = 0, applied: bool = False) -> RunState:
    """The state of a run that is about to begin, or to resume, with `step`."""
    return RunState(step, aborts=aborts, applied=applied)


def wake_at(state: RunState) -> float | None:
    """When a `Tick` is due, if nothing happens before."""
    if state.phase != "collecting":
        return None
    deadline = state.opened_at_s + state.step.deadline_s
    return deadline if state.quorum_at_s is None else min(deadline, state.quorum_at_s + state.step.grace_s)


def advance(schedule: Schedule, aborts_max: int, state: RunState, event: Event) -> Result:
    """The machine. Events that do not fit the phase (late, duplicate, foreign) change nothing."""
    match event:
        case Begin(at_s) if state.phase == "ready":
            return _open(state, state.step, at_s)
        case Answered(node, at_s) if awaits(state, node):
            answered = state.answered | {node}
            reached = state.quorum_at_s is None and len(answered) >= _stage_of(state).needed
            quorum_at_s = at_s if reached else state.quorum_at_s
            return _collect(schedule, aborts_max, replace(state, answered=answered, quorum_at_s=quorum_at_s), at_s)
        case Failed(node, at_s) if awaits(state, node):
            return _collect(schedule, aborts_max, replace(state, failed=state.failed | {node}), at_s)
        case Tick(at_s) if state.phase == "collecting":
            return _collect(schedule, aborts_max, state, at_s)
        case Settled(at_s) if state.phase == "settling":
            if state.step.kind == "train":
                state = replace(state, aborts=0, applied=True)
            return _next(schedule, state, at_s)
        case Lost(at_s, reason) if state.phase == "settling":
            return _abandon(schedule, aborts_max, state, at_s, f"{_name_of(state.step)}: {reason}")
    return state, ()


def awaits(state: RunState, node: str) -> bool:
    """Whether an answer of `node` would still count in the open step."""
    return state.phase == "collecting" and node in state.asked and node not in state.answered | state.failed


def _open(state: RunState, step: Step, at_s: float) -> Result:
    asked = frozenset(step.cohort) - step.absent
    opened = RunState(step, "collecting", asked=asked, opened_at_s=at_s, aborts=state.aborts, applied=state.applied)
    return opened, (Ask(step, step.stages[0].name, tuple(sorted(asked))),)


def _open_next_stage(state: RunState, at_s: float) -> Result:
    asked, stage = state.answered, state.step.stages[state.stage + 1]
    opened = replace(
        state, stage=state.stage + 1, asked=asked, answered=frozenset(), opened_at_s=at_s, quorum_at_s=None
    )
    return opened, (Ask(state.step, stage.name, tuple(sorted(asked))),)


def _stage_of(state: RunState) -> Stage:
    return state.step.stages[state.stage]


def _name_of(step: Step) -> str:
    return f"{step.kind} round {step.number}"


def _collect(schedule: Schedule, aborts_max: int, state: RunState, at_s: float) -> Result:
    step, needed = state.step, _stage_of(state).needed
    silent = len(state.asked - state.answered - state.failed)
    wake = wake_at(state)
    over = silent == 0 or (wake is not None and at_s >= wake)
    if len(state.answered) >= needed:
        if not over:
            return state, ()
        if _stage_of(state).name in ("", "masked"):
            state = replace(state, survivors=state.answered)
        if state.stage + 1 < len(step.stages):
            return _open_next_stage(state, at_s)
        return replace(state, phase="settling"), (Settle(step, tuple(sorted(state.survivors))),)
    if not over and len(state.answered) + silent >= needed:
        return state, ()
    return _abandon(schedule, aborts_max, state, at_s, _too_few(state))


def _too_few(state: RunState) -> str:
    stage, silent = _stage_of(state), sorted(state.asked - state.answered - state.failed)
    where = f", stage {stage.name}" if stage.name else ""
    return (
        f"{_name_of(state.step)}{where}: {len(state.answered)} of {len(state.asked)} nodes answered, the quorum is "
        f"{stage.needed}; failed: {', '.join(sorted(state.failed)) or 'none'}; silent: {', '.join(silent) or 'none'}"
    )


def _abandon(schedule: Schedule, aborts_max: int, state: RunState, at_s: float, reason: str) -> Result:
    step = state.step
    state = replace(state, aborts=state.aborts + (step.kind == "train"))
    given_up = Abandon(step, reason)
    last_chance = step.kind == "statistics" or state.aborts >= aborts_max or schedule.after(step) is None
    if last_chance or not (state.applied or _trains_later(schedule, step)):
        return replace(state, phase="ended"), (given_up, Finish("failed", reason))
    after, commands = _next(schedule, state, at_s)
    return after, (given_up, *commands)


def _trains_later(schedule: Schedule, step: Step) -> bool:
    """Whether a train round follows; without one, a run that applied none has nothing to evaluate."""
    return step.number < schedule.plan.rounds.count


def _next(schedule: Schedule, state: RunState, at_s: float) -> Result:
    following = schedule.after(state.step)
    if following is None:
        return replace(state, phase="ended"), (Finish("succeeded"),)
    return _open(state, following, at_s)
