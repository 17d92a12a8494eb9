"""`concord-node policy`: the owner's rules."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, write
from concord_shared.commands import Json, new_app, show
from concord_shared.errors import UsageError

__all__ = ["register"]

policy = new_app(
    "policy", "This node's own rules, in policy.toml: what a plan may ask of it, and what needs no person."
)


def register(app: typer.Typer) -> None:
    app.add_typer(policy)


@policy.command("show", epilog="**Example**\n\n`concord-node policy show`")
def show_policy(home: Home = None, as_json: Json = False) -> None:
    """Print the rules as they stand."""
    from concord_client.policy import DEFAULT, Policy

    with at_home(home) as (opened, _):
        loaded = Policy.load(opened.policy_file)
        file = opened.policy_file
    text = file.read_text("utf-8") if file.exists() else DEFAULT
    show(loaded.model_dump(mode="json"), as_json, lambda _: write(f"# {file}", text.rstrip()))


@policy.command("plugins", epilog="**Example**\n\n`concord-node policy plugins`")
def show_plugins(home: Home = None, as_json: Json = False) -> None:
    """List the wheels with models of their own that are installed here, and whether these rules allow them."""
    from concord_client.policy import Policy
    from concord_shared.models.plugins import installed_plugins

    with at_home(home) as (opened, _):
        file, allowed = opened.policy_file, Policy.load(opened.policy_file).plugins
    found = [
        {**asdict(each), "allowed": bool(each.sha256) and allowed.get(each.package) == each.sha256}
        for each in installed_plugins()
    ]

    def text(_: Any) -> None:
        if not found:
            write("no wheel that is installed here brings models")
        for each in found:
            models = ", ".join(each["models"])
            write(f"{each['package']} {each['version']}: {models}: {'allowed' if each['allowed'] else 'not allowed'}")
            if each["fault"]:
                write(f"  {each['fault']}")
            elif not each["allowed"]:
                write(f"  once you trust its code, in {file}:")
                write(f'  plugins = {{"{each["package"]}" = "{each["sha256"]}"}}')

    show({"plugins": found}, as_json, text)


@policy.command("check", epilog="**Example**\n\n`concord-node policy check heart-disease`")
def check(
    plan: Annotated[
        str, typer.Argument(help="A plan's TOML file or a shipped plan's name, to judge by the rules.")
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Read policy.toml as the node does; with a plan, say whether these rules allow it."""
    from concord_client.policy import Policy
    from concord_shared.guarantee import guarantee_of
    from concord_shared.plan import load_plan

    with at_home(home) as (opened, _):
        file, loaded = opened.policy_file, Policy.load(opened.policy_file)
    judged = load_plan(plan).plan if plan else None
    reasons = loaded.reasons(judged) if judged else ()
    guarantee = guarantee_of(judged) if judged else None
    rules = len(loaded.approvals.automatic)

    def text(_: Any) -> None:
        write(f"{file}: valid; automatic rules: {rules}")
        if plan:
            write(f"{plan}: allowed" if not reasons else f"{plan}: not allowed", *(f"  {reason}" for reason in reasons))
            write(*(guarantee.sentences() if guarantee else ["No differential privacy is promised."]))

    found = {"valid": True, "automatic_rules": rules, "allowed": not reasons, "reasons": list(reasons)}
    show(found | {"guarantee": guarantee.document() if guarantee else None}, as_json, text)
    if reasons:
        raise typer.Exit(1)


@policy.command("edit", epilog="**Example**\n\n`EDITOR=nano concord-node policy edit`")
def edit(home: Home = None) -> None:
    """Open the rules in $EDITOR; they are replaced only by ones that are valid."""
    import click

    from concord_client.home import read_settings
    from concord_client.policy import DEFAULT, Policy
    from concord_shared.files import write_atomically

    with at_home(home) as (opened, _):
        file = opened.policy_file
        draft = file.with_name("policy.draft.toml")
        before = next((each.read_text("utf-8") for each in (draft, file) if each.exists()), DEFAULT)
        after = click.edit(before, extension=".toml")
        if after is None:
            write("unchanged")
            return
        write_atomically(draft, after)
        try:
            read_settings(draft, Policy)
        except UsageError as error:
            raise UsageError(f"{error}\nThe rules stand as they were; edit again to go on with {draft.name}") from error
        draft.replace(file)
        write(f"{file}: replaced")
