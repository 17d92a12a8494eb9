"""The SuperLink on loopback, over TLS: rounds that lose processes, and callers that have no business there."""

import base64
import datetime
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleets import Fleet, FleetMember, listen, running_fleet
from flwr.app import Message
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import sign_message

from concord_client.fleet import FleetConnection
from concord_server.superlink.transport import FlowerTransport
from concord_shared.errors import DocumentRefusedError, NotAllowedError, RunStoppedError
from concord_shared.messages import answer, model_record, offer_message, read_offer
from concord_shared.signed_rounds import sign_reply, verify_offer
from helpers import offer_of

THETA = np.arange(200_000, dtype=np.float32)


@pytest.fixture(scope="class")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    shared_fleet.forget()
    return shared_fleet


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def ask(transport: FlowerTransport, names: list[str], round_number: int = 1) -> None:
    record = model_record(THETA, {})
    transport.send(
        offer_message(offer_of(node=name, round_number=round_number), record, index + 2, time.time())
        for index, name in enumerate(names)
    )


def receive_all(transport: FlowerTransport, count: int, timeout_s: float = 30) -> list[Message]:
    replies: list[Message] = []
    until = time.monotonic() + timeout_s
    while len(replies) < count and time.monotonic() < until:
        replies += transport.receive(0.5)
    return replies


def own_number(message: Message) -> Message:
    """A reply of 200,000 coordinates, all equal to the round, so that a wrong one shows."""
    offer = read_offer(message)
    return answer(message, offer, {"delta": np.full(200_000, offer.round_number, np.int32)}, {})


class TestRounds:
    def test_a_round_goes_to_every_node_and_back(self, fleet: Fleet, stop: threading.Event) -> None:
        members = [fleet.member(f"node-{index}") for index in (1, 2, 3)]
        for member in members:
            listen(fleet, member, own_number, stop)
        transport = fleet.transport(members)
        for number in (1, 2):
            ask(transport, [member.name for member in members], number)
            replies = receive_all(transport, 3)
            assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3, 4]
            for reply in replies:
                delta = reply.content.array_records["blocks"]["delta"]
                assert np.frombuffer(delta.data, "<i4").tolist() == [number] * 200_000
            transport.withdraw()
        transport.close()
        assert not fleet.refusals

    def test_offers_are_signed_by_the_coordinator(self, fleet: Fleet, stop: threading.Event) -> None:
        seen: list[str] = []
        member = fleet.member("node-1")

        def respond(message: Message) -> Message:
            verify_offer(message, fleet.coordinator.public_key())
            with pytest.raises(DocumentRefusedError, match="wrong"):
                verify_offer(message, Ed25519PrivateKey.generate().public_key())
            message.content.config_records["offer"]["round_number"] = 2
            with pytest.raises(DocumentRefusedError, match="wrong"):
                verify_offer(message, fleet.coordinator.public_key())
            message.content.config_records["offer"]["round_number"] = 1
            seen.append("verified")
            return own_number(message)

        listen(fleet, member, respond, stop)
        transport = fleet.transport([member])
        ask(transport, ["node-1"])
        assert len(receive_all(transport, 1)) == 1
        assert seen == ["verified"]
        transport.close()

    def test_a_node_that_comes_later_still_gets_its_offer(self, fleet: Fleet, stop: threading.Event) -> None:
        member = fleet.member("node-1")
        transport = fleet.transport([member])
        ask(transport, ["node-1"])
        assert transport.receive(0.5) == []
        assert transport.away == {"node-1"}
        listen(fleet, member, own_number, stop)
        assert len(receive_all(transport, 1)) == 1
        transport.close()

    def test_a_node_that_dies_with_an_offer_gets_it_again(self, fleet: Fleet, stop: threading.Event) -> None:
        member = fleet.member("node-1")
        transport = fleet.transport([member])
        with FleetConnection(fleet.address, member.tls, member.flower) as connection:
            ask(transport, ["node-1"])
            transport.receive(0.2)
            assert connection.receive(10) is not None  # and forgets it
        listen(fleet, member, own_number, stop)
        [reply] = receive_all(transport, 1)
        assert reply.metadata.src_node_id == 2
        transport.close()

    def test_a_node_that_was_killed_comes_back_at_once(self, fleet: Fleet, stop: threading.Event) -> None:
        """Flower would keep its place for a minute, and give the offer to the request that nobody waits for."""
        member = fleet.member("node-1")
        dead = FleetConnection(fleet.address, member.tls, member.flower)
        dead.__enter__()
        stolen: list[Message] = []
        ghost = threading.Thread(target=lambda: stolen.extend(filter(None, [dead.receive(20)])))
        ghost.start()
        time.sleep(0.5)  # its request waits at the door
        begun = time.monotonic()
        listen(fleet, member, own_number, stop)
        transport = fleet.transport([member])
        ask(transport, ["node-1"])
        assert len(receive_all(transport, 1)) == 1
        assert time.monotonic() - begun < 10
        ghost.join(15)
        assert stolen == []
        transport.close()

    def test_a_superlink_that_is_killed_in_a_round_loses_nothing(self, fleet: Fleet, stop: threading.Event) -> None:
        members = [fleet.member(f"node-{index}") for index in (1, 2)]
        held = threading.Event()

        def slow(message: Message) -> Message:
            held.wait(20)
            return own_number(message)

        listen(fleet, members[0], slow, stop)
        listen(fleet, members[1], own_number, stop)
        transport = fleet.transport(members)
        ask(transport, ["node-1", "node-2"])
        first = receive_all(transport, 1)
        fleet.kill()
        fleet.start()
        held.set()
        replies = first + receive_all(transport, 1)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3]
        assert not any(reply.has_error() for reply in replies)
        transport.close()

    def test_a_stop_is_noticed_while_waiting(self, fleet: Fleet) -> None:
        def check() -> None:
            raise RunStoppedError("by hand")

        transport = fleet.transport([fleet.member("node-1")], check=check)
        ask(transport, ["node-1"])
        with pytest.raises(RunStoppedError):
            transport.receive(60)
        transport.close()

    def test_many_replies_wait_on_the_disk_and_leave_it(self, fleet: Fleet, stop: threading.Event) -> None:
        members = [fleet.member(f"node-{index}") for index in range(1, 6)]
        for member in members:
            listen(fleet, member, own_number, stop)
        transport = fleet.transport(members)
        ask(transport, [member.name for member in members])
        assert len(receive_all(transport, 5)) == 5
        transport.close()
        time.sleep(0.5)
        assert not list((fleet.folder / "spool").iterdir())


def flower_headers(member: FleetMember, key: Any = None, age_s: float = 0) -> dict[str, str]:
    """Flower's second factor, by this member's key or another one."""
    signed_at = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)).isoformat()
    return {
        "flwr-public-key": base64.b64encode(member.row.flower_key).decode(),
        "flwr-timestamp": signed_at,
        "flwr-signature": base64.b64encode(sign_message(key or member.flower, signed_at.encode())).decode(),
    }


def post(fleet: Fleet, tls: ssl.SSLContext, path: str, body: bytes = b"", headers: Any = None) -> httpx.Response:
    with httpx.Client(verify=tls) as client:
        return client.post(f"https://{fleet.address}{path}", content=body, headers=headers or {})


class TestStrangers:
    def test_a_caller_with_only_the_ca_certificate_is_refused_by_tls(self, fleet: Fleet) -> None:
        with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
            post(fleet, fleet.authority.client_context(), "/v1/fleet/activate-node")

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/control/start-run",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/runtime/push-messages",
            "/v1/runtime/pull-messages",
            "/v1/fleet/register-node",
            "/v1/fleet/get-fab",
            "/v1/fleet/../runtime/pull-messages",
            "/rooms/open",
            "/rooms/nodes",
            "/docs",
            "/openapi.json",
            "/",
        ],
    )
    def test_a_node_reaches_fleet_calls_only(self, fleet: Fleet, path: str) -> None:
        member = fleet.member("node-1")
        assert post(fleet, member.tls, path, headers=flower_headers(member)).status_code == 403
        with httpx.Client(verify=member.tls) as client:
            assert client.get(f"https://{fleet.address}{path}").status_code == 403
        assert {who for who, _, _ in fleet.refusals} == {member.row.spiffe}

    def test_a_revoked_node_is_refused_within_two_seconds(self, fleet: Fleet) -> None:
        member = fleet.member("node-1")
        with FleetConnection(fleet.address, member.tls, member.flower) as connection:
            assert connection.receive(0.1) is None
            del fleet.nodes[member.row.spiffe]
            fleet.write_nodes()
            time.sleep(2)
            with pytest.raises(NotAllowedError):
                connection.receive(0.1)
        with pytest.raises(NotAllowedError), FleetConnection(fleet.address, member.tls, member.flower):
            pass
        assert fleet.refusals[0][0] == member.row.spiffe

    def test_a_node_with_another_nodes_flower_key_is_refused(self, fleet: Fleet) -> None:
        one, other = fleet.member("node-1"), fleet.member("node-2")
        with (
            pytest.raises(NotAllowedError, match="another node"),
            FleetConnection(fleet.address, one.tls, other.flower),
        ):
            pass

    def test_a_certificate_of_the_right_name_with_a_new_key_is_refused(self, fleet: Fleet) -> None:
        member = fleet.member("node-1")
        forged, _ = fleet._context("node-1", member.row.spiffe)
        with pytest.raises(NotAllowedError), FleetConnection(fleet.address, forged, member.flower):
            pass

    def test_a_public_key_without_its_signature_is_refused(self, fleet: Fleet) -> None:
        one, other = fleet.member("node-1"), fleet.member("node-2")
        body = ActivateNodeRequest(public_key=one.row.flower_key, heartbeat_interval=30).SerializeToString()
        headers = flower_headers(one, key=other.flower)
        assert post(fleet, one.tls, "/v1/fleet/activate-node", body, headers).status_code == 403

    def test_a_captured_request_is_refused_later_and_from_others(self, fleet: Fleet) -> None:
        one, other = fleet.member("node-1"), fleet.member("node-2")
        body = ActivateNodeRequest(public_key=one.row.flower_key, heartbeat_interval=30).SerializeToString()
        fresh, old = flower_headers(one), flower_headers(one, age_s=900)
        assert post(fleet, one.tls, "/v1/fleet/activate-node", body, old).status_code == 403
        assert post(fleet, other.tls, "/v1/fleet/activate-node", body, fresh).status_code == 403
        assert post(fleet, one.tls, "/v1/fleet/activate-node", body, fresh).status_code == 200

    def test_a_node_cannot_pull_or_reply_in_another_nodes_name(self, fleet: Fleet, stop: threading.Event) -> None:
        one, other = fleet.member("node-1"), fleet.member("node-2")
        transport = fleet.transport([one, other])
        with FleetConnection(fleet.address, other.tls, other.flower) as connection:
            ask(transport, ["node-1", "node-2"])
            victim = connection._node
            assert victim is not None
            body = PullMessagesRequest(node=victim).SerializeToString()
            assert post(fleet, one.tls, "/v1/fleet/pull-messages", body, flower_headers(one)).status_code == 403
            forged = PushMessagesRequest(node=Node(node_id=1))
            forged.messages_list.add().metadata.src_node_id = victim.node_id
            refused = post(fleet, one.tls, "/v1/fleet/push-messages", forged.SerializeToString(), flower_headers(one))
            assert refused.status_code == 403
            assert connection.receive(5) is not None
        transport.close()

    def test_a_flood_of_bytes_is_refused(self, fleet: Fleet) -> None:
        member = fleet.member("node-1")
        chunk = PushObjectRequest(object_content=bytes(1 << 20)).SerializeToString()
        assert post(fleet, member.tls, "/v1/fleet/push-object", chunk, flower_headers(member)).status_code == 403
        huge = bytes(7 << 20)
        assert post(fleet, member.tls, "/v1/fleet/pull-messages", huge, flower_headers(member)).status_code == 413

    def test_nonsense_is_answered_and_nothing_breaks(self, fleet: Fleet, stop: threading.Event) -> None:
        member = fleet.member("node-1")
        for path in ("activate-node", "pull-messages", "push-messages", "push-object", "pull-object"):
            answered = post(fleet, member.tls, f"/v1/fleet/{path}", b"\xff" * 50, flower_headers(member))
            assert 400 <= answered.status_code < 500
        listen(fleet, member, own_number, stop)
        transport = fleet.transport([member])
        ask(transport, ["node-1"])
        assert len(receive_all(transport, 1)) == 1
        transport.close()


class TestHostileReplies:
    def reply_with(self, fleet: Fleet, change: Any) -> tuple[Message, list[tuple[str, str]]]:
        """What the driver sees of a reply that `change(member, message)` made, and what was noted."""
        noted: list[tuple[str, str]] = []
        member = fleet.member("node-1")
        transport = fleet.transport([member], refused=lambda *each: noted.append(each))
        with FleetConnection(fleet.address, member.tls, member.flower) as connection:
            ask(transport, ["node-1"])
            message = None
            while message is None:
                transport.receive(0.1)
                message = connection.receive(1)
            connection.reply(change(member, message))
            [reply] = receive_all(transport, 1)
        transport.close()
        return reply, noted

    def test_an_unsigned_reply_is_refused_by_name(self, fleet: Fleet) -> None:
        reply, noted = self.reply_with(fleet, lambda member, message: own_number(message))
        assert reply.has_error()
        assert noted == [("node-1", "the reply is not signed")]

    def test_a_reply_signed_by_another_key_is_refused(self, fleet: Fleet) -> None:
        def change(member: FleetMember, message: Message) -> Message:
            reply = own_number(message)
            sign_reply(reply, Ed25519PrivateKey.generate())
            return reply

        reply, noted = self.reply_with(fleet, change)
        assert reply.has_error()
        assert "wrong" in noted[0][1]

    def test_a_reply_changed_after_signing_is_refused(self, fleet: Fleet) -> None:
        def change(member: FleetMember, message: Message) -> Message:
            reply = own_number(message)
            sign_reply(reply, member.identity)
            array = reply.content.array_records["blocks"]["delta"]
            array.data = bytes(len(array.data))
            return reply

        reply, _ = self.reply_with(fleet, change)
        assert reply.has_error()

    def test_a_decline_arrives_as_one(self, fleet: Fleet) -> None:
        from concord_shared.messages import decline

        reply, noted = self.reply_with(fleet, lambda member, message: decline(message, "not today"))
        assert reply.error.reason == "not today"
        assert noted == []

    def test_an_array_that_names_one_chunk_a_million_times_allocates_nothing(self) -> None:
        from concord_shared.flower_objects import put_together

        chunk = b"ArrayChunk  4\x00abcd"
        body = b'{"dtype":"int32","shape":[1],"stype":"x","arraychunk_ids":[' + b",".join([b"0"] * 1_000_000) + b"]}"
        array = b"Array " + b"c" * 64 + b" " + str(len(body)).encode() + b"\x00" + body
        with pytest.raises(DocumentRefusedError, match="larger"):
            put_together("a" * 64, {"c" * 64: chunk, "a" * 64: array}, 1 << 20)
