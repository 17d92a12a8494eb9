"""`concord check`: what a preflight would say of each node of a simulation, by the nodes' own code."""

from collections.abc import Mapping, Sequence
from typing import Any

from concord_client.data import differences, read_data
from concord_client.dry_round import dry_round
from concord_client.policy import Resources
from concord_local.federation import Federation
from concord_local.simulation import setting_for
from concord_shared.plan import load_plan

__all__ = ["check"]

CHECKS = ("contract", "device", "round", "memory")
"""Of the others, a simulation has nobody to ask."""


def check(
    plan: str,
    *,
    data: str | None = None,
    nodes: int | None = None,
    partition: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> dict[str, Any]:
    """Data against the plan's contract, then a dry round of two batches at each node, one after the other.

    Returns:
        `plan_digest`, `go`, and for each of `nodes`: its `checks`, `differences`, `figures`, as the coordinator tells
        them of a real one. Here they are about the person's own data, so the differences have exact counts.

    Raises:
        UsageError, DataError: as of `simulate`.
    """
    loaded = load_plan(plan, overrides)
    setting = setting_for(loaded, data, nodes, partition, device=device)
    per_directory = setting.partition == "directory"
    found = [] if per_directory else differences(setting.data, loaded.plan)
    if found:
        rows = [_row("all", {"checks": [_mismatch(len(found))]}, list(map(str, found)))]
    else:
        raw = read_data(setting.data, loaded.plan, per_directory=per_directory)
        federation = Federation.of(raw, loaded.plan, setting.partition, setting.nodes)
        fits = {"name": "contract", "status": "ok", "says": "the data fit the plan's contract", "next": ""}
        rows = []
        for name in federation.names:
            tried = dry_round(loaded.plan, lambda name=name: federation.dataset(name), Resources(device=device))  # type: ignore[misc]
            rows.append(_row(name, {**tried, "checks": [fits, *tried["checks"]]}, []))
    return {"plan_digest": loaded.plan.digest, "go": all(row["go"] for row in rows), "nodes": rows}


def _mismatch(count: int) -> dict[str, str]:
    says = f"{count} {'difference' if count == 1 else 'differences'} from the plan's data contract"
    return {"name": "contract", "status": "no", "says": says, "next": "correct the data, or the plan's [data]"}


def _row(node: str, found: Mapping[str, Any], differences: list[str]) -> dict[str, Any]:
    said = {each["name"]: each for each in found["checks"]}
    unknown = {"status": "unknown", "says": "not looked at", "next": ""}
    checks = [said.get(name, {"name": name, **unknown}) for name in CHECKS]
    return {
        "node": node,
        "go": all(each["status"] == "ok" for each in checks),
        "checks": checks,
        "differences": differences,
        "more": 0,
        "figures": found.get("figures"),
    }
