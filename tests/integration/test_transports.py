"""One conformance class over every transport, and real replies made hostile on their way."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message

from concord_local.transports import WorkerTask, WorkerTransport, _serve
from concord_shared.messages import RING, Offer, model_record, offer_message
from concord_shared.models import new_vector
from concord_shared.tensors import model_digest
from concord_shared.transport import Transport
from federations import Relay, driver, federation, run, small_plan, transport

KINDS = ["in-process", "workers"]
PLAN = small_plan()


def offers(node_names: list[str], kind: str = "evaluate") -> list[Message]:
    """Offers of round 1 to nodes, by name, all with one model."""
    layout, theta = new_vector(PLAN)
    record = model_record(theta, {})
    made = []
    for name in node_names:
        offer = Offer(
            run="test",
            kind=kind,  # type: ignore[arg-type]
            round_number=1,
            attempt=1,
            node=name,
            plan_digest=PLAN.digest,
            model_digest=model_digest(layout, theta),
            layout_digest=layout.digest,
            nodes_max=5,
            rows_max=4096,
            preprocessing=_unfitted(),
        )
        made.append(offer_message(offer, record, int(name[-1]) + 1, time.time()))
    return made


def _unfitted() -> str:
    import json

    from concord_shared.preprocessing import unfitted

    return json.dumps(unfitted(PLAN).document())


def receive_all(carried: Transport, count: int, timeout_s: float = 60) -> list[Message]:
    replies: list[Message] = []
    until = time.monotonic() + timeout_s
    while len(replies) < count and time.monotonic() < until:
        replies += carried.receive(0.2)
    return replies


class TestConformance:
    """What every transport must do; more of them in subclasses."""

    @pytest.fixture(params=KINDS)
    def carried(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        made = transport(request.param, PLAN, federation(PLAN), tmp_path)
        yield made
        made.close()

    def test_brings_one_reply_for_each_request_from_the_node_that_was_asked(self, carried: Transport) -> None:
        names = [f"node-{i}" for i in range(1, 6)]
        carried.send(offers(names))
        replies = receive_all(carried, 5)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3, 4, 5, 6]
        for reply in replies:
            assert reply.content.config_records["binding"]["node"] == f"node-{reply.metadata.src_node_id - 1}"

    def test_reply_names_the_request(self, carried: Transport) -> None:
        [message] = offers(["node-2"])
        carried.send([message])
        [reply] = receive_all(carried, 1)
        assert reply.metadata.reply_to_message_id == message.metadata.message_id

    def test_receive_returns_empty_after_the_timeout_when_nothing_was_asked(self, carried: Transport) -> None:
        started = time.monotonic()
        assert carried.receive(0.2) == []
        assert 0.1 < time.monotonic() - started < 5

    def test_accepts_more_requests_while_some_are_unanswered(self, carried: Transport) -> None:
        carried.send(offers(["node-1", "node-2"]))
        carried.send(offers(["node-3", "node-4", "node-5"], kind="train"))
        assert len(receive_all(carried, 5)) == 5

    def test_a_node_that_refuses_answers_with_an_error(self, carried: Transport) -> None:
        [message] = offers(["node-1"])
        message.content.config_records["offer"]["plan_digest"] = "0" * 64
        carried.send([message])
        [reply] = receive_all(carried, 1)
        assert reply.has_error()
        assert "ConsentRefusedError" in (reply.error.reason or "")

    def test_a_model_that_is_not_the_named_one_is_refused_by_the_node(self, carried: Transport) -> None:
        [message] = offers(["node-1"])
        message.content.config_records["offer"]["model_digest"] = "0" * 64
        carried.send([message])
        [reply] = receive_all(carried, 1)
        assert "not the one that the offer names" in (reply.error.reason or "")

    def test_close_twice(self, carried: Transport) -> None:
        carried.close()
        carried.close()


def test_a_worker_that_dies_is_replaced_and_its_requests_are_asked_again(tmp_path: Path) -> None:
    carried = transport("workers", PLAN, federation(PLAN), tmp_path)
    assert isinstance(carried, WorkerTransport)
    try:
        before = carried.process_ids
        carried._workers[0].process.kill()
        carried._workers[0].process.join()
        carried.send(offers([f"node-{i}" for i in range(1, 6)]))
        replies = receive_all(carried, 5)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3, 4, 5, 6]
        assert not any(reply.has_error() for reply in replies)
        assert set(carried.process_ids) != set(before)
        carried.send(offers(["node-1", "node-2"]))
        assert all(not reply.has_error() for reply in receive_all(carried, 2))
    finally:
        carried.close()


# Each hostile change of a real reply of one node: the round goes on without it, by name and reason.


def test_a_worker_whose_parent_is_gone_before_it_is_ready_ends_without_a_word(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    task = WorkerTask(small_plan().document(), tmp_path / "gone", tmp_path, "cpu", None, None)
    process = context.Process(target=_serve, args=(theirs, task))
    process.start()
    ours.close()
    theirs.close()
    process.join(60)
    assert process.exitcode == 0


def test_a_worker_whose_answer_nobody_reads_ends_without_a_word(tmp_path: Path) -> None:
    """An interrupt may come between an answer and its reading: the pipe is then reset, not at its end."""
    nodes = federation(PLAN, 2).share(tmp_path / "shared")
    assert nodes.directory is not None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    task = WorkerTask(PLAN.document(), nodes.directory, tmp_path, "cpu", None, None)
    process = context.Process(target=_serve, args=(theirs, task))
    process.start()
    theirs.close()
    assert ours.recv() is None, "it is ready"
    ours.send((offers(["node-1"])[0], None))
    assert ours.poll(60), "its answer is there"
    ours.close()
    process.join(60)
    assert process.exitcode == 0


def _replace_delta(message: Message, array: Array) -> None:
    message.content.array_records["blocks"]["delta"] = array


def _delta(message: Message) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(message.content.array_records["blocks"]["delta"].data, "<i4").copy()


def _lanes(message: Message, index: int, value: int) -> None:
    blocks = message.content.array_records["blocks"]
    lanes = np.frombuffer(blocks["lanes"].data, "<i8").copy()
    lanes[index] = value
    blocks["lanes"] = Array("int64", (4,), RING, lanes.tobytes())


def nan_floats(message: Message) -> None:
    _replace_delta(message, Array("float32", (650,), RING, np.full(650, np.nan, "<f4").tobytes()))


def broadcastable(message: Message) -> None:
    _replace_delta(message, Array("int32", (1,), RING, np.ones(1, "<i4").tobytes()))


def too_few_bytes(message: Message) -> None:
    _replace_delta(message, Array("int32", (650,), RING, b"\0" * 16))


def huge_shape(message: Message) -> None:
    _replace_delta(message, Array("int32", (1 << 50,), RING, b"\0" * 16))


def numpy_format(message: Message) -> None:
    _replace_delta(message, Array(np.ones(650, np.int32)))


def above_norm(message: Message) -> None:
    _replace_delta(message, Array("int32", (650,), RING, np.full(650, 1 << 23, "<i4").tobytes()))


def above_levels(message: Message) -> None:
    delta = _delta(message)
    delta[0] = (1 << 31) - 1
    _replace_delta(message, Array("int32", (650,), RING, delta.tobytes()))


def other_round(message: Message) -> None:
    message.content.config_records["binding"]["round_number"] = 2


def other_node(message: Message) -> None:
    message.content.config_records["binding"]["node"] = "node-1"


def other_plan(message: Message) -> None:
    message.content.config_records["binding"]["plan_digest"] = "0" * 64


def no_binding(message: Message) -> None:
    del message.content["binding"]


def extra_block(message: Message) -> None:
    message.content.array_records["blocks"]["backdoor"] = Array("int32", (1,), RING, b"\0" * 4)


def no_blocks(message: Message) -> None:
    message.content["blocks"] = ArrayRecord()


def heavy(message: Message) -> None:
    _lanes(message, 0, 1 << 40)


def weightless(message: Message) -> None:
    _lanes(message, 0, 0)


def negative_weight(message: Message) -> None:
    _lanes(message, 0, -5)


def counts_twice(message: Message) -> None:
    _lanes(message, 1, 2)


HOSTILE = {
    nan_floats: "layout",
    broadcastable: "layout",
    too_few_bytes: "layout",
    huge_shape: "layout",
    numpy_format: "layout",
    above_norm: "bound",
    above_levels: "bound",
    other_round: "foreign",
    other_node: "foreign",
    other_plan: "foreign",
    no_binding: "foreign",
    extra_block: "layout",
    no_blocks: "layout",
    heavy: "weight",
    weightless: "weight",
    negative_weight: "weight",
    counts_twice: "weight",
}


class Tampering(Relay):
    """Changes the training replies of node-3 on their way."""

    def __init__(self, inner: Transport, change: Callable[[Message], None]) -> None:
        super().__init__(inner)
        self._change = change

    def receive(self, timeout_s: float) -> list[Message]:
        replies = self.inner.receive(timeout_s)
        for reply in replies:
            if reply.metadata.src_node_id == 4 and reply.metadata.message_type == "train" and not reply.has_error():
                self._change(reply)
        return replies


@pytest.fixture(scope="module")
def without_node_3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of one round whose node-3 simply vanished."""

    class Lossy(Relay):
        def receive(self, timeout_s: float) -> list[Message]:
            replies = self.inner.receive(timeout_s)
            return [r for r in replies if (r.metadata.src_node_id, r.metadata.message_type) != (4, "train")]

    plan = small_plan("rounds.count=1", "rounds.grace_s=0.2")
    return run(plan, tmp_path_factory.mktemp("lossy"), wrap=Lossy)[0].model_digest


@pytest.fixture(scope="module", params=KINDS)
def shared_transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same nodes for all refusals."""
    plan = small_plan("rounds.count=1")
    made = transport(request.param, plan, federation(plan), tmp_path_factory.mktemp("transport"))
    yield made
    made.close()


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_hostile_reply_is_refused_and_the_round_goes_on(
    change: Callable[[Message], None], shared_transport: Transport, without_node_3: str, tmp_path: Path
) -> None:
    plan = small_plan("rounds.count=1")
    records: list[Any] = []
    carried = Tampering(shared_transport, change)
    result = driver(plan, federation(plan), carried, tmp_path, observer=records.append).run()
    assert records[0]["survivors"] == ["node-1", "node-2", "node-4", "node-5"]
    assert records[0]["failures"]["node-3"].startswith(HOSTILE[change])
    assert result.model_digest == without_node_3


def test_a_second_copy_of_a_reply_is_not_summed(tmp_path: Path) -> None:
    class Doubling(Relay):
        def receive(self, timeout_s: float) -> list[Message]:
            return [copy for reply in self.inner.receive(timeout_s) for copy in (reply, reply)]

    honest, _ = run(PLAN, tmp_path / "once")
    doubled, _ = run(PLAN, tmp_path / "twice", wrap=Doubling)
    assert doubled.model_digest == honest.model_digest


def test_a_reply_of_the_round_before_is_not_counted(tmp_path: Path) -> None:
    class Replaying(Relay):
        """node-3 answers round 2 and later with its reply to round 1."""

        old: Message | None = None

        def receive(self, timeout_s: float) -> list[Message]:
            replies = self.inner.receive(timeout_s)
            for index, reply in enumerate(replies):
                if reply.metadata.src_node_id == 4 and reply.metadata.message_type == "train":
                    self.old = self.old or reply
                    replies[index] = self.old
            return replies

    _, records = run(small_plan("rounds.grace_s=0.2"), tmp_path, wrap=Replaying)
    trained = [record for record in records if record["kind"] == "train"]
    assert "node-3" in trained[0]["survivors"]
    assert [record["late"] for record in trained[1:]] == [["node-3"], ["node-3"]]
    assert all("node-3" in record["silent"] for record in trained[1:])
