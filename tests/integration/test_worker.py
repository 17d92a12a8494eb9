"""A worker and its disk: what makes a run wait, what ends it, what it starts from, what it tells of it, and who goes on
when the worker is told to end.
"""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workers
from sqlalchemy import update
from sqlmodel import col, select
from typer.testing import CliRunner
from workers import LINK, PLAN, Wards, begin, ended, report, work
from worlds import World

from concord_server.commands import runs as commands
from concord_server.commands.watching import state_lines
from concord_server.database import utc_now
from concord_server.models.tables import ModelVersion
from concord_server.runs import logs
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Run
from concord_server.worker import task
from concord_server.worker.loop import Worker
from concord_shared.errors import RunStoppedError
from concord_shared.tensors import read_safetensors, write_safetensors

log = logging.getLogger("concord_server.tests")
FULL = "space on the coordinator's disk"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    """A coordinator, and the model with which every undisturbed run of the plan ends."""
    made = World(tmp_path_factory.mktemp("worker") / "coordinator")
    made.ready()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "FlowerTransport", Wards)
        patch.setattr(Wards, "states", tmp_path_factory.mktemp("nodes"))
        begin(made, "undisturbed")
        work(made, "undisturbed")
        yield made, model_of(made, "undisturbed")
    made.close()


@pytest.fixture
def world(whole: tuple[World, str]) -> Iterator[World]:
    yield whole[0]
    with whole[0].coordinator.database.session() as session:  # no run is left to the next test
        session.execute(update(Run).where(col(Run.state).not_in(ENDED)).values(state="failed"))


@pytest.fixture
def digest(whole: tuple[World, str]) -> str:
    return whole[1]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A name of its own for each test's run."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture
def last_model(world: World) -> Iterator[Path]:
    """The file of the undisturbed run's model, for a test to do harm to."""
    path = world.coordinator.home.path / versions(world, "undisturbed")[-1].path
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def model_of(world: World, run: str) -> str:
    found = ended(world, run)
    assert found["state"] == "succeeded", found["reason"]
    return str(found["summary"]["model_digest"])


def let_go_after(world: World, run: str, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Works on it for so many steps, as a worker that is drained."""

    def drain(transport: Wards, asked: int) -> None:
        if asked > steps:
            raise task.Drained("a test")

    with monkeypatch.context() as patch:
        patch.setattr(Wards, "after", drain)
        work(world, run, "worker-0")
    found = report(world, run)
    assert (found["state"], found["steps"]) == ("running", steps)


def versions(world: World, run: str) -> list[ModelVersion]:
    with world.coordinator.database.reading() as session:
        return list(session.exec(select(ModelVersion).where(ModelVersion.run == run).order_by(ModelVersion.round)))


def flip(path: Path) -> None:
    """One bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


Harm = Callable[[Path], Any]
DAMAGE: dict[str, tuple[Harm, str]] = {
    "missing": (Path.unlink, "is missing"),
    "one bit": (flip, "is damaged"),
    "half a file": (cut, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
}


@pytest.mark.parametrize(("harm", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_ends_the_run(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch, harm: Harm, words: str
) -> None:
    begin(world, run)
    let_go_after(world, run, monkeypatch, 2)
    harm(world.coordinator.home.runs / run / "round-1.safetensors")
    work(world, run)
    found = ended(world, run)
    assert found["state"] == "failed"
    assert f"the checkpoint of this run {words} at the coordinator (runs/{run}/round-1" in found["reason"]
    assert f"concord model list --run {run}" in found["reason"], "what a person can do"


def fails(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    """The disk refuses with this errno from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    mkdir, write_model = Path.mkdir, task.write_model

    def make(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent.parent.name == "models":
            refuse()
        mkdir(path, *arguments, **options)

    def write(*arguments: Any) -> None:
        monkeypatch.setattr("os.fsync", refuse)
        write_model(*arguments)

    match where:
        case "checkpoint":
            monkeypatch.setattr("os.fsync", refuse)
        case "model":
            monkeypatch.setattr(task, "write_model", write)
        case "model's folder":
            monkeypatch.setattr(Path, "mkdir", make)
        case "model's digest":
            monkeypatch.setattr(task, "file_digest", refuse)


@pytest.mark.parametrize("where", ["checkpoint", "model", "model's folder", "model's digest"])
def test_a_run_waits_for_a_full_disk_says_so_and_goes_on(
    world: World, run: str, digest: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    begin(world, run)
    since = []
    with monkeypatch.context() as patch:
        fails(patch, where, errno.ENOSPC)
        for owner in ("worker-1", "worker-2"):
            assert work(world, run, owner).troubled
            found = report(world, run)
            assert (found["state"], found["reason"]) == ("running", "")
            assert [each["what"] for each in found["waiting_for"]] == [FULL]
            since.append(found["waiting_for"][0]["since"])
            assert state_lines(found, since[0] + 180)[1] == f"all: {FULL}, since 3 min"
            patch.setattr(task, "utc_now", lambda: utc_now() + timedelta(minutes=1))
    assert since[0] == since[1], "it is one wait"
    work(world, run)
    assert model_of(world, run) == digest


def test_a_run_that_waits_for_the_disk_can_be_stopped(world: World, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(world, run)
    fails(monkeypatch, "model's folder", errno.ENOSPC)
    work(world, run)
    assert report(world, run)["waiting_for"]
    world.api("lab").post(f"/api/v1/runs/{run}/stop")
    work(world, run)
    assert (ended(world, run)["state"], ended(world, run)["reason"]) == ("stopped", "stopped by people-of-lab")


@pytest.mark.parametrize(
    ("number", "state", "words"),
    [
        (errno.EDQUOT, "running", FULL),
        (errno.EIO, "running", "the coordinator's disk (Input/output error)"),
        (errno.EACCES, "failed", "Permission denied"),
        (errno.ENAMETOOLONG, "failed", "File name too long"),
    ],
)
def test_only_what_can_be_mended_is_waited_for(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch, number: int, state: str, words: str
) -> None:
    begin(world, run)
    fails(monkeypatch, "model's folder", number)
    work(world, run)
    found = report(world, run)
    assert found["state"] == state
    assert words in ([each["what"] for each in found["waiting_for"]] or found["reason"])


@pytest.mark.parametrize("version", [1, 2], ids=["of a round", "of the end"])
def test_a_run_starts_from_exactly_the_tensors_of_an_earlier_model(
    world: World, run: str, digest: str, version: int
) -> None:
    chosen = versions(world, "undisturbed")[version - 1]
    assert (chosen.round, chosen.final, chosen.digest == digest) == (version, version == 2, version == 2)
    tensors, _ = read_safetensors(world.coordinator.home.path / chosen.path)
    layout = task.new_vector(PLAN)[0]
    theta = tensors["theta"] if version == 1 else layout.join(tensors)
    begin(world, run, start_model=chosen.digest)
    work(world, run)
    assert Wards.started_with is not None
    assert Wards.started_with[0] == chosen.digest
    assert np.array_equal(Wards.started_with[1], theta)
    assert model_of(world, run) not in (digest, chosen.digest)


def replace_tensors(path: Path) -> None:
    """A sound file, but of another model."""
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, {name: tensor + 1 for name, tensor in tensors.items()}, metadata)


def remove_tensor(path: Path) -> None:
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, dict(list(tensors.items())[1:]), metadata)


DAMAGE_OF_START = DAMAGE | {
    "another model": (replace_tensors, "is damaged"),
    "a tensor less": (remove_tensor, "is damaged"),
}


@pytest.mark.parametrize(("harm", "words"), DAMAGE_OF_START.values(), ids=DAMAGE_OF_START)
def test_a_damaged_model_to_start_from_is_refused(
    world: World, run: str, digest: str, last_model: Path, harm: Harm, words: str
) -> None:
    harm(last_model)
    begin(world, run, start_model=digest)
    work(world, run)
    found = ended(world, run)
    assert (found["state"], found["steps"]) == ("failed", 0)
    assert f"model {digest}, to start from, {words} at the coordinator (models/{digest}/" in found["reason"]
    assert "restore it from a backup and start the run again" in found["reason"]


def test_a_model_to_start_from_that_was_tidied_away_is_not_replaced_by_the_seeded_one(
    world: World, run: str, digest: str
) -> None:
    begin(world, run, start_model=digest)
    tidied = {}
    with world.coordinator.database.session() as session:
        for row in session.exec(select(ModelVersion)):
            tidied[row.id], row.path = row.path, ""
    work(world, run)
    with world.coordinator.database.session() as session:
        for row in session.exec(select(ModelVersion)):
            row.path = tidied[row.id]
    found = ended(world, run)
    assert (found["state"], found["steps"]) == ("failed", 0)
    assert f"model {digest}, to start from, is no longer kept" in found["reason"]


def test_a_resumed_run_needs_the_model_that_it_started_from_no_more(
    world: World, run: str, digest: str, last_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(world, run, start_model=digest)
    let_go_after(world, run, monkeypatch, 2)
    last_model.unlink()
    work(world, run)
    assert model_of(world, run) != digest


class TestLog:
    def test_it_tells_what_became_of_the_run_and_of_no_other(
        self, world: World, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse_and_stop(transport: Wards, steps: int) -> None:
            if steps == 2:
                other = threading.Thread(target=log.warning, args=("of another run",))
                other.start()
                other.join()
                transport.refused("ward-b", "it is not signed")
                raise RunStoppedError("stopped by ann")

        monkeypatch.setattr(Wards, "after", refuse_and_stop)
        begin(world, run)
        with caplog.at_level(logging.INFO, "concord_server"):
            log.warning("before")
            work(world, run)
            log.warning("after")
        assert ended(world, run)["reason"] == "stopped by ann"
        api = world.api("lab")
        items = api.get(f"/api/v1/runs/{run}/logs")["items"]
        assert [each["message"] for each in items] == [
            "a run begins",
            "a reply was refused",
            "a run ended without its model",
        ]
        assert items[1].items() >= {"run": run, "node": "ward-b", "reason": "it is not signed"}.items()
        assert items[2].items() >= {"level": "warning", "state": "stopped", "reason": "stopped by ann"}.items()
        written = logs.log_path(world.coordinator.home.runs, run).read_text().splitlines()
        assert [json.loads(line) for line in written] == items
        monkeypatch.setattr(commands, "coordinator", lambda: nullcontext(api))
        assert CliRunner().invoke(commands.group, ["logs", run]).output.splitlines() == written
        assert api.get(f"/api/v1/runs/{run}/logs", limit=1)["items"] == items[-1:]

    def test_a_refused_reply_is_in_the_audit_log_as_the_nodes(
        self, world: World, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(transport: Wards, steps: int) -> None:
            transport.refused("ward-b", "it is not signed")
            raise RunStoppedError("enough")

        monkeypatch.setattr(Wards, "after", refuse)
        begin(world, run)
        work(world, run)
        [event] = [each for each in world.coordinator.audited("reply:send-refused") if each["subject"] == run]
        assert event["actor"] == "node:ward-b"
        assert event["detail"] == {"reason": "it is not signed"}

    def test_an_unexpected_failure_tells_no_trace_to_the_study(
        self, world: World, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(transport: Wards, steps: int) -> None:
            raise ZeroDivisionError("a secret of the coordinator")

        monkeypatch.setattr(Wards, "after", fail)
        begin(world, run)
        work(world, run)
        assert "unexpected ZeroDivisionError" in ended(world, run)["reason"]
        items = world.api("lab").get(f"/api/v1/runs/{run}/logs")["items"]
        assert [each.get("error") for each in items] == ["ZeroDivisionError", None]
        assert "secret" not in json.dumps(items)

    def test_it_is_bounded_and_its_end_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "FILE_BYTES_MAX", 4000)
        with logs.recording(tmp_path, "long"):
            for number in range(200):
                log.warning("again", extra={"number": number})
        folder = logs.log_path(tmp_path, "long").parent
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert set(sizes) == {"run.jsonl", "run.jsonl.1"}
        assert max(sizes.values()) <= 4000
        assert [each["number"] for each in logs.tail(tmp_path, "long", 30)] == list(range(170, 200))

    def test_a_log_that_cannot_be_written_ends_no_run(
        self, world: World, run: str, digest: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        begin(world, run)
        folder = logs.log_path(world.coordinator.home.runs, run).parent
        folder.parent.mkdir()
        folder.write_text("a file in its place")
        with caplog.at_level(logging.INFO, "concord_server"):
            work(world, run)
        assert model_of(world, run) == digest
        assert "a run succeeded" in caplog.messages
        assert "Traceback" not in capsys.readouterr().err


def test_a_worker_told_to_end_gives_its_run_back_and_another_goes_on_to_the_same_model(
    world: World, run: str, digest: str, tmp_path: Path
) -> None:
    """SIGTERM to a worker's process, in the middle of a step."""
    home = world.coordinator.home
    begin(world, run)
    command = [sys.executable, workers.__file__, str(home.path), str(tmp_path / "nodes")]
    with (tmp_path / "worker.log").open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors)
    try:
        until = time.monotonic() + 60
        while report(world, run)["steps"] == 0 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0, (tmp_path / "worker.log").read_text()
    finally:
        process.kill()
        process.wait()
    found, row = report(world, run), world.row(run)
    assert (found["state"], found["steps"]) == ("running", 1), (tmp_path / "worker.log").read_text()
    assert (row.lease_owner, row.lease_until) == (None, None), "nobody waits until the lease runs out"
    worker = Worker(home, LINK)
    until = time.monotonic() + 30
    while report(world, run)["state"] == "running" and time.monotonic() < until:
        worker.look()
        time.sleep(0.02)
    assert model_of(world, run) == digest
    messages = [each["message"] for each in logs.tail(home.runs, run, 10)]
    assert messages == ["a run begins", "a run was let go"], "at this level a run that goes on says no more"
