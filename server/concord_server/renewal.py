"""A new membership key, and the word of it to every node."""

from pathlib import Path

from sqlmodel import col, select

from concord_server import pki
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.nodes.service import notify, publish_roster
from concord_server.nodes.tables import Node
from concord_server.nodes.trust import trust_of
from concord_server.settings import Home
from concord_shared.certificates import read_certificate

__all__ = ["renew_membership"]


def renew_membership(path: Path, root_key: Path) -> dict[str, str]:
    """Makes the key, then tells nodes: first what to trust, then a roster that the new key signed.

    Where the second half fails, the first holds; carrying it out again mends it.

    Raises:
        ArtefactError: not the root key of this federation. UnavailableError: the database cannot be used.
    """
    home = Home.open(path)
    home.database().check()
    authority = pki.renew_membership(home, root_key, utc_now())
    trust = trust_of(home.settings, authority).model_dump(mode="json")
    until = read_certificate(authority.membership_pem).not_valid_after_utc.isoformat()
    with home.database().session() as session:
        for node in session.exec(select(Node).where(col(Node.state) != "revoked").order_by(Node.name)):
            notify(session, node.name, "trust", "membership", trust)
        record(session, "coordinator", "membership:renew", home.settings.federation, not_after=until)
        roster = publish_roster(session, authority)
    return {"federation": home.settings.federation, "membership_until": until, "roster_version": str(roster.version)}
