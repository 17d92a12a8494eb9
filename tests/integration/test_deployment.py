"""A coordinator and three partners' nodes as processes over TLS: the same model as simulated, and what people may do
while a run goes on. Who is killed, and when, is in test_deaths.py.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_local.deployment import Deployment, Partner
from concord_server.evidence import export_run, exported_log
from concord_shared.errors import RunFailedError
from concord_shared.evidence.heads import read_mark
from concord_shared.evidence.log import verify_log
from deployments import NODES, begin, deployed, end, follow, plan_of, simulated


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployed")) as running:
        yield running


def test_same_model_as_simulated(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = simulated(tmp_path_factory.mktemp("simulated"), "rounds.count=4")
    report = follow(deployment, begin(deployment, plan_of("rounds.count=4")))
    assert report["state"] == "succeeded"
    for figure in ("plan_digest", "model_digest", "metrics"):
        assert report["summary"][figure] == expected[figure]


def test_under_masks_the_same_model_and_nothing_of_one_node(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = simulated(tmp_path_factory.mktemp("simulated"), "rounds.count=2")
    records: list[dict[str, Any]] = []
    report = follow(deployment, begin(deployment, plan_of("rounds.count=2", "privacy.mode=private")), records.append)
    assert report["state"] == "succeeded", report
    for figure in ("model_digest", "metrics"):
        assert report["summary"][figure] == expected[figure]
    assert report["summary"]["per_node"] == {}
    assert [record["kind"] for record in records] == ["train", "evaluate", "train", "evaluate"]
    assert not any(record.get("notes") or record.get("per_node") for record in records)


def test_both_sides_hold_evidence_of_what_happened(deployment: Deployment, tmp_path: Path) -> None:
    """Of the runs before, in the clear and under masks: receipts at the nodes, heads on both sides, capsules."""
    research, partner = deployment.organisations["research"].api, deployment.partners["node-1"]
    runs = [each["id"] for each in research.pages("/api/v1/runs", state="succeeded")]
    assert len(runs) == 2
    shown = [export_run(research, run, tmp_path / f"{run}.capsule") for run in runs]
    assert {each["privacy_mode"] for each in shown} == {"plain", "private"}
    for found in shown:
        file, steps = str(tmp_path / f"{found['run']}.capsule"), found["steps"]
        assert partner.run("verify", file)["model_digest"] == found["model_digest"]
        assert found["updates"] == 3 * steps
        until(lambda run=found["run"], steps=steps: len(receipts_of(partner, run)) == steps)
    assert partner.run("receipts", "verify")["receipts"] == sum(each["steps"] for each in shown)
    assert partner.run("audit", "verify")["verified"] is True
    content, key = exported_log(deployment.admin)
    remembered = [read_mark(each.run("audit", "head")["coordinator"]) for each in deployment.partners.values()]
    assert verify_log(content, key, remembered).entries > 20
    heads = deployment.admin.get("/api/v1/audit/heads")["items"]
    assert sorted((each["node"], each["alarm"]) for each in heads) == [(name, "") for name in sorted(NODES)]
    assert partner.run("status")["alarms"] == []


def receipts_of(partner: Partner, run: str) -> list[Any]:
    found: list[Any] = partner.run("receipts", "list", "--run", run)["receipts"]
    return found


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_with_fewer_bytes_the_same_model_as_simulated(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a round left out lies at the nodes, and goes with the next one."""
    smaller = ("rounds.count=3", "compression.kind=int8", "evaluation.every=0")
    expected = simulated(tmp_path_factory.mktemp("simulated"), *smaller)
    records: list[dict[str, Any]] = []
    report = follow(deployment, begin(deployment, plan_of(*smaller)), records.append)
    assert report["summary"]["model_digest"] == expected["model_digest"]
    assert all(record["bytes_up"] > 0 for record in records)


def test_robust_the_same_model_and_who_stood_out(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    robust = ("rounds.count=2", "privacy={mode='robust', attackers=1}")
    expected = simulated(tmp_path_factory.mktemp("simulated"), *robust)
    report = follow(deployment, begin(deployment, plan_of(*robust)))
    assert report["state"] == "succeeded", report
    for figure in ("plan_digest", "model_digest", "metrics"):
        assert report["summary"][figure] == expected[figure]
    assert report["robust"] == expected["robust"]
    assert set(report["robust"]["nodes"]) == {"node-1", "node-2", "node-3"}


def test_a_dead_node_does_not_block(deployment: Deployment) -> None:
    run = begin(deployment, plan_of("rounds.grace_s=2.0", "rounds.count=2", "rounds.quorum=2", "name='without-one'"))
    partner = deployment.partners["node-3"]
    end(partner)
    started = time.monotonic()
    report = follow(deployment, run)
    deployment.start_node(partner)
    assert report["state"] == "succeeded", report
    assert time.monotonic() - started < 60
    assert np.isfinite(report["summary"]["metrics"]["accuracy"])


def test_a_run_says_whom_it_waits_for_and_goes_on_when_they_are_back(deployment: Deployment) -> None:
    run = begin(deployment, plan_of("rounds.count=2", "name='waits'"))
    partner, research = deployment.partners["node-3"], deployment.organisations["research"]
    end(partner)
    until, waits = time.monotonic() + 30, []
    while not waits and time.monotonic() < until:
        time.sleep(0.2)
        waits = research.api.get(f"/api/v1/runs/{run}")["waiting_for"]
    deployment.start_node(partner)
    assert [each["node"] for each in waits] == ["node-3"]
    report = follow(deployment, run)
    assert report["state"] == "succeeded", report
    assert report["waiting_for"] == []


def test_stop_within_a_round_trip(deployment: Deployment) -> None:
    run = begin(deployment, plan_of("rounds.count=200", "name='long'"))
    research = deployment.organisations["research"]
    stopped: list[float] = []

    def at_round(record: dict[str, Any]) -> None:
        if not stopped:
            research.api.post(f"/api/v1/runs/{run}/stop")
            stopped.append(time.monotonic())

    report = follow(deployment, run, at_round)
    assert report["state"] == "stopped"
    assert time.monotonic() - stopped[0] < 10
    assert "research-lead" in report["reason"]


def test_withdrawal_takes_effect_and_the_others_go_on(deployment: Deployment) -> None:
    plan = plan_of("rounds.count=20", "rounds.quorum=2", "name='withdrawn'")
    run = begin(deployment, plan)
    partner = deployment.partners["node-2"]
    withdrawn: list[int] = []
    failures: dict[int, Any] = {}

    def at_round(record: dict[str, Any]) -> None:
        if not withdrawn:
            mine = [each for each in partner.run("approvals", "list")["requests"] if each["plan_digest"] == plan.digest]
            partner.run("approvals", "withdraw", mine[0]["id"])
            withdrawn.append(record["round"])
        failures[record["round"]] = record["failures"]

    report = follow(deployment, run, at_round)
    assert report["state"] == "succeeded", report
    assert any("withdrawn" in found.get("node-2", "") for found in failures.values()), failures


def test_a_node_whose_data_changed_declines_and_the_run_goes_on(deployment: Deployment) -> None:
    partner = deployment.partners["node-3"]
    spec = partner.run("data", "show", "own")["spec"]
    file = Path(spec.partition(":")[2])
    whole, seen = file.read_bytes(), list[Any]()

    def change(record: dict[str, Any]) -> None:
        seen.append(record)
        if len(seen) == 1:
            file.write_bytes(whole[: len(whole) // 2])

    plan = plan_of(
        "rounds.count=8", "rounds.grace_s=0.5", "rounds.quorum=2", "name='data-changed'", "evaluation.every=0"
    )
    try:
        report = follow(deployment, begin(deployment, plan), change)
    finally:
        file.write_bytes(whole)
    assert report["state"] == "succeeded", report
    assert "node-3" in seen[0]["survivors"]
    assert "node-3" not in seen[-1]["survivors"], seen[-1]
    assert "dataset own changed since it was registered" in json.dumps(seen[-1]["failures"])
    assert str(file) not in json.dumps(seen)


def test_a_revoked_node_is_out_within_five_seconds(deployment: Deployment) -> None:
    """Last of all: it does not come back."""
    partner = deployment.partners["node-1"]
    deployment.admin.post("/api/v1/nodes/node-1/revoke", {"reason": "a test"})
    begun = time.monotonic()
    while "does not admit this node" not in (partner.home / "up.log").read_text():
        assert time.monotonic() - begun < 5
        time.sleep(0.05)
    with pytest.raises(RunFailedError, match='"name": "state", "state": "fail", "said": "refused"'):
        partner.run("doctor")
    for log in (deployment.root / "coordinator.log", partner.home / "up.log"):
        assert all(json.loads(line)["message"] for line in log.read_text().splitlines()), "logs are JSON"
