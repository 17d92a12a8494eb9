"""A coordinator and three partners' nodes as processes over TLS: the same model as simulated, whatever is killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from concord_client.data import read_data
from concord_local.demo import STUDY, _agree, _approve
from concord_local.deployment import Deployment, Partner
from concord_local.partitions import deal
from concord_local.simulation import setting_for, simulate
from concord_local.slices import write_slice
from concord_server.client_nouns import start_run, watch_run
from concord_shared.plan import Plan, load_plan

OVERRIDES = ["rounds.count=6", "training.local_epochs=1", "rounds.quorum='all'"]
NODES = ["node-1", "node-2", "node-3"]


def plan_of(*overrides: str) -> Plan:
    return load_plan("digits-cnn", [*OVERRIDES, *overrides]).plan


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    plan = plan_of()
    setting = setting_for(load_plan("digits-cnn"), None, 3, None, workers=1)
    raw = read_data(setting.data, plan)
    dealt = deal(raw, plan.data, setting.partition, 3, plan.seed)
    with Deployment(tmp_path_factory.mktemp("deployed"), "hearts", {"lease_s": 3}) as running:
        research = running.add_organisation("research")
        owners = {name: running.add_organisation(f"{name}-org") for name in NODES}
        for name in NODES:
            partner = running.enrol(name, owners[name])
            folder = running.root / "data" / name
            folder.mkdir(parents=True)
            partner.run("data", "add", "own", write_slice(raw, dealt[name], plan, folder), "--publish")
            running.start_node(partner)
        _agree(running, research, owners, NODES)
        yield running


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = simulate("digits-cnn", nodes=3, overrides=OVERRIDES, workers=1, out=tmp_path_factory.mktemp("sim") / "run")
    return made.summary


def begin(deployment: Deployment, plan: Plan) -> str:
    """A run that every partner has approved."""
    research = deployment.organisations["research"]
    run = str(start_run(research.api, research.key, STUDY, plan)["id"])
    state = research.api.get(f"/api/v1/runs/{run}")["state"]
    if state == "waiting":
        deployment.each(lambda partner: _approve(partner, plan))
    return run


def follow(deployment: Deployment, run: str, at_round: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report of a run at its end; `at_round` is called with each record as it comes."""
    report: dict[str, Any] = {}
    for event, record in watch_run(deployment.organisations["research"].api, run):
        if event == "round":
            at_round(record)
        report = record
    return report


def kill_node(deployment: Deployment, partner: Partner) -> None:
    """As when the power fails: the daemon and its training process; then its keeper starts it again."""
    assert partner.process is not None
    partner.process.kill()
    partner.process.wait()
    deployment.start_node(partner)


def kill_coordinators(deployment: Deployment, name: str) -> None:
    os.kill(deployment.pids()[name], signal.SIGKILL)


def test_same_model_as_simulated(deployment: Deployment, simulated: dict[str, Any]) -> None:
    plan = plan_of()
    report = follow(deployment, begin(deployment, plan), lambda record: None)
    assert report["state"] == "succeeded"
    assert report["summary"]["plan_digest"] == simulated["plan_digest"]
    assert report["summary"]["model_digest"] == simulated["model_digest"]
    assert report["summary"]["metrics"] == simulated["metrics"]


def test_same_model_whatever_is_killed(deployment: Deployment, simulated: dict[str, Any]) -> None:
    """Each round somebody else dies: at its end, or a little into the next one."""
    partners = [deployment.partners[name] for name in NODES]
    deeds: list[Callable[[], None]] = [
        lambda: kill_coordinators(deployment, "worker"),
        lambda: kill_coordinators(deployment, "superlink"),
        lambda: kill_node(deployment, partners[0]),
        lambda: kill_coordinators(deployment, "control"),
        lambda: [kill_node(deployment, partner) for partner in partners],  # type: ignore[list-item, return-value]
    ]
    timers: list[threading.Timer] = []
    seen: list[str] = []

    def at_round(record: dict[str, Any]) -> None:
        seen.append(f"{record['kind']} {record['round']}")
        if record["kind"] == "train" and deeds:
            timers.append(threading.Timer(0.2 * len(timers), deeds.pop(0)))
            timers[-1].start()

    report = follow(deployment, begin(deployment, plan_of()), at_round)
    for timer in timers:
        timer.join()
    assert not deeds
    assert report["state"] == "succeeded", report
    assert report["summary"]["model_digest"] == simulated["model_digest"]
    assert len(seen) == len(set(seen)) == 12, "no step was lost, none counted twice"


def test_a_dead_node_does_not_block(deployment: Deployment) -> None:
    plan = plan_of("rounds.grace_s=2.0", "rounds.count=2", "rounds.quorum=2", "name='without-one'")
    run_before = begin(deployment, plan)
    partner = deployment.partners["node-3"]
    assert partner.process is not None
    partner.process.kill()
    partner.process.wait()
    started = time.monotonic()
    report = follow(deployment, run_before, lambda record: None)
    deployment.start_node(partner)
    assert report["state"] == "succeeded", report
    assert time.monotonic() - started < 60
    assert np.isfinite(report["summary"]["metrics"]["accuracy"])


def test_stop_within_a_round_trip(deployment: Deployment) -> None:
    plan = plan_of("rounds.count=200", "name='long'")
    run = begin(deployment, plan)
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
    plan = plan_of("rounds.count=4", "rounds.quorum=2", "name='withdrawn'")
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


def test_a_revoked_node_is_out_within_five_seconds(deployment: Deployment) -> None:
    """Last of all: it does not come back."""
    partner = deployment.partners["node-1"]
    deployment.admin.post("/api/v1/nodes/node-1/revoke", {"reason": "a test"})
    begun = time.monotonic()
    while "does not admit this node" not in (partner.home / "up.log").read_text():
        assert time.monotonic() - begun < 5
        time.sleep(0.05)
    found = {each["name"]: each for each in partner.run("doctor")["findings"]}
    assert found["state"]["said"] == "revoked"
    for log in (deployment.root / "coordinator.log", partner.home / "up.log"):
        assert all(json.loads(line)["message"] for line in log.read_text().splitlines()), "logs are JSON"
