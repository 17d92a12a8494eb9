"""deploy/flower: concord as a stock Flower app gives the model of `concord simulate`."""

import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import test_transports
from flwr.app import Message
from test_transports import PLAN

from concord_local.nodes import NodeHost
from concord_local.simulation import simulate
from federations import federation

APP = Path(__file__).parents[2] / "deploy" / "flower"
ROUNDS = 2


class LoopGrid:
    """The two methods of a Grid that the transport uses; it numbers messages itself, as Flower does."""

    def __init__(self, host: NodeHost) -> None:
        self._host = host
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            assert message.metadata.message_id == ""
            names.append(str(uuid4()))
            message.metadata.__dict__["_message_id"] = names[-1]
            self._waiting[names[-1]] = message
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._host.respond(self._waiting.pop(name)) for name in message_ids if name in self._waiting]


class TestGrid(test_transports.TestConformance):
    @pytest.fixture
    def carried(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        from flwr.supercore.task_identity import TaskIdentity  # a ServerApp has one; here nobody gave us any

        for name in ("_task_id", "_run_id", "_node_id"):
            monkeypatch.setattr(TaskIdentity, name, 1)
        monkeypatch.syspath_prepend(APP)
        module = importlib.import_module("concord_flower.grid_transport")
        return module.GridTransport(LoopGrid(NodeHost(PLAN, federation(PLAN), tmp_path, "cpu")))


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a stock SuperLink on a free port; what is started here is ended here, by its process id."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("skipped: needs Ray, as `bash deploy/run.sh --with ray test -m slow` installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid4().hex + uuid4().hex,
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port]
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _await_health(f"http://127.0.0.1:{port}/health", process)
            yield environment
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _await_health(address: str, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the SuperLink did not start")


@pytest.mark.slow
def test_flwr_run_gives_the_model_of_concord_simulate(flower: dict[str, str], tmp_path: Path) -> None:
    config = f'set="rounds.count={ROUNDS}" out="{tmp_path / "out"}"'
    size = "num-supernodes=10 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = ["flwr", "run", str(APP), "--stream", "-c", config, "--federation-config", size]
    done = subprocess.run(command, env=flower, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "summary.json").exists(), done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    expected = simulate(overrides=[f"rounds.count={ROUNDS}"], workers=1, out=tmp_path / "simulated").summary
    assert summary["plan_digest"] == expected["plan_digest"]
    assert summary["model_digest"] == expected["model_digest"]
    assert summary["metrics"] == expected["metrics"]
