"""Privacy budgets between machines, over TLS: what partners cap, approve and are charged; a run that one can't join."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from concord_client.ledger.filter import conversion
from concord_client.rounds import NO_ROOM
from concord_local.demo import STUDY
from concord_local.deployment import Deployment
from concord_server.client import Profile
from concord_server.client_nouns import start_run
from concord_shared.accounting import ORDERS, round_rdp
from concord_shared.errors import RunFailedError
from deployments import begin, deployed, end, follow, plan_of

pytestmark = pytest.mark.slow
ROUNDS = 2
BOUND = "{unit='record', epsilon=1.0, delta=1e-5, clip=1.0}"
PLAN = (
    f"rounds.count={ROUNDS}",
    "rounds.quorum=2",
    "rounds.grace_s=120.0",
    "model={name='logistic-regression'}",
    f"privacy={{mode='plain', dp={BOUND}}}",
)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployed")) as running:
        yield running


def ledgers(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """What `concord-node ledger show` says at each node."""
    shown = deployment.each(lambda partner: partner.run("ledger", "show"))
    return dict(zip(deployment.partners, shown, strict=True))


def charges_of(deployment: Deployment, node: str, run: str) -> list[str | None]:
    """The charges that the coordinator's receipts name, once there is one for each round of training."""
    until, found = time.monotonic() + 30, []
    while len(found) < ROUNDS and time.monotonic() < until:
        shown = deployment.partners[node].run("receipts", "list", "--run", run)["receipts"]
        found = [each["charge"] for each in shown if each["kind"] == "train"]
        time.sleep(0.2)
    return found


def watched(deployment: Deployment, run: str) -> str:
    """What `concord run watch` prints."""
    token = deployment.organisations["research"].api._http.headers["Authorization"].partition(" ")[2]
    environment = os.environ | {"CONCORD_PROFILE": str(deployment.root / "profile.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCORD_PROFILE", environment["CONCORD_PROFILE"])
        Profile(deployment.url, token, deployment.root_pem).write()
    command = [sys.executable, "-m", "concord_local", "run", "watch", run]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr + done.stdout


def test_budgets_from_the_cap_to_the_refusal(deployment: Deployment) -> None:
    caps = {"node-1": "1", "node-2": "5", "node-3": "5"}
    deployment.each(lambda partner: partner.run("ledger", "set-cap", "own", "--epsilon", caps[partner.name], "--yes"))
    plan = plan_of(*PLAN)

    first = begin(deployment, plan)
    report = follow(deployment, first)
    assert report["state"] == "succeeded", report
    for node, shown in ledgers(deployment).items():
        [charged], [account] = shown["runs"], shown["budgets"]
        assert (charged["run"], charged["charged"], charged["released"]) == (first, ROUNDS, ROUNDS), report
        assert account["reserved"] == pytest.approx(0)
        receipts = charges_of(deployment, node, first)
        assert len(set(receipts)) == ROUNDS, "each round has a charge of its own"
        assert None not in receipts
        if node == "node-1":  # a plan of exactly its cap, by the plan's own figure
            assert account["spent"] == pytest.approx(1.0, rel=0.01)
        else:
            rdp = ROUNDS * round_rdp(plan, charged["rows"])[ORDERS.index(account["order"])]
            assert account["spent"] == pytest.approx(rdp + conversion(account["order"], 1e-5))

    research = deployment.organisations["research"]
    second = str(start_run(research.api, research.key, STUDY, plan)["id"])
    records: list[dict[str, Any]] = []
    report = follow(deployment, second, records.append)
    assert report["state"] == "succeeded", report
    reasons = {record["failures"].get("node-1", "") for record in records if record["kind"] == "train"}
    assert all(each.endswith(f"BudgetRefusedError: {NO_ROOM}") for each in reasons), reasons
    assert f"BudgetRefusedError: {NO_ROOM}"[:40] in watched(deployment, second)
    found = {node: {each["run"] for each in shown["runs"]} for node, shown in ledgers(deployment).items()}
    assert found == {"node-1": {first}, "node-2": {first, second}, "node-3": {first, second}}

    with pytest.raises(RunFailedError, match="no differential privacy"):
        begin(deployment, plan_of(*PLAN[:-1], "name='unbounded'"))


def test_a_node_that_comes_back_is_told_where_its_ledger_stood(deployment: Deployment) -> None:
    partner = deployment.partners["node-1"]
    end(partner)
    deployment.start_node(partner)
    until = time.monotonic() + 30
    while not (told := partner.run("ledger", "verify")["witnessed"]) and time.monotonic() < until:
        time.sleep(0.2)
    assert told > 1
