"""A coordinator's directory, and its settings: `settings.toml`, overridden by CONCORD_… in the environment."""

import os
import stat
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from concord_server.database import Database
from concord_shared.errors import ArtefactError, UsageError
from concord_shared.files import explain
from concord_shared.plan.section import Name

__all__ = ["Home", "Settings"]


class Settings(BaseSettings):
    """Unknown keys are refused.

    host: the address to listen on; public_host: the name that others use; sans: further names of the certificate.
    public_control_port, public_superlink_port: where something in between forwards connections (not TLS) from another
    port; 0 for the port that is listened on.
    certificate, certificate_key: files of an existing certificate for the control listener.
    database_url: empty for concord.db in the coordinator's directory.
    checkpoint_quota_mb, retention_days: how many, and for how long, files of runs (and what nodes answered before them,
    to preflights) are kept; tidy_s: how often those
    beyond it are removed. spool_quota_mb: how much of messages may wait on the disk; more is refused until some left.
    table_quota_mb: how large the table of a robust run's Updates may be, on the disk while a round goes on.
    parameters_max, metrics_max: of a plan that is submitted, how many parameters its model and how many counts its
    metrics may have; a worker holds several times 4 and 8 bytes of each.
    connections_max, connections_per_caller: of each listener; whoever comes then is told to come again. A caller is a
    certificate or, where there is none, an address: raise the second where many people come from one.
    runs_parallel: how many runs a worker drives at once; those that wait for a silent node are not counted, up to
    runs_held in all, each with its model in memory.
    plugins: wheels whose models plans may use, each with the hash that `concord plugins` shows of it.
    metrics: let anyone read /metrics, not only auditors.
    """

    model_config = SettingsConfigDict(env_prefix="CONCORD_", extra="forbid", frozen=True)

    federation: Name
    public_host: str = Field(min_length=1, max_length=253)
    sans: list[str] = Field([], max_length=100)
    host: str = "127.0.0.1"
    control_port: int = Field(8443, ge=0, le=65535)
    superlink_port: int = Field(9443, ge=0, le=65535)
    public_control_port: int = Field(0, ge=0, le=65535)
    public_superlink_port: int = Field(0, ge=0, le=65535)
    database_url: str = ""
    certificate: str = ""
    certificate_key: str = ""
    lease_s: float = Field(15, ge=1, le=3600)
    runs_parallel: int = Field(4, ge=1, le=256)
    runs_held: int = Field(16, ge=1, le=1024)
    certificate_days: int = Field(30, ge=1, le=90)
    checkpoint_quota_mb: int = Field(20_000, ge=1)
    retention_days: int = Field(90, ge=1)
    table_quota_mb: int = Field(20_000, ge=1)
    parameters_max: int = Field(100_000_000, ge=1)
    metrics_max: int = Field(10_000_000, ge=1)
    tidy_s: float = Field(120, gt=0, le=86_400)
    spool_quota_mb: int = Field(100_000, ge=1)
    connections_max: int = Field(2000, ge=10, le=100_000)
    connections_per_caller: int = Field(500, ge=2, le=100_000)
    plugins: dict[str, str] = Field({}, max_length=1000)
    requests_per_minute: int = Field(3000, ge=1)
    enrolments_per_minute: int = Field(120, ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics: bool = False

    @property
    def control_address(self) -> tuple[str, int]:
        """Where others reach the control plane."""
        return self.public_host, self.public_control_port or self.control_port

    @property
    def own_host(self) -> str:
        """Where this machine reaches its own listeners, as it stands in a URL."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104 # read, not bound
        return f"[{host}]" if ":" in host else host

    @property
    def superlink_address(self) -> str:
        """Where others reach the SuperLink, as host:port."""
        host = f"[{self.public_host}]" if ":" in self.public_host else self.public_host
        return f"{host}:{self.public_superlink_port or self.superlink_port}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment is above the file, which arrives as arguments."""
        return env_settings, init_settings

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Raises: UsageError: an unknown key or a value that cannot be, by name."""
        try:
            content = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {explain(error)}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}") from error
        return cls.checked(content, f"{path}: ")

    @classmethod
    def checked(cls, content: Mapping[str, Any], where: str = "") -> "Settings":
        """Raises: UsageError: an unknown key or a value that cannot be, by name."""
        try:
            return cls(**content)
        except SettingsError as error:
            raise UsageError(f"{where}{error}") from error
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            raise UsageError(f"{where}{faults}") from error


class Home:
    """The coordinator's directory: where its things lie. `Home.open` also checks that others cannot read them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        pki = path / "pki"
        self.settings_file = path / "settings.toml"
        self.root_key = path / "root-key.pem"
        self.root_certificate = pki / "root.pem"
        self.membership_certificate = pki / "membership.pem"
        self.membership_key = pki / "membership.key"
        self.server_certificate = pki / "server.pem"
        self.server_key = pki / "server.key"
        self.worker_certificate = pki / "worker.pem"
        self.worker_key = pki / "worker.key"
        self.coordinator_key = pki / "coordinator.key"
        self.database_file = path / "concord.db"
        self.up_file = path / "up.json"
        self.runs = path / "runs"
        self.models = path / "models"
        self.logs = path / "logs"

    @classmethod
    def open(cls, path: Path) -> "Home":
        """Raises: UsageError: not a coordinator's directory. ArtefactError: others may read its secrets."""
        home = cls(Path(path).absolute())
        if not home.settings_file.is_file():
            raise UsageError(f"{path} is not a coordinator's directory; make one: concord server init {path} …")
        home._refuse_open_modes()
        _ = home.settings
        return home

    @property
    def directories(self) -> tuple[Path, ...]:
        return self.path, self.path / "pki", self.runs, self.models, self.logs

    @cached_property
    def settings(self) -> Settings:
        return Settings.read(self.settings_file)

    @cached_property
    def _database(self) -> Database:
        return Database(self.settings.database_url or f"sqlite:///{self.database_file}")

    def database(self) -> Database:
        """The one connection pool of this process."""
        return self._database

    def _refuse_open_modes(self) -> None:
        if os.name != "posix":
            return
        files = [self.settings_file, self.root_key, self.database_file, *self.pki_files]
        for path, wanted in [*((each, 0o700) for each in self.directories), *((each, 0o600) for each in files)]:
            if path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
                raise ArtefactError(f"{path}: others may read it (mode {mode:o}). Run: chmod {wanted:o} {path}")

    @property
    def pki_files(self) -> list[Path]:
        return [
            self.root_certificate,
            self.membership_certificate,
            self.membership_key,
            self.server_certificate,
            self.server_key,
            self.worker_certificate,
            self.worker_key,
            self.coordinator_key,
        ]
