"""A coordinator with organisations, people, nodes and their datasets: what tests of studies and runs start from."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlmodel import col, select
from starlette.testclient import TestClient

from concord_server import client_nouns as nouns
from concord_server.client import Coordinator as Api
from concord_server.nodes.tables import NodeUpdate
from concord_shared.documents import Approval, DatasetCard, RunManifest
from concord_shared.plan import Plan
from concord_shared.signing import Document, PrivateKey, new_identity_key, public_text, seal
from coordinators import Coordinator, NodeKeys, make_coordinator
from helpers import IMAGES, plan_of

__all__ = ["OWNERS", "World", "body", "now"]

OWNERS = {"ward-a": "hospital-a", "ward-b": "hospital-b", "ward-c": "hospital-b"}
STUDY = "heart"


def now() -> int:
    return int(time.time())


def body(document: Document, *keys: PrivateKey) -> dict[str, Any]:
    """A signed document as a request carries it."""
    return seal(document, *keys).model_dump(mode="json")


@dataclass
class Site:
    keys: NodeKeys
    client: TestClient


class World:
    """Organisations `lab` (asks), `hospital-a` and `hospital-b` (own data), `rival` (has nothing to do with it)."""

    def __init__(self, path: Path, database_url: str = "") -> None:
        self.coordinator: Coordinator = make_coordinator(path, database_url)
        self.keys: dict[str, Ed25519PrivateKey] = {}
        self.people: dict[str, TestClient] = {}
        for name in ("hospital-a", "hospital-b", "lab", "rival"):
            self._found(name)
        self.sites = {node: Site(*self.coordinator.enrol(node, owner)) for node, owner in OWNERS.items()}

    def close(self) -> None:
        self.coordinator.close()

    def api(self, organisation: str) -> Api:
        """The Python client, as a person of that organisation."""
        person = self.people[organisation]
        token = person.headers["Authorization"].partition(" ")[2]
        return Api("https://testserver", token, transport=person._transport)

    def publish(self, node: str, dataset: str = "heart", **changes: Any) -> Any:
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
        return {
            "hospital-a": self.agreed("hospital-a", ("ward-a/heart",)),
            "hospital-b": self.agreed("hospital-b", ("ward-b/heart", "ward-c/heart")),
        }

    def start(self, plan: Plan, **options: Any) -> dict[str, Any]:
        return nouns.start_run(self.api("lab"), self.keys["lab"], STUDY, plan, **options)

    def manifest(self, plan: Plan, **changes: Any) -> dict[str, Any]:
        """A manifest as the client would make it, but for `changes`; signed by the lab."""
        sent: list[dict[str, Any]] = []

        class Keep(Api):
            def post(self, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
                if path == "/api/v1/runs":
                    sent.append(body)
                    return {}
                return super().post(path, body, **query)

        api = Keep("https://testserver", self.api("lab")._http.headers["Authorization"][7:],
                   transport=self.people["lab"]._transport)  # fmt: skip
        nouns.start_run(api, self.keys["lab"], STUDY, plan)
        from concord_shared.signing import Envelope

        manifest = RunManifest.from_canonical(Envelope(**_tuples(sent[0]["manifest"])).bytes)
        return {"manifest": body(manifest.model_copy(update=changes), self.keys["lab"]), "priority": 0}

    def approve(
        self, node: str, plan: Plan, decision: str = "approved", sequence: int = 1, study: str = STUDY, **changes: Any
    ) -> Any:
        approval = Approval(
            **{
                "node": node,
                "organisation": OWNERS[node],
                "dataset": "heart",
                "dataset_version": "d" * 64,
                "study": study,
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


def _tuples(envelope: dict[str, Any]) -> dict[str, Any]:
    from concord_shared.signing import Signature

    return envelope | {"signatures": tuple(Signature(**each) for each in envelope["signatures"])}


def small_plan(*overrides: str) -> Plan:
    return plan_of(IMAGES, "rounds.count=2", *overrides)
