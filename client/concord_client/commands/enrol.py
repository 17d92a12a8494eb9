"""`concord-node enrol`, `trust-organisation` and `trust-node`: who this node is, and whom it believes."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, home_path, write
from concord_shared.commands import Json, SystemCa, readable, show

__all__ = ["register"]

INVITATION_BYTES_MAX = 4096


def register(app: typer.Typer) -> None:
    app.command("enrol", epilog="**Example**\n\n`concord-node enrol 'concord://fed.example:8443/acme/acme-1#…'`")(enrol)
    app.command("trust-organisation", epilog="**Example**\n\n`concord-node trust-organisation charite 4f2a 9c1e …`")(
        trust
    )
    app.command("trust-node", epilog="**Example**\n\n`concord-node trust-node ward-b 4f2a 9c1e …`")(trust_node)


def enrol(
    invitation: Annotated[str, typer.Argument(metavar="LINE", help="The invitation, quoted; - reads it from stdin.")],
    organisation_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your organisation's public key, from your own people, to check against."),
    ] = None,
    ca: Annotated[str, typer.Option(metavar="FILE", help="Further authorities in PEM, such as a company's.")] = "",
    system_ca: SystemCa = False,
    proxy: Annotated[str, typer.Option(metavar="URL", help="A proxy, rather than that of HTTPS_PROXY.")] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Join a federation by an invitation: keys are made here and never leave."""
    from concord_client.enrolment import enrol, read_organisation_key
    from concord_shared.protocol import InvitationLine

    line = InvitationLine.parse(sys.stdin.readline(INVITATION_BYTES_MAX) if invitation == "-" else invitation)
    key = read_organisation_key(organisation_key) if organisation_key else None
    done = enrol(line, home_path(home), key, ca, proxy, system_ca=system_ca)

    def text(_: dict[str, Any]) -> None:
        write(
            f"enrolled as {line.organisation}/{line.node} in {done.home.path}, state: {done.state}",
            "",
            "This node's identity key:",
            f"  {readable(done.identity)}",
            "The coordinator's administrator must see the same before activating this node: compare by telephone.",
        )
        if not done.confirmed:
            write("", *_unconfirmed(line.organisation, done.organisation_key))
        write("", "Next: concord-node data add NAME SPEC; concord-node up")

    result = {
        "home": str(done.home.path),
        "organisation": line.organisation,
        "node": line.node,
        "state": done.state,
        "identity": done.identity,
        "organisation_key": done.organisation_key,
        "organisation_key_confirmed": done.confirmed,
    }
    show(result, as_json, text)


def trust(
    organisation: Annotated[str, typer.Argument(help="The organisation's name.")],
    fingerprint: Annotated[list[str], typer.Argument(help="Its key's fingerprint, as its own people read it to you.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Confirm that an organisation's new key is its own."""
    from concord_client.sync import trust_organisation

    with at_home(home) as (opened, store):
        applied = trust_organisation(opened, store, organisation, "".join(fingerprint), time.time())
        for refused in store.refused():
            if (refused.kind, refused.subject) == ("organisation-key", organisation):
                store.accept_refused(refused.id)
    accepted = [f"{kind} {subject}" for kind, subject in applied.accepted]
    show(
        {"organisation": organisation, "accepted": accepted},
        as_json,
        lambda _: write(f"the new key of {organisation} is trusted", *(f"accepted now: {each}" for each in accepted)),
    )


def trust_node(
    node: Annotated[str, typer.Argument(help="The other node's name.")],
    fingerprint: Annotated[list[str], typer.Argument(help="Its key's fingerprint, as its own people read it to you.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Confirm that another node's new identity key is its own, for masked rounds with it."""
    from concord_client.masked_rounds import trust_peer

    with at_home(home) as (_, store):
        trust_peer(store, node, "".join(fingerprint))
    show({"node": node}, as_json, lambda _: write(f"the key of {node} is trusted"))


def _unconfirmed(organisation: str, key: str | None) -> list[str]:
    if key is None:
        return [f"{organisation} has no key yet: the first one that the coordinator shows will be taken for its own."]
    return [
        f"The coordinator says that this is the key of your organisation {organisation}:",
        f"  {readable(key)}",
        "Ask your own people whether it is. (--organisation-key FILE checks it.)",
    ]
