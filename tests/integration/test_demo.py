"""`concord demo` as people meet it: a real federation on this machine, which ends as it should and leaves nothing."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from concord_local.simulation import simulate
from datasets import needs

SMALL = ["rounds.count=2", "training.local_epochs=1", "model.name=2nn"]
QUICK = [word for override in SMALL for word in ("--set", override)]
BESIDE = {"comparison", "environment", "run", "steps", "partners"}
"""What the demo says beside what `concord simulate` says: the first is what --compare adds there, too."""
DEMO_S = 400


class Ground:
    """Where demos run: a directory for temporary files, whose name marks every process that was started here."""

    def __init__(self, temporary: Path, output: Path) -> None:
        self.temporary, self._output = temporary, output
        cache = str(output / "torch")  # else torch keeps it among the temporary files, one for each user
        self._environment = {**os.environ, "TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": cache}
        self.ports: set[int] = set()

    def start(self, *arguments: str, module: str = "concord_local", **environment: str) -> "subprocess.Popen[str]":
        """In a group of its own, as a shell would; what it says goes to files."""
        with (self._output / "out").open("w") as out, (self._output / "errors").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def run(self, *arguments: str, module: str = "concord_local", **environment: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        process = self.start(*arguments, module=module, **environment)
        self.await_(lambda: process.poll() is not None)
        return process.returncode, self.said("out"), self.said("errors")

    def demo(self, *arguments: str) -> dict[str, Any]:
        code, out, errors = self.run("demo", *arguments, "--json")
        assert code == 0, errors
        return dict(json.loads(out))

    def said(self, where: str) -> str:
        return (self._output / where).read_text("utf-8")

    def await_(self, condition: Callable[[], bool], timeout_s: float = DEMO_S) -> None:
        """Meanwhile notes on which ports a coordinator listens."""
        until = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until, self.said("errors")
            for up in self.temporary.glob("*/coordinator/up.json"):
                with contextlib.suppress(OSError, ValueError):
                    self.ports |= set(json.loads(up.read_text("utf-8"))["ports"].values())
            time.sleep(0.1)

    def processes(self) -> list[int]:
        mark = f"TMPDIR={self.temporary}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
        return found

    def assert_still(self) -> None:
        """No process, and nobody listens where the coordinator did."""
        assert self.processes() == []
        assert self.ports, "a coordinator was up"
        for port in self.ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0

    def assert_nothing_left(self) -> None:
        self.assert_still()
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    temporary = Path(tempfile.mkdtemp(prefix="d-"))  # a short path: sockets lie there
    ground = Ground(temporary, tmp_path)
    yield ground
    for process_id in ground.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow
def test_json_is_that_of_the_simulation_and_nothing_is_left(ground: Ground, tmp_path: Path) -> None:
    found = ground.demo(*QUICK)
    ground.assert_nothing_left()
    expected = simulate("digits-cnn", nodes=3, overrides=SMALL, workers=1, out=tmp_path / "run").summary
    assert found.keys() == expected.keys() | BESIDE
    for figure in ("seconds", "setting"):
        assert found[figure].keys() == expected[figure].keys(), figure
    for figure in ("plan_digest", "model_digest", "deterministic", "rounds", "metrics", "per_node", "owners"):
        assert found[figure] == expected[figure], figure
    assert found["worst_node"] == expected["worst_node"]
    assert 0 < found["seconds"]["startup"] < found["seconds"]["total"]
    assert found["peak_pss_mb"] > 100
    assert found["run_dir"] is None
    assert found["partners"].keys() == found["per_node"].keys() == {"node-1", "node-2", "node-3"}


@pytest.mark.slow
def test_two_nodes_are_enough(ground: Ground) -> None:
    found = ground.demo(*QUICK, "--nodes", "2")
    assert found["nodes"] == len(found["partners"]) == 2
    ground.assert_nothing_left()


@pytest.mark.slow
def test_four_hospitals(ground: Ground, dataset_path: Callable[[str], Path]) -> None:
    data = str(dataset_path("heart_disease"))
    found = ground.demo("--plan", "heart-disease", "--data", data, "--set", "rounds.count=2")
    assert found["nodes"] == len(found["partners"]) == 4
    assert found["comparison"]["all"]["test_rows"] == found["metrics"]["rows"]
    ground.assert_nothing_left()


@pytest.mark.slow
def test_what_is_kept_can_be_begun_again_and_ended(ground: Ground) -> None:
    """The demo says how. Coordinator and nodes come back where they were, so they find each other."""
    found = ground.demo(*QUICK, "--nodes", "2", "--keep")
    ground.assert_still()
    told = " ".join(ground.said("errors").split())
    home = Path(found["run_dir"])
    directory, node = home / "coordinator", home / "nodes" / "node-1"
    assert list(ground.temporary.iterdir()) == [home]
    for how in (f"concord server up {directory}", f"{node} concord-node up", "Ctrl-C", f"rm -r {home}"):
        assert how in told
    code, _, errors = ground.run("server", "status", str(directory))
    assert (code, f"concord server up {directory}" in errors) == (1, True)

    before = set(ground.ports)
    up = ground.start("server", "up", str(directory))
    code, out, errors = ground.run("server", "status", str(directory), "--wait", "60", "--json")
    assert code == 0, errors
    assert set(json.loads(out)["ports"].values()) == before
    at_home = {"module": "concord_client", "CONCORD_NODE_HOME": str(node)}
    daemon = ground.start("up", **at_home)
    ground.await_(lambda: "listening for rounds" in ground.said("errors"), 60)
    for process in (daemon, up):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    ground.assert_still()


@pytest.mark.slow
@pytest.mark.parametrize(
    "when", ["coordinator/up.json", "nodes/node-2/certificate.pem", "nodes/node-1/states/*/reply*"]
)
def test_an_interrupted_demo_leaves_nothing(when: str, ground: Ground) -> None:
    """While the coordinator starts, while nodes enrol, while rounds go on."""
    process = ground.start("demo", "--set", "rounds.count=500")
    ground.await_(lambda: any(ground.temporary.glob(f"concord-demo-*/{when}")), 120)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1
    assert ground.said("errors").splitlines()[-1] == "error: stopped"
    assert "Traceback" not in ground.said("errors")
    assert ground.processes() == []
    assert list(ground.temporary.iterdir()) == []


@pytest.mark.slow
def test_the_whole_demo_takes_a_minute_and_a_half(ground: Ground) -> None:
    found = ground.demo()
    assert found["seconds"]["total"] < 90, found["steps"]
    assert found["metrics"]["accuracy"] > 0.9
    ground.assert_nothing_left()


DEEP = ("training.local_epochs=0", "training.local_steps=3", "rounds.count=1")
RESNET = "model={name='resnet-18', stem='stride-2', width=0.125"
SGD = ("model.name=mlp", "training={optimiser='sgd', learning_rate=0.1, local_epochs=1}", "rounds.count=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "overrides"),
    [
        ("fashion-resnet18", (RESNET + "}", *DEEP)),
        ("fashion-resnet18", (RESNET + ", norm='batch'}", "strategy.name=fedbn", *DEEP)),
        ("fashion-efficientnet", ("model={name='efficientnet-b0', stem='stride-2', width=0.25}", *DEEP)),
        ("sms-encoder", ("rounds.count=1",)),
        ("restaurants-mf", ("rounds.count=2",)),
        ("restaurants-ncf", ("rounds.count=2",)),
        *(("digits-cnn", (*SGD, f"strategy.name={name}")) for name in ("fednova", "scaffold", "ditto", "fedrep")),
    ],
)
@needs("fashion_mnist", "sms_spam", "restaurant_ratings")
def test_each_family_and_strategy_comes_to_the_simulation_s_model(
    plan: str, overrides: tuple[str, ...], ground: Ground, tmp_path: Path
) -> None:
    """Deployed under masks, and simulated without."""
    sets = [word for override in (*overrides, "privacy.mode=private") for word in ("--set", override)]
    found = ground.demo("--plan", plan, "--nodes", "3", *sets)
    expected = simulate(plan, nodes=3, overrides=list(overrides), workers=1, out=tmp_path / "run").summary
    assert found["model_digest"] == expected["model_digest"]
    ground.assert_nothing_left()


@pytest.mark.slow
def test_speakers_learn_a_language_model_under_masks(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "play"
    folder.mkdir()
    speeches = [
        f"{name}:\n{(name.lower() + ', speak again! ') * 50}" for _ in range(4) for name in ("ANN", "BOB", "EVE")
    ]
    (folder / "input.txt").write_text("\n\n".join(speeches), "utf-8")
    small = ["model={name='gpt-mini', layers=1, width=16, heads=2}", "rounds.count=2", "rounds.cohort=all"]
    sets = [word for override in (*small, "privacy.mode=private") for word in ("--set", override)]
    found = ground.demo("--plan", "shakespeare-gpt", "--data", f"tiny-shakespeare:{folder}", *sets)
    assert found["partners"].keys() == {"ann", "bob", "eve"}
    assert set(found["metrics"]) == {"rows", "tokens", "loss", "perplexity", "accuracy"}
    expected = simulate(
        "shakespeare-gpt", data=f"tiny-shakespeare:{folder}", nodes=3, overrides=small, workers=1, out=tmp_path / "run"
    ).summary
    assert found["model_digest"] == expected["model_digest"]  # private or plain, deployed or simulated
    ground.assert_nothing_left()
