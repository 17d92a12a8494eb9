"""A real node beside a real coordinator, in one process: what one sends the other takes, and every byte is noted."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from worlds import STUDY, World

from concord_client.control import ControlChannel
from concord_client.enrolment import enrol
from concord_client.home import NodeHome
from concord_client.preflight import answer_preflights
from concord_client.registry import add_dataset, publish
from concord_client.store import NodeStore
from concord_client.sync import Applied, apply_updates
from concord_client.training_desk import _examine
from concord_server import client_nouns as nouns
from concord_shared.plan import Plan
from concord_shared.preflight import PreflightReport
from concord_shared.signing import Envelope, fingerprint
from helpers import plan_of

NODE, OWNER, DATASET = "clinic-1", "hospital-a", "patients"
TABLE_PLAN = """
name = "pressures"
[data]
task = "classification"
input = "table"
target = "ill"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[[data.columns]]
name = "pressure"
range = [20, 300]
[model]
name = "logistic-regression"
[training]
batch_size = 16
[rounds]
count = 5
"""


def table_plan(*overrides: str) -> Plan:
    return plan_of(TABLE_PLAN, *overrides)


def good_table(rows: int = 60) -> bytes:
    lines = [f"{20 + row % 60},{100 + row % 50},{'yes' if row % 3 else 'no'}" for row in range(rows)]
    return ("\n".join(["age,pressure,ill", *lines]) + "\n").encode()


class Here:
    """The examining process's work, done in this one. It can be told to fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: dict[str, Exception] = {}

    def examine(
        self, part: str, home: Path, plan: Plan, dataset: str, deadline_s: float, may_go_on: Callable[[], None]
    ) -> Mapping[str, Any]:
        self.asked.append(part)
        may_go_on()
        if part in self.fails:
            raise self.fails[part]
        frame, _ = _examine({"do": f"examine-{part}", "home": str(home), "plan": plan.document(), "dataset": dataset})
        found: dict[str, Any] = frame["found"]
        return found

    def rest(self) -> None:
        pass


class Wire(httpx.BaseTransport):
    """Notes every byte of both directions."""

    def __init__(self, inner: httpx.BaseTransport, heard: list[bytes]) -> None:
        self._inner, self._heard = inner, heard

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._heard += [request.url.path.encode(), request.read()]
        found = self._inner.handle_request(request)
        content = found.read()
        self._heard.append(content)
        return httpx.Response(found.status_code, headers=found.headers, stream=httpx.ByteStream(content))


@dataclass
class Clinic:
    """The node `clinic-1` of hospital A, whose patients serve the lab's study."""

    world: World
    home: NodeHome
    store: NodeStore
    wire: Wire
    table: Path
    heard: list[bytes] = field(default_factory=list)
    examiner: Here = field(default_factory=Here)

    @classmethod
    def beside(cls, world: World, folder: Path) -> "Clinic":
        heard: list[bytes] = []
        coordinator, line = world.coordinator, world.coordinator.invite(NODE, OWNER)
        strange = Wire(coordinator.anyone._transport, heard)
        made = enrol(line, folder / "node", transports=lambda context: strange)
        told = {"fingerprint": fingerprint(made.home.identity_key().public_key())}
        assert coordinator.admin.post(f"/api/v1/nodes/{NODE}/activate", json=told).status_code == 200
        wire = Wire(coordinator.node(made.home.certificate_pem())._transport, heard)
        clinic = cls(world, made.home, made.home.store(), wire, folder / "patients.csv", heard)
        clinic.register(good_table())
        publish(clinic.home, clinic.store, DATASET, time.time())
        clinic.turn()
        world.ready()
        world.agreed(OWNER, (f"{NODE}/{DATASET}",))
        clinic.turn()
        return clinic

    def register(self, content: bytes) -> None:
        self.table.write_bytes(content)
        replaces = self.store.dataset(DATASET) is not None
        add_dataset(self.store, DATASET, f"csv:{self.table}", time.time(), replaces=replaces)

    def turn(self) -> Applied:
        """What the daemon's threads do: hear, answer, deliver."""
        with ControlChannel(self.home, self.store, transport=self.wire) as channel:
            applied = apply_updates(self.home, self.store, channel.updates(0), time.time())
            answer_preflights(self.home, self.store, self.examiner)
            channel.deliver()
        return applied

    def ask(self, plan: Plan, **options: Any) -> dict[str, Any]:
        """Asked by the lab, of this node alone unless told otherwise; what the coordinator then shows to the lab."""
        options = {"nodes": (NODE,)} | options
        asked = nouns.ask_preflight(self.world.api("lab"), self.world.keys["lab"], STUDY, plan, **options)
        self.turn()
        return self.shown(asked["preflight"])

    def shown(self, preflight: str, organisation: str = "lab") -> dict[str, Any]:
        return self.world.api(organisation).get(f"/api/v1/studies/{STUDY}/preflights/{preflight}")

    def change_policy(self, old: str, new: str) -> None:
        text = self.home.policy_file.read_text("utf-8")
        assert old in text
        self.home.policy_file.write_text(text.replace(old, new), "utf-8")


def statuses(found: dict[str, Any], node: str = NODE) -> dict[str, str]:
    (row,) = [each for each in found["nodes"] if each["node"] == node]
    return {check["name"]: check["status"] for check in row["checks"]}


def row_of(found: dict[str, Any], node: str = NODE) -> dict[str, Any]:
    (row,) = [each for each in found["nodes"] if each["node"] == node]
    return dict(row)


def check_of(found: dict[str, Any], name: str, node: str = NODE) -> dict[str, str]:
    (check,) = [each for each in row_of(found, node)["checks"] if each["name"] == name]
    return dict(check)


def report_of(found: dict[str, Any], node: str = NODE) -> PreflightReport:
    signed = Envelope.model_validate_json(json.dumps(row_of(found, node)["report"]))
    return PreflightReport.from_canonical(signed.bytes)
