"""`concord person …` and `concord token …`."""

import sys
from typing import Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_shared.commands import Json
from concord_shared.errors import UsageError

__all__ = ["register"]

people = typer.Typer(help="People and their roles.", no_args_is_help=True)
tokens = typer.Typer(help="Tokens that people and programs sign in with.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME")]
Role = Annotated[
    str, typer.Argument(metavar="ROLE", help="federation-admin, org-admin, data-steward, researcher or auditor.")
]
Where = Annotated[
    str | None,
    typer.Option("--organisation", metavar="NAME", help="Where the role holds; left out: in all of the federation."),
]


def register(app: typer.Typer) -> None:
    app.add_typer(people, name="person")
    app.add_typer(tokens, name="token")


@people.command(epilog="**Example**\n\n`concord person create ada --organisation hospital-a --role org-admin`")
def create(
    name: Name,
    organisation: Annotated[str | None, typer.Option(help="The organisation that the person belongs to.")] = None,
    roles: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="ROLE[@ORG|@*]", help="A role in the own organisation; @* for the federation."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Admit a person. A token for them is made with `concord token create --person NAME`."""
    grants = [_grant(role, organisation) for role in roles or ()]
    body = {"name": name, "organisation": organisation, "roles": grants}
    with coordinator() as api:
        show_record(api.post("/api/v1/people", body), as_json, _show_person)


@people.command("list")
def list_people(as_json: Json = False) -> None:
    """List people and their roles."""
    with coordinator() as api:
        found = list(api.pages("/api/v1/people"))
    shown = [each if as_json else {**each, "roles": _roles(each)} for each in found]
    show_items(shown, ("name", "organisation", "roles"), as_json)


@people.command(epilog="**Example**\n\n`concord person grant ada researcher --organisation hospital-a`")
def grant(name: Name, role: Role, organisation: Where = None, as_json: Json = False) -> None:
    """Grant a role."""
    body = {"role": role, "organisation": organisation}
    with coordinator() as api:
        show_record(api.post(f"/api/v1/people/{name}/roles", body), as_json, _show_person)


@people.command()
def withdraw(name: Name, role: Role, organisation: Where = None, as_json: Json = False) -> None:
    """Take a role away."""
    with coordinator() as api:
        found = api.delete(f"/api/v1/people/{name}/roles/{role}", organisation=organisation)
        show_record(found, as_json, _show_person)


@tokens.command(
    "create", epilog="**Example**\n\n`concord token create --person ada --days 30 --scope read --scope runs:write`"
)
def create_token(
    person: Annotated[str | None, typer.Option(help="For whom; left out: for yourself.")] = None,
    title: Annotated[str, typer.Option(help="What it is for.")] = "",
    days: Annotated[int, typer.Option(min=1, max=365, help="How long it holds.")] = 90,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, write, or for one noun: runs:write. Repeatable; default read and write."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a token. It is shown this once."""
    body = {"person": person, "title": title, "days": days, "scopes": scopes or ["read", "write"]}
    with coordinator() as api:
        show_record(api.post("/api/v1/tokens", body), as_json, lambda made: sys.stdout.write(made["token"] + "\n"))


@tokens.command("list")
def list_tokens(as_json: Json = False) -> None:
    """List your tokens; a federation-admin sees everyone's."""
    columns = ("id", "person", "title", "scopes", "expires_at", "revoked_at", "last_used_at")
    with coordinator() as api:
        show_items(api.pages("/api/v1/tokens"), columns, as_json)


@tokens.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="From `concord token list`.")], as_json: Json = False
) -> None:
    """Revoke a token, at once."""
    with coordinator() as api:
        show_record(api.delete(f"/api/v1/tokens/{token_id}"), as_json)


def _grant(text: str, organisation: str | None) -> dict[str, str | None]:
    """`researcher`, `researcher@hospital-a`, `auditor@*`."""
    role, _, where = text.partition("@")
    if role == "federation-admin" or where == "*":
        return {"role": role, "organisation": None}
    if not where and organisation is None:
        raise UsageError(f"--role {role}: say where it holds: {role}@ORGANISATION, or {role}@* for the federation")
    return {"role": role, "organisation": where or organisation}


def _roles(person: dict[str, Any]) -> str:
    return ", ".join(f"{each['role']}@{each['organisation'] or '*'}" for each in person["roles"])


def _show_person(person: dict[str, Any]) -> None:
    show_record({**person, "roles": _roles(person)}, False)
