"""The command `concord-node`: what a partner runs beside its data."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NoReturn

import typer

from concord_client.commands import register
from concord_client.commands.common import SPECS
from concord_shared import __version__
from concord_shared.commands import Json, new_app, run_app, show

__all__ = ["main"]

app = new_app("concord-node", "A partner's node: trains on data that never leave this machine.")


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
    data: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help=SPECS,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check local data against a plan's data contract. Nothing leaves this machine."""
    from concord_client.data import read_data
    from concord_client.data.dataset import cleaning_counts
    from concord_shared.plan import load_plan

    loaded = load_plan(plan)
    rows = read_data(data, loaded.plan, loaded.simulate.data)
    told = {"plan": loaded.plan.name, "plan_digest": loaded.plan.digest, "rows": len(rows), "fits": True}
    show(told | cleaning_counts(loaded.plan, rows), as_json, _lines)


@app.command("device")
def device(
    wanted: Annotated[str, typer.Argument(help="auto, cpu, cuda or mps.")] = "auto", as_json: Json = False
) -> None:
    """Say which device would train, and in which precision `auto` would."""
    from concord_client.devices import autocast_dtype, choose_device, describe_device

    chosen = choose_device(wanted)
    precision = "fp32" if autocast_dtype("auto", chosen) is None else "bf16"
    show({"device": str(chosen), "name": describe_device(chosen), "auto_precision": precision}, as_json, _lines)


@app.command("version")
def show_version(as_json: Json = False) -> None:
    """Print versions."""
    show({"concord-node": __version__, "flwr": version("flwr"), "torch": version("torch")}, as_json, _lines)


register(app)


def main() -> NoReturn:
    run_app(app)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _lines(value: dict[str, Any]) -> None:
    sys.stdout.write("".join(f"{key}: {item}\n" for key, item in value.items()))
