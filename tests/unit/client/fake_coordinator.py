"""A coordinator for a node's tests: its keys and certificates, and answers that a test can bend."""

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from concord_client import control
from concord_client.enrolment import Enrolled, enrol
from concord_client.home import NodeHome
from concord_client.registry import add_dataset
from concord_client.store import NodeStore
from concord_client.sync import Applied, apply_updates
from concord_shared.certificates import root_fingerprint
from concord_shared.documents import (
    Agreement,
    EnrolmentClaim,
    Participant,
    Roster,
    RosterNode,
    RosterOrganisation,
    RunManifest,
    Study,
    Terms,
)
from concord_shared.evidence.heads import TreeHead
from concord_shared.evidence.merkle import Read, completed, consistency_proof, leaf_hash, root_of
from concord_shared.plan import Plan, load_plan
from concord_shared.protocol import PROTOCOL_HEADER, InvitationLine, Update, Updates
from concord_shared.signing import Envelope, public_text, seal

FEDERATION, ORGANISATION, NODE = "fed", "acme", "acme-1"
REQUESTER, OTHER_NODE = "charite", "charite-1"
NOW = 1_800_000_000
DAY = 24 * 3600
TOKEN = "t" * 43
HOST, PORT = "fed.example", 8443
CLIENT_AUTH = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH])
SERVER_AUTH = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])


@dataclass(frozen=True)
class Authority:
    """A certificate and its key; issues others."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    @classmethod
    def root(cls, name: str = "root", now: int = NOW) -> "Authority":
        key = generate_private_key(SECP256R1())
        return cls(certificate(name, key.public_key(), name, key, ca=True, now=now, days=3650), key)

    def authority(self, name: str = "membership", now: int = NOW, days: int = 90) -> "Authority":
        key = generate_private_key(SECP256R1())
        return Authority(self.issue(name, key.public_key(), ca=True, now=now, days=days), key)

    def issue(self, name: str, key: Any, **options: Any) -> x509.Certificate:
        issuer = self.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
        return certificate(name, key, str(issuer), self.key, **options)

    @property
    def pem(self) -> str:
        return pem(self.certificate)


def certificate(
    name: str,
    key: Any,
    issuer: str,
    issuer_key: EllipticCurvePrivateKey,
    ca: bool = False,
    names: list[x509.GeneralName] | None = None,
    usage: x509.ExtendedKeyUsage | None = None,
    now: int = NOW,
    days: int = 30,
) -> x509.Certificate:
    def common(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    begin = datetime.datetime.fromtimestamp(now - 60, datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(common(name))
        .issuer_name(common(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usage:
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def pem(of: x509.Certificate) -> str:
    return of.public_bytes(serialization.Encoding.PEM).decode()


@dataclass
class FakeLog:
    """A log of which only the leaves matter."""

    leaves: list[bytes] = field(default_factory=lambda: [b"begin"])

    def stored(self) -> Read:
        found: dict[tuple[int, int], bytes] = {}
        for index, data in enumerate(self.leaves):
            found[0, index] = leaf_hash(data)
            for level, place, full in completed(index, found[0, index], lambda *at: found[at]):
                found[level, place] = full
        return lambda *at: found[at]

    def head(self, log: str) -> TreeHead:
        root = root_of(len(self.leaves), self.stored()).hex()
        return TreeHead(log=log, size=len(self.leaves), root=root, issued_at=NOW)

    def proof(self, since: int) -> list[str]:
        if not 0 < since < len(self.leaves):
            return []
        return [part.hex() for part in consistency_proof(since, len(self.leaves), self.stored())]


@dataclass
class FakeCoordinator:
    """Answers as a coordinator does; a test replaces what it wants to be wrong."""

    now: int = NOW
    root: Authority = field(default_factory=Authority.root)
    membership: Authority = field(init=False)
    coordinator_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    keys: dict[str, Ed25519PrivateKey] = field(
        default_factory=lambda: {name: Ed25519PrivateKey.generate() for name in (ORGANISATION, REQUESTER)}
    )
    version: int = 1
    claim: EnrolmentClaim | None = None
    token_used: bool = False
    spiffe: str = f"spiffe://{FEDERATION}/{ORGANISATION}/{NODE}"
    issuer: Authority | None = None
    requests: list[httpx.Request] = field(default_factory=list)
    received: dict[str, list[Any]] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    overrides: dict[str, Callable[[httpx.Request], httpx.Response]] = field(default_factory=dict)
    days: int = 30
    log: FakeLog = field(default_factory=FakeLog)
    remembered: dict[str, Any] | None = None
    receipts: list[Envelope] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.membership = self.root.authority(now=self.now)

    @property
    def line(self) -> InvitationLine:
        return InvitationLine(HOST, PORT, ORGANISATION, NODE, root_fingerprint(self.root.certificate), TOKEN)

    @property
    def trust(self) -> dict[str, Any]:
        return {
            "federation": FEDERATION,
            "protocols": [1],
            "root_certificate": self.root.pem,
            "membership_certificate": self.membership.pem,
            "superlink": f"{HOST}:9443",
            "now": self.now,
        }

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.path
        if path in self.overrides:
            return self.overrides[path](request)
        if request.headers.get(PROTOCOL_HEADER) != "1":
            return problem(426, "protocol", "this coordinator speaks protocol 1")
        if path == "/api/trust":
            return httpx.Response(200, json=self.trust)
        if (request.method, path) == ("GET", "/api/node/ledger-head"):
            return httpx.Response(200, json={"head": self.received.get("ledger-head", [None])[-1]})
        body = json.loads(request.content) if request.content else {}
        if path == "/api/enrol":
            return self._enrol(body)
        if path == "/api/node/updates":
            return self._updates(int(request.url.params["after"]))
        if path == "/api/node/heads":
            return self._heads(request.method, body, int(request.url.params.get("since", 0)))
        if path == "/api/node/receipts":
            return self._receipts(int(request.url.params["after"]))
        if path == "/api/node/renew":
            return httpx.Response(200, json={"chain": self.chain(body["request"])})
        self.received.setdefault(path.rsplit("/", 1)[-1], []).append(body)
        return httpx.Response(204)

    def transport(self, _: Any = None) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: _streamed(self.handle(request)))

    def chain(self, request: str) -> str:
        key = x509.load_pem_x509_csr(request.encode()).public_key()
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(self.spiffe)]
        issuer = self.issuer or self.membership
        leaf = issuer.issue(NODE, key, names=names, usage=CLIENT_AUTH, now=self.now, days=self.days)
        return pem(leaf) + self.membership.pem

    def roster(self, **changes: Any) -> Roster:
        assert self.claim is not None
        fields: dict[str, Any] = {
            "federation": FEDERATION,
            "version": self.version,
            "issued_at": self.now,
            "coordinator_key": public_text(self.coordinator_key.public_key()),
            "organisations": tuple(
                RosterOrganisation(name=name, key=public_text(key.public_key())) for name, key in self.keys.items()
            ),
            "nodes": (
                RosterNode(
                    name=NODE,
                    organisation=ORGANISATION,
                    state="active",
                    identity_key=self.claim.identity_key,
                    flower_key=self.claim.flower_key,
                ),
                RosterNode(
                    name=OTHER_NODE, organisation=REQUESTER, state="active", identity_key="k" * 60, flower_key="f" * 60
                ),
            ),
        }
        return Roster(**fields | changes)

    def _enrol(self, body: dict[str, Any]) -> httpx.Response:
        if self.token_used or body["token"] != TOKEN:
            return problem(403, "invitation-used", "the invitation was used already; ask for a new one")
        claim = EnrolmentClaim.from_canonical(Envelope.model_validate_json(json.dumps(body["claim"])).bytes)
        assert claim.token_digest == hashlib.sha256(TOKEN.encode()).hexdigest()
        self.claim, self.token_used = claim, True
        roster = seal(self.roster(), self.membership.key)
        answer = {
            "certificate": {"chain": self.chain(body["request"])},
            "roster": roster.model_dump(mode="json"),
            "state": "enrolled",
        }
        return httpx.Response(200, json=answer)

    def _heads(self, method: str, body: dict[str, Any], since: int) -> httpx.Response:
        """As an honest coordinator does, but for `log`, which a test may replace."""
        if method == "POST":
            self.remembered = body["head"]
            return httpx.Response(204)
        head = seal(self.log.head(f"{FEDERATION}/coordinator"), self.coordinator_key).model_dump(mode="json")
        return httpx.Response(200, json={"head": head, "proof": self.log.proof(since), "remembered": self.remembered})

    def _receipts(self, after: int) -> httpx.Response:
        found = [each.model_dump(mode="json") for each in self.receipts[after:]]
        return httpx.Response(200, json={"receipts": found, "cursor": max(after, len(self.receipts))})

    def _updates(self, after: int) -> httpx.Response:
        found = tuple(update for update in self.updates if update.sequence > after)
        cursor = found[-1].sequence if found else after
        answer = Updates(updates=found, cursor=cursor, state="active", now=self.now)
        return httpx.Response(200, json=answer.model_dump(mode="json"))


def _streamed(response: httpx.Response) -> httpx.Response:
    """As it comes from a socket: not read yet."""
    return httpx.Response(response.status_code, headers=response.headers, stream=httpx.ByteStream(response.content))


def problem(status: int, code: str, detail: str) -> httpx.Response:
    content = json.dumps({"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code})
    return httpx.Response(status, content=content, headers={"Content-Type": "application/problem+json"})


def enrol_with(coordinator: FakeCoordinator, path: Path, **options: Any) -> Enrolled:
    return enrol(coordinator.line, path, clock=lambda: coordinator.now, transports=coordinator.transport, **options)


@dataclass
class Partner:
    """An enrolled node with one dataset, and the documents of one study about it."""

    coordinator: FakeCoordinator
    home: NodeHome
    store: NodeStore
    plan: Plan
    sequence: int = 0

    def apply(self, kind: str, body: Any, now: int = NOW) -> Applied:
        """One update, as the coordinator would deliver it."""
        self.sequence += 1
        body = body.model_dump(mode="json") if isinstance(body, Envelope) else body
        update = Update(sequence=self.sequence, kind=kind, body=body)  # type: ignore[arg-type]
        batch = Updates(updates=(update,), cursor=self.sequence, state="active", now=now)
        return apply_updates(self.home, self.store, batch, now)

    def refused(self, kind: str, body: Any, now: int = NOW) -> str:
        """The reason for which an update was refused; it must be."""
        applied = self.apply(kind, body, now)
        assert len(applied.refused) == 1, f"{kind} was accepted"
        return applied.refused[0][2]

    def key(self, organisation: str) -> Ed25519PrivateKey:
        return self.coordinator.keys[organisation]

    def study(self, **changes: Any) -> Study:
        fields: dict[str, Any] = {
            "study": "heart",
            "title": "Hearts",
            "purpose": "to know hearts better",
            "organisation": REQUESTER,
            "members": (REQUESTER, ORGANISATION),
            "issued_at": NOW,
        }
        return Study(**fields | changes)

    def agreement(self, **changes: Any) -> Agreement:
        fields: dict[str, Any] = {
            "agreement": "heart-acme",
            "study": "heart",
            "study_digest": self.study().digest,
            "requester": REQUESTER,
            "owner": ORGANISATION,
            "datasets": (f"{NODE}/patients",),
            "terms": Terms(not_after=NOW + 100 * DAY),
            "issued_at": NOW,
        }
        return Agreement(**fields | changes)

    def agreed(self, agreement: Agreement, *signers: str) -> dict[str, Any]:
        signers = signers or (ORGANISATION, REQUESTER)
        envelope = seal(agreement, *(self.key(signer) for signer in signers))
        return {"state": "agreed", "envelope": envelope.model_dump(mode="json")}

    def request(self, plan: Plan | None = None, **changes: Any) -> dict[str, Any]:
        document = (plan or self.plan).document()
        return {"study": "heart", "document": document, "requested_by": REQUESTER} | changes

    def manifest(self, **changes: Any) -> RunManifest:
        dataset = self.store.dataset("patients")
        assert dataset is not None
        own = Participant(node=NODE, organisation=ORGANISATION, dataset="patients", dataset_version=dataset.version)
        other = Participant(node=OTHER_NODE, organisation=REQUESTER, dataset="theirs", dataset_version="0" * 64)
        fields: dict[str, Any] = {
            "run": "run-1",
            "study": "heart",
            "plan_digest": self.plan.digest,
            "organisation": REQUESTER,
            "roster_version": 1,
            "participants": (own, other),
            "cohort_seed": 7,
            "versions": {"concord": "0.1.0"},
            "nonce": "0" * 64,
            "not_before": NOW,
            "not_after": NOW + DAY,
        }
        return RunManifest(**fields | changes)

    def ask(self) -> None:
        """Study, agreement and plan arrive and are believed."""
        for kind, body in (
            ("study", seal(self.study(), self.key(REQUESTER))),
            ("agreement", self.agreed(self.agreement())),
            ("plan", self.request()),
        ):
            assert self.apply(kind, body).refused == []


TABLE_PLAN = """
name = "tiny"
[data]
task = "classification"
input = "table"
target = "ill"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[[data.columns]]
name = "weight"
range = [0, 400]
[model]
name = "logistic-regression"
[rounds]
count = 3
"""


def write_table(path: Path, rows: int = 20) -> Path:
    lines = [f"{20 + row},{50 + row},{'yes' if row % 3 else 'no'}" for row in range(rows)]
    path.write_text("\n".join(["age,weight,ill", *lines]) + "\n", "utf-8")
    return path


def partner_in(directory: Path, coordinator: FakeCoordinator | None = None) -> Partner:
    """An enrolled node whose dataset `patients` is registered."""
    coordinator = coordinator or FakeCoordinator()
    home = enrol_with(coordinator, directory / "node").home
    plan_file = directory / "tiny.toml"
    plan_file.write_text(TABLE_PLAN, "utf-8")
    store = home.store()
    table = write_table(directory / "patients.csv")
    add_dataset(store, "patients", f"csv:{table}", NOW)
    return Partner(coordinator, home, store, load_plan(str(plan_file)).plan)


def use_commands_at(partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process are those of this node, and reach its fake coordinator at its time."""
    original = control.ControlChannel.__init__

    def connect(self: Any, home: NodeHome, store: NodeStore, clock: Any = None, transport: Any = None) -> None:
        original(self, home, store, lambda: NOW, partner.coordinator.transport())

    monkeypatch.setattr(control.ControlChannel, "__init__", connect)
    monkeypatch.setattr("time.time", lambda: float(NOW))
    monkeypatch.setenv("CONCORD_NODE_HOME", str(partner.home.path))
