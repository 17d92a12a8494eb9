"""`concord audit …`: what happened at a coordinator, and that nobody rewrote it."""

from pathlib import Path
from typing import Annotated

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="The audit log, which only grows. For auditors of the federation.")
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.")]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head", metavar="SIZE:ROOT", help="A head that you remember, as `audit head` printed it; repeatable."
    ),
]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="audit")


@group.callback(
    invoke_without_command=True, epilog="**Example**\n\n`concord audit --action node:enrol-refused --limit 20`"
)
def audit(
    context: typer.Context,
    actor: Annotated[str | None, typer.Option(help="person:NAME, node:NAME, address:IP or coordinator.")] = None,
    action: Annotated[str | None, typer.Option(help="subject:verb, such as node:revoke.")] = None,
    subject: Annotated[str | None, typer.Option(help="What it was done to.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    as_json: Json = False,
) -> None:
    """Read the audit log, newest first; or verify, export and prove it. For federation-admins and auditors."""
    if context.invoked_subcommand is not None:
        return
    with coordinator() as api:
        found = api.pages("/api/v1/audit", limit, actor=actor, action=action, subject=subject)
        show_items(found, ("id", "at", "actor", "action", "subject", "detail"), as_json)


@group.command(epilog="**Example**\n\n`concord audit head`")
def head(as_json: Json = False) -> None:
    """Print SIZE:ROOT of the log as it is now, to hold against it later; and the key that signed it."""
    from concord_server.evidence import signed_head

    with coordinator() as api:
        found = signed_head(api)
    show_record({"head": found.head.mark, "log": found.head.log, "key": found.fingerprint}, as_json)


@group.command(
    epilog="**Examples**\n\n`concord audit verify`\n\n"
    "`concord audit verify log.jsonl --key FINGERPRINT --head SIZE:ROOT`"
)
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="An exported log, or the proof of an entry.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="FINGERPRINT", help="Whose signature a file must have.")
    ] = None,
    heads: Heads = None,
    as_json: Json = False,
) -> None:
    """Verify the coordinator's log, or a file without asking anybody; names the entry that was altered or is missing.

    What was cut off the end, or rewritten and signed anew, is found against a head that somebody remembers: nodes do,
    and you do with --head. Exit code 1 unless all of it holds.
    """
    from concord_server.evidence import exported_log
    from concord_shared.evidence.chain import plain_fingerprint
    from concord_shared.evidence.files import verify_file
    from concord_shared.evidence.heads import read_mark
    from concord_shared.evidence.log import verify_log

    marks = [read_mark(each) for each in heads or ()]
    trusted = None if key is None else plain_fingerprint(key)
    if file is not None:
        found = verify_file(file, trusted, marks)
    else:
        with coordinator() as api:
            content, signer = exported_log(api)
        found = verify_log(content, trusted or signer, marks).model_dump(mode="json")
    show_record(found | {"verified": True}, as_json)
    if trusted is None and file is not None and not as_json:
        typer.echo("compare the key with the coordinator's own: concord audit head, or name it with --key", err=True)


@group.command(epilog="**Example**\n\n`concord audit export -o log.jsonl`")
def export(out: Out, as_json: Json = False) -> None:
    """Write the whole log with its signed head to a file that anybody can verify."""
    from concord_server.evidence import exported_log
    from concord_shared.files import write_atomically

    with coordinator() as api:
        content, key = exported_log(api)
    write_atomically(out, content)
    show_record({"file": str(out), "entries": content.count(b"\n") - 1, "key": key}, as_json)


@group.command(epilog="**Example**\n\n`concord audit prove 17 -o entry.json`")
def prove(
    entry: Annotated[int, typer.Argument(metavar="ENTRY", min=1, help="Its number in `concord audit`.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write one entry with the proof that it is in the log, for somebody who shall see no other. Verified before."""
    from concord_server.evidence import entry_proof
    from concord_shared.evidence.proofs import proof_text
    from concord_shared.files import write_atomically

    with coordinator() as api:
        made, found = entry_proof(api, entry)
    write_atomically(out, proof_text(made))
    show_record({"file": str(out)} | found, as_json)


@group.command(epilog="**Example**\n\n`concord audit heads`")
def heads(as_json: Json = False) -> None:
    """List what the coordinator remembers of each node's own log; an alarm where one was cut or rewritten."""
    with coordinator() as api:
        items = api.get("/api/v1/audit/heads")["items"]
    show_items(items, ("node", "size", "received_at", "alarm"), as_json)


@group.command(epilog="**Example**\n\n`concord audit accept ward-3 --reason 'a backup was put back; ada confirmed it'`")
def accept(
    node: Annotated[str, typer.Argument(metavar="NODE")],
    reason: Annotated[str, typer.Option(help="What you found out; it goes into the log.")],
    as_json: Json = False,
) -> None:
    """End the alarm about a node's log: somebody looked, and it goes on from what the node has now."""
    with coordinator() as api:
        show_record(api.post(f"/api/v1/audit/heads/{node}/accept", {"reason": reason}), as_json)
