"""A coordinator's worker whose nodes answer in its own process, over digits: runs of a real database in a second.

As a program (`python workers.py DIR STATES`) it is the worker's process, whose nodes fall silent after the first step.
"""

import logging
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray
from worlds import OWNERS, World

from concord_client.data import Split
from concord_local.federation import Federation
from concord_local.nodes import NodeHost
from concord_local.transports import InProcessTransport
from concord_server.database import utc_now
from concord_server.runs import service
from concord_server.runs.states import ENDED
from concord_server.superlink.transport import Party
from concord_server.worker import task
from concord_server.worker.leases import Lease
from concord_shared.messages import read_offer
from federations import federation, small_plan

__all__ = ["LINK", "PLAN", "Wards", "begin", "ended", "work"]

PLAN = small_plan("rounds.count=2", "rounds.quorum='all'", "name='wards'")
LINK: Any = task.Link("", None, None)  # type: ignore[arg-type] # nobody is reached over it
LEASE_S = 60.0


class Wards(InProcessTransport):
    """In the place of the worker's transport. after: called before each wait, with the number of steps that were asked.

    started_with: the model of the first offer.
    """

    after: Callable[["Wards", int], None] = lambda transport, steps: None
    states = Path()
    started_with: tuple[str, NDArray[Any]] | None = None

    def __init__(
        self,
        address: str,
        tls: Any,
        signer: Any,
        parties: Iterable[Party],
        reply_bytes_max: int,
        check: Callable[[], None],
        refused: Callable[[str, str], None],
    ) -> None:
        super().__init__(NodeHost(PLAN, wards(), self.states, "cpu"))
        self.check, self.refused, self.steps = check, refused, 0
        self.spent_s: dict[str, float] = {}

    def send(self, messages: Iterable[Message]) -> None:
        listed = list(messages)
        self.steps += 1
        if self.steps == 1:
            theta = listed[0].content.array_records["model"]["theta"]
            Wards.started_with = read_offer(listed[0]).model_digest, np.frombuffer(theta.data, np.float32)
        super().send(listed)

    def receive(self, timeout_s: float) -> list[Message]:
        type(self).after(self, self.steps)
        self.check()
        return super().receive(timeout_s)

    def awaited(self) -> list[Any]:
        return []


def wards() -> Federation:
    """As many rows as the wards approve."""
    whole = federation(PLAN, len(OWNERS))
    few = {Split.TRAIN: 80, Split.VALIDATION: 0, Split.TEST: 20}
    rows = [{split: rows[: few[split]] for split, rows in whole.rows[name].items()} for name in whole.names]
    return Federation(whole.inputs, whole.targets, dict(zip(OWNERS, rows, strict=True)))


def begin(world: World, run: str, **options: Any) -> None:
    """A run of the plan that all wards approved."""
    world.start(PLAN, run=run, **options)
    if report(world, run)["state"] == "waiting":
        for node in OWNERS:
            assert world.approve(node, PLAN).status_code == 204
    assert report(world, run)["state"] == "queued"


def work(world: World, run: str, owner: str = "worker-1") -> Lease:
    """Drives the run that is next, in this thread, for as long as a worker would."""
    with world.coordinator.database.session() as session:
        leased = service.lease_next(session, owner, utc_now(), LEASE_S)
        assert leased is not None
        assert leased.id == run
    lease = Lease(run)
    task.carry_out(world.coordinator.home, LINK, lease, owner)
    return lease


def report(world: World, run: str) -> dict[str, Any]:
    return world.api("lab").get(f"/api/v1/runs/{run}")


def ended(world: World, run: str) -> dict[str, Any]:
    """The report of a run that ended; nobody has it any more."""
    found = report(world, run)
    assert found["state"] in ENDED, found
    assert found["waiting_for"] == []
    return found


def fall_silent(transport: Wards, steps: int) -> None:
    if steps > 1:
        transport.withdraw()


if __name__ == "__main__":
    Wards.after, Wards.states = fall_silent, Path(sys.argv[2])
    task.FlowerTransport = Wards  # type: ignore[misc,assignment]
    logging.captureWarnings(True)
    runpy.run_module("concord_server.worker", run_name="__main__")
