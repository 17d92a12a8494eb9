"""What `--json` prints of a run, and of a run over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concord_client.data import Split
from concord_client.ledger.costs import unbounded_because
from concord_local.attacks import Attack
from concord_local.federation import Federation
from concord_local.nodes import model_builder
from concord_server.driver import RunResult
from concord_server.robust.anomalies import overview
from concord_shared.guarantee import guarantee_of
from concord_shared.metrics import better, headline
from concord_shared.models import is_personal
from concord_shared.plan import DataContract, Plan
from concord_shared.preprocessing import Fitted

__all__ = ["cleaning_summary", "robust_summary", "summarise", "summarise_seeds", "worst_node"]

Figures = Mapping[str, Any]


def summarise(
    plan: Plan,
    federation: Federation,
    setting: Mapping[str, Any],
    directory: Path,
    result: RunResult,
    own: Mapping[str, Figures],
) -> dict[str, Any]:
    """`per_node`: what the coordinator knows of nodes, under masks nothing; `owners`: what each knows of its own;
    `personal`: whether the figures are of each node's own model, and not of the shared one.
    """
    per_node = dict(result.per_node) or None
    owners = {
        name: {"train_rows": len(federation.rows[name][Split.TRAIN]), **_forecast(plan), **known}
        for name, known in own.items()
    }
    return {
        "run_dir": str(directory),
        "plan": plan.name,
        "plan_digest": plan.digest,
        "model_digest": result.model_digest,
        "deterministic": plan.is_repeatable,
        "guarantee": guarantee.document() if (guarantee := guarantee_of(plan)) else None,
        "nodes": len(federation.names),
        "rounds": plan.rounds.count,
        **(
            {"statistics": dict(result.preprocessing), "plan_document": plan.document()}
            if plan.kind == "statistics"
            else {}
        ),
        "personal": is_personal(plan, model_builder(plan)),
        "metrics": result.metrics,
        "per_node": per_node,
        "worst_node": worst_node(plan.data, per_node or {}),
        "owners": owners,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "setting": dict(setting),
    }


def _forecast(plan: Plan) -> dict[str, float]:
    """What a node's privacy ledger, were it a partner's, would need to hold for this plan alone."""
    dp = plan.privacy.dp
    return {"epsilon_at_most": dp.epsilon} if dp is not None and not unbounded_because(plan) else {}


def cleaning_summary(federation: Federation, dropped: Mapping[str, int], result: RunResult) -> dict[str, Any]:
    """`cleaning`: by node what cleaning did to its training rows; for the owners' eyes. Nothing where nothing is."""
    fitted = Fitted.from_document(result.preprocessing)
    found = {}
    for name in federation.names:
        counts = fitted.counts(federation.dataset(name).take(Split.TRAIN)[0])
        counts |= {"duplicates": dropped[name]} if name in dropped else {}
        if counts:
            found[name] = counts
    return {"cleaning": found} if found else {}


def robust_summary(attack: Attack | None, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`robust`: who stood out, in that mode. `attack`: who attacked in a drill, and what was seen of it, counted over
    nodes and rounds: flags that hit attackers (precision), attackers' Updates that were flagged (recall), and replies
    of theirs that were refused before they were looked at. Nothing where there is neither.
    """
    found = overview(records)
    robust = {"robust": found} if found else {}
    if attack is None:
        return robust
    trained = [record for record in records if record["kind"] == "train"]
    rows = [(node, row["flag"]) for record in trained for node, row in _reported(record).items()]
    flags = [node for node, flag in rows if flag]
    hits, sent = sum(node in attack.nodes for node in flags), sum(node in attack.nodes for node, _ in rows)
    seen = {
        "flags": len(flags),
        "flags_on_attackers": hits,
        "updates_of_attackers": sent,
        "precision": hits / len(flags) if flags else None,
        "recall": hits / sent if sent else None,
        "refused": sum(node in attack.nodes for record in trained for node in record["failures"]),
        "quarantined": sorted(node for node, row in found["nodes"].items() if row["quarantined"]) if found else [],
    }
    return robust | {"attack": attack.document() | {"seen": seen}}


def _reported(record: Mapping[str, Any]) -> Mapping[str, Any]:
    nodes: Mapping[str, Any] = record.get("anomalies", {}).get("nodes", {})
    return nodes


def summarise_seeds(plan: Plan, directory: Path, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of every figure, sums of seconds and bytes; there is no one model, so no one digest."""
    per_node = _by_node([run["per_node"] or {} for run in runs]) or None
    peaks = [run["peak_pss_mb"] for run in runs if run["peak_pss_mb"] is not None]
    return {
        "run_dir": str(directory),
        "plan": plan.name,
        "plan_digest": plan.digest,
        "model_digest": None,
        "deterministic": plan.is_repeatable,
        "guarantee": guarantee.document() if (guarantee := guarantee_of(plan)) else None,
        "nodes": runs[0]["nodes"],
        "rounds": plan.rounds.count,
        "personal": runs[0]["personal"],
        "metrics": _means([run["metrics"] for run in runs]),
        "deviation": _deviations([run["metrics"] for run in runs]),
        "per_node": per_node,
        "worst_node": worst_node(plan.data, per_node or {}),
        "owners": _by_node([run["owners"] for run in runs]),
        "seconds": {key: round(sum(run["seconds"][key] for run in runs), 3) for key in runs[0]["seconds"]},
        "bytes_up": sum(run["bytes_up"] for run in runs),
        "bytes_down": sum(run["bytes_down"] for run in runs),
        "peak_pss_mb": max(peaks, default=None),
        "setting": runs[0]["setting"],
        "seeds": [{"seed": seed, **_outline(run)} for seed, run in enumerate(runs)],
    }


def worst_node(contract: DataContract, per_node: Mapping[str, Figures]) -> dict[str, Any] | None:
    """The node with the worst headline figure, the first by name among equals."""
    figure = headline(contract)
    worst: tuple[str, float] | None = None
    for name, figures in per_node.items():
        value = figures.get(figure)
        if value is not None and (worst is None or better(contract, worst[1], value)):
            worst = (name, value)
    return None if worst is None else {"node": worst[0], figure: worst[1]}


def _by_node(runs: Sequence[Mapping[str, Figures]]) -> dict[str, dict[str, float]]:
    """Means of each node's figures; of nodes that every run has."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: _means([run[name] for run in runs]) for name in names}


def _means(figures: Sequence[Figures]) -> dict[str, float]:
    return {key: statistics.fmean(values) for key, values in _columns(figures).items()}


def _deviations(figures: Sequence[Figures]) -> dict[str, float]:
    return {key: statistics.stdev(values) if len(values) > 1 else 0.0 for key, values in _columns(figures).items()}


def _columns(figures: Sequence[Figures]) -> dict[str, list[float]]:
    """Values over seeds of every figure that is a number in all of them."""
    columns = {key: [item.get(key) for item in figures] for key in figures[0]}
    return {
        key: [float(value) for value in values if value is not None]
        for key, values in columns.items()
        if all(isinstance(value, (int, float)) for value in values)
    }


def _outline(run: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: run[key] for key in ("run_dir", "plan_digest", "model_digest", "seconds")}
    return kept | {"metrics": {key: value for key, value in run["metrics"].items() if key != "confusion"}}
