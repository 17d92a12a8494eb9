"""Who may do what: policies, tokens, nodes' certificates, revocation, rates and sizes."""

import datetime
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from sqlmodel import select

from concord_server.api.guard import BODY_BYTES_MAX, TokenBuckets, _address
from concord_server.api.metrics import may_read_metrics
from concord_server.api.security import node_caller, public, signed_in
from concord_server.database import utc_now
from concord_server.people.tables import ApiToken
from concord_server.pki import Authority, make_membership, make_root
from concord_shared.protocol import Updates
from concord_shared.signing import new_identity_key, public_text
from coordinators import Coordinator, NodeKeys, make_coordinator

POLICIES = {public, signed_in, node_caller, may_read_metrics}


def _calls(dependant: Dependant) -> set[object]:
    """All functions that a route depends on."""
    found: set[object] = {dependant.call}
    for each in dependant.dependencies:
        found |= _calls(each)
    return found


def _routes(coordinator: Coordinator) -> list[tuple[str, str, set[object]]]:
    """Method, path and policies of every route there is."""
    found = []
    for route in iter_route_contexts(coordinator.app.routes):
        assert isinstance(route.original_route, APIRoute), f"{route.path}: nothing but routes with a policy"
        policies = _calls(route.dependant) & POLICIES
        found += [(method, str(route.path), policies) for method in route.methods or ()]
    return found


def test_every_route_has_a_policy(coordinator: Coordinator) -> None:
    routes = _routes(coordinator)
    assert len(routes) > 20
    for method, path, policies in routes:
        assert len(policies) == 1, f"{method} {path}: expected one policy, got {policies}"


def test_only_these_routes_are_public(coordinator: Coordinator) -> None:
    found = {path for _, path, policies in _routes(coordinator) if public in policies}
    assert found == {"/api/health", "/api/openapi.json", "/api/trust", "/api/enrol"}


def test_without_a_token_nothing_is_told(coordinator: Coordinator) -> None:
    for method, path, policies in _routes(coordinator):
        if public not in policies:
            filled = path.replace("{", "").replace("}", "")
            answer = coordinator.anyone.request(method, filled, headers={"Concord-Protocol": "1"})
            assert answer.status_code == 401, f"{method} {path}: {answer.status_code}"


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/api/docs", "/"])
def test_no_pages_for_browsers(coordinator: Coordinator, path: str) -> None:
    answer = coordinator.anyone.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_token_expires(coordinator: Coordinator) -> None:
    with coordinator.database.session() as session:
        session.exec(select(ApiToken)).one().expires_at = utc_now() - datetime.timedelta(seconds=1)
    answer = coordinator.admin.get("/api/v1/me")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_revoked_token_ends_at_once(coordinator: Coordinator) -> None:
    ada = coordinator.new_person("ada", "hospital-a", "researcher")
    (mine,) = ada.get("/api/v1/tokens").json()["items"]
    assert ada.delete(f"/api/v1/tokens/{mine['id']}").status_code == 200
    assert ada.get("/api/v1/me").status_code == 401


def test_a_token_is_kept_as_its_digest(coordinator: Coordinator) -> None:
    content = coordinator.home.database_file.read_bytes() + Path(f"{coordinator.home.database_file}-wal").read_bytes()
    assert coordinator.token.encode() not in content
    assert coordinator.invite("ward-1", "hospital-a").token.encode() not in content


@pytest.mark.parametrize(
    ("scopes", "reads", "writes"),
    [(("read",), 200, 403), (("organisations:read",), 200, 403), (("people:read",), 403, 403), (("write",), 403, 201)],
)
def test_a_scope_is_not_exceeded(coordinator: Coordinator, scopes: tuple[str, ...], reads: int, writes: int) -> None:
    limited = coordinator.person(coordinator.new_token("admin", scopes))
    assert limited.get("/api/v1/organisations").status_code == reads
    assert limited.post("/api/v1/organisations", json={"name": "hospital-c"}).status_code == writes


def test_a_limited_token_makes_no_wider_one(coordinator: Coordinator) -> None:
    limited = coordinator.person(coordinator.new_token("admin", ("tokens:write",)))
    assert limited.post("/api/v1/tokens", json={"scopes": ["read"]}).status_code == 403
    assert limited.post("/api/v1/tokens", json={"scopes": ["tokens:write"]}).status_code == 201


def test_an_org_admin_stays_within_the_organisation(coordinator: Coordinator) -> None:
    bea = coordinator.new_person("bea", "hospital-b", "org-admin")
    assert bea.post("/api/v1/organisations", json={"name": "hospital-c"}).status_code == 403
    assert bea.post("/api/v1/people", json={"name": "eve", "organisation": "hospital-a"}).status_code == 403
    assert bea.post("/api/v1/invitations", json={"node": "w", "organisation": "hospital-a"}).status_code == 403
    assert bea.post("/api/v1/tokens", json={"person": "admin"}).status_code == 403
    role = {"role": "federation-admin"}
    assert bea.post("/api/v1/people/bea/roles", json=role).status_code == 403
    assert bea.post("/api/v1/people", json={"name": "cid", "organisation": "hospital-b"}).status_code == 201
    assert bea.post("/api/v1/tokens", json={"person": "cid"}).status_code == 201
    coordinator.enrol("ward-1", "hospital-a")
    assert bea.post("/api/v1/nodes/ward-1/revoke", json={}).status_code == 403


def test_an_org_admin_makes_no_token_for_someone_above(coordinator: Coordinator) -> None:
    bea = coordinator.new_person("bea", "hospital-b", "org-admin")
    coordinator.new_person("boss", "hospital-b", "auditor@*")
    assert bea.post("/api/v1/tokens", json={"person": "boss"}).status_code == 403


def test_a_federation_admin_does_not_speak_for_a_member(coordinator: Coordinator) -> None:
    key = {"key": public_text(new_identity_key().public_key())}
    assert coordinator.admin.put("/api/v1/organisations/hospital-b/key", json=key).status_code == 403
    bea = coordinator.new_person("bea", "hospital-b", "org-admin")
    answer = bea.put("/api/v1/organisations/hospital-b/key", json=key)
    assert answer.status_code == 200
    other = {"key": public_text(new_identity_key().public_key())}
    assert bea.put("/api/v1/organisations/hospital-b/key", json=other).status_code == 409
    assert bea.put("/api/v1/organisations/hospital-b/key", json=other | {"replace": True}).status_code == 200


def test_the_last_federation_admin_stays(coordinator: Coordinator) -> None:
    assert coordinator.admin.delete("/api/v1/people/admin/roles/federation-admin").status_code == 409


def test_only_auditors_of_the_federation_read_the_audit_log(coordinator: Coordinator) -> None:
    assert coordinator.new_person("ada", "hospital-a", "auditor").get("/api/v1/audit").status_code == 403
    assert coordinator.new_person("ben", None, "auditor@*").get("/api/v1/audit").status_code == 200
    assert coordinator.new_person("cid", "hospital-a", "researcher").get("/api/v1/audit").status_code == 403


def _certificate(coordinator: Coordinator, organisation: str, node: str, authority: Authority | None = None) -> str:
    """A certificate that the coordinator did not give to a node of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    return (authority or coordinator.authority).node(organisation, node, key.public_key(), 30, utc_now()).chain


def test_a_foreign_key_with_a_nodes_name_is_refused_and_audited(coordinator: Coordinator) -> None:
    coordinator.enrol("ward-1", "hospital-a")
    thief = coordinator.node(_certificate(coordinator, "hospital-a", "ward-1"))
    assert thief.get("/api/node/updates").status_code == 401
    (event,) = coordinator.audited("node:connect-refused")
    assert event["detail"]["reason"] == "foreign key"


@pytest.mark.parametrize(("organisation", "node"), [("hospital-b", "ward-1"), ("hospital-a", "ward-9"), ("x/y", "z")])
def test_a_name_that_is_no_nodes_is_refused(coordinator: Coordinator, organisation: str, node: str) -> None:
    coordinator.enrol("ward-1", "hospital-a")
    assert coordinator.node(_certificate(coordinator, organisation, node)).get("/api/node/updates").status_code == 401


def test_the_workers_certificate_is_not_a_nodes(coordinator: Coordinator) -> None:
    chain = coordinator.home.worker_certificate.read_text()
    assert coordinator.node(chain).get("/api/node/updates").status_code == 401


def test_a_certificate_of_another_federation_is_refused(coordinator: Coordinator) -> None:
    coordinator.enrol("ward-1", "hospital-a")
    root_key, root_pem = make_root("lungs", utc_now())
    key, membership_pem = make_membership("lungs", root_key, root_pem, utc_now())
    other = Authority("lungs", root_pem, membership_pem, key, "")
    chain = _certificate(coordinator, "hospital-a", "ward-1", other)
    assert coordinator.node(chain).get("/api/node/updates").status_code == 401


def test_revocation_holds_at_once(coordinator: Coordinator) -> None:
    _, node = coordinator.enrol("ward-1", "hospital-a")
    assert node.get("/api/node/updates").status_code == 200
    assert coordinator.admin.post("/api/v1/nodes/ward-1/revoke", json={"reason": "stolen"}).status_code == 200
    began = time.monotonic()
    assert node.get("/api/node/updates").status_code == 401
    assert time.monotonic() - began < 5
    assert coordinator.audited("node:connect-refused")[0]["detail"]["reason"] == "revoked"


def test_revocation_ends_a_long_poll(coordinator: Coordinator) -> None:
    _, node = coordinator.enrol("ward-1", "hospital-a")
    cursor = node.get("/api/node/updates").json()["cursor"]
    answers: list[Updates] = []

    def poll() -> None:
        answer = node.get("/api/node/updates", params={"after": cursor, "wait_s": 20})
        answers.append(Updates.model_validate_json(answer.content))

    waiting = threading.Thread(target=poll)
    waiting.start()
    time.sleep(0.5)
    began = time.monotonic()
    coordinator.admin.post("/api/v1/nodes/ward-1/revoke", json={})
    waiting.join(10)
    assert time.monotonic() - began < 5
    assert (answers[0].state, answers[0].updates) == ("revoked", ())


def test_a_long_poll_answers_when_there_is_something_new(coordinator: Coordinator) -> None:
    _, node = coordinator.enrol("ward-1", "hospital-a")
    cursor = node.get("/api/node/updates").json()["cursor"]
    began = time.monotonic()
    threading.Timer(0.5, lambda: coordinator.enrol("ward-2", "hospital-b", active=False)).start()
    answer = node.get("/api/node/updates", params={"after": cursor, "wait_s": 20}).json()
    assert [update["kind"] for update in answer["updates"]] == ["roster"]
    assert time.monotonic() - began < 5


def test_a_long_poll_ends_with_the_process(coordinator: Coordinator) -> None:
    _, node = coordinator.enrol("ward-1", "hospital-a")
    cursor = node.get("/api/node/updates").json()["cursor"]
    threading.Timer(0.5, coordinator.app.state.concord.closing.set).start()
    began = time.monotonic()
    assert node.get("/api/node/updates", params={"after": cursor, "wait_s": 20}).json()["updates"] == []
    assert time.monotonic() - began < 3


def test_suspended_nodes_are_told_and_may_come_back(coordinator: Coordinator) -> None:
    keys, node = coordinator.enrol("ward-1", "hospital-a")
    assert coordinator.admin.post("/api/v1/nodes/ward-1/suspend", json={}).json()["state"] == "suspended"
    assert node.get("/api/node/updates").json()["state"] == "suspended"
    body = {"fingerprint": keys.fingerprint}
    assert coordinator.admin.post("/api/v1/nodes/ward-1/activate", json=body).json()["state"] == "active"
    assert coordinator.admin.post("/api/v1/nodes/ward-1/revoke", json={}).status_code == 200
    assert coordinator.admin.post("/api/v1/nodes/ward-1/activate", json=body).status_code == 409


def test_every_change_is_a_new_roster_for_every_node(coordinator: Coordinator) -> None:
    _, one = coordinator.enrol("ward-1", "hospital-a")
    cursor = one.get("/api/node/updates").json()["cursor"]
    coordinator.enrol("ward-2", "hospital-b")
    coordinator.admin.post("/api/v1/nodes/ward-2/revoke", json={})
    found = Updates.model_validate_json(one.get("/api/node/updates", params={"after": cursor}).content)
    assert [update.kind for update in found.updates] == ["roster"] * 3
    assert one.get("/api/node/updates", params={"after": found.cursor}).json()["updates"] == []
    versions = coordinator.admin.get("/api/v1/roster")
    assert versions.status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Concord-Protocol": "2"}, {"Concord-Protocol": "one"}])
def test_another_protocol_version_is_refused_by_name(coordinator: Coordinator, headers: dict[str, str]) -> None:
    answer = coordinator.anyone.get("/api/node/updates", headers=headers)
    assert answer.status_code == 426
    assert answer.json()["code"] == "protocol"
    assert "protocol 1" in answer.json()["detail"]


def test_a_large_body_is_refused(coordinator: Coordinator) -> None:
    answer = coordinator.admin.post("/api/v1/organisations", content=b" " * (BODY_BYTES_MAX + 1))
    assert answer.status_code == 413

    def chunks():  # type: ignore[no-untyped-def]
        for _ in range(BODY_BYTES_MAX // 65536 + 2):
            yield b" " * 65536

    assert coordinator.admin.post("/api/v1/organisations", content=chunks()).status_code == 413


def test_headers_keep_browsers_and_caches_out(coordinator: Coordinator) -> None:
    for answer in (coordinator.anyone.get("/api/health"), coordinator.anyone.get("/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "max-age" in answer.headers["strict-transport-security"]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_too_many_requests_wait(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path / "c", requests_per_minute=10)
    answers = [coordinator.admin.get("/api/v1/me") for _ in range(12)]
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert coordinator.anyone.get("/api/health").status_code == 200  # others are not held up
    coordinator.close()


def test_enrolment_has_a_stricter_rate(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path / "c", enrolments_per_minute=3)
    line = coordinator.invite("ward-1", "hospital-a")
    request = NodeKeys().enrolment(line).model_copy(update={"token": "x" * 43})
    codes = [coordinator.post_enrolment(request).status_code for _ in range(4)]
    assert codes == [403, 403, 403, 429]
    coordinator.close()


@pytest.mark.parametrize("path", ["/api/v1/me", "/api/v1/nothing", "/api/health", "/api/v1/organisations?limit=x"])
def test_invented_tokens_count_for_their_address(tmp_path: Path, path: str) -> None:
    coordinator = make_coordinator(tmp_path / "c", requests_per_minute=10)  # and so the administrator is known
    answers = [coordinator.person(f"concord_{number % 3}").get(path) for number in range(12)]
    assert answers[-1].status_code == 429
    assert coordinator.admin.get("/api/v1/me").status_code == 200
    coordinator.close()


def test_one_token_has_one_rate_however_it_is_written(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path / "c", requests_per_minute=20)
    written = [f"{word}{' ' * spaces}{coordinator.token}" for word in ("Bearer", "bearer") for spaces in range(1, 11)]
    written += written
    answers = [coordinator.anyone.get("/api/v1/me", headers={"Authorization": each}) for each in written]
    assert answers[-1].status_code == 429
    assert coordinator.anyone.get("/api/health").status_code == 200  # none of it counted for the address
    coordinator.close()


def test_a_revoked_token_counts_for_its_address_again(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path / "c", requests_per_minute=10)
    ada = coordinator.new_person("ada", "hospital-a", "researcher")
    (mine,) = ada.get("/api/v1/tokens").json()["items"]
    assert ada.delete(f"/api/v1/tokens/{mine['id']}").status_code == 200
    assert ada.get("/api/v1/me").status_code == 401
    answers = [(ada if turn % 2 else coordinator.person("concord_x")).get("/api/v1/me") for turn in range(11)]
    assert answers[-1].status_code == 429
    coordinator.close()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("somewhere", "elsewhere", False),
    ],
)
def test_an_address_is_a_network_of_64_bits(one: str, other: str, same: bool) -> None:
    found = {_address({"client": (each, 1)}) for each in (one, other)}
    assert len(found) == (1 if same else 2)


def test_buckets_refill_and_forget() -> None:
    buckets = TokenBuckets(60)
    assert [buckets.wait_s("a", 0.0) for _ in range(60)] == [0.0] * 60
    assert buckets.wait_s("a", 0.0) == pytest.approx(1.0)
    assert buckets.wait_s("b", 0.0) == 0.0
    assert buckets.wait_s("a", 1.0) == 0.0


def test_errors_never_tell_the_inside(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr("concord_server.organisations.service.find", fail)
    answer = coordinator.admin.get("/api/v1/organisations/hospital-a")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_invalid_requests_name_the_field_and_not_the_value(coordinator: Coordinator) -> None:
    answer = coordinator.admin.post("/api/v1/organisations", json={"name": "Not A Name!", "more": "secret-value"})
    assert answer.status_code == 422
    assert any(line.startswith("body.name") for line in answer.json()["errors"])
    assert "secret-value" not in answer.text
    assert coordinator.admin.patch("/api/v1/organisations").status_code == 405


def test_metrics_are_for_auditors_and_tell_no_paths(coordinator: Coordinator) -> None:
    coordinator.enrol("ward-1", "hospital-a")
    coordinator.admin.get("/api/v1/nodes/ward-1")
    coordinator.admin.get("/api/v1/nothing/secret-path")
    answer = coordinator.new_person("ben", None, "auditor@*").get("/metrics")
    assert 'concord_nodes{state="active"} 1.0' in answer.text
    assert 'route="/api/v1/nodes/{name}"' in answer.text
    assert "secret-path" not in answer.text
    assert coordinator.new_person("cid", "hospital-a", "researcher").get("/metrics").status_code == 403


def test_metrics_may_be_open_by_the_settings(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path / "c", metrics=True)
    assert coordinator.anyone.get("/metrics").status_code == 200
    coordinator.close()
