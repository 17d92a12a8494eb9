"""`concord-node audit`: this node's own log, and what it remembers of the coordinator's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, confirm, lines, write
from concord_client.commands.common import Yes as Sure
from concord_shared.commands import Json, show

if TYPE_CHECKING:
    from concord_client.home import NodeHome
    from concord_client.store import NodeStore

__all__ = ["register"]

group = typer.Typer(help="This node's own audit log, which only grows.", no_args_is_help=True)
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.")]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="FINGERPRINT", help="Whose signature it must have; by default this node's own."),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head", metavar="SIZE:ROOT", help="A head that you remember, as `audit head` printed it; repeatable."
    ),
]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="audit")


@group.command("list", epilog="**Example**\n\n`concord-node audit list --action egress:reply --limit 20`")
def list_entries(
    action: Annotated[str | None, typer.Option(help="subject:verb, such as approval:approved.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 50,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List what was decided, received and sent, oldest first."""
    with at_home(home) as (_, store):
        found = [each for each, _ in store.log_entries() if action in (None, each.action)][-limit:]
    items = [each.model_dump(mode="json") for each in found]
    head = ("no", "at", "actor", "action", "subject")
    rows = [(each.sequence, each.at[:19], each.actor, each.action, each.subject) for each in found]
    show({"entries": items}, as_json, lambda _: lines([head, *rows]))


@group.command(epilog="**Example**\n\n`concord-node audit head`")
def head(home: Home = None, as_json: Json = False) -> None:
    """Print SIZE:ROOT of this node's log and of the coordinator's, as far as it was proven to have only grown.

    Compare the coordinator's with other partners: one who was shown another log holds another ROOT at the same SIZE.
    """
    from concord_client.evidence import own_head, remembered_head
    from concord_shared.signing import fingerprint

    with at_home(home) as (opened, store):
        held = remembered_head(store)
        own = own_head(opened, store)
        found = {
            "own": own.mark,
            "key": fingerprint(opened.identity_key().public_key()),
            "coordinator": held.mark if held else None,
        }
    show(found, as_json, lambda value: lines([(key, item or "none yet") for key, item in value.items()]))


@group.command(
    epilog="**Examples**\n\n`concord-node audit verify`\n\n`concord-node audit verify log.jsonl --head SIZE:ROOT`"
)
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="An exported log, or the proof of an entry.")
    ] = None,
    key: Key = None,
    heads: Heads = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Verify this node's log as it is stored, or a file, without asking anybody. Names the entry that was altered.

    What was cut off the end, or rewritten and signed anew, is found against a head that somebody remembers: of a
    stored log those of the coordinator's last answer are held against it when heads are exchanged.
    """
    from concord_shared.evidence.files import verify_file
    from concord_shared.evidence.heads import read_mark
    from concord_shared.evidence.log import verify_log

    marks = [read_mark(each) for each in heads or ()]
    with at_home(home) as (opened, store):
        own = _own_key(opened)
        if file is None:
            found = verify_log(_exported(opened, store), own, marks).model_dump(mode="json")
        else:
            found = verify_file(file, key or own, marks)
    show(found | {"verified": True}, as_json, lambda value: lines(value.items()))


@group.command(epilog="**Example**\n\n`concord-node audit export -o log.jsonl`")
def export(out: Out, home: Home = None, as_json: Json = False) -> None:
    """Write the whole log with a signed head to a file that anybody can verify."""
    from concord_shared.files import write_atomically

    with at_home(home) as (opened, store):
        content = _exported(opened, store)
        write_atomically(out, content)
        found = {"file": str(out), "entries": content.count(b"\n") - 1, "key": _own_key(opened)}
    show(found, as_json, lambda value: lines(value.items()))


@group.command(epilog="**Example**\n\n`concord-node audit prove 17 -o entry.json`")
def prove(
    entry: Annotated[int, typer.Argument(metavar="ENTRY", min=1, help="Its number in `audit list`.")],
    out: Out,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write one entry with the proof that it is in this log, for somebody who shall see no other."""
    from concord_client.evidence import own_head
    from concord_shared.errors import UsageError
    from concord_shared.evidence.log import GENESIS
    from concord_shared.evidence.proofs import proof_text, prove_entry
    from concord_shared.files import write_atomically
    from concord_shared.signing import seal

    with at_home(home) as (opened, store):
        signer, head = opened.identity_key(), own_head(opened, store)
        if entry > head.size:
            raise UsageError(f"there is no entry {entry}: this log has {head.size}")
        around = {each.sequence: (each, found) for each, found in store.log_entries(max(1, entry - 1), 2)}
        before = around[entry - 1][1] if entry > 1 else GENESIS
        proof = store.log_proof(entry, head.size)
        made = prove_entry(around[entry][0].canonical, before.hex(), proof, seal(head, signer), signer.public_key())
    write_atomically(out, proof_text(made))
    show({"file": str(out), "entry": entry, "head": head.mark}, as_json, lambda value: lines(value.items()))


@group.command(
    epilog="**Example**\n\n`concord-node audit accept --reason 'they put back a backup; Ben confirmed it by phone'`"
)
def accept(
    reason: Annotated[str, typer.Option(help="What you found out; it goes into the log.")],
    yes: Sure = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """End the alarm about a log that was cut or rewritten: you looked, and go on from the log as it is now."""
    from concord_client.evidence import accept_logs, alarms

    with at_home(home) as (_, store):
        for alarm in alarms(store):
            write(alarm.reason) if not as_json else None
        if not confirm("Go on from the logs as they are now?", yes):
            return
        done = accept_logs(store, reason)
    show({"accepted": [each.whose for each in done]}, as_json, lambda _: write("accepted; rounds go on"))


def _own_key(home: "NodeHome") -> str:
    from concord_shared.signing import fingerprint

    return fingerprint(home.identity_key().public_key())


def _exported(home: "NodeHome", store: "NodeStore") -> bytes:
    from concord_client.evidence import own_head
    from concord_shared.evidence.log import export_log
    from concord_shared.signing import seal

    signer, head = home.identity_key(), own_head(home, store)
    entries: list[Any] = [(each.canonical, found) for each, found in store.log_entries(1, head.size)]
    return b"".join(export_log(seal(head, signer), signer.public_key(), entries))
