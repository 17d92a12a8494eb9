"""The node's home: modes, settings, and the TLS context."""

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from concord_client.home import NodeConfig, NodeHome, default_home, read_settings
from concord_shared.errors import ArtefactError, UsageError
from unit.client.fake_coordinator import FakeCoordinator, enrol_with

CONFIG = {
    "federation": "fed",
    "organisation": "acme",
    "node": "acme-1",
    "url": "https://fed.example:8443",
    "superlink": "fed.example:9443",
    "root": "0" * 64,
}


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> NodeHome:
    return enrol_with(FakeCoordinator(), tmp_path_factory.mktemp("home") / "node").home


def test_home_that_is_not_enrolled_says_how(tmp_path: Path) -> None:
    NodeHome.prepare(tmp_path / "node")
    with pytest.raises(ArtefactError, match="concord-node enrol"):
        NodeHome.open(tmp_path / "node")


def test_home_is_for_its_owner_alone(enrolled: NodeHome) -> None:
    for folder in (enrolled.path, enrolled.keys, enrolled.models, enrolled.withdrawn):
        assert folder.stat().st_mode & 0o077 == 0, folder
    for name in ("tls", "identity", "flower"):
        assert enrolled.key_file(name).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="skipped: modes are those of POSIX")
def test_home_refuses_a_directory_open_to_others(tmp_path: Path) -> None:
    home = enrol_with(FakeCoordinator(), tmp_path / "node").home
    home.path.chmod(0o755)
    with pytest.raises(ArtefactError, match="chmod 700"):
        NodeHome.open(home.path)


@pytest.mark.skipif(os.name != "posix", reason="skipped: modes are those of POSIX")
def test_home_refuses_a_key_open_to_others(tmp_path: Path) -> None:
    home = enrol_with(FakeCoordinator(), tmp_path / "node").home
    for name, use in (("tls", home.tls_context), ("identity", home.identity_key), ("flower", home.flower_key)):
        home.key_file(name).chmod(0o640)
        with pytest.raises(ArtefactError, match="others may read this key"):
            use()
        home.key_file(name).chmod(0o600)
        use()


def test_tls_context_verifies_the_server_and_refuses_old_tls(enrolled: NodeHome) -> None:
    context = enrolled.tls_context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.get_ca_certs()[0]["subject"] == ((("commonName", "root"),),)  # the pinned root and nobody else
    assert len(context.get_ca_certs()) == 1


def test_config_survives_writing_and_reading(enrolled: NodeHome) -> None:
    assert NodeHome.open(enrolled.path).config == enrolled.config
    assert enrolled.config.spiffe == "spiffe://fed/acme/acme-1"


def test_config_refuses_an_unknown_key_with_the_known_one(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("".join(f'{key} = "{value}"\n' for key, value in CONFIG.items()) + 'proxi = "x"\n', "utf-8")
    with pytest.raises(UsageError, match=r"proxi: unknown key\. Did you mean proxy"):
        read_settings(file, NodeConfig)


def test_config_refuses_an_address_without_tls(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    fields = CONFIG | {"url": "http://fed.example"}
    file.write_text("".join(f'{key} = "{value}"\n' for key, value in fields.items()), "utf-8")
    with pytest.raises(UsageError, match="url"):
        read_settings(file, NodeConfig)


def test_default_home_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONCORD_NODE_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("CONCORD_NODE_HOME")
    assert default_home() == Path.home() / ".concord-node"


def test_withdrawn_markers_of_different_approvals_differ(enrolled: NodeHome) -> None:
    abouts = [("a", "0" * 64, "b"), ("b", "0" * 64, "a"), ("a", "1" * 64, "b")]
    assert len({enrolled.withdrawn_marker(*about) for about in abouts}) == 3


def test_daemon_and_commands_are_light_to_import() -> None:
    """A node waits most of its life: what trains and what reads tables is loaded where it is used."""
    modules = ["home", "store", "enrolment", "control", "sync", "policy", "approvals", "registry", "cli"]
    imports = "; ".join(f"import concord_client.{name}" for name in modules)
    heavy = "{'torch', 'polars', 'sklearn', 'pandas', 'PIL', 'concord_server'}"
    code = f"{imports}; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
