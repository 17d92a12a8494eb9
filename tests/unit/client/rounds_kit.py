"""A partner's home without an enrolment: keys, roster, study, agreement, plan, approval, manifest; and offers to it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from concord_client.home import NodeConfig, NodeHome
from concord_client.packing import pack, unpack
from concord_client.policy import write_default
from concord_client.registry import add_dataset
from concord_client.store import NodeStore
from concord_client.training_job import Job
from concord_shared.documents import (
    Agreement,
    Approval,
    Participant,
    Roster,
    RosterNode,
    RosterOrganisation,
    RunManifest,
    Study,
    Terms,
)
from concord_shared.messages import Offer, answer, model_record, offer_message, read_offer
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from concord_shared.preprocessing import unfitted
from concord_shared.signed_rounds import sign_offer
from concord_shared.signing import Document, public_text, seal, write_private_key
from concord_shared.tensors import Float32Vector, model_digest
from federations import digits, federation, small_plan

NODES = ("node-1", "node-2", "node-3")
NODE = "node-1"
HOUR_S = 3600
DIGEST = "0" * 64


@dataclass
class Site:
    """One partner, its home and the keys of the others."""

    home: NodeHome
    store: NodeStore
    plan: Plan
    coordinator: Ed25519PrivateKey
    organisation: Ed25519PrivateKey
    data: Path
    theta: Float32Vector
    layout_digest: str
    model_digest: str

    @property
    def study(self) -> Study:
        study = self.store.study("digits-2026")
        assert study is not None
        return study

    def put(self, kind: Any, id: str, document: Document, state: str = "") -> None:
        self.store.put(kind, id, seal(document, self.organisation), state)

    def change_policy(self, old: str, new: str) -> None:
        text = self.home.policy_file.read_text("utf-8")
        assert old in text
        self.home.policy_file.write_text(text.replace(old, new), "utf-8")

    def agree(self, **terms: Any) -> None:
        given = {"minimum_cohort": 2, "not_after": int(time.time()) + HOUR_S} | terms
        agreement = Agreement(
            agreement="agreement-1",
            study=self.study.study,
            study_digest=self.study.digest,
            requester="hospital-b",
            owner="hospital-a",
            datasets=(f"{NODE}/digits",),
            terms=Terms(**given),
            issued_at=0,
        )
        self.put("agreement", "agreement-1", agreement, "agreed")

    def approve(self, **changes: Any) -> Approval:
        now = int(time.time())
        dataset = self.store.dataset("digits")
        last = self.store.last_approval(self.study.study, self.plan.digest, "digits")
        assert dataset is not None
        fields: dict[str, Any] = {
            "node": NODE,
            "organisation": "hospital-a",
            "dataset": "digits",
            "dataset_version": dataset.version,
            "study": self.study.study,
            "plan_digest": self.plan.digest,
            "decision": "approved",
            "decided_by": "a person",
            "rows": 480,
            "evaluation_rows": 120,
            "sequence": (last.sequence if last else 0) + 1,
            "issued_at": now,
            "not_after": now + HOUR_S,
        }
        approval = Approval(**(fields | changes))
        self.store.put_approval(approval, seal(approval, self.home.identity_key()))
        return approval

    def start(self, run: str = "run-1", **changes: Any) -> RunManifest:
        now = int(time.time())
        dataset = self.store.dataset("digits")
        assert dataset is not None
        fields: dict[str, Any] = {
            "run": run,
            "study": self.study.study,
            "plan_digest": self.plan.digest,
            "organisation": "hospital-b",
            "roster_version": 1,
            "participants": tuple(
                Participant(
                    node=name,
                    organisation=organisation_of(name),
                    dataset="digits",
                    dataset_version=dataset.version if name == NODE else DIGEST,
                )
                for name in NODES
            ),
            "cohort_seed": 1,
            "versions": {},
            "nonce": DIGEST,
            "not_before": now - HOUR_S,
            "not_after": now + HOUR_S,
        }
        manifest = RunManifest(**(fields | changes))
        self.put("manifest", run, manifest)
        return manifest

    def offer(self, **changes: Any) -> Offer:
        fields: dict[str, Any] = {
            "run": "run-1",
            "kind": "train",
            "round_number": 1,
            "attempt": 1,
            "node": NODE,
            "plan_digest": self.plan.digest,
            "model_digest": self.model_digest,
            "layout_digest": self.layout_digest,
            "nodes_max": 3,
            "rows_max": 2048,
            "preprocessing": unfitted_text(self.plan),
        }
        return Offer(**(fields | changes))

    def message(
        self, key: Ed25519PrivateKey | None = None, theta: Float32Vector | None = None, **changes: Any
    ) -> Message:
        offer = self.offer(**changes)
        model = None if offer.kind == "statistics" else model_record(self.theta if theta is None else theta, {})
        message = offer_message(offer, model, 2, time.time())
        sign_offer(message, key or self.coordinator)
        return message

    def job(self, **changes: Any) -> Job:
        dataset = self.store.dataset("digits")
        assert dataset is not None
        job = Job(
            plan=self.plan,
            node=NODE,
            spec=dataset.spec,
            version=dataset.version,
            states=self.home.states / "run-1",
            marker=self.home.withdrawn_marker(self.study.study, self.plan.digest, "digits"),
            until=time.time() + HOUR_S,
            rows=480,
            evaluation_rows=120,
        )
        return replace(job, **changes)


def unfitted_text(plan: Plan) -> str:
    import json

    return json.dumps(unfitted(plan).document())


def organisation_of(node: str) -> str:
    return "hospital-a" if node == NODE else "hospital-b"


def make_site(path: Path, *overrides: str, plan: Plan | None = None) -> Site:
    """Everything that a round needs is there and fits. plan: of the digits; by default a small one with `overrides`."""
    plan = plan or small_plan(*overrides)
    home = NodeHome.prepare(path / "home")
    identity = Ed25519PrivateKey.generate()
    for name, key in (
        ("identity", identity),
        ("tls", generate_private_key(SECP256R1())),
        ("flower", generate_private_key(SECP384R1())),
    ):
        write_private_key(home.key_file(name), key)
    home.write_config(
        NodeConfig(
            federation="test",
            organisation="hospital-a",
            node=NODE,
            url="https://127.0.0.1:1",
            superlink="127.0.0.1:2",
            root=DIGEST,
        )
    )
    write_default(home.policy_file)
    store, coordinator, organisation = home.store(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    layout, theta = new_vector(plan)
    data = write_slice(plan, path)
    site = Site(home, store, plan, coordinator, organisation, data, theta, layout.digest, model_digest(layout, theta))
    add_dataset(store, "digits", f"npz:{data}", time.time(), plan=write_plan(plan, path))
    roster = Roster(
        federation="test",
        version=1,
        issued_at=0,
        coordinator_key=public_text(coordinator.public_key()),
        organisations=tuple(
            RosterOrganisation(name=name, key=public_text(organisation.public_key()))
            for name in ("hospital-a", "hospital-b")
        ),
        nodes=tuple(
            RosterNode(
                name=name,
                organisation=organisation_of(name),
                state="active",
                identity_key=public_text(identity.public_key()),
                flower_key=public_text(identity.public_key()),
            )
            for name in NODES
        ),
    )
    site.put("roster", "1", roster)
    store.set_fact("roster", "1")
    for name in ("hospital-a", "hospital-b"):
        store.pin_organisation(name, public_text(organisation.public_key()))
    study = Study(
        study="digits-2026", title="", purpose="", organisation="hospital-b", members=("hospital-a",), issued_at=0
    )
    site.put("study", study.study, study)
    store.put("plan", plan.digest, plan.document())
    site.agree()
    site.approve()
    site.start()
    store.set_fact("state", "active")
    return site


def write_slice(plan: Plan, path: Path) -> Path:
    """node-1's rows of the digits, as it has them in a simulation of three nodes."""
    rows = np.sort(np.concatenate(list(federation(plan, len(NODES)).rows[NODE].values())))
    file = path / "slice.npz"
    np.savez(file, x=digits().inputs[rows], y=digits().targets[rows])
    return file


def write_plan(plan: Plan, path: Path) -> str:
    from concord_local.rundir import plan_toml

    file = path / "plan.toml"
    file.write_text(plan_toml(plan), "utf-8")
    return str(file)


class Scripted:
    """A `Responder` that answers with numbers, and counts how often it was asked. then: called before it answers."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.jobs: list[Job] = []
        self.closed = False
        self._then = then

    def respond(self, job: Job, message: Message, deadline_s: float) -> Message:
        self.jobs.append(job)
        self._then()
        blocks = {"delta": np.arange(5, dtype="<i4") + len(self.jobs), "lanes": np.zeros(4, "<i8")}
        return answer(message, read_offer(message), blocks, {"rows": 1})

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def bytes_of_reply(message: Message) -> tuple[Any, list[bytes]]:
    return pack(message.content)


def copied(message: Message) -> Message:
    """The same message as it would arrive a second time."""
    from concord_shared.messages import with_metadata

    header, buffers = pack(message.content)
    return with_metadata(unpack(header, buffers), message.metadata)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
