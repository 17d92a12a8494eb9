"""`concord plan …`: plans of studies. (`concord plans` lists the shipped ones.)"""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.signing import OnBehalf
from concord_shared.commands import Json

if TYPE_CHECKING:
    from concord_shared.plan import Plan

__all__ = ["explain_privacy", "register"]

group = typer.Typer(help="Plans that were submitted to studies.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="plan")


@group.command(
    epilog="**Examples**\n\n`concord plan submit heart-disease --study heart`\n\n"
    "`concord plan submit plan.toml --study heart --set rounds.count=20`"
)
def submit(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A TOML file, or a name from `concord plans`.")],
    study: Annotated[str, typer.Option(metavar="STUDY")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable.")
    ] = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Submit a plan to a study; the nodes whose data serve it are asked to decide."""
    from concord_server.client_nouns import submit_plan
    from concord_shared.plan import load_plan

    loaded = load_plan(plan, overrides or ()).plan
    explain_privacy(loaded)
    with coordinator() as api:
        show_record(_told(submit_plan(api, study, loaded, organisation), as_json), as_json)


@group.command("list")
def list_all(
    study: Annotated[str | None, typer.Option(metavar="STUDY")] = None,
    as_json: Json = False,
) -> None:
    """List plans of your studies."""
    with coordinator() as api:
        show_items(
            api.pages("/api/v1/plans", study=study), ("digest", "name", "model", "rounds", "created_at"), as_json
        )


@group.command(epilog="**Example**\n\n`concord plan show DIGEST > plan.toml`")
def show(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="From `concord plan list`.")], as_json: Json = False
) -> None:
    """Print a plan as a file that `concord simulate` takes, every default written out."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/plans/{digest}"), as_json, _show_toml)


def explain_privacy(plan: "Plan") -> None:
    """Says on standard error what a robust plan means, to whoever chooses it; other modes are what people expect."""
    if plan.privacy.mode == "robust":
        sys.stderr.write(
            f"privacy.mode = robust: the coordinator sees each node's Update, and every approval says so; combined by "
            f"{plan.privacy.rule}, up to {plan.privacy.attackers} nodes that work against the others are tolerated, "
            f"and a round needs {2 * plan.privacy.attackers + 1} Updates. Every node counts the same\n"
        )


def _told(found: dict[str, Any], as_json: bool) -> dict[str, Any]:
    return found if as_json else {key: value for key, value in found.items() if key != "document"}


def _show_toml(found: dict[str, Any]) -> None:
    import tomli_w

    if promised := found["guarantee"]:
        for key in ("unit", "epsilon", "delta", "mechanism", "against"):
            sys.stdout.write(f"# differential privacy, {key}: {promised[key]}\n")
        for each in promised["not_covered"]:
            sys.stdout.write(f"# not covered: {each}\n")
    document = {key: value for key, value in found["document"].items() if key != "schema"}
    sys.stdout.write(tomli_w.dumps(_without_nulls(document)))


def _without_nulls(value: Any) -> Any:
    """TOML has no null: an absent key means the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
