"""`concord-node leave`: the end of a node, by its owner. What is left are the receipts."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concord_client.commands.common import Home, Yes, at_home, confirm, write
from concord_shared.commands import Json, show

if TYPE_CHECKING:
    from concord_client.home import NodeHome
    from concord_client.store import NodeStore

__all__ = ["register"]

STOP_S = 30.0


def register(app: typer.Typer) -> None:
    app.command("leave", epilog="**Example**\n\n`concord-node leave --reason 'the study is over'`")(leave)


def leave(
    reason: Annotated[str, typer.Option(help="In your words; the coordinator keeps it.")] = "",
    offline: Annotated[
        bool, typer.Option("--offline", help="Erase even if the coordinator cannot be told; hand it receipts.json.")
    ] = False,
    yes: Yes = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Leave the federation: withdraw everything, stop, be revoked, erase this node. Keeps receipts.json."""
    with at_home(home) as (opened, store):
        node = f"{opened.config.organisation}/{opened.config.node}"
        if not confirm(f"Leave as {node} and erase {opened.path}, all but receipts.json? There is no way back.", yes):
            return
        told = _leave(opened, store, reason, offline)
    _erase(opened)
    result = {"left": node, "coordinator_told": told, "receipts": str(opened.receipts)}
    show(result, as_json, lambda _: write(f"left as {node}; receipts: {opened.receipts}", *_untold(told)))


def _leave(home: "NodeHome", store: "NodeStore", reason: str, offline: bool) -> bool:
    """Everything but the erasing: an error before that leaves a node that does nothing and can try again."""
    from concord_client.approvals import withdraw_dataset
    from concord_client.control import ControlChannel
    from concord_client.evidence import exchange
    from concord_client.farewell import write_farewell
    from concord_shared.documents import Leave
    from concord_shared.errors import ConcordError, NotAllowedError, UnreachableError
    from concord_shared.signing import seal

    now = time.time()
    withdraw_dataset(home, store, None, now, "the node leaves")
    _stop_daemon(home)
    farewell = seal(Leave(node=home.config.node, reason=reason, issued_at=int(now)), home.identity_key())
    try:
        with ControlChannel(home, store) as channel:
            channel.deliver()
            with suppress(ConcordError):  # the last receipts, where there are any
                exchange(home, store, channel, now)
            channel.leave(farewell, home.config.node)
        told = True
    except NotAllowedError:
        told = False  # revoked already: nothing is left to be told
    except UnreachableError as error:
        if not offline:
            raise UnreachableError(
                f"{error}. All approvals are withdrawn here, nothing is erased. Try again, or leave with --offline and "
                "hand receipts.json to the coordinator's administrator"
            ) from error
        told = False
    write_farewell(home, store, farewell)
    return told


def _stop_daemon(home: "NodeHome") -> None:
    """Ends `concord-node up`, if it works with this home, and waits for it."""
    from concord_client.daemon_lock import running_daemon
    from concord_shared.errors import ArtefactError

    pid = running_daemon(home)
    if pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while running_daemon(home) is not None:
        if time.monotonic() > deadline:
            raise ArtefactError(
                f"concord-node up (process {pid}) does not end. All approvals are withdrawn, nothing is erased: end it "
                "and leave again"
            )
        time.sleep(0.1)


def _erase(home: "NodeHome") -> None:
    """node.toml first: from then on this is no node's home; then the keys."""
    from concord_shared.errors import ArtefactError
    from concord_shared.files import explain

    last: list[Path] = [
        path for path in home.path.iterdir() if path not in (home.config_file, home.keys, home.receipts)
    ]
    try:
        for path in (home.config_file, home.keys, *last):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ArtefactError(f"cannot erase {home.path}: {explain(error)}. Erase what is left by hand") from error


def _untold(told: bool) -> list[str]:
    return [] if told else ["the coordinator was not told, or had revoked this node before: hand it receipts.json"]
