import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from concord_client.data import NodeDataset, Split
from concord_client.devices import OWN_THREADS, choose_device
from concord_client.fixed_update import FixedUpdate
from concord_client.node import Node
from concord_client.packing import pack, read_packed, unpack, write_packed
from concord_client.training_desk import Desk, limit_memory, serve
from concord_client.training_job import Job, NodeStoppingError, Resources, TrainingFailedError, watch
from concord_client.training_process import TrainingProcess
from concord_local.deployment import descendants
from concord_local.nodes import NodeHost
from concord_server.replies import Expectation, accept_reply
from concord_shared.blocks import LANES, decode_means
from concord_shared.errors import ConsentRefusedError, DataError, UsageError
from concord_shared.fitting import fit_locally
from concord_shared.messages import RAW, array_of, read_offer
from concord_shared.models import new_vector
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.strategies import strategy_for
from concord_shared.transport import NodeEntry
from federations import federation

from .rounds_kit import NODE, Site, alive, bytes_of_reply, make_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def process() -> Iterator[TrainingProcess]:
    """One for all tests that don't end it: it imports torch once, which is what it is for."""
    made = TrainingProcess()
    yield made
    made.close()


def blocks_of(reply: Any) -> dict[str, bytes]:
    return {name: array.data for name, array in reply.content.array_records["blocks"].items()}


def hang(connection: "Connection[Any, Any]", parent: int) -> None:
    connection.send_bytes(b'{"buffers": 0}')
    time.sleep(3600)


def refuse(connection: "Connection[Any, Any]", parent: int) -> None:
    connection.send_bytes(b'{"buffers": 0}')
    while True:
        try:
            for _ in range(2):  # a header, and the model
                connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(
            b'{"buffers": 0, "outcome": "failed", "kind": "ConsentRefusedError", "reason": "as asked", "detail": ""}'
        )


def die(connection: "Connection[Any, Any]", parent: int) -> None:
    connection.send_bytes(b'{"buffers": 0}')
    connection.recv_bytes()
    os._exit(7)


def die_once(connection: "Connection[Any, Any]", parent: int) -> None:
    """Ends by itself at its first request; its successor answers."""
    mark = Path(os.environ["CONCORD_TEST_DIED"])
    if mark.exists():
        refuse(connection, parent)
    mark.touch()
    die(connection, parent)


class TestPacking:
    def test_a_content_comes_back_as_it_was(self, tmp_path: Path) -> None:
        content = RecordDict(
            {
                "blocks": ArrayRecord({"a": array_of(np.arange(6, dtype=np.float32).reshape(2, 3), RAW)}),
                "binding": ConfigRecord({"run": "köln", "attempt": 3, "bytes": b"\x00\xff", "yes": True, "real": 0.1}),
            }
        )
        header, buffers = pack(content)
        write_packed(tmp_path / "reply", {**header, "more": 1}, buffers)
        assert read_packed(tmp_path / "reply", lambda header: header["more"] == 2) is None
        found = read_packed(tmp_path / "reply", lambda header: header["more"] == 1)
        assert found is not None
        assert found[0].pop("more") == 1
        for again in (unpack(json.loads(json.dumps(header)), buffers), unpack(*found)):
            assert again.config_records["binding"] == content.config_records["binding"]
            assert again.array_records["blocks"]["a"].data == content.array_records["blocks"]["a"].data
            assert again.array_records["blocks"]["a"].shape == (2, 3)

    @pytest.mark.parametrize("cut", [0, 3, 12, 40])
    def test_a_torn_file_is_no_file(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "reply"
        write_packed(path, {"config": {}, "arrays": []}, [])
        path.write_bytes(path.read_bytes()[:cut])
        assert read_packed(path, lambda header: True) is None


class TestAnswers:
    def test_the_same_bytes_as_the_node_of_a_simulation(self, site: Site, process: TrainingProcess) -> None:
        """The same plan, data and node name: what is simulated is what is deployed."""
        host = NodeHost(site.plan, federation(site.plan, 3), site.home.path / "simulated", "cpu")
        for kind in ("train", "evaluate"):
            message = site.message(kind=kind)
            deployed = process.respond(site.job(resources=Resources("cpu")), message, 120)
            assert blocks_of(deployed) == blocks_of(host.respond(message))

    def test_a_warm_process_is_used_again(self, site: Site, process: TrainingProcess) -> None:
        message = site.message()
        one = process.respond(site.job(), message, 120)
        first, begun = process.pid, time.monotonic()
        two = process.respond(site.job(), message, 120)
        assert process.pid == first
        assert time.monotonic() - begun < 5, "torch is imported already"
        assert blocks_of(one) == blocks_of(two)

    def test_an_idle_process_is_ended(self, site: Site) -> None:
        now = [0.0]
        process = TrainingProcess(idle_s=60, clock=lambda: now[0], target=refuse)
        try:
            with pytest.raises(ConsentRefusedError, match="as asked"):
                process.respond(site.job(), site.message(), 120)
            pid = process.pid
            assert pid is not None
            process.rest()
            assert process.pid == pid
            now[0] = 61
            process.rest()
            assert process.pid is None
            assert not alive(pid)
        finally:
            process.close()

    def test_the_node_refuses_what_is_not_the_plans(self, site: Site, process: TrainingProcess) -> None:
        theta = site.theta.copy()
        theta[0] += 1
        with pytest.raises(ConsentRefusedError, match="not the one that the offer names"):
            process.respond(site.job(), site.message(theta=theta), 120)
        assert blocks_of(process.respond(site.job(), site.message(), 120))

    def test_data_that_do_not_fit_are_a_data_error(self, site: Site, process: TrainingProcess) -> None:
        np.savez(site.data, x=np.zeros((4, 1, 9, 9), np.uint8), y=np.zeros(4, np.int64))
        with pytest.raises(DataError, match="does not fit"):
            process.respond(site.job(), site.message(), 120)

    def test_what_is_lent_is_kept_to(self, site: Site) -> None:
        """16 MB are too few for torch: the node survives it, and the next request finds a process without a limit."""
        process = TrainingProcess()
        try:
            with pytest.raises(TrainingFailedError, match=r"no memory left|died twice"):
                process.respond(site.job(resources=Resources("cpu", memory_mb=16)), site.message(), 120)
            assert process.pid is None
        finally:
            process.close()


class TestOwnersLimits:
    """What the owner lends is what the child takes: for each job anew, in a process that stays warm."""

    def test_threads_and_device_are_those_of_each_job(self, site: Site, tmp_path: Path) -> None:
        """A deterministic plan takes one thread; the next one takes again what it may."""
        free = parse_plan_document(site.plan.document() | {"training": training_of(site, deterministic=False)})
        process = TrainingProcess(target=tell)

        def told(plan: Plan, resources: Resources) -> str:
            with pytest.raises(ConsentRefusedError) as raised:
                process.respond(site.job(plan=plan, resources=resources), site.message(), 120)
            return str(raised.value)

        try:
            own = f"{OWN_THREADS} threads on cpu, NumPy {{1}}"
            assert told(free, Resources("cpu")) == own
            pid = process.pid
            assert told(site.plan, Resources("cpu", 3)) == "1 threads on cpu, NumPy {1}"
            assert told(free, Resources("cpu")) == own
            assert told(free, Resources("cpu", 3)) == "3 threads on cpu, NumPy {1}"
            assert told(free, Resources("cpu")) == own
            missing = next(name for name in ("mps", "cuda") if not there(name))
            with pytest.raises(UsageError, match=f"device '{missing}' is not available"):
                process.respond(site.job(resources=Resources(missing)), site.message(), 120)
            assert process.pid == pid, "all of it in one process"
        finally:
            process.close()

    def test_several_devices_train_together_and_one_that_dies_is_named(self, tmp_path: Path) -> None:
        site = make_site(tmp_path, "training.deterministic=false", "training.local_epochs=2")
        process, lent = TrainingProcess(), Resources(devices=("cpu", "cpu"))
        try:
            one = process.respond(site.job(), site.message(), 120)
            two = process.respond(site.job(resources=lent), site.message(), 120)
            moved, apart = (np.frombuffer(blocks_of(each)["delta"], np.int32).astype(float) for each in (one, two))
            assert np.abs(moved - apart).max() < 1e-3 * np.abs(moved).max()
            assert process.pid is not None
            rank = next(pid for pid in descendants(process.pid) if b"concord_client.ranks" in command_of(pid))
            os.kill(rank, signal.SIGKILL)
            with pytest.raises(TrainingFailedError, match=r"RankLostError: .*cpu \(exit code -9\)"):
                process.respond(site.job(resources=lent), site.message(), 120)
            assert blocks_of(process.respond(site.job(resources=lent), site.message(), 120))
            ranks = [pid for pid in descendants(process.pid) if b"concord_client.ranks" in command_of(pid)]
            os.kill(process.pid, signal.SIGKILL)
            until = time.monotonic() + 20
            while any(command_of(pid) for pid in ranks) and time.monotonic() < until:
                time.sleep(0.1)
            assert not any(command_of(pid) for pid in ranks), "they end with the process that began them"
        finally:
            process.close()
            site.store.close()

    def test_a_limit_that_cannot_be_kept_is_said_once(
        self, site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        note = limit_memory(512, "cuda")
        answer = ({"content": {"config": {}, "arrays": []}, "note": note}, [])
        process = TrainingProcess()
        monkeypatch.setattr(process, "_ask", lambda *_: answer)
        for _ in range(2):
            process.respond(site.job(resources=Resources("cuda", memory_mb=512)), site.message(), 120)
        assert caplog.text.count("memory_mb = 512 in policy.toml is not enforced") == 1

    @pytest.mark.parametrize(("system", "device"), [("darwin", "cpu"), ("linux", "cuda"), ("win32", "cpu")])
    def test_where_a_limit_of_memory_does_not_hold(
        self, system: str, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("concord_client.training_desk.sys.platform", system)
        assert f"this is {device} under {system}" in limit_memory(512, device)
        assert limit_memory(None, device) == ""


def tell(connection: "Connection[Any, Any]", parent: int) -> None:
    """A training process that says what it would train with. NumPy's sums need one thread, to be the same bits."""
    import torch
    from threadpoolctl import threadpool_info

    def respond(self: Node, message: Any) -> Any:
        numpy = {each["num_threads"] for each in threadpool_info() if each["internal_api"] == "openblas"} or {1}
        raise ConsentRefusedError(f"{torch.get_num_threads()} threads on {self.bench.device}, NumPy {numpy}")

    Node.respond = respond  # type: ignore[method-assign]
    serve(connection, parent)


def command_of(pid: int) -> bytes:
    """Empty where it ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def training_of(site: Site, **changes: Any) -> dict[str, Any]:
    return site.plan.training.model_dump(mode="json") | changes


def there(device: str) -> bool:
    try:
        return bool(choose_device(device))
    except UsageError:
        return False


class TestFailures:
    def test_a_hanging_process_is_killed_and_the_next_request_gets_a_new_one(self, site: Site) -> None:
        process = TrainingProcess(target=hang)
        begun = time.monotonic()
        with pytest.raises(TrainingFailedError, match="took longer than"):
            process.respond(site.job(), site.message(), 1.0)
        assert time.monotonic() - begun < 10
        assert process.pid is None
        process.target = refuse
        with pytest.raises(ConsentRefusedError, match="as asked"):
            process.respond(site.job(), site.message(), 120)
        process.close()

    def test_a_hanging_process_ends_where_its_approval_does(self, site: Site) -> None:
        """It cannot look itself; so the daemon does, and gives it a moment to end by itself."""
        process, job = TrainingProcess(target=hang, patience_s=0.2), site.job()
        threading.Timer(0.5, job.marker.touch).start()
        begun = time.monotonic()
        with pytest.raises(ConsentRefusedError, match="approval withdrawn"):
            process.respond(job, site.message(), 600)
        assert time.monotonic() - begun < 10
        assert process.pid is None
        process.close()

    def test_a_death_is_tried_again_once(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CONCORD_TEST_DIED", str(site.home.path / "died"))
        process = TrainingProcess(target=die_once)
        with pytest.raises(ConsentRefusedError, match="as asked"):
            process.respond(site.job(), site.message(), 120)
        process.close()

    def test_a_second_death_is_a_reason(self, site: Site) -> None:
        process = TrainingProcess(target=die)
        with pytest.raises(TrainingFailedError, match=r"died twice \(exit code 7\)"):
            process.respond(site.job(), site.message(), 60)
        process.close()

    def test_killed_from_outside_in_the_middle_of_training(self, tmp_path: Path) -> None:
        """As the system does where memory is short."""
        site = make_site(tmp_path, "training.local_epochs=30", "training.batch_size=1")
        process = TrainingProcess()
        with pytest.raises(ConsentRefusedError, match="the offer names"):  # warm now
            process.respond(site.job(), site.message(theta=site.theta + np.float32(1)), 120)
        first = process.pid
        assert first is not None
        threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
        assert blocks_of(process.respond(site.job(), site.message(), 120))
        assert process.pid != first
        process.close()
        site.store.close()

    def test_close_ends_what_goes_on(self, site: Site) -> None:
        process = TrainingProcess(target=hang)
        threading.Timer(1.0, process.close).start()
        begun = time.monotonic()
        with pytest.raises(NodeStoppingError):
            process.respond(site.job(), site.message(), 600)
        assert time.monotonic() - begun < 5
        with pytest.raises(NodeStoppingError):
            process.respond(site.job(), site.message(), 600)


class TestWithdrawal:
    def test_approval_withdrawn_in_the_middle_of_training_runs_no_further_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The marker appears after the third batch: the fourth never begins."""
        site = make_site(tmp_path, "training.local_epochs=5", "training.batch_size=8")
        batches = 0
        desk, job = Desk(os.getppid()), site.job(resources=Resources("cpu"))
        node = desk._node(job)
        inner = node.bench.task.loss

        def counted(*given: Any) -> Any:
            nonlocal batches
            batches += 1
            if batches == 3:
                job.marker.touch()
            return inner(*given)

        monkeypatch.setattr(node.bench.task, "loss", counted)
        message = site.message()
        header, buffers = pack(message.content)
        request = {"do": "respond", "job": job.document(), "type": "train", "content": header}
        with pytest.raises(ConsentRefusedError, match="approval withdrawn"):
            desk.answer((request, buffers))
        assert batches == 3
        site.store.close()

    def test_approval_withdrawn_in_the_middle_of_evaluation_runs_no_further_batch(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("concord_client.tasks.Task.rows_at_once", 16)
        batches = 0
        desk, job = Desk(os.getppid()), site.job(resources=Resources("cpu"))
        node = desk._node(job)
        inner = node.bench.task.sums

        def counted(*given: Any) -> Any:
            nonlocal batches
            batches += 1
            if batches == 2:
                job.marker.touch()
            return inner(*given)

        monkeypatch.setattr(node.bench.task, "sums", counted)
        header, buffers = pack(site.message(kind="evaluate").content)
        request = {"do": "respond", "job": job.document(), "type": "evaluate", "content": header}
        with pytest.raises(ConsentRefusedError, match="approval withdrawn"):
            desk.answer((request, buffers))
        assert batches == 2

    @pytest.mark.parametrize("kind", ["statistics", "evaluate", "train"])
    def test_approval_withdrawn_reads_no_rows_for_anything(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where there are no batches: statistics of columns, and the sums of least squares, which ask for rows."""
        site = make_site(tmp_path, "preprocessing.scope=federated", "preprocessing.standardise=true")
        node = Desk(os.getppid())._node(site.job(resources=Resources("cpu")))
        taken: list[Split] = []
        take = NodeDataset.take
        monkeypatch.setattr(NodeDataset, "take", lambda self, split: taken.append(split) or take(self, split))
        message = site.message(kind=kind, preprocessing=preprocessing_of(node))
        assert node.respond(message).has_content()
        assert taken
        taken.clear()

        def withdrawn() -> None:
            raise ConsentRefusedError("approval withdrawn")

        node.before_batch = withdrawn
        with pytest.raises(ConsentRefusedError, match="approval withdrawn"):
            node.respond(message)
        work, _ = node._work(read_offer(message), site.theta, {})
        with pytest.raises(ConsentRefusedError, match="approval withdrawn"):
            work.rows()
        assert not taken
        site.store.close()

    def test_approval_withdrawn_ends_a_running_process_of_training(
        self, tmp_path: Path, process: TrainingProcess
    ) -> None:
        site = make_site(tmp_path, "training.local_epochs=2000", "training.batch_size=1")
        with pytest.raises(ConsentRefusedError, match="the offer names"):  # warm now
            process.respond(site.job(), site.message(theta=site.theta + np.float32(1)), 120)
        threading.Timer(0.5, site.job().marker.touch).start()
        begun = time.monotonic()
        with pytest.raises(ConsentRefusedError, match="approval withdrawn"):
            process.respond(site.job(), site.message(), 300)
        assert time.monotonic() - begun < 15, "minutes of work were left"
        site.store.close()

    def test_an_approval_that_expires_ends_the_work(self, site: Site) -> None:
        with pytest.raises(ConsentRefusedError, match="expired"):
            watch(site.job(until=time.time() - 1), os.getppid())()

    def test_an_orphan_ends_its_work(self, site: Site) -> None:
        with pytest.raises(ConsentRefusedError, match="node was ended"):
            watch(site.job(), 1 << 30)()

    def test_a_marker_that_cannot_be_looked_for_counts_as_withdrawn(self, site: Site) -> None:
        site.home.withdrawn.rmdir()
        site.home.withdrawn.touch()
        with pytest.raises(OSError, match="Not a directory"):
            watch(site.job(), os.getppid())()


def preprocessing_of(node: Node) -> str:
    return json.dumps(fit_locally(node.bench.plan, node.dataset.take(Split.TRAIN)[0]).document())


class TestFixedUpdate:
    def test_a_fixed_update_passes_the_coordinators_door(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """One step in the node's coordinate, nothing elsewhere: a sum shows who was counted, and how often."""
        message = site.message()
        reply = FixedUpdate(3).respond(site.job(), message, 1)
        assert "DOES NOT TRAIN" in caplog.text
        layout, _ = new_vector(site.plan)
        blocks = (*strategy_for(site.plan).blocks(site.plan, layout), LANES)
        cap, entry = site.plan.rounds.weight_cap, NodeEntry(NODE, 2, 480, 120)
        accepted = accept_reply(reply, Expectation(read_offer(message), entry, blocks, cap, site.plan.data))
        delta = decode_means(blocks[:1], accepted, 3, cap)["delta"]
        assert delta[3] == pytest.approx(2.0**-7, rel=1e-4)
        assert np.count_nonzero(delta) == 1


def test_a_job_survives_the_pipe(site: Site) -> None:
    job = site.job(resources=Resources("cpu", 2, 512))
    assert Job.of(json.loads(json.dumps(job.document()))) == job


def test_the_daemon_imports_no_torch_and_no_reader_of_data() -> None:
    code = """
import sys
import concord_client.daemon, concord_client.rounds, concord_client.doctor, concord_client.models
heavy = {"torch", "opacus", "dp_accounting", "polars", "sklearn", "pyarrow", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_answer_keeps_its_receiver(site: Site, process: TrainingProcess) -> None:
    message = site.message()
    reply = process.respond(site.job(), message, 120)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert bytes_of_reply(reply)
