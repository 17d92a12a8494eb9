"""Enrolment: one test for each thing that must not be believed, and what is left on the disk."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from concord_client.control import ControlChannel
from concord_client.enrolment import certificate_ends, enrol, read_organisation_key, renew_if_due
from concord_client.home import NodeHome
from concord_client.store import NodeStore
from concord_shared.certificates import read_certificate
from concord_shared.documents import EnrolmentClaim, RosterOrganisation
from concord_shared.errors import DocumentRefusedError, NotAllowedError, UnreachableError, UsageError
from concord_shared.protocol import InvitationLine
from concord_shared.signing import (
    Envelope,
    fingerprint,
    new_identity_key,
    open_envelope,
    public_text,
    read_public_text,
    seal,
)
from unit.client.fake_coordinator import (
    DAY,
    HOST,
    NODE,
    NOW,
    ORGANISATION,
    PORT,
    TOKEN,
    Authority,
    FakeCoordinator,
    enrol_with,
    problem,
)


def not_enrolled(path: Path) -> bool:
    """No settings and no certificate; keys may be there, for the next try."""
    home = NodeHome(path)
    return not any(file.exists() for file in (home.config_file, home.certificate, home.root, home.membership))


def sent(coordinator: FakeCoordinator) -> list[str]:
    return [request.url.path for request in coordinator.requests if request.method == "POST"]


def test_enrolment_leaves_a_home_that_works(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    done = enrol_with(coordinator, tmp_path / "node")
    home = NodeHome.open(tmp_path / "node")
    assert home.config.url == f"https://{HOST}:{PORT}"
    assert home.config.superlink == f"{HOST}:9443"
    assert home.config.root == coordinator.line.root
    assert done.identity == fingerprint(home.identity_key().public_key())
    assert "every plan needs a person" in home.policy_file.read_text("utf-8").lower()
    home.tls_context()
    with home.store() as store:
        roster = store.roster()
        assert roster is not None
        assert roster.version == 1
        assert store.organisation_key("charite") == public_text(coordinator.keys["charite"].public_key())
        assert store.fact("state") == "enrolled"


def test_enrolment_proves_possession_of_all_three_keys(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    home = enrol_with(coordinator, tmp_path / "node").home
    body = json.loads(next(r for r in coordinator.requests if r.url.path == "/api/enrol").content)
    keys = [home.identity_key().public_key(), home.flower_key().public_key()]
    claim = open_envelope(Envelope.model_validate_json(json.dumps(body["claim"])), EnrolmentClaim, keys)
    assert claim.tls_key == public_text(home.tls_key().public_key())
    assert x509.load_pem_x509_csr(body["request"].encode()).is_signature_valid


def test_private_keys_never_leave(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    home = enrol_with(coordinator, tmp_path / "node").home
    content = b"".join(request.content for request in coordinator.requests)
    for key in (home.tls_key(), home.identity_key(), home.flower_key()):
        raw = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        assert b"".join(raw.splitlines()[1:-1])[20:60] not in content
    assert b"PRIVATE" not in content


def test_enrolment_is_in_the_egress_log_before_it_leaves(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    seen = []

    def look(request: httpx.Request) -> httpx.Response:
        with NodeStore(tmp_path / "node" / "node.db") as store:
            seen.extend(store.egress())
        return problem(500, "trouble", "later")

    coordinator.overrides["/api/enrol"] = look
    with pytest.raises(UnreachableError):
        enrol_with(coordinator, tmp_path / "node")
    assert [(entry.kind, entry.bytes > 100) for entry in seen] == [("enrolment", True)]


def test_enrolment_refuses_another_root_than_the_invitation_names(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    line = coordinator.line
    coordinator.root = Authority.root()
    coordinator.membership = coordinator.root.authority()
    with pytest.raises(DocumentRefusedError, match="not the coordinator that invited you"):
        enrol(line, tmp_path / "node", clock=lambda: NOW, transports=coordinator.transport)
    assert sent(coordinator) == []
    assert not_enrolled(tmp_path / "node")


def test_enrolment_refuses_a_membership_key_that_the_root_did_not_sign(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.membership = Authority.root("root").authority()
    with pytest.raises(DocumentRefusedError, match="not signed by the root"):
        enrol_with(coordinator, tmp_path / "node")
    assert sent(coordinator) == []


def test_enrolment_refuses_a_membership_certificate_that_is_no_authority(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    leaf = coordinator.root.issue("membership", coordinator.membership.key.public_key())
    coordinator.membership = Authority(leaf, coordinator.membership.key)
    with pytest.raises(DocumentRefusedError, match="not that of an authority"):
        enrol_with(coordinator, tmp_path / "node")


def test_enrolment_refuses_an_expired_membership_certificate(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.membership = coordinator.root.authority(now=NOW - 20 * DAY, days=10)
    with pytest.raises(DocumentRefusedError, match="clock"):
        enrol_with(coordinator, tmp_path / "node")
    assert sent(coordinator) == []


def test_enrolment_refuses_a_clock_that_differs(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    with pytest.raises(DocumentRefusedError, match="differ by 1000 s"):
        enrol(coordinator.line, tmp_path / "node", clock=lambda: NOW + 1000, transports=coordinator.transport)
    assert sent(coordinator) == []


def test_enrolment_refuses_another_protocol(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.overrides["/api/trust"] = lambda _: httpx.Response(200, json=coordinator.trust | {"protocols": [2, 3]})
    with pytest.raises(UnreachableError, match="speaks version 2, 3 of the protocol"):
        enrol_with(coordinator, tmp_path / "node")


def test_used_token_is_said_so(tmp_path: Path) -> None:
    coordinator = FakeCoordinator(token_used=True)
    with pytest.raises(NotAllowedError, match=r"did not admit.*used already") as caught:
        enrol_with(coordinator, tmp_path / "node")
    assert caught.value.code == "invitation-used"
    assert not_enrolled(tmp_path / "node")


def test_enrolment_refuses_a_certificate_for_another_name(tmp_path: Path) -> None:
    coordinator = FakeCoordinator(spiffe="spiffe://fed/acme/acme-2")
    with pytest.raises(DocumentRefusedError, match="names spiffe://fed/acme/acme-2"):
        enrol_with(coordinator, tmp_path / "node")
    assert not_enrolled(tmp_path / "node")


def test_enrolment_refuses_a_certificate_for_another_key(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    foreign = request.sign(generate_private_key(SECP256R1()), hashes.SHA256())
    text = foreign.public_bytes(serialization.Encoding.PEM).decode()
    chain = coordinator.chain
    coordinator.chain = lambda request: chain(text)  # type: ignore[method-assign]
    with pytest.raises(DocumentRefusedError, match="another key"):
        enrol_with(coordinator, tmp_path / "node")
    assert not_enrolled(tmp_path / "node")


def test_enrolment_refuses_a_certificate_of_another_issuer(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.issuer = Authority.root("membership")
    with pytest.raises(DocumentRefusedError, match="not signed by the membership key"):
        enrol_with(coordinator, tmp_path / "node")


def test_enrolment_refuses_an_expired_certificate(tmp_path: Path) -> None:
    coordinator = FakeCoordinator(days=0)
    with pytest.raises(DocumentRefusedError, match="check this machine's clock"):
        enrol_with(coordinator, tmp_path / "node")


def answer_with_roster(coordinator: FakeCoordinator, signer: Any = None, **changes: Any) -> None:
    """An otherwise right answer to the enrolment, with another roster."""
    original = coordinator._enrol

    def answer(request: httpx.Request) -> httpx.Response:
        response = original(json.loads(request.content))
        roster = seal(coordinator.roster(**changes), signer or coordinator.membership.key)
        return httpx.Response(200, json=response.json() | {"roster": roster.model_dump(mode="json")})

    coordinator.overrides["/api/enrol"] = answer


def test_enrolment_refuses_a_roster_that_the_membership_key_did_not_sign(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    answer_with_roster(coordinator, signer=new_identity_key())
    with pytest.raises(DocumentRefusedError, match="lacks the signature"):
        enrol_with(coordinator, tmp_path / "node")
    assert not_enrolled(tmp_path / "node")


def test_enrolment_refuses_a_roster_without_this_node(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    answer_with_roster(coordinator, nodes=())
    with pytest.raises(DocumentRefusedError, match="0 rows for this node"):
        enrol_with(coordinator, tmp_path / "node")


def test_enrolment_refuses_a_roster_of_another_federation(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    answer_with_roster(coordinator, federation="other")
    with pytest.raises(DocumentRefusedError, match="federation other"):
        enrol_with(coordinator, tmp_path / "node")


def test_enrolment_refuses_another_key_of_the_own_organisation(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    false = public_text(new_identity_key().public_key())
    answer_with_roster(coordinator, organisations=(RosterOrganisation(name=ORGANISATION, key=false),))
    own = coordinator.keys[ORGANISATION].public_key()
    with pytest.raises(DocumentRefusedError, match="ask your organisation's people"):
        enrol_with(coordinator, tmp_path / "node", organisation_key=own)
    assert not_enrolled(tmp_path / "node")


def test_own_organisation_key_is_pinned_when_given(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    own = coordinator.keys[ORGANISATION].public_key()
    done = enrol_with(coordinator, tmp_path / "node", organisation_key=own)
    assert done.confirmed
    assert done.organisation_key == fingerprint(own)


def test_own_organisation_key_is_pinned_even_before_the_roster_has_one(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    answer_with_roster(coordinator, organisations=(RosterOrganisation(name=ORGANISATION),))
    own = new_identity_key().public_key()
    enrol_with(coordinator, tmp_path / "node", organisation_key=own)
    with NodeHome.open(tmp_path / "node").store() as store:
        assert store.organisation_key(ORGANISATION) == public_text(own)


def test_network_breaks_and_the_same_line_works_again_with_the_same_keys(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection reset", request=request)

    coordinator.overrides["/api/enrol"] = broken
    with pytest.raises(UnreachableError, match="connection reset"):
        enrol_with(coordinator, tmp_path / "node")
    assert not_enrolled(tmp_path / "node")
    identity = NodeHome(tmp_path / "node").identity_key().public_key()
    coordinator.overrides.clear()
    assert enrol_with(coordinator, tmp_path / "node").identity == fingerprint(identity)


def test_home_of_another_node_is_never_taken_over(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    enrol_with(coordinator, tmp_path / "node")
    line = coordinator.line
    other = InvitationLine(line.host, line.port, ORGANISATION, "acme-2", line.root, TOKEN)
    with pytest.raises(UsageError, match="home of acme/acme-1"):
        enrol(other, tmp_path / "node", clock=lambda: NOW, transports=coordinator.transport)


def test_huge_answer_is_not_read(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.overrides["/api/trust"] = lambda _: httpx.Response(200, content=b" " * (9 << 20))
    with pytest.raises(UnreachableError, match="larger than"):
        enrol_with(coordinator, tmp_path / "node")


def test_something_that_is_no_coordinator_is_named(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.overrides["/api/trust"] = lambda _: httpx.Response(200, text="<html>hello</html>")
    with pytest.raises(UnreachableError, match="Is this a coordinator"):
        enrol_with(coordinator, tmp_path / "node")


def test_renewal_waits_for_two_thirds_of_the_life(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    home = enrol_with(coordinator, tmp_path / "node").home
    with home.store() as store, ControlChannel(home, store, lambda: NOW, coordinator.transport()) as channel:
        assert not renew_if_due(home, channel, NOW + 19 * DAY)
        coordinator.now = NOW + 21 * DAY
        before = read_certificate(home.certificate_pem())
        assert renew_if_due(home, channel, NOW + 21 * DAY)
        after = read_certificate(home.certificate_pem())
        assert before.serial_number != after.serial_number
        assert certificate_ends(home) == after.not_valid_after_utc
        assert before.public_key() == after.public_key()
        assert store.egress()[-1].kind == "renewal"


def test_renewal_refuses_a_certificate_for_another_name_and_keeps_the_old_one(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    home = enrol_with(coordinator, tmp_path / "node").home
    coordinator.now, coordinator.spiffe = NOW + 25 * DAY, "spiffe://fed/acme/acme-2"
    before = home.certificate_pem()
    with home.store() as store:
        channel = ControlChannel(home, store, lambda: NOW, coordinator.transport())
        with channel, pytest.raises(DocumentRefusedError) as refused:
            renew_if_due(home, channel, NOW + 25 * DAY)
    assert "acme-2" in str(refused.value)
    assert home.certificate_pem() == before
    assert NODE in home.config.spiffe


def test_organisation_key_is_read_as_pem_and_as_text(tmp_path: Path) -> None:
    key = new_identity_key().public_key()
    file = tmp_path / "organisation.pub"
    file.write_text(public_text(key) + "\n", "utf-8")
    assert fingerprint(read_organisation_key(file)) == fingerprint(key)
    file.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    assert fingerprint(read_organisation_key(file)) == fingerprint(key)
    file.write_text("hello", "utf-8")
    with pytest.raises(DocumentRefusedError):
        read_organisation_key(file)
    assert read_public_text(public_text(key))
