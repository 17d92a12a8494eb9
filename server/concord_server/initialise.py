"""A new coordinator's directory: keys, certificates, settings, database, the first administrator."""

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from sqlmodel import Session, select

from concord_server import pki
from concord_server.database import utc_now
from concord_server.nodes.service import publish_roster
from concord_server.organisations import service as organisations
from concord_server.people import service as people
from concord_server.people.tables import Person
from concord_server.settings import Home, Settings
from concord_shared.errors import ArtefactError, UsageError
from concord_shared.files import explain, write_atomically
from concord_shared.signing import new_identity_key, write_private_key

__all__ = ["Initialised", "initialise"]


@dataclass(frozen=True)
class Initialised:
    """token: the first administrator's, shown once and kept nowhere."""

    directory: str
    federation: str
    admin: str
    token: str
    root_fingerprint: str
    root_key: str


def initialise(path: Path, settings: Mapping[str, Any], admin: str, organisation: str | None = None) -> Initialised:
    """Makes everything of a coordinator in `path`, or nothing.

    settings: what settings.toml is to say; organisation: the first one, which the administrator belongs to.

    Raises:
        UsageError: the directory is not empty, or a setting is not valid.
        ArtefactError: it cannot be written.
    """
    Settings.checked(settings)
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is there already and not empty; name a new directory")
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    before = os.umask(0o077)
    try:
        home = _lay_out(fresh, settings)
        made = _begin(home, admin, organisation)
        home.database().close()
        fresh.rename(path)
    except OSError as error:
        raise ArtefactError(f"cannot make {path}: {explain(error)}") from error
    finally:
        os.umask(before)
        shutil.rmtree(fresh, ignore_errors=True)
    return Initialised(
        directory=str(path),
        federation=home.settings.federation,
        admin=admin,
        token=made[0],
        root_fingerprint=made[1],
        root_key=str(path / home.root_key.name),
    )


def _lay_out(path: Path, settings: Mapping[str, Any]) -> Home:
    home = Home(path)
    for directory in home.directories:
        directory.mkdir(mode=0o700, parents=directory == path)
    write_atomically(home.settings_file, tomli_w.dumps(dict(settings)))
    return home


def _begin(home: Home, admin: str, organisation: str | None) -> tuple[str, str]:
    """Keys, certificates and the first rows. Returns the administrator's token and the root's fingerprint."""
    now = utc_now()
    root_key, root_pem = pki.make_root(home.settings.federation, now)
    write_private_key(home.root_key, root_key)
    write_atomically(home.root_certificate, root_pem)
    write_private_key(home.coordinator_key, new_identity_key())
    authority = pki.renew_membership(home, home.root_key, now)
    database = home.database()
    database.upgrade()
    with database.session() as session:
        if session.exec(select(Person)).first() is not None:
            raise UsageError("this database is another coordinator's; name an empty one with --database-url")
        token = _first_rows(session, admin, organisation)
        publish_roster(session, authority)
    return token, authority.root_fingerprint


def _first_rows(session: Session, admin: str, organisation: str | None) -> str:
    actor = "coordinator"
    if organisation is not None:
        organisations.create(session, actor, organisations.NewOrganisation(name=organisation))
    person = people.add_person(session, actor, admin, organisation)
    people.write_grant(session, actor, person, people.Grant(role="federation-admin"))
    if organisation is not None:
        people.write_grant(session, actor, person, people.Grant(role="org-admin", organisation=organisation))
    made = people.issue_token(session, actor, person, people.NewToken(title="first administrator"))
    return made.token
