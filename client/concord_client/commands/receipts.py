"""`concord-node receipts`: the coordinator's word for every Update of this node that it took."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, day, lines, write
from concord_shared.commands import Json, show

if TYPE_CHECKING:
    from concord_shared.evidence.receipts import Receipt

__all__ = ["register"]

group = typer.Typer(help="Receipts for Updates of this node.", no_args_is_help=True)
Run = Annotated[str | None, typer.Option("--run", metavar="RUN", help="Of this run only.")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="receipts")


@group.command("list", epilog="**Example**\n\n`concord-node receipts list --run heart-1`")
def list_receipts(run: Run = None, home: Home = None, as_json: Json = False) -> None:
    """List receipts, in the order of their arrival."""
    found = _read(home, run)
    head = ("receipt", "dataset", "sent", "taken at")
    rows = [(each.step, each.dataset, each.sent[:16], day(each.taken_at)) for each in found]
    items = [each.model_dump(mode="json") | {"receipt": each.step} for each in found]
    show({"receipts": items}, as_json, lambda _: lines([head, *rows]) if rows else write("no receipts yet"))


@group.command("show", epilog="**Example**\n\n`concord-node receipts show heart-1/train/3/1`")
def show_receipt(
    receipt: Annotated[str, typer.Argument(metavar="RECEIPT", help="From `concord-node receipts list`.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show all that a receipt says."""
    from concord_shared.errors import UsageError

    found = [each for each in _read(home, None) if each.step == receipt]
    if not found:
        raise UsageError(f"there is no receipt {receipt!r}; see: concord-node receipts list")
    show(found[0].model_dump(mode="json"), as_json, lambda value: lines(value.items()))


@group.command(
    epilog="**Examples**\n\n`concord-node receipts verify`\n\n"
    "`concord-node receipts verify receipts.json --root ROOT_FINGERPRINT`"
)
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="receipts.json, which `concord-node leave` left.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Of a file: the federation's root key.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Verify every receipt: the coordinator's signature, and that the log of this node says that just that was sent."""
    if file is None:
        found = _verify_stored(home)
    else:
        from concord_client.farewell import verify_farewell
        from concord_shared.errors import UsageError

        if root is None:
            raise UsageError("name the root key of the federation, which the invitation named: --root FINGERPRINT")
        found = verify_farewell(file, root.lower().replace(":", "").replace(" ", ""))
    show(found | {"verified": True}, as_json, lambda value: lines(value.items()))


def _verify_stored(home: Path | None) -> dict[str, Any]:
    from concord_client.evidence import coordinator_key, take_receipt

    with at_home(home) as (opened, store):
        key = coordinator_key(store)
        with opened.ledger(repairing=True) as ledger:
            found = [take_receipt(opened, store, ledger, envelope, key) for envelope in store.receipts()]
    return {"receipts": len(found), "runs": sorted({each.run for each in found})}


def _read(home: Path | None, run: str | None) -> "list[Receipt]":
    """Verified when they were stored."""
    from concord_shared.evidence.receipts import Receipt

    with at_home(home) as (_, store):
        return [Receipt.from_canonical(envelope.bytes) for envelope in store.receipts(run)]
