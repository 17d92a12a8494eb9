"""A real coordinator with three partners' nodes, as processes over TLS, for tests of whole runs between machines."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from concord_client.data import read_data
from concord_local.demo import STUDY, agree_with_owners
from concord_local.deployment import Deployment, Partner
from concord_local.partitions import deal
from concord_local.simulation import setting_for, simulate
from concord_local.slices import write_slice
from concord_server.client_nouns import start_run, watch_run
from concord_shared.plan import Plan, load_plan

NODES = ["node-1", "node-2", "node-3"]
OVERRIDES = ["training.local_epochs=1", "rounds.quorum='all'"]
"""Rounds of a second, in which nobody may be missing: so the model is that of a simulation or the run fails."""


def plan_of(*overrides: str) -> Plan:
    return load_plan("digits-cnn", [*OVERRIDES, *overrides]).plan


def simulated(folder: Path, *overrides: str) -> dict[str, Any]:
    return simulate("digits-cnn", nodes=3, overrides=[*OVERRIDES, *overrides], workers=1, out=folder / "run").summary


@contextlib.contextmanager
def deployed(
    folder: Path, listen: Callable[[Deployment, Partner], object] = Deployment.start_node
) -> Iterator[Deployment]:
    """Enrolled and agreed nodes, each with its slice of the digits; `listen` makes them answer."""
    plan = plan_of()
    setting = setting_for(load_plan("digits-cnn"), None, 3, None, workers=1)
    raw = read_data(setting.data, plan)
    dealt = deal(raw, plan.data, setting.partition, 3, plan.seed)
    with Deployment(folder, "hearts", {"lease_s": 3}) as running:
        research = running.add_organisation("research")
        owners = {name: running.add_organisation(f"{name}-org") for name in NODES}

        def prepare(name: str) -> None:
            partner = running.enrol(name, owners[name])
            rows = running.root / "data" / name
            rows.mkdir(parents=True)
            partner.run("data", "add", "own", write_slice(raw, dealt[name], plan, rows), "--publish")
            listen(running, partner)

        running.each(prepare, NODES)  # type: ignore[arg-type]
        agree_with_owners(running, research, owners, NODES)
        yield running


def begin(deployment: Deployment, plan: Plan) -> str:
    """A run that every partner has approved."""
    research = deployment.organisations["research"]
    run = str(start_run(research.api, research.key, STUDY, plan)["id"])
    if research.api.get(f"/api/v1/runs/{run}")["state"] == "waiting":
        deployment.each(lambda partner: partner.approve(plan))
    return run


def follow(deployment: Deployment, run: str, at_round: Callable[[dict[str, Any]], None] = lambda _: None) -> Any:
    """The report of a run at its end; `at_round` is called with each record as it comes."""
    report: dict[str, Any] = {}
    for event, record in watch_run(deployment.organisations["research"].api, run):
        if event == "round":
            at_round(record)
        report = record
    return report


class Keeper(contextlib.AbstractContextManager["Keeper"]):
    """Starts nodes that died again, as a partner's service manager would; says in `pids.json` who lives."""

    def __init__(self, deployment: Deployment, folder: Path, environment: dict[str, str]) -> None:
        self._deployment, self._folder, self._environment = deployment, folder, environment
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep)

    def __enter__(self) -> "Keeper":
        for partner in self._deployment.partners.values():
            end(partner)
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(0.1):
            self._look()

    def _look(self) -> None:
        partners = self._deployment.partners
        for partner in partners.values():
            if partner.process is None or partner.process.poll() is not None:
                self._deployment.start_node(partner, self._environment)
        pids: dict[str, Any] = {name: partner.process.pid for name, partner in partners.items() if partner.process}
        pids["up"] = str(self._deployment.coordinator_home / "up.json")
        draft = self._folder / "pids.json.new"
        draft.write_text(json.dumps(pids))
        draft.replace(self._folder / "pids.json")


def end(partner: Partner) -> None:
    if partner.process is not None:
        partner.process.kill()
        partner.process.wait()
