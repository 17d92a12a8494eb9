"""The coordinator as real processes: init, up, status, login and the way to a node, over TLS; kills and ends."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from concord_server.client import Coordinator
from concord_server.settings import Home
from concord_server.supervisor import LIVED_S, WAIT_S_MAX, WAIT_S_MIN, _Child
from concord_shared.protocol import InvitationLine
from coordinators import NodeKeys

CONCORD = [sys.executable, "-m", "concord_local"]


def _run(*arguments: str, code: int = 0, profile: Path | None = None, text: str = "") -> str:
    environment = os.environ | ({"CONCORD_PROFILE": str(profile)} if profile else {})
    done = subprocess.run(
        [*CONCORD, *arguments], capture_output=True, text=True, timeout=60, env=environment, input=text, check=False
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


def _json(*arguments: str, profile: Path | None = None) -> Any:
    return json.loads(_run(*arguments, "--json", profile=profile))


@contextlib.contextmanager
def _up(directory: Path, *options: str) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen([*CONCORD, "server", "up", str(directory), *options], stderr=subprocess.PIPE)
    try:
        yield _json("server", "status", str(directory), "--wait", "30")
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        sys.stderr.write(errors.decode())


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    options = ["--federation", "hearts", "--public-host", "localhost", "--san", "127.0.0.1", "--control-port", "0"]
    options += ["--superlink-port", "0", "--organisation", "hospital-a"]
    found: dict[str, Any] = _json("server", "init", str(tmp_path / "c"), *options)
    return found


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return False


def _until(what: str, test: Any, timeout_s: float = 20) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := test():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def test_from_an_empty_directory_to_a_node_over_tls(made: dict[str, Any], tmp_path: Path) -> None:
    directory, profile = Path(made["directory"]), tmp_path / "profile.json"
    with _up(directory, "--only", "control") as status:
        assert status["running"]
        assert status["healthy"]
        url = f"https://localhost:{status['ports']['control']}"
        (tmp_path / "token").write_text(made["token"])
        login = ["login", url, "--root", made["root_fingerprint"], "--token-file", str(tmp_path / "token")]
        assert _json(*login, profile=profile)["name"] == "admin"
        assert profile.stat().st_mode & 0o077 == 0

        keys = _json("keys", "init", str(tmp_path / "keys"))
        shown = _json("org", "key", "hospital-a", keys["public"], profile=profile)
        assert shown["fingerprint"] == keys["fingerprint"]
        printed = _run("invite", "ward-1", "--organisation", "hospital-a", profile=profile)
        assert printed.startswith("concord-node enrol 'concord://localhost:")
        line = InvitationLine.parse(printed.split("'")[1])
        assert (line.port, line.root) == (status["ports"]["control"], made["root_fingerprint"])

        node = NodeKeys()
        chain = _enrol(directory, line, node, status["ports"]["superlink"])
        _json("node", "activate", "ward-1", "--fingerprint", node.fingerprint, profile=profile)
        with _node(directory, line, node, chain, tmp_path) as http:
            assert http.get("/api/node/updates").json()["state"] == "active"
            _json("node", "revoke", "ward-1", "--reason", "test", profile=profile)
            assert http.get("/api/node/updates").status_code == 401
        assert "ward-1" in _run("node", "list", profile=profile)
        began = time.monotonic()
        actions = [each["action"] for each in _json("audit", profile=profile)["items"]]
        assert actions[:3] == ["node:connect-refused", "node:revoke", "node:activate"]
    assert time.monotonic() - began < 15
    assert not _alive(status["processes"]["control"]["pid"])
    assert "is not up" in _run("server", "status", str(directory), code=1)
    assert not (directory / "up.json").exists()


def _enrol(directory: Path, line: InvitationLine, node: NodeKeys, superlink: int) -> str:
    """As a node does: over TLS, with the root that the invitation names."""
    context = ssl.create_default_context(cafile=str(directory / "pki" / "root.pem"))
    with httpx.Client(base_url=f"https://{line.host}:{line.port}", verify=context) as http:
        assert http.get("/api/trust").json()["superlink"] == f"localhost:{superlink}"
        headers = {"Concord-Protocol": "1", "Content-Type": "application/json"}
        answer = http.post("/api/enrol", content=node.enrolment(line).model_dump_json(), headers=headers)
        return str(answer.json()["certificate"]["chain"])


def _node(directory: Path, line: InvitationLine, node: NodeKeys, chain: str, tmp_path: Path) -> httpx.Client:
    (tmp_path / "chain.pem").write_text(chain)
    key = node.tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "tls.key").write_bytes(key)
    context = ssl.create_default_context(cafile=str(directory / "pki" / "root.pem"))
    context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "tls.key")
    url, headers = f"https://{line.host}:{line.port}", {"Concord-Protocol": "1"}
    return httpx.Client(base_url=url, verify=context, headers=headers)


def test_login_shows_the_token_to_nobody_else(made: dict[str, Any], tmp_path: Path) -> None:
    with _up(Path(made["directory"]), "--only", "control") as status:
        url = f"https://localhost:{status['ports']['control']}"
        (tmp_path / "token").write_text(made["token"])
        login = ["login", url, "--root", "0" * 64, "--token-file", str(tmp_path / "token")]
        assert "root key" in _run(*login, code=1, profile=tmp_path / "p.json")
        assert not (tmp_path / "p.json").exists()
        login = ["login", url, "--root", made["root_fingerprint"], "--token-file", "-"]
        assert "unknown, expired or revoked" in _run(*login, code=1, profile=tmp_path / "p.json", text="concord_x")


def test_a_killed_child_is_started_again_and_ends_with_its_supervisor(made: dict[str, Any]) -> None:
    directory = Path(made["directory"])
    with _up(directory, "--only", "control") as status:
        pid = status["processes"]["control"]["pid"]
        os.kill(pid, signal.SIGKILL)
        _until("the child is started again", lambda: _pid(directory) not in (None, pid))
        again = _json("server", "status", str(directory), "--wait", "30")
        assert again["healthy"]
        assert again["processes"]["control"]["restarts"] == 1
        assert again["ports"] == status["ports"]
        assert "is up already" in _run("server", "up", str(directory), code=2)
        os.kill(status["supervisor"], signal.SIGKILL)
        _until("the child ends", lambda: not _alive(again["processes"]["control"]["pid"]))
        left = _run("server", "status", str(directory), code=1)
        assert "is not up" in left


def test_idle_connections_do_not_hold_up_the_end(made: dict[str, Any]) -> None:
    """One that was idle for longer than it is kept alive is closing already, and TLS waits for the other side."""
    directory = Path(made["directory"])
    with _up(directory, "--only", "control") as status:
        url, root = f"https://localhost:{status['ports']['control']}", (directory / "pki" / "root.pem").read_text()
        with Coordinator(url, made["token"], root) as api:
            api.get("/api/v1/organisations")
            time.sleep(6)
            os.kill(status["supervisor"], signal.SIGTERM)
            begun = time.monotonic()
            _until("the child ends", lambda: not _alive(status["processes"]["control"]["pid"]))
            assert time.monotonic() - begun < 5


def _pid(directory: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        pid: int | None = json.loads((directory / "up.json").read_text())["pids"]["control"]
        return pid
    return None


def test_what_was_begun_is_answered_before_the_end(made: dict[str, Any]) -> None:
    """Half a request is there when the process is told to end; the other half comes, and so does the answer."""
    directory, body = Path(made["directory"]), b'{"name": "hospital-b"}'
    head = (
        f"POST /api/v1/organisations HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {made['token']}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    context = ssl.create_default_context(cafile=str(directory / "pki" / "root.pem"))
    with _up(directory, "--only", "control") as status:
        address, pid = ("localhost", status["ports"]["control"]), status["processes"]["control"]["pid"]
        with context.wrap_socket(socket.create_connection(address, 10), server_hostname="localhost") as caller:
            caller.sendall(head.encode() + body[:5])
            time.sleep(0.5)
            os.kill(status["supervisor"], signal.SIGTERM)
            _until("the listener is closed", lambda: not _listens(address))
            assert _alive(pid)
            caller.sendall(body[5:])
            answer = caller.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 201")
        _until("the process has ended", lambda: not _alive(pid))


def _listens(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, 1):
        return True
    return False


def test_init_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    options = ["--federation", "hearts", "--public-host", "localhost"]
    assert "not empty" in _run("server", "init", str(tmp_path / "c"), *options, code=2)
    assert [each.name for each in tmp_path.rglob("*")] == ["c", "mine.txt"]


@pytest.mark.parametrize("options", [["--public-host", "not a host"], ["--federation", "Not A Name"], ["--san", "a b"]])
def test_init_refuses_bad_values_and_leaves_nothing(tmp_path: Path, options: list[str]) -> None:
    base = ["--federation", "hearts", "--public-host", "localhost"]
    _run("server", "init", str(tmp_path / "c"), *base, *options, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["root-key.pem", "pki/membership.key", "concord.db"])
def test_open_modes_stop_the_start(made: dict[str, Any], path: str) -> None:
    file = Path(made["directory"]) / path
    file.chmod(0o644)
    assert f"chmod 600 {file}" in _run("server", "up", made["directory"], code=1)


def test_unknown_settings_stop_the_start(made: dict[str, Any]) -> None:
    settings = Path(made["directory"]) / "settings.toml"
    settings.write_text(settings.read_text() + "\nlease = 3\n")
    assert "lease" in _run("server", "up", made["directory"], code=2)


def test_a_membership_key_is_renewed_with_the_root_key(made: dict[str, Any], tmp_path: Path) -> None:
    directory, root_key = Path(made["directory"]), tmp_path / "root-key.pem"
    (directory / "root-key.pem").rename(root_key)
    with _up(directory, "--only", "control") as status:
        before = (directory / "pki" / "membership.pem").read_text()
        _json("server", "renew-membership", str(directory), "--root-key", str(root_key))
        after = (directory / "pki" / "membership.pem").read_text()
        assert after != before
        root = (directory / "pki" / "root.pem").read_text()
        with Coordinator(f"https://localhost:{status['ports']['control']}", made["token"], root) as coordinator:
            assert coordinator.get("/api/trust")["membership_certificate"] == after
            assert coordinator.post("/api/v1/organisations", {"name": "hospital-b"})["name"] == "hospital-b"


def test_a_foreign_root_key_renews_nothing(made: dict[str, Any], tmp_path: Path) -> None:
    directory = Path(made["directory"])
    before = (directory / "pki" / "membership.pem").read_bytes()
    foreign = directory / "pki" / "membership.key"
    said = _run("server", "renew-membership", str(directory), "--root-key", str(foreign), code=1)
    assert "not the root key" in said
    assert (directory / "pki" / "membership.pem").read_bytes() == before


def test_an_old_schema_names_the_command(made: dict[str, Any]) -> None:
    directory = made["directory"]
    Home.open(Path(directory)).database().downgrade("base")
    assert "concord server upgrade DIR" in _run("server", "up", directory, code=1)
    _run("server", "upgrade", directory)
    with _up(Path(directory), "--only", "control") as status:
        assert status["healthy"]


def test_waits_grow_and_a_long_life_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    child = _Child("control", ["false"], {})
    monkeypatch.setattr(_Child, "start", lambda self, now: setattr(self, "started", now))
    waits = []
    for _ in range(10):
        waits.append(child.wait_s)
        child._died(1, 0.0)
    assert waits[0] == WAIT_S_MIN
    assert waits == sorted(waits)
    assert child.wait_s == WAIT_S_MAX
    child._died(1, LIVED_S)
    assert child.wait_s == 2 * WAIT_S_MIN


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom concord_local.cli import app\n"
        "for group in ('server', 'org', 'person', 'token', 'node', 'keys', 'invitation'):\n"
        "    assert CliRunner().invoke(app, [group, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'sqlalchemy', 'flwr', 'fastapi', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
