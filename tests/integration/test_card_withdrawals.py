"""A dataset that its node removed: the coordinator shows, offers and runs with its card no more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.client.fake_coordinator import NOW, partner_in
from worlds import OWNERS, STUDY, World, body, now, small_plan

from concord_client.control import ControlChannel
from concord_client.registry import add_dataset, publish, withdraw_card
from concord_shared.protocol import CardWithdrawal
from concord_shared.signing import Envelope, open_envelope


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def withdraw(world: World, site: str, key: str = "", **changes: Any) -> Any:
    given = {"node": site, "organisation": OWNERS[site], "dataset": "heart", "issued_at": now()} | changes
    document = body(CardWithdrawal(**given), world.sites[key or site].keys.identity)
    return world.sites[site].client.post("/api/node/cards", json=document)


def names(world: World) -> list[str]:
    return [each["name"] for each in world.people["lab"].get("/api/v1/datasets").json()["items"]]


def test_a_withdrawn_card_is_gone_for_everyone_and_noted(world: World) -> None:
    world.ready()
    started = world.start(small_plan())
    assert withdraw(world, "ward-a").status_code == 204
    assert names(world) == ["ward-b/heart", "ward-c/heart"]
    assert world.people["lab"].get("/api/v1/datasets/ward-a/heart").status_code == 404
    with world.coordinator.database.reading() as session:
        from concord_server.studies.service import agreed_datasets

        assert list(agreed_datasets(session, STUDY, now())) == ["ward-b/heart", "ward-c/heart"]
    assert started["state"] == "waiting"
    assert world.approve("ward-a", small_plan()).status_code == 409
    [noted] = world.coordinator.audited("dataset:withdraw")
    assert noted["subject"] == "ward-a/heart"
    assert noted["detail"]["version"] == "d" * 64
    assert withdraw(world, "ward-a").status_code == 204, "a second time changes nothing"
    assert len(world.coordinator.audited("dataset:withdraw")) == 1
    assert world.publish("ward-a").status_code == 204
    assert "ward-a/heart" in names(world)


def test_a_withdrawal_is_refused(world: World) -> None:
    assert world.publish("ward-a").status_code == 204
    assert world.publish("ward-b").status_code == 204
    for changes, status, said in (
        ({"node": "ward-b"}, 403, "of its own datasets"),
        ({"organisation": "hospital-b"}, 403, "of its own datasets"),
        ({"key": "ward-b"}, 400, "lacks the signature"),
        ({"issued_at": now() - 60}, 409, "a newer card"),
        ({"issued_at": now() + 600}, 400, "in the future"),
    ):
        answer = withdraw(world, "ward-a", **changes)  # type: ignore[arg-type]
        assert answer.status_code == status
        assert said in answer.json()["detail"]
    assert names(world) == ["ward-a/heart", "ward-b/heart"]


def test_a_node_withdraws_what_it_published_and_tells_of_nothing_else(tmp_path: Path) -> None:
    partner = partner_in(tmp_path)
    home, store = partner.home, partner.store
    assert not withdraw_card(home, store, "patients", NOW), "its name never left"
    publish(home, store, "patients", NOW)
    with ControlChannel(home, store, lambda: NOW, partner.coordinator.transport()) as channel:
        assert channel.deliver() == 1
        spec = store.dataset("patients")
        assert spec is not None
        add_dataset(store, "patients", spec.spec, NOW, replaces=True)  # its card is still that of the version before
        assert withdraw_card(home, store, "patients", NOW)
        assert channel.deliver() == 1
    _, sent = partner.coordinator.received["cards"]
    word = open_envelope(Envelope.model_validate(_tupled(sent)), CardWithdrawal, [home.identity_key().public_key()])
    assert (word.node, word.dataset) == (home.config.node, "patients")
    assert [each.kind for each in store.egress()] == ["enrolment", "card", "card-withdrawal"]
    store.close()


def _tupled(sent: dict[str, Any]) -> dict[str, Any]:
    return sent | {"signatures": tuple(sent["signatures"])}
