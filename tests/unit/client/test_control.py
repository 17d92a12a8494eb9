"""The control channel: what is logged, what is believed of an answer, and what an error means."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from concord_client.control import ControlChannel
from concord_client.registry import publish
from concord_shared.documents import DatasetCard, ModelFile
from concord_shared.errors import (
    ApiError,
    ConflictError,
    DocumentRefusedError,
    NotAllowedError,
    NotFoundError,
    UnreachableError,
)
from concord_shared.protocol import Update
from concord_shared.signing import Envelope, open_envelope, seal
from unit.client.fake_coordinator import NOW, REQUESTER, Partner, partner_in, problem


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    yield made
    made.store.close()


def channel(partner: Partner) -> ControlChannel:
    return ControlChannel(partner.home, partner.store, lambda: NOW, partner.coordinator.transport())


def test_updates_come_after_the_cursor(partner: Partner) -> None:
    body = seal(partner.study(), partner.key(REQUESTER)).model_dump(mode="json")
    partner.coordinator.updates = [Update(sequence=n, kind="study", body=body) for n in (1, 2, 3)]
    partner.store.cursor = 1
    with channel(partner) as open_channel:
        updates = open_channel.updates(0)
    assert [update.sequence for update in updates.updates] == [2, 3]
    assert partner.store.cursor == 1  # moved by whoever applies them


def test_what_leaves_is_in_the_egress_log_with_its_digest(partner: Partner) -> None:
    publish(partner.home, partner.store, "patients", NOW)
    with channel(partner) as open_channel:
        assert open_channel.deliver() == 1
    request = partner.coordinator.requests[-1]
    entry = partner.store.egress()[-1]
    assert (entry.to, entry.kind, entry.subject) == (partner.home.config.url, "card", "patients")
    assert (entry.bytes, entry.sha256) == (len(request.content), hashlib.sha256(request.content).hexdigest())
    envelope = Envelope.model_validate_json(request.content)
    card = open_envelope(envelope, DatasetCard, [partner.home.identity_key().public_key()])
    assert card.columns == ("age", "weight", "ill")
    assert "csv:" not in request.content.decode() + card.model_dump_json()  # the path stays here


def test_what_cannot_be_sent_stays_and_is_sent_later(partner: Partner) -> None:
    publish(partner.home, partner.store, "patients", NOW)

    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("no route", request=request)

    partner.coordinator.overrides["/api/node/cards"] = down
    with channel(partner) as open_channel:
        with pytest.raises(UnreachableError, match="no route"):
            open_channel.deliver()
        assert len(partner.store.outbox()) == 1
        partner.coordinator.overrides.clear()
        assert open_channel.deliver() == 1
    assert partner.store.outbox() == []


def test_what_the_coordinator_never_takes_is_noted_and_blocks_nothing(partner: Partner) -> None:
    publish(partner.home, partner.store, "patients", NOW)
    partner.coordinator.overrides["/api/node/cards"] = lambda _: problem(409, "conflict", "another card is newer")
    with channel(partner) as open_channel:
        assert open_channel.deliver() == 0
    assert partner.store.outbox() == []
    assert "another card is newer" in partner.store.refused()[-1].reason


def test_revoked_node_keeps_what_it_could_not_send(partner: Partner) -> None:
    publish(partner.home, partner.store, "patients", NOW)
    partner.coordinator.overrides["/api/node/cards"] = lambda _: problem(403, "revoked", "this node is revoked")
    with channel(partner) as open_channel, pytest.raises(NotAllowedError, match="revoked"):
        open_channel.deliver()
    assert len(partner.store.outbox()) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ApiError),
        (401, NotAllowedError),
        (403, NotAllowedError),
        (404, NotFoundError),
        (409, ConflictError),
        (422, ApiError),
        (426, UnreachableError),
        (429, UnreachableError),
        (500, UnreachableError),
        (503, UnreachableError),
        (302, UnreachableError),
    ],
)
def test_status_becomes_its_error(partner: Partner, status: int, error: type[Exception]) -> None:
    partner.coordinator.overrides["/api/node/updates"] = lambda _: problem(status, "some-code", "some detail")
    with channel(partner) as open_channel, pytest.raises(error, match="some detail") as caught:
        open_channel.updates(0)
    if isinstance(caught.value, ApiError):
        assert (caught.value.status, caught.value.code) == (status, "some-code")


def test_words_of_the_coordinator_cannot_steer_a_terminal(partner: Partner) -> None:
    partner.coordinator.overrides["/api/node/updates"] = lambda _: problem(404, "x", "\x1b[2J\x9bgone")
    with channel(partner) as open_channel, pytest.raises(NotFoundError) as caught:
        open_channel.updates(0)
    assert str(caught.value).isprintable()


def test_answer_of_another_shape_is_refused(partner: Partner) -> None:
    partner.coordinator.overrides["/api/node/updates"] = lambda _: httpx.Response(200, json={"updates": "all"})
    with channel(partner) as open_channel, pytest.raises(UnreachableError, match="not a Updates"):
        open_channel.updates(0)


def test_packed_answer_is_refused(partner: Partner) -> None:
    """A small packed body could unpack to any size."""
    headers = {"Content-Encoding": "gzip"}
    answer = httpx.Response(200, stream=httpx.ByteStream(b"\x1f\x8b"), headers=headers)
    transport = httpx.MockTransport(lambda _: answer)
    packed = ControlChannel(partner.home, partner.store, lambda: NOW, transport)
    with packed, pytest.raises(UnreachableError, match="packed"):
        packed.updates(0)


def test_endless_answer_is_cut_off(partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concord_client.control.ANSWER_BYTES_MAX", 1000)
    partner.coordinator.overrides["/api/node/updates"] = lambda _: httpx.Response(200, content=b" " * 1001)
    with channel(partner) as open_channel, pytest.raises(UnreachableError, match="larger than 1000"):
        open_channel.updates(0)


@pytest.mark.parametrize("wrong", [b"another!!!", b"short", b"much longer than promised"])
def test_model_of_other_bytes_is_not_kept(partner: Partner, tmp_path: Path, wrong: bytes) -> None:
    right = b"the model!"
    file = ModelFile(name="model.safetensors", sha256=hashlib.sha256(right).hexdigest(), size=len(right))
    path = f"/api/node/models/{'a' * 64}/model.safetensors"
    target = tmp_path / "model.safetensors"
    with channel(partner) as open_channel:
        partner.coordinator.overrides[path] = lambda _: httpx.Response(200, content=wrong)
        with pytest.raises((DocumentRefusedError, UnreachableError)):
            open_channel.download_model("a" * 64, "run-1", file, target)
        assert list(tmp_path.glob("*model*")) == []
        partner.coordinator.overrides[path] = lambda _: httpx.Response(200, content=right)
        open_channel.download_model("a" * 64, "run-1", file, target)
    assert target.read_bytes() == right


def test_every_request_says_its_protocol(partner: Partner) -> None:
    with channel(partner) as open_channel:
        open_channel.updates(0)
        open_channel.trust()
    assert {request.headers["Concord-Protocol"] for request in partner.coordinator.requests} == {"1"}
    assert json.dumps(partner.coordinator.received) == "{}"
