"""Enrolment: the way in, and one test for each way that is refused."""

import datetime
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from sqlmodel import select

from concord_server.database import utc_now
from concord_server.nodes.tables import Invitation, Node
from concord_shared.certificates import membership_key, read_certificate, root_fingerprint, spiffe_of
from concord_shared.documents import Leave, Roster
from concord_shared.protocol import EnrolResponse, Trust, Updates
from concord_shared.signing import fingerprint, new_identity_key, open_envelope, public_text, seal
from coordinators import Coordinator, NodeKeys, tampered


def _problem(answer: object, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text  # type: ignore[attr-defined]
    assert answer.headers["content-type"] == "application/problem+json"  # type: ignore[attr-defined]
    content = answer.json()  # type: ignore[attr-defined]
    assert content["code"] == code, content
    return str(content["detail"])


def test_a_node_enrols_and_is_activated(coordinator: Coordinator) -> None:
    line, keys = coordinator.invite("ward-1", "hospital-a"), NodeKeys()
    trust = Trust.model_validate_json(coordinator.anyone.get("/api/trust").content)
    signer = membership_key(trust.root_certificate, trust.membership_certificate, line.root, utc_now())

    answer = coordinator.post_enrolment(keys.enrolment(line))
    enrolled = EnrolResponse.model_validate_json(answer.content)
    assert enrolled.state == "enrolled"

    roster = open_envelope(enrolled.roster, Roster, [signer])
    (row,) = roster.nodes
    assert (row.name, row.organisation, row.state) == ("ward-1", "hospital-a", "enrolled")
    assert row.identity_key == public_text(keys.identity.public_key())
    assert row.flower_key == public_text(keys.flower.public_key())

    shown = coordinator.admin.get("/api/v1/nodes/ward-1").json()
    assert shown["fingerprint"] == keys.fingerprint
    node = coordinator.node(enrolled.certificate.chain)
    body = {"fingerprint": keys.fingerprint.upper()}
    assert coordinator.admin.post("/api/v1/nodes/ward-1/activate", json=body).json()["state"] == "active"
    found = Updates.model_validate_json(node.get("/api/node/updates").content)
    assert found.state == "active"
    assert [update.kind for update in found.updates] == ["roster", "roster"]


def test_a_certificate_holds_nothing_of_the_request_but_its_key(coordinator: Coordinator) -> None:
    keys = NodeKeys()
    answer = coordinator.post_enrolment(keys.enrolment(coordinator.invite("ward-1", "hospital-a")))
    certificate = x509.load_pem_x509_certificate(answer.json()["certificate"]["chain"].encode())
    assert fingerprint(certificate.public_key()) == fingerprint(keys.tls.public_key())  # type: ignore[arg-type]
    assert spiffe_of(certificate) == "spiffe://hearts/hospital-a/ward-1"
    assert certificate.subject == x509.Name([])
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    life = certificate.not_valid_after_utc - utc_now()
    assert datetime.timedelta(days=29) < life <= datetime.timedelta(days=30)


def test_enrol_refuses_a_wrong_token(coordinator: Coordinator) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    request = NodeKeys().enrolment(line).model_copy(update={"token": "x" * 43})
    _problem(coordinator.post_enrolment(request), 403, "invitation-unknown")
    (event,) = coordinator.audited("node:enrol-refused")
    assert event["detail"]["code"] == "invitation-unknown"
    assert "x" * 43 not in str(event)


def test_enrol_refuses_a_used_token(coordinator: Coordinator) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    assert coordinator.post_enrolment(NodeKeys().enrolment(line)).status_code == 200
    _problem(coordinator.post_enrolment(NodeKeys().enrolment(line)), 403, "invitation-used")
    assert len(coordinator.audited("node:enrol-refused")) == 1


def test_a_token_raced_for_admits_one(coordinator: Coordinator) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    requests = [NodeKeys().enrolment(line) for _ in range(6)]
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda each=each: codes.append(coordinator.post_enrolment(each).status_code))
        for each in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 403, 403, 403, 403, 403]


def test_enrol_refuses_an_expired_token(coordinator: Coordinator) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    with coordinator.database.session() as session:
        row = session.exec(select(Invitation)).one()
        row.expires_at = utc_now() - datetime.timedelta(seconds=1)
    detail = _problem(coordinator.post_enrolment(NodeKeys().enrolment(line)), 403, "invitation-expired")
    assert "expired at" in detail


def test_enrol_refuses_a_withdrawn_invitation(coordinator: Coordinator) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    (invitation,) = coordinator.admin.get("/api/v1/invitations").json()["items"]
    assert coordinator.admin.delete(f"/api/v1/invitations/{invitation['id']}").status_code == 200
    _problem(coordinator.post_enrolment(NodeKeys().enrolment(line)), 403, "invitation-expired")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"node": "ward-2"}, "node"),
        ({"organisation": "hospital-b"}, "organisation"),
        ({"federation": "lungs"}, "federation"),
        ({"token_digest": "0" * 64}, "token_digest"),
    ],
)
def test_enrol_refuses_another_name_than_the_invitations(
    coordinator: Coordinator, changes: dict[str, str], said: str
) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    detail = _problem(coordinator.post_enrolment(NodeKeys().enrolment(line, **changes)), 400, "document-refused")
    assert said in detail


@pytest.mark.parametrize("stolen", ["identity_key", "flower_key"])
def test_enrol_refuses_a_foreign_key_in_the_claim(coordinator: Coordinator, stolen: str) -> None:
    """Someone's public key can be known; claiming it needs its signature."""
    line, victim = coordinator.invite("ward-1", "hospital-a"), NodeKeys()
    key = {"identity_key": victim.identity.public_key(), "flower_key": victim.flower.public_key()}[stolen]
    request = NodeKeys().enrolment(line, **{stolen: public_text(key)})  # type: ignore[arg-type]
    _problem(coordinator.post_enrolment(request), 400, "document-refused")


def test_enrol_refuses_a_claim_that_was_changed(coordinator: Coordinator) -> None:
    line, keys = coordinator.invite("ward-1", "hospital-a"), NodeKeys()
    request = keys.enrolment(line, node="ward-2")
    request = request.model_copy(update={"claim": tampered(request.claim, node="ward-1")})
    assert "signature" in _problem(coordinator.post_enrolment(request), 400, "document-refused")


def test_enrol_refuses_a_request_with_another_key(coordinator: Coordinator) -> None:
    line, keys = coordinator.invite("ward-1", "hospital-a"), NodeKeys()
    other = keys.request(ec.generate_private_key(ec.SECP256R1()))
    detail = _problem(coordinator.post_enrolment(keys.enrolment(line, other)), 400, "document-refused")
    assert "another key" in detail


def test_enrol_refuses_a_request_that_its_key_did_not_sign(coordinator: Coordinator) -> None:
    import base64

    line, keys = coordinator.invite("ward-1", "hospital-a"), NodeKeys()
    lines = keys.request().splitlines()
    der = bytearray(base64.b64decode("".join(lines[1:-1])))
    der[-1] ^= 1
    forged = "\n".join([lines[0], base64.b64encode(der).decode(), lines[-1], ""])
    _problem(coordinator.post_enrolment(keys.enrolment(line, forged)), 400, "document-refused")


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_enrol_refuses_a_tls_key_of_another_kind(coordinator: Coordinator, curve: ec.EllipticCurve) -> None:
    line, keys = coordinator.invite("ward-1", "hospital-a"), NodeKeys(tls=ec.generate_private_key(curve))
    _problem(coordinator.post_enrolment(keys.enrolment(line)), 400, "document-refused")


@pytest.mark.parametrize("skew_s", [-700, 700])
def test_enrol_refuses_a_wrong_clock_and_tells_both(coordinator: Coordinator, skew_s: int) -> None:
    line, then = coordinator.invite("ward-1", "hospital-a"), int(time.time()) + skew_s
    detail = _problem(coordinator.post_enrolment(NodeKeys().enrolment(line, issued_at=then)), 400, "clock")
    theirs = datetime.datetime.fromtimestamp(then, datetime.UTC)
    assert f"{theirs:%Y-%m-%d %H:%M:%S}" in detail
    assert f"{utc_now():%Y-%m-%d %H:%M}" in detail


def test_a_refused_enrolment_leaves_the_token_usable(coordinator: Coordinator) -> None:
    line = coordinator.invite("ward-1", "hospital-a")
    coordinator.post_enrolment(NodeKeys().enrolment(line, issued_at=1))
    assert coordinator.post_enrolment(NodeKeys().enrolment(line)).status_code == 200


def test_enrol_refuses_keys_of_another_node(coordinator: Coordinator) -> None:
    keys, _ = coordinator.enrol("ward-1", "hospital-a")
    line = coordinator.invite("ward-2", "hospital-a")
    _problem(coordinator.post_enrolment(keys.enrolment(line)), 409, "conflict")
    with coordinator.database.reading() as session:
        assert session.exec(select(Invitation).where(Invitation.node == "ward-2")).one().used_at is None


def test_no_invitation_for_a_name_that_another_organisation_has(coordinator: Coordinator) -> None:
    coordinator.enrol("ward-1", "hospital-a")
    body = {"node": "ward-1", "organisation": "hospital-b"}
    _problem(coordinator.admin.post("/api/v1/invitations", json=body), 409, "conflict")


def test_a_node_that_left_may_come_back_with_new_keys(coordinator: Coordinator) -> None:
    keys, node = coordinator.enrol("ward-1", "hospital-a")
    leave = seal(Leave(node="ward-1", issued_at=int(time.time())), keys.identity)
    assert node.post("/api/node/leave", content=leave.model_dump_json()).status_code == 204
    assert node.get("/api/node/updates").status_code == 401
    again, fresh = coordinator.enrol("ward-1", "hospital-a")
    assert fresh.get("/api/node/updates").status_code == 200
    assert node.get("/api/node/updates").status_code == 401
    assert coordinator.admin.get("/api/v1/nodes/ward-1").json()["fingerprint"] == again.fingerprint


def test_leave_refuses_another_nodes_word(coordinator: Coordinator) -> None:
    keys, _ = coordinator.enrol("ward-1", "hospital-a")
    _, other = coordinator.enrol("ward-2", "hospital-a")
    leave = seal(Leave(node="ward-1", issued_at=int(time.time())), keys.identity)
    _problem(other.post("/api/node/leave", content=leave.model_dump_json()), 400, "document-refused")
    assert coordinator.admin.get("/api/v1/nodes/ward-1").json()["state"] == "active"


def test_leave_refuses_an_old_word(coordinator: Coordinator) -> None:
    keys, node = coordinator.enrol("ward-1", "hospital-a")
    leave = seal(Leave(node="ward-1", issued_at=int(time.time()) - 3600), keys.identity)
    _problem(node.post("/api/node/leave", content=leave.model_dump_json()), 400, "clock")


def test_activation_refuses_another_fingerprint(coordinator: Coordinator) -> None:
    coordinator.enrol("ward-1", "hospital-a", active=False)
    body = {"fingerprint": fingerprint(new_identity_key().public_key())}
    _problem(coordinator.admin.post("/api/v1/nodes/ward-1/activate", json=body), 409, "conflict")
    assert coordinator.admin.get("/api/v1/nodes/ward-1").json()["state"] == "enrolled"


def test_a_renewed_certificate_takes_over_when_it_is_used(coordinator: Coordinator) -> None:
    keys, before = coordinator.enrol("ward-1", "hospital-a")
    renewed = ec.generate_private_key(ec.SECP256R1())
    answer = before.post("/api/node/renew", json={"request": keys.request(renewed)})
    assert answer.status_code == 200, answer.text
    assert before.get("/api/node/updates").status_code == 200  # as if the answer had been lost
    after = coordinator.node(answer.json()["chain"])
    assert after.get("/api/node/updates").status_code == 200
    assert before.get("/api/node/updates").status_code == 401
    with coordinator.database.reading() as session:
        row = session.get(Node, "ward-1")
        assert row is not None
        assert (row.tls_key, row.tls_key_next) == (fingerprint(renewed.public_key()), None)


def test_renewing_with_the_same_key_needs_no_change(coordinator: Coordinator) -> None:
    keys, node = coordinator.enrol("ward-1", "hospital-a")
    answer = node.post("/api/node/renew", json={"request": keys.request()})
    assert coordinator.node(answer.json()["chain"]).get("/api/node/updates").status_code == 200
    assert node.get("/api/node/updates").status_code == 200


def test_the_invitation_names_this_root(coordinator: Coordinator) -> None:
    trust = coordinator.anyone.get("/api/trust").json()
    line = coordinator.invite("ward-1", "hospital-a")
    assert (
        line.root == root_fingerprint(read_certificate(trust["root_certificate"])) == coordinator.made.root_fingerprint
    )
