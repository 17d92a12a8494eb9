"""What all lists and creations have in common: pages, and Idempotency-Keys."""

import threading
import uuid

from sqlmodel import select

from concord_server.api.tables import IdempotentRequest
from concord_server.organisations.tables import Organisation
from coordinators import Coordinator


def test_pages_hold_everything_once_and_in_order(coordinator: Coordinator) -> None:
    names = sorted([f"clinic-{number:02d}" for number in range(7)] + ["hospital-a", "hospital-b"])
    for name in names:
        coordinator.admin.post("/api/v1/organisations", json={"name": name})
    seen, after, sizes = [], None, []
    while True:
        page = coordinator.admin.get(
            "/api/v1/organisations", params={"limit": 4} | ({"after": after} if after else {})
        ).json()
        seen += [each["name"] for each in page["items"]]
        sizes.append(len(page["items"]))
        after = page["next"]
        if after is None:
            break
    assert seen == names
    assert sizes == [4, 4, 1]


def test_a_page_has_limits(coordinator: Coordinator) -> None:
    assert coordinator.admin.get("/api/v1/organisations", params={"limit": 0}).status_code == 422
    assert coordinator.admin.get("/api/v1/organisations", params={"limit": 100000}).status_code == 422
    assert coordinator.admin.get("/api/v1/audit", params={"after": "not-a-number"}).status_code == 400


def test_the_audit_log_is_newest_first_over_pages(coordinator: Coordinator) -> None:
    first = coordinator.admin.get("/api/v1/audit", params={"limit": 2}).json()
    second = coordinator.admin.get("/api/v1/audit", params={"limit": 2, "after": first["next"]}).json()
    ids = [each["id"] for each in first["items"] + second["items"]]
    assert ids == sorted(ids, reverse=True)
    assert len(set(ids)) == 4


def test_a_creation_sent_twice_is_done_once(coordinator: Coordinator) -> None:
    key, body = {"Idempotency-Key": str(uuid.uuid4())}, {"name": "hospital-c", "title": "C"}
    first = coordinator.admin.post("/api/v1/organisations", json=body, headers=key)
    second = coordinator.admin.post("/api/v1/organisations", json=body, headers=key)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert len(coordinator.audited("organisation:create")) == 3


def test_creations_sent_at_once_are_done_once(coordinator: Coordinator) -> None:
    key, body = {"Idempotency-Key": str(uuid.uuid4())}, {"name": "hospital-c"}
    codes: list[int] = []

    def send() -> None:
        codes.append(coordinator.admin.post("/api/v1/organisations", json=body, headers=key).status_code)

    threads = [threading.Thread(target=send) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [201] * 5
    with coordinator.database.reading() as session:
        assert len(session.exec(select(Organisation).where(Organisation.name == "hospital-c")).all()) == 1


def test_a_key_is_not_used_for_something_else(coordinator: Coordinator) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    assert coordinator.admin.post("/api/v1/organisations", json={"name": "c"}, headers=key).status_code == 201
    assert coordinator.admin.post("/api/v1/organisations", json={"name": "d"}, headers=key).status_code == 409
    ada = coordinator.new_person("ada", None, "federation-admin@*")
    assert ada.post("/api/v1/organisations", json={"name": "d"}, headers=key).status_code == 201


def test_a_failed_creation_may_be_sent_again(coordinator: Coordinator) -> None:
    key, body = {"Idempotency-Key": str(uuid.uuid4())}, {"name": "ada", "organisation": "hospital-c"}
    assert coordinator.admin.post("/api/v1/people", json=body, headers=key).status_code == 404
    coordinator.new_organisation("hospital-c")
    assert coordinator.admin.post("/api/v1/people", json=body, headers=key).status_code == 201


def test_a_secret_is_not_kept_for_a_second_answer(coordinator: Coordinator) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    made = coordinator.admin.post("/api/v1/tokens", json={}, headers=key)
    again = coordinator.admin.post("/api/v1/tokens", json={}, headers=key)
    assert (made.status_code, again.status_code) == (201, 409)
    with coordinator.database.reading() as session:
        assert session.exec(select(IdempotentRequest)).one().response is None
