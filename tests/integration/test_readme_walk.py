"""The README's walk between machines, run as it stands: each block in a home of its own, placeholders filled with what
a command before printed, as a person would. Only names and ports are changed, so that all of it stays on this machine.

The partners' commands come from an environment with nothing but the wheel, where $CONCORD_NODE_PYTHON names one (as
`.ci/run` makes it); else from this one.
"""

import contextlib
import csv
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from concord_shared.plan import load_plan

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
INSTALLS = ("bash deploy/run.sh ", "python3 -m venv ", "pip install ")
"""Done before the test, by hand or by `.ci/run`."""
PRINTED = {
    "ROOT_FINGERPRINT": re.compile(r"^Root fingerprint +([0-9a-f]{64})$", re.M),
    "INVITATION": re.compile(r"^concord-node enrol ('concord://\S+')$", re.M),
    "NODE_FINGERPRINT": re.compile(r"^fingerprint +((?:[0-9a-f]{4} ?){16})$", re.M),
    "REQUEST": re.compile(r"^([0-9a-f]{8}) +pending", re.M),
    "MODEL_DIGEST": re.compile(r"^([0-9a-f]{64}) ", re.M),
}
SHARED = ("ROOT_FINGERPRINT", "MODEL_DIGEST")
"""Told from one person to another; the rest belongs to one hospital."""


def blocks() -> list[list[str]]:
    section = README.partition("## A federation between machines\n")[2].partition("\n## ")[0]
    found = re.findall(r"```bash\n# (\d+) · .*?\n(.*?)```", section, re.S)
    assert [int(number) for number, _ in found] == list(range(1, 12))
    return [[line.partition(" # ")[0].strip() for line in body.splitlines()] for _, body in found]


class Walk:
    """The homes of all who take part, and what they have read so far."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, str] = {}
        self.started: list[subprocess.Popen[bytes]] = []
        self.ports = free_ports()
        folder = os.environ.get("CONCORD_NODE_PYTHON")
        self.path = {"concord": Path(sys.executable).parent, "node": Path(folder or sys.executable).parent}

    def do(self, where: str, lines: list[str]) -> str:
        """Pastes the lines at `where`, which is "uni", or "desk-a", "ward-b" …; returns what was printed."""
        return "".join(self._line(where, line) for line in lines if line and not line.startswith(INSTALLS))

    def _line(self, where: str, line: str) -> str:
        command = self._filled(where, line)
        home = self.root / where
        home.mkdir(exist_ok=True)
        kind = "node" if where.startswith("ward") else "concord"
        environment = {
            "HOME": str(home),
            "PATH": f"{self.path[kind]}:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
        }
        if command.endswith("&"):
            with (home / "background.log").open("ab") as log:
                arguments = ["bash", "-c", f"exec {command[:-1]}"]
                self.started.append(subprocess.Popen(arguments, cwd=home, env=environment, stdout=log, stderr=log))
            return ""
        with terminal("y\n") as stdin:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=home,
                env=environment,
                stdin=stdin,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        assert done.returncode == 0, f"{where}$ {command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        self._read(where, done.stdout)
        return done.stdout

    def _filled(self, where: str, line: str) -> str:
        for name, value in self.known.items():
            owner, _, placeholder = name.rpartition(" ")
            if owner in ("", where[-1]):
                line = line.replace(placeholder, value if placeholder == "INVITATION" else f'"{value}"')
        control, superlink = self.ports
        changes = {
            "fl.example.org": "localhost",
            "0.0.0.0": "127.0.0.1",
            ":8443": f":{control}",
            "--organisation uni": f"--organisation uni --control-port {control} --superlink-port {superlink}",
        }
        for written, here in changes.items():
            line = line.replace(written, here)
        if where.endswith("-b"):  # bob at hospital B does the same
            line = re.sub(r"\bada\b", "bob", line)
            line = re.sub(r"\b(hospital|ward|heart)-a\b", r"\1-b", line)
        return line

    def _read(self, where: str, printed: str) -> None:
        for placeholder, pattern in PRINTED.items():
            if match := pattern.search(printed):
                owner = "" if placeholder in SHARED else f"{where[-1]} "
                self.known[owner + placeholder] = match[1].strip()

    def give(self, file: str, to: str) -> None:
        """What one person hands to another."""
        (self.root / to).mkdir(exist_ok=True)
        shutil.copy(self.root / file, self.root / to)

    def end(self) -> None:
        for process in reversed(self.started):
            process.send_signal(signal.SIGTERM)
        for process in self.started:
            process.wait(30)


@contextlib.contextmanager
def terminal(answer: str) -> Iterator[int]:
    """A terminal at which a person has typed the answer to the one question that may come."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer.encode())
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def write_patients(path: Path, seed: int, rows: int = 160) -> None:
    """A table that fits the contract of the plan; the older, the iller."""
    contract = load_plan("heart-disease").plan.data
    generator = np.random.default_rng(seed)
    columns: dict[str, list[object]] = {}
    for column in contract.columns:
        if column.categories:
            columns[column.name] = list(generator.choice(column.categories, rows))
        else:
            low, high = column.range or (0, 1)
            columns[column.name] = list(generator.integers(int(low), int(high) + 1, rows))
    ill = np.array(columns["age"]) + generator.normal(0, 10, rows) > 60
    columns[contract.target] = [contract.classes[int(each)] for each in ill]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    made = Walk(tmp_path)
    yield made
    made.end()


def test_the_walk_ends_with_predictions_of_a_partner(walk: Walk) -> None:
    step = dict(enumerate(blocks(), 1))
    both = (("desk-a", "ward-a"), ("desk-b", "ward-b"))
    walk.do("uni", step[1])
    for desk, ward in both:
        walk.give(f"uni/{'ada' if desk == 'desk-a' else 'bob'}.token", desk)
        walk.do(desk, step[2])
        walk.give(f"{desk}/keys/organisation.pub", ward)
        write_patients(walk.root / ward / "patients.csv", seed=ord(ward[-1]))
        write_patients(walk.root / ward / "new-patients.csv", seed=0, rows=30)
        printed = walk.do(ward, step[3])
        shown = walk.do(desk, [line for line in step[4] if " show " in line])
        assert walk.known[f"{ward[-1]} NODE_FINGERPRINT"] in printed, "both sides show the same"
        assert "enrolled" in shown
        walk.do(desk, [line for line in step[4] if " show " not in line])
        walk.do(ward, step[5])
    assert "ward-b/patients" in walk.do("uni", step[6])
    for desk, _ in both:
        assert "agreed" in walk.do(desk, step[7])
    assert "ward-a: approval" in walk.do("uni", step[8])
    for _, ward in both:
        time.sleep(1)
        told = walk.do(ward, step[9])
        assert "Who is at risk?" in told
        assert "approved" in told
    assert "succeeded" in walk.do("uni", step[10])
    time.sleep(1)
    for _, ward in both:
        told = walk.do(ward, step[11])
        assert "accuracy" in told
        with (walk.root / ward / "predictions.csv").open(newline="") as file:
            predictions = list(csv.DictReader(file))
        assert len(predictions) == 30
        assert {row["prediction"] for row in predictions} == {"no", "yes"}
