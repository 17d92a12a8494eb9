"""Who stands out in a round, and who is left out of the rest of a run: stated rules over figures, kept with the round.

A figure stands out where it lies more than `FAR` robust deviations from the nodes' median (1.4826 times the median
absolute deviation, Hampel 1974; never taken smaller than `FLOOR`, or nearly equal nodes would stand out by a trifle).
Lengths are compared by their logarithms: twice as long is as far as half as long.

    far       the Update's distance to the aggregate is larger
    long      its norm is larger
    short     its norm is smaller: a node that did no work
    against   its cosine to the aggregate is lower: it points elsewhere

At most f nodes are flagged in a round, those that stand out most. A flag is a reason to look, not a proof: an honest
node whose rows are unlike all others' stands out too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_server.robust.combining import Combined
from concord_shared.plan.privacy import Robust

__all__ = ["Quarantine", "overview", "report"]

Record = Mapping[str, Any]
FAR = 5.0
FLOOR = 0.05
"""Of a deviation: about 5 % of a length, and 0.05 of a cosine."""
TINY = 1e-12
FIGURES = ("norm", "distance", "cosine", "trimmed")


def report(nodes: Sequence[str], found: Combined, privacy: Robust) -> dict[str, Any]:
    """What is kept of a round: the rule, and of each node its figures and why it is flagged ("" if it is not)."""
    by_reason = {
        "far": _above(np.log(np.maximum(found.distance, TINY))),
        "long": _above(np.log(np.maximum(found.norm, TINY))),
        "short": _above(-np.log(np.maximum(found.norm, TINY))),
        "against": _above(-found.cosine),
    }
    scores = np.max(list(by_reason.values()), axis=0)
    worst = set(np.argsort(-scores, kind="stable")[: privacy.attackers].tolist())
    told: dict[str, dict[str, Any]] = {}
    for index, node in enumerate(nodes):
        reasons = [reason for reason, values in by_reason.items() if values[index] > FAR]
        figures = {name: float(f"{getattr(found, name)[index]:.6g}") for name in FIGURES}
        told[node] = figures | {
            "score": float(f"{scores[index]:.4g}"),
            "flag": ", ".join(reasons) if index in worst else "",
        }
    return {"rule": privacy.rule, "attackers": privacy.attackers, "nodes": told}


def _above(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how many robust deviations each value lies above the median."""
    middle = np.median(values)
    deviation = max(1.4826 * float(np.median(np.abs(values - middle))), FLOOR)
    above: NDArray[np.float64] = (values - middle) / deviation
    return above


@dataclass
class Quarantine:
    """Who of a run is left out, as its records say: the same after a restart.

    after: rounds in a row, of those that a node took part in, with a flag; 0: nobody is ever left out.
    """

    after: int
    _rows: dict[str, list[tuple[int, Record]]] = field(default_factory=dict)
    _out: set[str] = field(default_factory=set)
    _lifted: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(self._out - self._lifted)

    def lift(self, nodes: Iterable[str]) -> None:
        """A person's word that these are to be asked again. It holds to the end of the run, whatever they send."""
        self._lifted |= set(nodes)

    def note(self, record: Record) -> None:
        """Takes the record of a step that is done."""
        self._out |= set(record.get("quarantined", ()))
        self.lift(record.get("lifted", ()))
        for node, row in record.get("anomalies", {}).get("nodes", {}).items():
            rows = self._rows.setdefault(node, [])
            rows.append((record["round"], row))
            if not row["flag"]:
                rows.clear()

    def suspects(self, number: int, found: Record) -> dict[str, dict[str, Any]]:
        """Whom the report of a round (not noted yet) puts into quarantine from the next one on, with the evidence."""
        if self.after == 0:
            return {}
        suspects = {}
        for node, row in found["nodes"].items():
            streak = [*self._rows.get(node, []), (number, row)]
            if row["flag"] and node not in self._lifted and len(streak) >= self.after:
                rounds = [{"round": each, **figures} for each, figures in streak[-self.after :]]
                suspects[node] = {"rule": f"flagged in {self.after} rounds in a row", "rounds": rounds}
        return suspects


def overview(records: Iterable[Record]) -> dict[str, Any] | None:
    """Of a run, for people: of each node how often it took part and was flagged, its figures' means, and since when
    and why it is left out. None where the records hold no report.
    """
    rows: dict[str, list[Record]] = {}
    rule: dict[str, Any] = {}
    out: dict[str, dict[str, Any]] = {}
    lifted: dict[str, str] = {}
    withheld = ""
    for record in records:
        found = record.get("anomalies")
        if found:
            rule = {"rule": found["rule"], "attackers": found["attackers"]}
            for node, row in found["nodes"].items():
                rows.setdefault(node, []).append(row)
        for node, evidence in record.get("quarantined", {}).items():
            out[node] = {"round": record["round"], **evidence}
        for node, by in record.get("lifted", {}).items():
            out.pop(node, None)
            lifted[node] = by
        withheld = record.get("quarantine_withheld", withheld)
    if not rule:
        return None
    nodes: dict[str, dict[str, Any]] = {}
    for node in sorted(rows):
        seen = rows[node]
        reasons = sorted({reason for row in seen for reason in row["flag"].split(", ") if reason})
        nodes[node] = {name: float(f"{np.mean([row[name] for row in seen]):.4g}") for name in FIGURES} | {
            "rounds": len(seen),
            "flagged": sum(bool(row["flag"]) for row in seen),
            "reasons": reasons,
            "quarantined": out.get(node),
            "lifted_by": lifted.get(node, ""),
        }
    return rule | {"nodes": nodes, "quarantine_withheld": withheld}
