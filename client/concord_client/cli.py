"""The command `concord-node`: what a partner runs beside its data."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NoReturn

import typer

from concord_shared import __version__
from concord_shared.errors import ConcordError

__all__ = ["main"]

app = typer.Typer(
    name="concord-node",
    help="A partner's node: trains on data that never leave this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
INTERRUPTED = 130
"""What typer returns where Ctrl-C ended a command."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]


@app.callback()
def _about() -> None:
    """Says so where both distributions are installed: they hold the same files, and must not be mixed."""
    if _installed("concord") and _installed("concord-node"):
        sys.stderr.write(
            "warning: concord and concord-node are both installed; uninstall one, they hold the same files\n"
        )


@app.command("check", epilog="**Example**\n\n`concord-node check heart.toml --data csv:patients.csv`")
def check(
    plan: Annotated[str, typer.Argument(help="A plan's TOML file, or a shipped plan's name.")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="csv:FILE, parquet:FILE, npz:FILE, idx:DIR, images:DIR.")],
    as_json: Json = False,
) -> None:
    """Check local data against a plan's data contract. Nothing leaves this machine."""
    from concord_client.data import read_data
    from concord_shared.plan import load_plan

    loaded = load_plan(plan)
    rows = len(read_data(data, loaded.plan, loaded.simulate.data))
    _show({"plan": loaded.plan.name, "plan_digest": loaded.plan.digest, "rows": rows, "fits": True}, as_json)


@app.command("device")
def device(
    wanted: Annotated[str, typer.Argument(help="auto, cpu, cuda or mps.")] = "auto", as_json: Json = False
) -> None:
    """Say which device would train, and in which precision `auto` would."""
    from concord_client.devices import autocast_dtype, choose_device, describe_device

    chosen = choose_device(wanted)
    precision = "fp32" if autocast_dtype("auto", chosen) is None else "bf16"
    _show({"device": str(chosen), "name": describe_device(chosen), "auto_precision": precision}, as_json)


@app.command("version")
def show_version(as_json: Json = False) -> None:
    """Print versions."""
    _show({"concord-node": __version__, "flwr": version("flwr"), "torch": version("torch")}, as_json)


def main() -> NoReturn:
    """Exit codes: 0 ok, 1 something failed, 2 wrong use."""
    try:
        if app(standalone_mode=False) == INTERRUPTED:
            sys.stderr.write("error: stopped\n")
            sys.exit(1)
    except ConcordError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line's own usage errors
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        raise
    sys.exit(0)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _show(value: dict[str, Any], as_json: bool) -> None:
    text = json.dumps(value) if as_json else "\n".join(f"{key}: {item}" for key, item in value.items())
    sys.stdout.write(text + "\n")
