"""A coordinator as a company runs it: its listener shows a certificate that the company has already, and others reach
it on other ports, which something in between forwards. A person logs in and a node enrols, by what was printed.
"""

import contextlib
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fleets import free_port
from test_control_processes import _json, _run, _until, _up
from test_node_enrolment import believe
from test_node_proxy import _pump
from unit.client.fake_coordinator import Authority, pem

from concord_local.deployment import Deployment, Partner


class Forwarder:
    """Carries connections from its own port to another one of this machine; counts them."""

    def __init__(self, target: int) -> None:
        self.count, self._target = 0, target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.count += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()


@pytest.fixture
def forwarders() -> Iterator[tuple[Forwarder, Forwarder]]:
    with contextlib.ExitStack() as stack:
        made = Forwarder(free_port()), Forwarder(free_port())
        for each in made:
            stack.callback(each.close)
        yield made


def certificate_of(company: Authority, folder: Path) -> dict[str, str]:
    key = generate_private_key(SECP256R1())
    shown = company.issue("localhost", key.public_key(), names=[x509.DNSName("localhost")], now=int(time.time()))
    (folder / "company.crt").write_text(pem(shown), "ascii")
    (folder / "company.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return {"certificate": str(folder / "company.crt"), "certificate_key": str(folder / "company.key")}


def test_a_company_certificate_and_forwarded_ports(
    tmp_path: Path, forwarders: tuple[Forwarder, Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    control, rounds = forwarders
    company = Authority.root("company", now=int(time.time()))
    ports = ["--control-port", str(control._target), "--superlink-port", str(rounds._target)]
    made = _json("server", "init", str(tmp_path / "c"), "--federation", "hearts", "--public-host", "localhost", *ports)
    settings = tmp_path / "c" / "settings.toml"
    public = {"public_control_port": control.port, "public_superlink_port": rounds.port}
    settings.write_text(
        tomli_w.dumps(tomllib.loads(settings.read_text()) | public | certificate_of(company, tmp_path)), "utf-8"
    )
    (tmp_path / "token").write_text(made["token"])
    profile, partner = tmp_path / "profile.json", Partner("ward", None, tmp_path / "ward")  # type: ignore[arg-type]
    with _up(tmp_path / "c") as status:
        assert status["healthy"]
        login = ["login", f"https://localhost:{control.port}", "--root", made["root_fingerprint"]]
        login += ["--token-file", str(tmp_path / "token")]
        assert "--system-ca" in _run(*login, code=1, profile=profile), "the company's authority is not the federation's"
        with monkeypatch.context() as patch:
            believe(company, tmp_path, patch)
            _json(*login, "--system-ca", profile=profile)
            _json("org", "create", "hospital", profile=profile)
            line = _json("invite", "ward", "--organisation", "hospital", profile=profile)["line"]
            assert f"localhost:{control.port}/" in line
        told = partner.run("enrol", "-", "--ca", str(tmp_path / "authorities.pem"), stdin=line)
        with monkeypatch.context() as patch:
            believe(company, tmp_path, patch)
            _json("node", "activate", "ward", "--fingerprint", told["identity"], profile=profile)
        with _node_up(partner):
            found = _until("the node is active, through both", lambda: _well(partner))
        assert f"localhost:{control.port}" in found["coordinator"]
        assert f"localhost:{rounds.port}" in found["fleet"]
        assert "running" in found["daemon"]
    assert min(control.count, rounds.count) > 0


@contextlib.contextmanager
def _node_up(partner: Partner) -> Iterator[None]:
    Deployment.start_node(None, partner)  # type: ignore[arg-type]
    try:
        yield
    finally:
        assert partner.process is not None
        partner.process.terminate()
        partner.process.wait(20)


def _well(partner: Partner) -> dict[str, str]:
    """What doctor says of each thing, once the daemon runs and the coordinator calls the node active."""
    findings = {each["name"]: each for each in partner.run("doctor")["findings"]}
    well = findings["daemon"]["state"] == findings["state"]["state"] == "ok"
    return {name: each["said"] for name, each in findings.items()} if well else {}
