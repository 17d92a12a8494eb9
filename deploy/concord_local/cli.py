"""The command `concord`. Each command imports what it needs when it runs: `concord --help` imports no torch."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from concord_server.commands import register_commands
from concord_shared.commands import Json, new_app, run_app, show
from concord_shared.errors import UsageError
from concord_shared.pretrained import commands as pretrained

__all__ = ["main"]

app = new_app("concord", "Train one model over many partners' data; the data stay where they are.")
bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan, e.g. rounds.count=5."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="digits, idx:DIR, csv:FILE, parquet:FILE, npz:FILE, images:DIR, or a DIR that the plan knows.",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")]
OneNode = Annotated[
    str | None, typer.Option("--node", metavar="NAME", help="With the part of the model that stayed at this node.")
]


@app.command(
    epilog="""
**Examples**

`concord simulate` · digits over 10 uneven nodes, about half a minute

`concord simulate fashion-cnn --data idx:fashion_mnist --compare`

`concord simulate heart-disease --data DIR --seeds 5 --json`

`concord simulate mnist-cnn --set rounds.count=3 --faults dropout:0.2,slow:3`

`concord simulate --attack scale:-10 --attackers 3 --set privacy.mode=robust --set privacy.attackers=3`

`concord simulate --engine ray` · the same models on Flower's simulation runtime

`concord simulate --resume runs/digits-cnn-20260101-120000`
"""
)
def simulate(
    plan: Annotated[str, typer.Argument(help="A TOML file, or a name from `concord plans`.")] = "digits-cnn",
    data: Data = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes.")] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="iid, dirichlet:ALPHA, shards:K, quantity:ALPHA, grouped:COLUMN, natural:COLUMN, or directory (one "
            "for each node).",
        ),
    ] = None,
    overrides: Set = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; default one for each core.")] = None,
    seeds: Annotated[int | None, typer.Option(metavar="K", help="Run seeds 0…K−1; metrics are means.")] = None,
    faults: Annotated[str, typer.Option(metavar="SPEC", help="Faults on purpose, e.g. dropout:0.2,slow:3.")] = "",
    attack: Annotated[
        str,
        typer.Option(metavar="SPEC", help="A drill: label-flip, sign-flip, scale:-10, alie, free-rider or nan."),
    ] = "",
    attackers: Annotated[
        int | None, typer.Option(metavar="F", help="With --attack: how many nodes do it, drawn by the plan's seed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory; default runs/NAME-TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with a run that was stopped.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train each node alone, and all data pooled.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION", help="An own nn.Module, on this machine only.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="What carries messages to the nodes: local, or ray (Flower's simulation runtime).")
    ] = "local",
    ray_address: Annotated[
        str, typer.Option(metavar="ADDR", help="With --engine ray: a Ray cluster, to train on all its machines.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine."""
    from concord_local import progress
    from concord_local.simulation import simulate as run

    chosen = (data, nodes, partition, overrides, workers, seeds, faults, out, compare, model, ray_address, attack)
    if resume is not None and (any((*chosen, attackers)) or (plan, device, engine) != ("digits-cnn", "auto", "local")):
        raise UsageError("--resume goes on with a run as it began; leave the other options out")
    with progress.observer() as observer:
        result = run(
            plan,
            data=data,
            nodes=nodes,
            partition=partition,
            overrides=overrides or (),
            workers=workers,
            seeds=seeds,
            faults=faults,
            out=out,
            resume=resume,
            compare=compare,
            model=model,
            device=device,
            engine=engine,
            ray_address=ray_address,
            attack=attack,
            attackers=attackers,
            observer=observer,
        )
    show(result.summary, as_json, progress.show_result)


@app.command(
    epilog="""
**Examples**

`concord check heart-disease --data DIR`

`concord check plan.toml --data csv:patients.csv --nodes 5 --json`
"""
)
def check(
    plan: Annotated[str, typer.Argument(help="A TOML file, or a name from `concord plans`.")] = "digits-cnn",
    data: Data = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="SPEC", help="As of `concord simulate`.")] = None,
    overrides: Set = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check data against a plan, and try two batches at each node of a simulation: times, bytes, memory.

    What `concord study preflight` asks of real nodes. Exit code 1 unless all are go.
    """
    from concord_local.preflight import check as run
    from concord_server.commands.preflights import show_matrix

    found = run(plan, data=data, nodes=nodes, partition=partition, overrides=overrides or (), device=device)
    show(found, as_json, show_matrix)
    if not found["go"]:
        raise typer.Exit(1)


@app.command(
    epilog="""
**Examples**

`concord estimate fashion-cnn --data idx:fashion_mnist`

`concord estimate plan.toml --data csv:patients.csv --nodes 5 --json`

`concord estimate digits-cnn --set privacy.mode=private` · with what masks add
"""
)
def estimate(
    plan: Annotated[str, typer.Argument(help="A TOML file, or a name from `concord plans`.")] = "digits-cnn",
    data: Data = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="SPEC", help="As of `concord simulate`.")] = None,
    overrides: Set = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; default one for each core.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say what a plan will cost before it runs: time, bytes and memory, from two batches."""
    from concord_local.estimate import estimate as run
    from concord_local.estimate import show_estimate

    found = run(
        plan, data=data, nodes=nodes, partition=partition, overrides=overrides or (), workers=workers, device=device
    )
    show(found, as_json, show_estimate)


@app.command(
    epilog="""
**Examples**

`concord demo` · a coordinator and three nodes as processes, about a minute

`concord demo --plan heart-disease --data DIR` · four hospitals

`concord demo --keep` · leaves their homes to look at
"""
)
def demo(
    plan: Annotated[str, typer.Option(help="A TOML file, or a name from `concord plans`.")] = "digits-cnn",
    data: Data = None,
    nodes: Annotated[int | None, typer.Option(help="How many partners.")] = None,
    overrides: Set = None,
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove the homes of coordinator and nodes.")] = False,
    as_json: Json = False,
) -> None:
    """Run a real federation on this machine: separate processes and homes, over TLS, from invitation to prediction."""
    from concord_local import progress
    from concord_local.demo import demo as run

    with progress.observer() as observer:
        summary = run(plan, data=data, nodes=nodes, overrides=overrides or (), keep=keep, observer=observer)
    show(summary, as_json, progress.show_demo)


@app.command(
    epilog="**Examples**\n\n`concord plans`\n\n`concord plans digits-cnn` prints a plan to start an own one from\n\n"
    "`concord plans --together`"
)
def plans(
    name: Annotated[str | None, typer.Argument(help="Print this plan's file.")] = None,
    together: Annotated[
        bool,
        typer.Option("--together", help="Which models, strategies and privacy go together, found by trying."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the plans that come with concord, or print one."""
    from concord_local import catalogue

    if together:
        from concord_local.together import show_together, what_goes_together

        show({"together": what_goes_together()}, as_json, show_together)
    elif name is None:
        show(catalogue.list_plans(), as_json, catalogue.show_plans)
    else:
        show(catalogue.one_plan(name), as_json, lambda plan: sys.stdout.write(plan["text"]))


@app.command(epilog="**Example**\n\n`concord sweep digits-cnn --set training.learning_rate=0.01,0.03,0.1 --seeds 3`")
def sweep(
    plan: Annotated[str, typer.Argument(help="A TOML file, or a name from `concord plans`.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=A,B,C", help="Values to try; several keys make a grid.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each point of the grid.")] = 1,
    data: Data = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="SPEC", help="As in `concord simulate`.")] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes.")] = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's directory; default runs/NAME-sweep-TIME.")] = None,
    as_json: Json = False,
) -> None:
    """Try a grid of values; the best is chosen on validation rows, never on test rows."""
    from concord_local import progress
    from concord_local.sweep import sweep as run

    with progress.observer() as observer:
        summary = run(
            plan, overrides, seeds=seeds, data=data, nodes=nodes, partition=partition, workers=workers, out=out,
            observer=observer,
        )  # fmt: skip
    show(summary, as_json, progress.show_sweep)


@app.command(epilog="**Example**\n\n`concord compare runs/digits-cnn-20260101-120000 runs/digits-cnn-20260101-130000`")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="Directories of finished runs.")],
    as_json: Json = False,
) -> None:
    """Put finished runs side by side; says whether their models are equal, and whether they could be."""
    from concord_local import progress
    from concord_local.inference import compare_runs

    show(compare_runs(runs), as_json, progress.show_comparison_of_runs)


pretrained.register(app)


@app.command("plugins", epilog="**Example**\n\n`concord plugins --json`")
def show_plugins(as_json: Json = False) -> None:
    """List the wheels with models of their own that are installed here, and the hash by which a plan names them."""
    from dataclasses import asdict

    from concord_shared.models.plugins import installed_plugins

    found = [asdict(each) for each in installed_plugins()]

    def text(_: object) -> None:
        if not found:
            typer.echo("no wheel that is installed here brings models")
        for each in found:
            typer.echo(f"{each['package']} {each['version']}: {', '.join(each['models'])}")
            typer.echo(f"  {each['fault'] or 'sha256 = ' + each['sha256']}")

    show({"plugins": found}, as_json, text)


@app.command(epilog="**Example**\n\n`concord evaluate runs/mnist-cnn-20260101-120000 --data idx:mnist`")
def evaluate(
    run: Run,
    data: Annotated[str, typer.Option(metavar="SPEC")],
    node: OneNode = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's model on data (their test rows, where they have an own split)."""
    from concord_local import progress
    from concord_local.inference import evaluate_run

    show(evaluate_run(run, data, node), as_json, progress.show_figures)


@app.command(
    epilog="**Example**\n\n`concord predict runs/wine-quality-20260101-120000 --data csv:new.csv --out predictions.csv`"
)
def predict(
    run: Run,
    data: Annotated[str, typer.Option(metavar="SPEC", help="A table needs no target column.")],
    out: Annotated[Path | None, typer.Option(help="Write CSV here, not to standard output.")] = None,
    node: OneNode = None,
    as_json: Json = False,
) -> None:
    """Predict every row of data with a run's model and its preprocessing."""
    from concord_local.inference import predict_run, show_predictions

    show(predict_run(run, data, out, node), as_json, show_predictions)


@bench.command("simulate", epilog="**Example**\n\n`concord bench simulate --data idx:fashion_mnist --json`")
def bench_simulate(
    data: Annotated[str, typer.Option(metavar="SPEC", help="Fashion-MNIST's files.")] = "idx:fashion_mnist",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs: bare loop, then concord.")] = 5,
    workers: Annotated[int | None, typer.Option(help="Training processes; default one for each core.")] = None,
    as_json: Json = False,
) -> None:
    """Time a simulation beside the bare PyTorch loop that does the same steps."""
    from concord_local.benchmark import bench_simulation, show_bench

    show(bench_simulation(data, repeats, workers), as_json, show_bench)


@bench.command("aggregate", epilog="**Example**\n\n`concord bench aggregate --updates 20 --parameters 25000000`")
def bench_aggregate(
    updates: Annotated[int, typer.Option(min=1, max=128)] = 20,
    parameters: Annotated[int, typer.Option(min=1)] = 25_000_000,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Time checking and summing large updates beside one numpy add of the same bytes."""
    from concord_local.benchmark import bench_aggregation, show_aggregation

    show(bench_aggregation(updates, parameters, repeats), as_json, show_aggregation)


@bench.command("masking", epilog="**Example**\n\n`concord bench masking --nodes 100 --parameters 10000000`")
def bench_masking(
    nodes: Annotated[int, typer.Option(min=3, max=128)] = 10,
    parameters: Annotated[int, typer.Option(min=1)] = 10_000_000,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Json = False,
) -> None:
    """Time a masked step at one node, and its opening at the coordinator."""
    from concord_local.masking_benchmark import bench_masking as run
    from concord_local.masking_benchmark import show_masking

    show(run(nodes, parameters, repeats), as_json, show_masking)


@bench.command("link", epilog="**Example**\n\n`concord bench link --nodes 8 --parameters 25000000 --rounds 5`")
def bench_link(
    nodes: Annotated[int, typer.Option(min=1, max=200)] = 2,
    parameters: Annotated[int, typer.Option(min=100)] = 2_500,
    rounds: Annotated[int, typer.Option(min=2)] = 20,
    private: Annotated[bool, typer.Option("--private", help="Under masks.")] = False,
    as_json: Json = False,
) -> None:
    """Time rounds of a real coordinator and real nodes over TLS, with a fixed update in the place of training."""
    from concord_local.link_benchmark import bench_link as run
    from concord_local.link_benchmark import show_link

    show(run(nodes, parameters, rounds, private), as_json, show_link)


@bench.command("cleaning", epilog="**Example**\n\n`concord bench cleaning adult --share 0.1`")
def bench_cleaning(
    experiment: Annotated[str, typer.Argument(help="adult or fashion.")] = "adult",
    data: Annotated[str, typer.Option(metavar="SPEC", help="Its data; by default below $CONCORD_DATA.")] = "",
    share: Annotated[float, typer.Option(min=0, max=1, help="Of cells or pixels that are damaged at 3 nodes.")] = 0.1,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Measure what damaged data at some nodes cost a model, and how much cleaning brings back."""
    from concord_local.cleaning_benchmark import bench_cleaning as run
    from concord_local.cleaning_benchmark import show_cleaning

    show(run(experiment, data, share, seeds), as_json, show_cleaning)


@app.command()
def version(as_json: Json = False) -> None:
    """Print versions."""
    from importlib.metadata import version as version_of

    from concord_shared import __version__

    versions = {"concord": __version__} | {name: version_of(name) for name in ("flwr", "torch", "numpy")}
    show(versions, as_json, lambda found: print(*(f"{name} {v}" for name, v in found.items()), sep="\n"))  # noqa: T201


register_commands(app)


def main() -> NoReturn:
    run_app(app)
