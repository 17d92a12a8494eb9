"""A coordinator with organisations, people, nodes and their datasets: what tests of studies and runs start from."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Table, update
from sqlmodel import col, select

from concord_server import client_nouns as nouns
from concord_server.client import Coordinator as Api
from concord_server.database import all_tables, utc_now
from concord_server.models.tables import ModelVersion
from concord_server.nodes.tables import Node, NodeUpdate
from concord_server.runs import service
from concord_server.runs.states import Outcome
from concord_server.runs.tables import Run
from concord_shared.documents import Agreement, Approval, DatasetCard, RunManifest, Terms, Withdrawal
from concord_shared.files import file_digest
from concord_shared.model_files import write_model
from concord_shared.plan import Plan
from concord_shared.preflight import NODE_CHECKS, Check, Figures, PreflightReport, PreflightRequest
from concord_shared.signing import Document, Envelope, PrivateKey, new_identity_key, public_text, seal
from concord_shared.tensors import Layout, model_digest
from coordinators import Coordinator, NodeKeys, TestClient, make_coordinator, new_database_url
from helpers import IMAGES, plan_of

__all__ = ["LEASE_S", "OWNERS", "STUDY", "World", "body", "now", "ready_world", "small_plan"]

OWNERS = {"ward-a": "hospital-a", "ward-b": "hospital-b", "ward-c": "hospital-b"}
STUDY = "heart"
LEASE_S = 15.0
BASE = {
    "organisation",
    "person",
    "role_grant",
    "api_token",
    "node",
    "roster_version",
    "invitation",
    "audit_event",
    "audit_subtree",
}
"""Tables that `World.clear` leaves as they are."""


def now() -> int:
    return int(time.time())


def body(document: Document, *keys: PrivateKey) -> dict[str, Any]:
    """A signed document as a request carries it."""
    return seal(document, *keys).model_dump(mode="json")


def small_plan(*overrides: str) -> Plan:
    return plan_of(IMAGES, "rounds.count=2", *overrides)


@dataclass
class Site:
    keys: NodeKeys
    client: TestClient


class World:
    """Organisations `lab` (asks), `hospital-a` and `hospital-b` (own data), `rival` (has nothing to do with it)."""

    def __init__(self, path: Path, database_url: str = "", **settings: Any) -> None:
        self.coordinator: Coordinator = make_coordinator(path, database_url, **settings)
        self.keys: dict[str, Ed25519PrivateKey] = {}
        self.people: dict[str, TestClient] = {}
        self._kept: dict[Table, list[dict[str, Any]]] = {}
        for name in ("hospital-a", "hospital-b", "lab", "rival"):
            self._found(name)
        self.sites = {node: Site(*self.coordinator.enrol(node, owner)) for node, owner in OWNERS.items()}

    @property
    def database(self) -> Any:
        return self.coordinator.database

    def close(self) -> None:
        self.coordinator.close()

    def keep(self) -> None:
        """Remembers what is asked and agreed by now, for `clear`."""
        with self.database.reading() as session:
            for table in self._tables():
                self._kept[table] = [dict(row) for row in session.execute(table.select()).mappings()]

    def clear(self) -> None:
        """As it was when it was kept, or as if nobody had asked for anything yet; all nodes are active."""
        with self.database.session() as session:
            for table in reversed(self._tables()):
                session.execute(table.delete())
            for table, rows in self._kept.items():
                if rows:
                    session.execute(table.insert(), rows)
            session.execute(update(Node).values(state="active", last_seen_at=None))

    def _tables(self) -> list[Table]:
        """Of what people ask for, each after those that it names."""
        return [table for table in all_tables().sorted_tables if table.name not in BASE]

    def api(self, organisation: str) -> Api:
        """The Python client, as a person of that organisation."""
        person = self.people[organisation]
        token = person.headers["Authorization"].partition(" ")[2]
        return Api("https://testserver", token, transport=person._transport)

    def publish(self, node: str, dataset: str = "heart", /, **changes: Any) -> Any:
        card = DatasetCard(
            **{
                "node": node,
                "organisation": OWNERS[node],
                "dataset": dataset,
                "dataset_version": "d" * 64,
                "title": "Heart patients",
                "rows": 100,
                "input": "image",
                "issued_at": now(),
            }
            | changes
        )
        site = self.sites[node]
        return site.client.post("/api/node/cards", json=body(card, site.keys.identity))

    def study(self, study: str = STUDY, members: tuple[str, ...] = ("hospital-a",)) -> dict[str, Any]:
        return nouns.create_study(
            self.api("lab"), self.keys["lab"], study, title="Heart", purpose="Who is at risk?", members=members
        )

    def agreed(self, owner: str, datasets: tuple[str, ...], study: str = STUDY, **terms: Any) -> str:
        """An agreement, requested by the lab and offered as it is."""
        made = nouns.request_agreement(self.api("lab"), self.keys["lab"], study, datasets, terms=terms)
        found = nouns.offer_agreement(self.api(owner), self.keys[owner], made["agreement"])
        assert found["state"] == "agreed"
        return str(found["agreement"])

    def ready(self) -> dict[str, str]:
        """Cards, a study and agreements over all three wards; agreements by owner."""
        for node in OWNERS:
            assert self.publish(node).status_code == 204
        self.study()
        return self.ready_agreements()

    def ready_agreements(self, **terms: Any) -> dict[str, str]:
        return {
            "hospital-a": self.agreed("hospital-a", ("ward-a/heart",), **terms),
            "hospital-b": self.agreed("hospital-b", ("ward-b/heart", "ward-c/heart"), **terms),
        }

    def agreement(self, owner: str = "hospital-a", **changes: Any) -> Agreement:
        """A request of the lab's for the owner's first dataset, as its client would make it, but for `changes`."""
        node = next((name for name, place in OWNERS.items() if place == owner), "ward-a")
        fields = {
            "agreement": "asked",
            "study": STUDY,
            "study_digest": self.api("lab").get(f"/api/v1/studies/{STUDY}")["digest"],
            "requester": "lab",
            "owner": owner,
            "datasets": (f"{node}/heart",),
            "terms": Terms(not_after=now() + 86_400),
            "issued_at": now(),
        }
        return Agreement(**fields | changes)

    def post(self, organisation: str, path: str, document: Document, *keys: str) -> Any:
        """A document signed by `keys` (organisations), sent by a person of `organisation`."""
        signed = body(document, *(self.keys[key] for key in keys))
        return self.people[organisation].post(f"/api/v1/{path}", json=signed)

    def withdraw(self, agreement: str, owner: str) -> Any:
        document = Withdrawal(agreement=agreement, organisation=owner, reason="enough", issued_at=now())
        return self.post(owner, f"agreements/{agreement}/withdraw", document, owner)

    def start(self, plan: Plan, study: str = STUDY, **options: Any) -> dict[str, Any]:
        return nouns.start_run(self.api("lab"), self.keys["lab"], study, plan, **options)

    def manifest(self, plan: Plan, key: str = "lab", **changes: Any) -> dict[str, Any]:
        """The body of a start as the client would send it, but for `changes` of the manifest; signed by `key`."""
        api = self.api("lab")
        sent: list[dict[str, Any]] = []
        post = api.post

        def keep(path: str, body: Any = None, **query: Any) -> dict[str, Any]:
            if path != "/api/v1/runs":
                return post(path, body, **query)
            sent.append(body)
            return {}

        api.post = keep  # type: ignore[method-assign]
        nouns.start_run(api, self.keys["lab"], STUDY, plan)
        made = RunManifest.from_canonical(Envelope.model_validate_json(json.dumps(sent[0]["manifest"])).bytes)
        return {"manifest": body(made.model_copy(update=changes), self.keys[key])}

    def send(self, manifest: dict[str, Any], organisation: str = "lab") -> Any:
        return self.people[organisation].post("/api/v1/runs", json=manifest)

    def queued(self, plan: Plan, *runs: str, **options: Any) -> None:
        """Starts runs of a plan that every ward approved."""
        for run in runs:
            self.start(plan, run=run, **options)
        for node in OWNERS:
            assert self.approve(node, plan).status_code == 204
        assert {self.run(run)["state"] for run in runs} == {"queued"}

    def run(self, run: str) -> dict[str, Any]:
        return self.api("lab").get(f"/api/v1/runs/{run}")

    def lease(self, owner: str, at: datetime | None = None) -> str | None:
        """The run that a worker of this name gets."""
        with self.database.session() as session:
            found = service.lease_next(session, owner, at or utc_now(), LEASE_S)
            return None if found is None else str(found.id)

    def step(self, run: str, owner: str, number: int = 1, model: str = "", kind: str = "train") -> None:
        """A step as a worker stores it: record, checkpoint and, where `model` says its digest, the model."""
        record = {"kind": kind, "round": number, "of": 2, "survivors": sorted(OWNERS), "seconds": 0.1}
        made = ModelVersion(
            digest=model, run=run, plan_digest="", round=number, path=f"runs/{run}/{number}", sha256="0" * 64, size=1
        )
        with self.database.session() as session:
            service.save_step(session, run, owner, record, {"version": number}, made if model else None)

    def finish(self, run: str, owner: str, state: Outcome = "succeeded", reason: str = "") -> None:
        with self.database.session() as session:
            service.finish(session, run, owner, state, reason, {})

    def finish_with_model(self, run: str, owner: str, plan: Plan) -> str:
        """The run's last model, with its files as a worker leaves them; its digest."""
        layout = Layout.of({"weight": (2,)})
        theta = np.full(2, plan.seed, np.float32)
        digest = model_digest(layout, theta)
        path = self.coordinator.home.models / digest / "model.safetensors"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_model(path, plan, layout, theta, {})
        (path.parent / "plan.json").write_text(json.dumps(plan.document()))
        (path.parent / "summary.json").write_text("{}")
        model = ModelVersion(
            digest=digest,
            run=run,
            plan_digest=plan.digest,
            round=2,
            path=f"models/{digest}/model.safetensors",
            sha256=file_digest(path),
            size=path.stat().st_size,
            metrics={"accuracy": 0.9},
        )
        with self.database.session() as session:
            service.finish(session, run, owner, "succeeded", "", {"model_digest": digest}, model)
        return digest

    def row(self, run: str) -> Run:
        with self.database.reading() as session:
            found: Run = session.get_one(Run, run)
            return found

    def approve(self, node: str, plan: Plan, decision: str = "approved", sequence: int = 1, /, **changes: Any) -> Any:
        approval = Approval(
            **{
                "node": node,
                "organisation": OWNERS[node],
                "dataset": "heart",
                "dataset_version": "d" * 64,
                "study": STUDY,
                "plan_digest": plan.digest,
                "decision": decision,
                "decided_by": "a person",
                "rows": 80,
                "evaluation_rows": 20,
                "sequence": sequence,
                "issued_at": now(),
                "not_after": now() + 3600,
            }
            | changes
        )
        site = self.sites[node]
        return site.client.post("/api/node/approvals", json=body(approval, site.keys.identity))

    def preflight(self, plan: Plan, node: str = "ward-a") -> str:
        """A preflight of one node, which answered that all is well; its id."""
        asked = nouns.ask_preflight(self.api("lab"), self.keys["lab"], STUDY, plan, nodes=(node,))
        assert self.answer_preflight(node, asked).status_code == 204
        return str(asked["preflight"])

    def preflight_report(self, node: str, asked: dict[str, Any], **changes: Any) -> PreflightReport:
        """A go, but for `changes`; asked: as the API shows it."""
        request = PreflightRequest.from_canonical(Envelope.model_validate_json(json.dumps(asked["document"])).bytes)
        fields = {
            "preflight": request.preflight,
            "request_digest": request.digest,
            "node": node,
            "organisation": OWNERS[node],
            "dataset": "heart",
            "checks": tuple(Check(name=name, status="ok", says="fine") for name in NODE_CHECKS),
            "figures": Figures(rows=100, batch_us=5, round_ms=1, total_ms=2, memory_mb=10),
            "issued_at": now(),
        }
        return PreflightReport(**fields | changes)

    def answer_preflight(self, node: str, asked: dict[str, Any], **changes: Any) -> Any:
        site = self.sites[node]
        report = self.preflight_report(node, asked, **changes)
        return site.client.post("/api/node/preflights", json=body(report, site.keys.identity))

    def updates(self, node: str) -> list[NodeUpdate]:
        """What a node was told, in order."""
        with self.coordinator.database.reading() as session:
            query = select(NodeUpdate).where(NodeUpdate.node == node, NodeUpdate.kind != "roster")
            return list(session.exec(query.order_by(col(NodeUpdate.sequence))))

    def kinds(self, node: str) -> list[str]:
        return [update.kind for update in self.updates(node)]

    def _found(self, name: str) -> None:
        if name in ("lab", "rival"):
            self.coordinator.new_organisation(name)
        self.people[name] = self.coordinator.new_person(
            f"people-of-{name}", name, "org-admin", "data-steward", "researcher"
        )
        self.keys[name] = new_identity_key()
        told = {"key": public_text(self.keys[name].public_key())}
        assert self.people[name].put(f"/api/v1/organisations/{name}/key", json=told).status_code == 200


@contextmanager
def ready_world(request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> Iterator[World]:
    """One whose wards' data are open to the lab's study, on the database that `request.param` names; kept as it is."""
    url = new_database_url(request.getfixturevalue("postgresql")) if request.param == "postgresql" else ""
    world = World(folders.mktemp("world") / "c", url)
    world.ready()
    world.keep()
    yield world
    world.close()
