"""Loaded by every process that a test starts with this folder on PYTHONPATH: kills somebody at a stage of a round.

$CONCORD_TEST_DEATHS is a folder with `deeds.json`, a list of [stage, whom]: when a process comes to the stage of the
first entry, it takes the entry off the list and sends SIGKILL to those that `pids.json` or the coordinator's `up.json`
name. Nothing of this is in the product: its functions are wrapped from outside.
"""

import fcntl
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STAGES: dict[str, tuple[tuple[str, str, str], ...]] = {
    # module: (class or "", function, name of the stage; "<" before the call, ">" after it)
    "concord_server.superlink.transport": (
        ("FlowerTransport", "_push", "<offering"),
        ("FlowerTransport", "_push", ">offered"),
        ("FlowerTransport", "_read", "<reply complete"),
    ),
    "concord_server.driver": (
        ("Driver", "_take", ">summed"),
        ("Driver", "_settle", "<all answered"),
    ),
    "concord_server.runs.store": (
        ("DatabaseStepStore", "save", "<applied"),
        ("DatabaseStepStore", "save", ">stored"),
    ),
    "concord_server.worker.task": (
        ("", "_keep_model", "<ended"),
        ("", "_keep_model", ">model kept"),
    ),
    "concord_server.superlink.calls": (
        ("", "call_runtime", "<superlink asked by worker"),
        ("", "call_fleet", ">superlink answered node"),
    ),
    "concord_client.rounds": (
        ("Rounds", "answer", "<node received"),
        ("Rounds", "answer", ">node answered"),
    ),
    "concord_client.masked_step": (
        ("MaskedStep", "_keys", ">keys made"),
        ("MaskedStep", "_shares", ">shares sealed"),
        ("MaskedStep", "_masked", "<update made"),
        ("MaskedStep", "_masked", ">update masked"),
        ("MaskedStep", "_consent", ">survivors agreed"),
        ("MaskedStep", "_open", "<opening"),
        ("MaskedStep", "_open", ">opened"),
    ),
    "concord_server.unmasking": (
        ("MaskedCollection", "begin", ">stage begun"),
        ("MaskedCollection", "open", "<unmasking"),
    ),
    "concord_client.trainer": (("Workbench", "train", "<node trains"), ("Workbench", "train", ">node trained")),
    "concord_client.fleet": (("FleetConnection", "reply", ">node replied"),),
}


def reached(stage: str, folder: Path) -> None:
    whom = take(stage, folder)
    for pid in [] if whom is None else await_pids(whom, folder):
        os.kill(pid, signal.SIGKILL)


def take(stage: str, folder: Path) -> str | None:
    """Whom the first deed kills, if it is of this stage; it is then done."""
    with (folder / "deeds.json").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        deeds = json.load(file)
        if not deeds or deeds[0][0] != stage:
            return None
        file.seek(0)
        json.dump(deeds[1:], file)
        file.truncate()
        with (folder / "done.jsonl").open("a") as done:
            done.write(json.dumps([*deeds[0], time.time()]) + "\n")
    return str(deeds[0][1])


def await_pids(whom: str, folder: Path) -> list[int]:
    """Whoever has just died is on the way back."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            nodes = json.loads((folder / "pids.json").read_text())
            known = nodes | json.loads(Path(nodes["up"]).read_text())["pids"]
        except (OSError, ValueError):
            known = {}
        pids = [known.get(name) for name in (whom.split(",") if "," in whom else [whom])]
        if all(pids):
            own = os.getpid()
            return sorted(pids, key=lambda pid: pid == own)
        time.sleep(0.02)
    return []


def wrapped(function: Callable[..., Any], stages: Sequence[str], folder: Path) -> Callable[..., Any]:
    before = [stage[1:] for stage in stages if stage[0] == "<"]
    after = [stage[1:] for stage in stages if stage[0] == ">"]

    def call(*arguments: Any, **options: Any) -> Any:
        for stage in before:
            reached(stage, folder)
        result = function(*arguments, **options)
        for stage in after:
            reached(stage, folder)
        return result

    return call


class Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, folder: Path) -> None:
        self._loader, self._folder = loader, folder

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        if module.__name__ == "concord_server.supervisor":
            module.WAIT_S_MAX = 0.5  # nobody waits longer for having died often
            return
        stages: dict[tuple[str, str], list[str]] = {}
        for owner, name, stage in STAGES[module.__name__]:
            stages.setdefault((owner, name), []).append(stage)
        for (owner, name), found in stages.items():
            where = getattr(module, owner) if owner else module
            setattr(where, name, wrapped(getattr(where, name), found, self._folder))


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in STAGES and name != "concord_server.supervisor":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, self._folder)
        return spec


if "CONCORD_TEST_DEATHS" in os.environ:
    sys.meta_path.insert(0, Finder(Path(os.environ["CONCORD_TEST_DEATHS"])))
