"""The life of a run, as pure functions of what is known: no database, no clock.

    waiting ──enough nodes approved──► queued ──leased──► running ──► succeeded | failed | stopped
       │                                 │
       └──too few can approve, too late──┴──► failed          a person stops it ──► stopped

A run waits until every participant has decided. A run that ended stays as it ended.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from concord_server.schedule import Schedule
from concord_shared.errors import ConflictError, UsageError
from concord_shared.plan.rounds import share_of
from concord_shared.plan.schema import Plan

__all__ = [
    "ENDED",
    "Outcome",
    "RunWord",
    "Situation",
    "Verdict",
    "Waiting",
    "Word",
    "decide",
    "move",
    "nodes_needed",
]

RunWord = Literal["waiting", "queued", "running", "succeeded", "failed", "stopped"]
Outcome = Literal["succeeded", "failed", "stopped"]
ENDED: frozenset[str] = frozenset(get_args(Outcome))
NAMES_SHOWN_MAX = 10
_NEXT: Mapping[str, frozenset[str]] = {
    "waiting": frozenset({"queued", "failed", "stopped"}),
    "queued": frozenset({"running", "failed", "stopped"}),
    "running": frozenset({"succeeded", "failed", "stopped"}),
}

Decided = Literal["approved", "rejected", "withdrawn", "changed", "revoked"]
Awaited = Literal["approval", "offline", "suspended"]
LOST = ("withdrawn", "changed", "revoked")


@dataclass(frozen=True)
class Word:
    """What one participant has said: its decision, or what is awaited of it.

    changed: its dataset is no longer the one that the manifest names; revoked: it left the federation.
    """

    node: str
    says: Decided | Awaited


@dataclass(frozen=True)
class Waiting:
    """One line of `waiting_for`: "hospital-b: approval, since …" (seconds of Unix time)."""

    node: str
    what: str
    since: int

    def document(self) -> dict[str, Any]:
        return {"node": self.node, "what": self.what, "since": self.since}


@dataclass(frozen=True)
class Situation:
    """Everything that decides what becomes of a run. needed: the fewest approvals with which it can begin."""

    state: RunWord
    words: tuple[Word, ...]
    needed: int
    now: int
    not_before: int
    not_after: int
    waiting_for: tuple[Waiting, ...] = ()


@dataclass(frozen=True)
class Verdict:
    state: RunWord
    reason: str = ""
    waiting_for: tuple[Waiting, ...] = ()


def decide(given: Situation) -> Verdict:
    """What becomes of a run that nobody works on. One that runs only learns whom it lost, or by the reason that it is
    to stop: a worker ends it.
    """
    if given.state in ENDED:
        return Verdict(given.state)
    if given.state == "running":
        over = "its manifest is over; start it again, from its last model and for more days"
        return Verdict("running", over if given.now > given.not_after else "", _waiting(given, *LOST))
    awaited = _waiting(given, *get_args(Awaited))
    if given.now > given.not_after:
        return Verdict("failed", f"it did not begin in time: {_still(given, awaited)}")
    approved = sum(word.says == "approved" for word in given.words)
    if approved + len(awaited) < given.needed:
        return Verdict("failed", _too_few(given))
    if given.state == "queued":
        return Verdict("queued", waiting_for=_waiting(given, *LOST))
    if awaited or given.now < given.not_before:
        return Verdict("waiting", waiting_for=awaited or (_waits(given, "", "start time"),))
    return Verdict("queued")


def move(state: RunWord, to: RunWord) -> RunWord:
    """Raises: ConflictError: a run cannot go from `state` to `to`."""
    if to not in _NEXT.get(state, ()):
        raise ConflictError(f"the run is {state}; it cannot become {to}")
    return to


def nodes_needed(plan: Plan, participants: int, minimum_cohort: int) -> int:
    """The fewest of `participants` nodes with which a run of `plan` can begin: at least its quorum, enough for its
    cohort, and no round asks fewer than `minimum_cohort`.

    Raises:
        ConflictError: not even all of them are enough.
    """
    rounds = plan.rounds
    quorum = share_of(rounds.quorum, min(participants, share_of(rounds.cohort, participants)))

    def enough(count: int) -> bool:
        if count < quorum or share_of(rounds.cohort, count) < minimum_cohort:
            return False
        try:
            Schedule(plan, tuple(map(str, range(count))))
        except UsageError:
            return False
        return True

    if not enough(participants):
        raise ConflictError(_impossible(plan, participants, minimum_cohort))
    masks = Schedule(plan, tuple(map(str, range(participants)))).step("evaluate", 1).masks
    if masks is not None:  # n is that of the manifest, whoever comes; a step over everybody ends each run
        return max(quorum, minimum_cohort, masks.survivors)
    return 1 + bisect_left(range(1, participants + 1), True, key=enough)


def _impossible(plan: Plan, participants: int, minimum_cohort: int) -> str:
    try:
        Schedule(plan, tuple(map(str, range(participants))))
    except UsageError as error:
        return f"the plan cannot run on {participants} nodes: {error}"
    cohort = share_of(plan.rounds.cohort, participants)
    return (
        f"a round of this plan would ask {cohort} of {participants} nodes, and an agreement wants at least "
        f"{minimum_cohort}; let more nodes take part, or raise rounds.cohort"
    )


def _waiting(given: Situation, *what: str) -> tuple[Waiting, ...]:
    return tuple(_waits(given, word.node, word.says) for word in given.words if word.says in what)


def _waits(given: Situation, node: str, what: str) -> Waiting:
    """Since when: as noted before. That a node went offline, or came back, begins no new wait."""
    of_nodes = get_args(Awaited)
    for known in given.waiting_for:
        if known.node == node and (known.what == what or (known.what in of_nodes and what in of_nodes)):
            return Waiting(node, what, known.since)
    return Waiting(node, what, given.now)


def _still(given: Situation, awaited: tuple[Waiting, ...]) -> str:
    if not awaited:
        return "its manifest is over before a worker took it up; start it again"
    return f"still undecided: {_names(each.node for each in awaited)}; ask them, and start it again"


def _too_few(given: Situation) -> str:
    lost = {what: [word.node for word in given.words if word.says == what] for what in get_args(Decided)[1:]}
    told = "; ".join(f"{what}: {_names(nodes)}" for what, nodes in lost.items() if nodes)
    return f"too few nodes can take part: {given.needed} of {len(given.words)} are needed; {told}"


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - NAMES_SHOWN_MAX
    return ", ".join(ordered[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
