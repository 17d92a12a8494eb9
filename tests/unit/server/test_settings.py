"""Settings: the file, the environment above it, and what is refused."""

from pathlib import Path

import pytest

from concord_server.settings import Home, Settings
from concord_shared.errors import ArtefactError, UsageError

LEAST = 'federation = "hearts"\npublic_host = "fl.example.org"\n'


def _write(path: Path, text: str) -> Path:
    file = path / "settings.toml"
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_two_settings_are_enough(tmp_path: Path) -> None:
    settings = Settings.read(_write(tmp_path, LEAST))
    assert (settings.control_port, settings.superlink_port, settings.host) == (8443, 9443, "127.0.0.1")
    assert settings.superlink_address == "fl.example.org:9443"


def test_the_environment_is_above_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_CONTROL_PORT", "18443")
    monkeypatch.setenv("CONCORD_SANS", '["10.0.0.1"]')
    settings = Settings.read(_write(tmp_path, LEAST + "control_port = 1\n"))
    assert settings.control_port == 18443
    assert settings.sans == ["10.0.0.1"]


def test_a_port_in_between_is_what_others_are_told(tmp_path: Path) -> None:
    settings = Settings.read(_write(tmp_path, LEAST + "public_control_port = 443\npublic_superlink_port = 444\n"))
    assert settings.control_address == ("fl.example.org", 443)
    assert settings.superlink_address == "fl.example.org:444"


def test_an_ipv6_host_is_written_in_brackets(tmp_path: Path) -> None:
    settings = Settings.read(_write(tmp_path, LEAST.replace("fl.example.org", "::1")))
    assert settings.superlink_address == "[::1]:9443"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LEAST + "lease = 3\n", "lease"),
        (LEAST + "control_port = 70000\n", "control_port"),
        (LEAST + 'federation2 = "x"\n', "federation2"),
        ('public_host = "x"\n', "federation"),
        ('federation = "Not A Name"\npublic_host = "x"\n', "federation"),
        ("federation = \n", "settings.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Settings.read(_write(tmp_path, text))


def test_a_bad_value_of_the_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_LEASE_S", "soon")
    with pytest.raises(UsageError, match="lease_s"):
        Settings.read(_write(tmp_path, LEAST))


def test_a_directory_that_is_no_coordinators_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="concord server init"):
        Home.open(tmp_path)


def test_a_directory_that_others_may_read_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, LEAST)
    tmp_path.chmod(0o755)
    with pytest.raises(ArtefactError, match="chmod 700"):
        Home.open(tmp_path)
    tmp_path.chmod(0o700)
    assert Home.open(tmp_path).settings.federation == "hearts"
