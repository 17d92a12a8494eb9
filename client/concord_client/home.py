"""A node's home: one directory with its keys, certificates, settings and database, for its owner's eyes only."""

import datetime
import difflib
import getpass
import json
import os
import ssl
import stat
import tomllib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, Field, ValidationError

from concord_client.store import NodeStore
from concord_shared.certificates import membership_key
from concord_shared.errors import ArtefactError, UsageError
from concord_shared.files import explain, write_atomically
from concord_shared.plan.section import Name
from concord_shared.signing import PublicKey, Record, read_private_key

if TYPE_CHECKING:
    from concord_client.ledger.ledger import PrivacyLedger

__all__ = ["NodeConfig", "NodeHome", "default_home", "person", "read_settings"]

SETTINGS_BYTES_MAX = 1 << 20
FOLDERS = ("keys", "states", "personal", "models", "logs", "withdrawn")
Settings = TypeVar("Settings", bound=BaseModel)


class NodeConfig(Record):
    """node.toml: who this node is and where its coordinator is.

    superlink: host:port of Flower's fleet. root: the fingerprint of the federation's root key, pinned. ca: a file of
    further authorities, such as a company's. system_ca: the coordinator shows a certificate of a public authority.
    proxy: a URL; empty for what HTTPS_PROXY and NO_PROXY say.
    """

    federation: Name
    organisation: Name
    node: Name
    url: str = Field(pattern=r"^https://[^/\s]+$")
    superlink: str = Field(pattern=r"^[^/\s]+:\d{1,5}$")
    root: str = Field(pattern="^[0-9a-f]{64}$")
    ca: str = ""
    system_ca: bool = False
    proxy: str = ""

    @property
    def spiffe(self) -> str:
        return f"spiffe://{self.federation}/{self.organisation}/{self.node}"


class NodeHome:
    """The paths below one directory, and what lies there.

    A home without node.toml is not enrolled; that file is written last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def prepare(cls, path: Path) -> "NodeHome":
        """A new or existing directory with its folders, closed to others; not yet enrolled.

        Raises:
            ArtefactError: it cannot be made, or is open to others.
        """
        home = cls(path)
        try:
            for folder in (path, *(path / name for name in FOLDERS)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"cannot make the node's home {path}: {explain(error)}") from error
        home._check_modes()
        return home

    @classmethod
    def create(cls, path: Path, config: NodeConfig, root: str, membership: str, chain: str) -> "NodeHome":
        """Enrolled from here on: certificates (PEM) and settings are in place, beside the keys made before."""
        home = cls.prepare(path)
        write_atomically(home.root, root)
        write_atomically(home.membership, membership)
        write_atomically(home.certificate, chain)
        home.write_config(config)
        return home

    @classmethod
    def open(cls, path: Path) -> "NodeHome":
        """An enrolled home.

        Raises:
            ArtefactError: it is not there, open to others, or its settings cannot be read.
        """
        home = cls(path)
        if not home.config_file.is_file():
            raise ArtefactError(
                f"{path} is not the home of an enrolled node. Enrol with: concord-node enrol 'concord://…', or name "
                "another home with --home DIR or $CONCORD_NODE_HOME"
            )
        home._check_modes()
        _ = home.config
        return home

    # Paths

    @property
    def config_file(self) -> Path:
        return self.path / "node.toml"

    @property
    def policy_file(self) -> Path:
        return self.path / "policy.toml"

    @property
    def database(self) -> Path:
        return self.path / "node.db"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.db"

    @property
    def certificate(self) -> Path:
        return self.path / "certificate.pem"

    @property
    def root(self) -> Path:
        return self.path / "root.pem"

    @property
    def membership(self) -> Path:
        return self.path / "membership.pem"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def states(self) -> Path:
        return self.path / "states"

    @property
    def personal(self) -> Path:
        return self.path / "personal"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def withdrawn(self) -> Path:
        return self.path / "withdrawn"

    def schema_file(self, dataset: str) -> Path:
        """What the owner is shown of a table, to correct it: it holds ranges and categories."""
        return self.path / "schemas" / f"{dataset}.toml"

    @property
    def receipts(self) -> Path:
        return self.path / "receipts.json"

    @property
    def daemon_pid(self) -> Path:
        """The process id of `concord-node up`, while it runs."""
        return self.path / "daemon.pid"

    def key_file(self, name: str) -> Path:
        """name: tls, identity or flower."""
        return self.keys / f"{name}.key"

    def withdrawn_marker(self, study: str, plan_digest: str, dataset: str) -> Path:
        """While this file is there, nothing is done under the approval of this plan, dataset and study."""
        return self.withdrawn / f"{study}.{dataset}.{plan_digest}"

    # What lies there

    @cached_property
    def config(self) -> NodeConfig:
        return read_settings(self.config_file, NodeConfig)

    def certificate_pem(self) -> str:
        return _text(self.certificate)

    def write_config(self, config: NodeConfig) -> None:
        write_atomically(self.config_file, tomli_w.dumps(config.model_dump()))
        self.__dict__.pop("config", None)

    @property
    def is_enrolled(self) -> bool:
        return self.config_file.is_file()

    def store(self) -> NodeStore:
        return NodeStore(self.database)

    def ledger(self, repairing: bool = False) -> "PrivacyLedger":
        """Raises: LedgerDamagedError: it was altered or rolled back; nothing is trained then."""
        from concord_client.ledger.ledger import PrivacyLedger
        from concord_shared.accounting import ORDERS

        orders = tuple(float(order) for order in ORDERS)
        return PrivacyLedger(
            self.ledger_file, self.config.node, self.identity_key(), orders, by=person(), repairing=repairing
        )

    def tls_key(self) -> EllipticCurvePrivateKey:
        return self._curve_key("tls")

    def flower_key(self) -> EllipticCurvePrivateKey:
        return self._curve_key("flower")

    def identity_key(self) -> Ed25519PrivateKey:
        key = read_private_key(self.key_file("identity"))
        if not isinstance(key, Ed25519PrivateKey):
            raise ArtefactError(f"{self.key_file('identity')}: expected an Ed25519 key")
        return key

    def root_pem(self) -> str:
        return _text(self.root)

    def membership_pem(self) -> str:
        return _text(self.membership)

    def membership_key(self, now: datetime.datetime) -> PublicKey:
        """The key that signs rosters. Raises: DocumentRefusedError: the chain from the pinned root is broken."""
        return membership_key(self.root_pem(), self.membership_pem(), self.config.root, now)

    def tls_context(self) -> ssl.SSLContext:
        """For connections to the coordinator: this node's certificate; trusts the federation's root, and the further
        authorities of the settings.

        Raises:
            ArtefactError: a certificate or key is missing, damaged or open to others.
        """
        self.tls_key()  # refuses a key that others may read
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        add_authorities(context, self.root_pem(), self.config.ca, self.config.system_ca)
        try:
            context.load_cert_chain(self.certificate, self.key_file("tls"))
        except (OSError, ssl.SSLError) as error:
            raise ArtefactError(f"{self.certificate}: not this node's certificate: {error}") from error
        return context

    def _curve_key(self, name: str) -> EllipticCurvePrivateKey:
        key = read_private_key(self.key_file(name))
        if not isinstance(key, EllipticCurvePrivateKey):
            raise ArtefactError(f"{self.key_file(name)}: expected an elliptic-curve key")
        return key

    def _check_modes(self) -> None:
        """Keys and the list of datasets are nobody else's business."""
        if os.name != "posix":
            return
        for folder in (self.path, self.keys):
            if folder.is_dir() and (mode := stat.S_IMODE(folder.stat().st_mode)) & 0o077:
                raise ArtefactError(f"{folder}: others may enter (mode {mode:o}). Run: chmod 700 {folder}")


def person() -> str:
    """Who gives this command."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "operator"


def default_home() -> Path:
    """$CONCORD_NODE_HOME, or else ~/.concord-node."""
    return Path(os.environ.get("CONCORD_NODE_HOME") or Path.home() / ".concord-node").expanduser()


def add_authorities(context: ssl.SSLContext, root: str, ca: str, system_ca: bool) -> None:
    """Whom a connection trusts to say who the coordinator is."""
    try:
        context.load_verify_locations(cadata=root)
        if ca:
            context.load_verify_locations(cafile=Path(ca).expanduser())
    except (OSError, ssl.SSLError) as error:
        raise ArtefactError(f"cannot read the authorities {ca or 'of the federation'}: {error}") from error
    if system_ca:
        context.load_default_certs()


def read_settings(path: Path, schema: type[Settings]) -> Settings:
    """A TOML file as `schema`; every mistake is named, an unknown key with what was probably meant.

    Raises:
        ArtefactError: it cannot be read.
        UsageError: it is not TOML, or not valid; one line for each mistake.
    """
    try:
        if path.stat().st_size > SETTINGS_BYTES_MAX:
            raise UsageError(f"{path}: expected at most {SETTINGS_BYTES_MAX} bytes")
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    try:
        return schema.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise UsageError("\n".join(_explain(path, schema, item) for item in error.errors(include_url=False))) from error


def _explain(path: Path, schema: type[BaseModel], item: Mapping[str, Any]) -> str:
    where = f"{path}: {'.'.join(str(part) for part in item['loc'])}"
    if item["type"] == "extra_forbidden":
        known = list(_keys_at(schema, item["loc"][:-1]))
        near = difflib.get_close_matches(str(item["loc"][-1]), known, 1, 0.5)
        return f"{where}: unknown key. " + (f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}")
    if item["type"] == "missing":
        return f"{where}: missing"
    message = str(item["msg"]).replace("Input should be", "expected").replace("Value error, ", "")
    return f"{where}: {message}, got {json.dumps(item['input'], default=str)[:80]}"


def _keys_at(schema: type[BaseModel], loc: tuple[int | str, ...]) -> Iterator[str]:
    """The keys of the section that a location leads to."""
    for part in loc:
        field = schema.model_fields.get(str(part)) if isinstance(part, str) else None
        schema = next(_models_in(field.annotation), schema) if field else schema
    yield from schema.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {explain(error)}. Enrol again, or restore it") from error
