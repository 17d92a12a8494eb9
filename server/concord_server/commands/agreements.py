"""`concord agreement …`: request, offer, agree, withdraw."""

import sys
import time
from typing import Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.signing import Key, OnBehalf, signing_key
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="Agreements: which datasets may serve a study, on which terms.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="AGREEMENT", help="From `concord agreement list`.")]
Cohort = Annotated[
    int | None, typer.Option("--minimum-cohort", min=1, help="No round with fewer nodes than these. Default 2.")
]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="The most rounds of a run. Default 1000.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME", help="Allow only these models; repeatable.")
]
Use = Annotated[str | None, typer.Option(help="Other terms, in words.")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="agreement")


@group.command(
    epilog="**Example**\n\n`concord agreement request heart ward-3/heart ward-4/heart --days 180 "
    "--key keys/organisation.key`"
)
def request(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    datasets: Annotated[list[str], typer.Argument(metavar="NODE/DATASET…", help="Of one owner.")],
    minimum_cohort: Cohort = None,
    rounds: Rounds = None,
    models: Models = None,
    use: Use = None,
    days: Annotated[int, typer.Option(min=1, help="How long it is to hold.")] = 365,
    agreement: Annotated[str | None, typer.Option("--id", help="Its id; made up by default.")] = None,
    key: Key = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Ask an owner to open datasets to a study, on these terms."""
    from concord_server.client_nouns import request_agreement

    terms, signer = _terms(minimum_cohort, rounds, models, use), signing_key(key)
    with coordinator() as api:
        made = request_agreement(
            api, signer, study, datasets, terms=terms, days=days, agreement=agreement, organisation=organisation
        )
    show_record(made, as_json, _show)


@group.command(
    epilog="**Examples**\n\n`concord agreement offer ID --key FILE` agrees as requested\n\n"
    "`concord agreement offer ID --rounds 50 --days 90 --key FILE` sets other terms"
)
def offer(
    agreement: Id,
    minimum_cohort: Cohort = None,
    rounds: Rounds = None,
    models: Models = None,
    use: Use = None,
    days: Annotated[int | None, typer.Option(min=1, help="How long it is to hold, from now.")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="NODE/DATASET", help="Only these; repeatable.")
    ] = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Offer what was requested: as it is, and so agreed at once, or on other terms. For the owner."""
    from concord_server.client_nouns import offer_agreement

    terms, signer = _terms(minimum_cohort, rounds, models, use), signing_key(key)
    with coordinator() as api:
        made = offer_agreement(api, signer, agreement, terms=terms, days=days, datasets=datasets or ())
    show_record(made, as_json, _show)


@group.command(epilog="**Example**\n\n`concord agreement agree ID --digest 4be1… --key FILE`")
def agree(
    agreement: Id,
    digest: Annotated[
        str | None, typer.Option(help="Of the offer that you have seen; refuses one that changed since.")
    ] = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Agree to what the owner offers; see it first with `concord agreement show`. For the requester."""
    from concord_server.client_nouns import agree as sign

    signer = signing_key(key)
    with coordinator() as api:
        show_record(sign(api, signer, agreement, digest), as_json, _show)


@group.command(epilog="**Example**\n\n`concord agreement withdraw ID --reason 'the study is over' --key FILE`")
def withdraw(
    agreement: Id,
    reason: Annotated[str, typer.Option(help="For the others to read.")] = "",
    key: Key = None,
    as_json: Json = False,
) -> None:
    """End an agreement, at once and for good; runs that live by it stop. For the owner."""
    from concord_server.client_nouns import withdraw_agreement

    signer = signing_key(key)
    with coordinator() as api:
        show_record(withdraw_agreement(api, signer, agreement, reason), as_json, _show)


@group.command("list")
def list_all(
    study: Annotated[str | None, typer.Option(metavar="STUDY")] = None,
    state: Annotated[str | None, typer.Option(help="requested, offered, agreed or withdrawn.")] = None,
    as_json: Json = False,
) -> None:
    """List agreements to which your organisation is a party."""
    columns = ("agreement", "study", "requester", "owner", "state", "datasets")
    with coordinator() as api:
        show_items(api.pages("/api/v1/agreements", study=study, state=state), columns, as_json)


@group.command()
def show(agreement: Id, as_json: Json = False) -> None:
    """Show an agreement and its terms."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/agreements/{agreement}"), as_json, _show)


def _terms(minimum_cohort: int | None, rounds: int | None, models: list[str] | None, use: str | None) -> dict[str, Any]:
    """What was asked for; the rest stays as it is."""
    given = {"minimum_cohort": minimum_cohort, "rounds_max": rounds, "use": use}
    named = {"models": tuple(models)} if models else {}
    return {field: value for field, value in given.items() if value is not None} | named


def _show(found: dict[str, Any]) -> None:
    terms = found["terms"]
    until = time.strftime("%Y-%m-%d", time.gmtime(terms["not_after"]))
    lines = [
        f"{found['agreement']}: {found['state']}",
        f"  {found['owner']} opens {', '.join(found['datasets'])}",
        f"  to the study {found['study']}, as {found['requester']} asked, until {until}",
        f"  no round with fewer than {terms['minimum_cohort']} nodes; at most {terms['rounds_max']} rounds a run",
        f"  models: {', '.join(terms['models']) or 'any that the node has installed'}",
        *([f"  {terms['use']}"] if terms["use"] else []),
        f"  digest {found['digest']}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
