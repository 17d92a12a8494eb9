"""`concord run …`, and `concord server tidy`."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.server import group as server
from concord_server.commands.signing import Key, OnBehalf, signing_key
from concord_shared.commands import Json

if TYPE_CHECKING:
    from concord_server.client import Coordinator

__all__ = ["register"]

group = typer.Typer(help="Runs of plans.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="RUN", help="From `concord run list`.")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="run")


@group.command(
    epilog="**Examples**\n\n`concord run start heart-disease --study heart --key keys/organisation.key --wait`\n\n"
    "`concord run start plan.toml --study heart --nodes ward-3,ward-4/heart --set rounds.count=20`\n\n"
    "`concord run start plan.toml --study heart --start-model DIGEST`"
)
def start(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A TOML file, or a name from `concord plans`.")],
    study: Annotated[str, typer.Option(metavar="STUDY")],
    nodes: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Who takes part; NODE/DATASET where a node has several. Default: all that agreed."
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable.")
    ] = None,
    start_model: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Go on from this model of the study.")
    ] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="Higher goes first.")] = 0,
    days: Annotated[int, typer.Option(min=1, max=365, help="How long nodes may work on it, at most.")] = 30,
    run: Annotated[str | None, typer.Option("--id", help="Its id; made up by default.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end.")] = False,
    key: Key = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Start a run: submits the plan if need be, makes the manifest and signs it with your organisation's key."""
    from concord_server.client_nouns import start_run
    from concord_server.commands.plans import explain_privacy
    from concord_shared.plan import load_plan

    loaded, signer = load_plan(plan, overrides or ()).plan, signing_key(key)
    explain_privacy(loaded)
    with coordinator() as api:
        made = start_run(
            api,
            signer,
            study,
            loaded,
            nodes=tuple(name.strip() for name in nodes.split(",") if name.strip()),
            start_model=start_model,
            priority=priority,
            days=days,
            run=run,
            organisation=organisation,
        )
        if wait:
            _watch(api, made["id"], as_json)
        else:
            show_record(made, as_json, _show)


@group.command(epilog="**Example**\n\n`concord run watch heart-disease-1f3a`")
def watch(run: Id, as_json: Json = False) -> None:
    """Follow a run to its end, from its first round; says for whom it waits. Exit code 1 unless it succeeded."""
    with coordinator() as api:
        _watch(api, run, as_json)


@group.command("list", epilog="**Example**\n\n`concord run list --study heart --state waiting`")
def list_all(
    study: Annotated[str | None, typer.Option(metavar="STUDY")] = None,
    state: Annotated[str | None, typer.Option(help="waiting, queued, running, succeeded, failed or stopped.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List runs of your studies, the newest first."""
    columns = ("id", "study", "organisation", "state", "steps", "created_at", "reason")
    with coordinator() as api:
        show_items(api.pages("/api/v1/runs", limit, study=study, state=state), columns, as_json)


@group.command()
def show(run: Id, as_json: Json = False) -> None:
    """Show a run: its state, for whom it waits, its figures."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/runs/{run}"), as_json, _show)


@group.command(epilog="**Example**\n\n`concord run statistics heart-statistics-1f3a --json`")
def statistics(run: Id, as_json: Json = False) -> None:
    """Show what a run of a plan of kind statistics found, of all nodes' rows together."""
    from concord_server.commands.statistics import show_statistics

    with coordinator() as api:
        found = api.get(f"/api/v1/runs/{run}/statistics")
    show_record(found, as_json, lambda value: show_statistics(value["found"], value["plan"]))


@group.command()
def stop(run: Id, as_json: Json = False) -> None:
    """Stop a run. One that has begun keeps the model of its last round; another run can start from it."""
    with coordinator() as api:
        show_record(api.post(f"/api/v1/runs/{run}/stop"), as_json, _show)


@group.command(epilog="**Example**\n\n`concord run export heart-1 -o heart-1.capsule`")
def export(
    run: Id,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.")],
    as_json: Json = False,
) -> None:
    """Write all evidence of a run that ended to one signed file, and verify it: `concord verify` does so anywhere."""
    from concord_server.evidence import export_run
    from concord_shared.evidence.commands import show_capsule

    with coordinator() as api:
        found = export_run(api, run, out)
    show_record({"file": str(out)} | found, as_json, show_capsule)


@group.command(epilog="**Example**\n\n`concord run lift heart-1 ward-a --reason 'a paediatric ward; checked by phone'`")
def lift(
    run: Id,
    node: Annotated[str, typer.Argument(metavar="NODE", help="In quarantine, as `concord run show` says.")],
    reason: Annotated[str, typer.Option(help="For the audit log.")] = "",
    as_json: Json = False,
) -> None:
    """Have a robust run ask a node again that it left out, from its next step to its end, whatever the node sends."""
    with coordinator() as api:
        found = api.post(f"/api/v1/runs/{run}/quarantine/{quote(node, safe='')}/lift", {"reason": reason})
        show_record(found, as_json, _show)


@group.command()
def logs(
    run: Id,
    limit: Annotated[int, typer.Option(min=1, max=5000, help="The last so many lines.")] = 200,
    as_json: Json = False,
) -> None:
    """Print what the coordinator's workers logged of a run."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/runs/{run}/logs", limit=limit), as_json, _show_log)


@server.command(epilog="**Example**\n\n`concord server tidy /srv/concord --dry-run`")
def tidy(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's directory.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old checkpoints by the settings retention_days and checkpoint_quota_mb.

    Never a released model, the last model of a run, or one that a run yet to end starts from.
    """
    from concord_server.database import utc_now
    from concord_server.runs.retention import tidy as remove
    from concord_server.settings import Home

    home = Home.open(directory)
    home.database().check()
    limits = (home.settings.retention_days, home.settings.checkpoint_quota_mb << 20)
    with home.database().session() as session:
        gone = remove(session, home.path, utc_now(), *limits, dry_run=dry_run)
    found = {"removed": not dry_run, "bytes": sum(each.size for each in gone), "files": [each.path for each in gone]}
    show_record(found, as_json, _show_tidied)


def _watch(api: "Coordinator", run: str, as_json: bool) -> None:
    from concord_server.commands.watching import watch as follow

    report = follow(api, run)
    show_record(report, as_json, _show)
    if report["state"] != "succeeded":
        raise typer.Exit(1)


def _show(found: dict[str, Any]) -> None:
    from concord_server.commands.watching import robust_lines, state_lines

    head, *waits = state_lines(found, time.time())
    lines = [
        f"{found['id']}: {head}",
        *(f"  {line}" for line in waits),
        f"  plan {found['plan_digest'][:16]}…, study {found['study']}, started by {found['created_by']} of "
        f"{found['organisation']}",
        f"  nodes: {', '.join(found['nodes'])}; {found['steps']} steps done",
    ]
    lines += [f"  {line}" for line in robust_lines(found.get("robust"))]
    summary = found.get("summary") or {}
    if "statistics" in summary:
        lines.append(f"  statistics: concord run statistics {found['id']}")
    elif "model_digest" in summary:
        lines.append(f"  model {summary['model_digest']}")
    metrics = summary.get("metrics") or {}
    figures = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))]
    if figures:
        lines.append(f"  {', '.join(figures)}")
    sys.stdout.write("\n".join(lines) + "\n")


def _show_log(found: dict[str, Any]) -> None:
    for item in found["items"]:
        sys.stdout.write(json.dumps(item, ensure_ascii=False) + "\n")


def _show_tidied(found: dict[str, Any]) -> None:
    verb = "removed" if found["removed"] else "would remove"
    sys.stdout.write("".join(f"{path}\n" for path in found["files"]))
    sys.stdout.write(f"{verb} {len(found['files'])} files, {found['bytes'] / 1e6:.1f} MB\n")
