"""A real federation on one machine: a coordinator and partners' nodes as processes, each with a home of its own.

What people do is done over the API with their own tokens and keys; what partners do is done by `concord-node`, the
command that they would type. Nothing is shared between the homes but the loopback network.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from concord_server.client import Coordinator
from concord_shared.errors import RunFailedError
from concord_shared.files import write_atomically
from concord_shared.plan import Plan
from concord_shared.signing import PrivateKey, new_identity_key, public_text, write_private_key

__all__ = ["Deployment", "Organisation", "Partner", "descendants"]

COMMAND_S = 120.0
START_S = 60.0
STOP_S = 15.0
POLL_S = 0.2
OWNER_ROLES = ("org-admin", "data-steward", "researcher")


@dataclass
class Organisation:
    """Its people's key, and their connection to the coordinator."""

    name: str
    key: PrivateKey
    key_file: Path
    api: Coordinator


@dataclass
class Partner:
    """A node beside its data. process: `concord-node up`, where it runs."""

    name: str
    organisation: Organisation
    home: Path
    process: "subprocess.Popen[bytes] | None" = None

    def run(self, *arguments: str, stdin: str | None = None) -> Any:
        """What `concord-node … --json` prints, in this partner's home.

        Raises:
            RunFailedError: it failed, with what it said.
        """
        done = subprocess.run(  # noqa: S603 (our own command)
            [sys.executable, "-m", "concord_client", *arguments, "--json"],
            env={**os.environ, "CONCORD_NODE_HOME": str(self.home)},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise RunFailedError(f"concord-node {' '.join(arguments[:3])} at {self.name} failed: {' '.join(said)}")
        return json.loads(done.stdout)

    def approve(self, plan: Plan, wait_s: float = 60.0) -> None:
        """What a person does: waits to be asked, looks at what is asked, and approves exactly this plan.

        Raises:
            RunFailedError: the node was not asked in time, or would not.
        """
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            asked = self.run("approvals", "list", "--pending")["requests"]
            if found := [each["id"] for each in asked if each["plan_digest"] == plan.digest]:
                self.run("approvals", "approve", found[0], "--yes")
                return
            time.sleep(POLL_S)
        raise RunFailedError(f"{self.name} was not asked for the plan within {wait_s:.0f} s")


@dataclass
class Deployment:
    """Below `root`: coordinator/, and a home for each organisation and node. `with` ends every process."""

    root: Path
    federation: str = "demo"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinator_home = self.root / "coordinator"
        self.organisations: dict[str, Organisation] = {}
        self.partners: dict[str, Partner] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Coordinator] = []

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self._initialise()
        try:
            self.start_coordinator()
        except BaseException:  # no `with` block began, so none will end what was started
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # The coordinator

    def _initialise(self) -> None:
        from concord_server.initialise import initialise

        settings = {
            "federation": self.federation,
            "public_host": "127.0.0.1",
            "host": "127.0.0.1",
            "control_port": 0,
            "superlink_port": 0,
            **self.settings,
        }
        made = initialise(self.coordinator_home, settings, "admin")
        self._token, self.root_fingerprint = made.token, made.root_fingerprint

    def start_coordinator(self) -> None:
        """Starts `concord server up` and waits until it answers.

        Raises:
            RunFailedError: it does not within a minute.
        """
        from concord_server.status import status

        with (self.root / "coordinator.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own command)
                [sys.executable, "-m", "concord_local", "server", "up", str(self.coordinator_home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        found = status(self.coordinator_home, START_S)
        if not found["healthy"]:
            raise RunFailedError(f"the coordinator did not come up; its log is {self.root / 'coordinator.log'}")
        self.ports = found["ports"]
        self._keep_ports()
        self.url = f"https://127.0.0.1:{self.ports['control']}"
        self.root_pem = (self.coordinator_home / "pki" / "root.pem").read_text("ascii")
        self.admin = self.connect(self._token)

    def _keep_ports(self) -> None:
        """Whoever starts this coordinator again, it comes back where its nodes look for it."""
        file = self.coordinator_home / "settings.toml"
        found = {f"{name}_port": port for name, port in self.ports.items()}
        write_atomically(file, tomli_w.dumps(tomllib.loads(file.read_text("utf-8")) | found))
        file.chmod(0o600)

    def connect(self, token: str) -> Coordinator:
        """A connection of a person's, which `stop` closes."""
        made = Coordinator(self.url, token, self.root_pem)
        self._connections.append(made)
        return made

    def pids(self) -> dict[str, int]:
        """Of the coordinator's processes, as they are now."""
        found = json.loads((self.coordinator_home / "up.json").read_text("utf-8"))
        return {name: pid for name, pid in found["pids"].items() if pid is not None}

    # Organisations and partners

    def add_organisation(self, name: str) -> Organisation:
        """An organisation with one person of it, and a key that its people made."""
        folder = self.root / "organisations" / name
        folder.mkdir(parents=True, mode=0o700)
        key = new_identity_key()
        write_private_key(folder / "organisation.key", key)
        self.admin.post("/api/v1/organisations", {"name": name})
        roles = [{"role": role, "organisation": name} for role in OWNER_ROLES]
        person = f"{name}-lead"
        self.admin.post("/api/v1/people", {"name": person, "organisation": name, "roles": roles})
        token = self.admin.post("/api/v1/tokens", {"person": person, "title": "demo"})["token"]
        api = self.connect(token)
        api.put(f"/api/v1/organisations/{name}/key", {"key": public_text(key.public_key())})
        made = self.organisations[name] = Organisation(name, key, folder / "organisation.key", api)
        return made

    def enrol(self, name: str, organisation: Organisation) -> Partner:
        """Invitation, enrolment, and the comparison of fingerprints that makes the node active."""
        line = organisation.api.post("/api/v1/invitations", {"node": name, "organisation": organisation.name})["line"]
        partner = Partner(name, organisation, self.root / "nodes" / name)
        told = partner.run("enrol", "-", stdin=line)
        self.admin.post(f"/api/v1/nodes/{name}/activate", {"fingerprint": told["identity"]})
        self.partners[name] = partner
        return partner

    def start_node(self, partner: Partner, environment: Mapping[str, str] | None = None) -> None:
        with (partner.home / "up.log").open("ab") as log:
            partner.process = subprocess.Popen(
                [sys.executable, "-m", "concord_client", "up"],
                env={**os.environ, "CONCORD_NODE_HOME": str(partner.home), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def each(self, action: Any, partners: Sequence[Partner] | None = None) -> list[Any]:
        """`action` for every partner, a few at a time, as different people would."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(action, partners if partners is not None else list(self.partners.values())))

    def stop(self) -> None:
        """Ends every process that was started here: nodes first, then the coordinator."""
        nodes = [partner.process for partner in self.partners.values() if partner.process is not None]
        for process in nodes:
            process.terminate()
        _await_end(nodes)
        if self._process is not None:
            self._process.terminate()
            _await_end([self._process])
        for api in self._connections:
            api.close()


def descendants(process_id: int) -> list[int]:
    """A process, all that it has started and that lives, and all that those have. Alone where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(entry.read_text("ascii", "replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found = [process_id]
    for each in found:  # grows while it is walked
        found += children.get(each, [])
    return found


def _await_end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    until = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
