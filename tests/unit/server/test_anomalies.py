"""Who stands out, by the stated rules; who is left out, and what undoes it."""

from typing import Any

import numpy as np
import pytest

from concord_server.robust.anomalies import Quarantine, overview, report
from concord_server.robust.combining import Combined
from concord_shared.plan.privacy import Robust

NODES = tuple("abcdefg")
PRIVACY = Robust(mode="robust", attackers=2)


def found(**changes: dict[str, float]) -> Combined:
    """Seven alike nodes, but for what is changed: norm={"b": 9}."""
    figures: dict[str, np.ndarray] = {
        "norm": np.array([2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0]),
        "distance": np.array([1.0, 1.05, 0.95, 1.0, 1.02, 0.98, 1.0]),
        "cosine": np.array([0.8, 0.82, 0.78, 0.8, 0.81, 0.79, 0.8]),
        "trimmed": np.full(7, 0.5),
    }
    for name, values in changes.items():
        for node, value in values.items():
            figures[name][NODES.index(node)] = value
    return Combined(np.zeros(1), **figures)


def flags(combined: Combined, privacy: Robust = PRIVACY) -> dict[str, str]:
    nodes = report(NODES, combined, privacy)["nodes"]
    return {node: row["flag"] for node, row in nodes.items() if row["flag"]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distance": {"b": 1.5}}, "far"),
        ({"norm": {"b": 3.0}}, "long"),
        ({"norm": {"b": 0.0}}, "short"),
        ({"cosine": {"b": -0.1}}, "against"),
        ({"distance": {"b": 9}, "norm": {"b": 10}, "cosine": {"b": -0.5}}, "far, long, against"),
    ],
)
def test_says_who_stands_out_and_by_what(changes: Any, reason: str) -> None:
    assert flags(found(**changes)) == {"b": reason}


def test_alike_nodes_do_not_stand_out() -> None:
    assert flags(found()) == {}
    assert flags(Combined(np.zeros(1), np.zeros(7), np.zeros(7), np.zeros(7), np.zeros(7))) == {}, "nobody did anything"


def test_nearly_equal_nodes_do_not_stand_out_by_a_trifle() -> None:
    same = dict.fromkeys(NODES, 1.0)
    assert flags(found(distance=same | {"b": 1.1})) == {}


def test_flags_no_more_nodes_than_there_are_attackers() -> None:
    three = {"a": 5.0, "c": 7.0, "e": 6.0}
    assert set(flags(found(distance=three))) == {"c", "e"}, "those that stand out most"


def record(number: int, *flagged: str, out: dict[str, Any] | None = None, nodes: str = "abcdefg") -> dict[str, Any]:
    rows = report(NODES, found(), PRIVACY)["nodes"]
    rows = {node: row | {"flag": "far" if node in flagged else ""} for node, row in rows.items() if node in nodes}
    told = {"rule": "median", "attackers": 2, "nodes": rows}
    return {"kind": "train", "round": number, "anomalies": told} | ({"quarantined": out} if out else {})


class TestQuarantine:
    def noted(self, *records: dict[str, Any], after: int = 3) -> Quarantine:
        made = Quarantine(after)
        for each in records:
            made.note(each)
        return made

    def suspects(self, made: Quarantine, each: dict[str, Any]) -> dict[str, Any]:
        return made.suspects(each["round"], each["anomalies"])

    def test_takes_as_many_rounds_in_a_row_as_the_plan_says(self) -> None:
        made = self.noted(record(1, "b"), record(2, "b"))
        [(node, evidence)] = self.suspects(made, record(3, "b", "c")).items()
        assert node == "b"
        assert evidence["rule"] == "flagged in 3 rounds in a row"
        assert [each["round"] for each in evidence["rounds"]] == [1, 2, 3]
        assert evidence["rounds"][0]["distance"] == 1.05

    def test_a_round_without_a_flag_begins_anew(self) -> None:
        made = self.noted(record(1, "b"), record(2, "b"), record(3))
        assert self.suspects(made, record(4, "b")) == {}

    def test_rounds_that_a_node_was_not_asked_in_do_not_count(self) -> None:
        made = self.noted(record(1, "b"), record(2, nodes="acdefg"), record(3, "b"))
        assert set(self.suspects(made, record(4, "b"))) == {"b"}

    def test_never_where_the_plan_says_never(self) -> None:
        assert self.suspects(self.noted(record(1, "b"), after=0), record(2, "b")) == {}

    def test_the_same_after_a_restart(self) -> None:
        """Records are all that there is."""
        out = {"b": {"rule": "flagged in 3 rounds in a row", "rounds": []}}
        assert self.noted(record(1, "b"), record(2, "b"), record(3, "b", out=out)).nodes == {"b"}

    def test_a_persons_word_holds_to_the_end(self) -> None:
        out = {"b": {"rule": "", "rounds": []}}
        made = self.noted(record(3, "b", out=out), {"kind": "lift", "round": 3, "lifted": {"b": "ada"}})
        assert made.nodes == frozenset()
        made = self.noted(*(record(number, "b") for number in range(1, 9)))
        made.lift(["b"])
        assert self.suspects(made, record(9, "b")) == {}


def test_overview_counts_and_tells_who_is_out() -> None:
    out = {"b": {"rule": "flagged in 2 rounds in a row", "rounds": []}}
    records = [record(1, "b"), record(2, "b", "c", out=out), record(3, nodes="acdefg")]
    told = overview(records)
    assert told is not None
    assert (told["nodes"]["b"]["flagged"], told["nodes"]["b"]["rounds"]) == (2, 2)
    assert told["nodes"]["b"]["quarantined"]["round"] == 2
    assert told["nodes"]["c"]["flagged"] == 1
    assert told["nodes"]["c"]["quarantined"] is None
    assert told["nodes"]["a"]["rounds"] == 3
    lifted = overview([*records, {"kind": "lift", "round": 2, "lifted": {"b": "ada"}}])
    assert lifted is not None
    assert lifted["nodes"]["b"]["quarantined"] is None
    assert lifted["nodes"]["b"]["lifted_by"] == "ada"
    assert overview([{"kind": "train", "round": 1}]) is None
