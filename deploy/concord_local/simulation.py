"""`concord simulate`: a whole federation on one machine, from a plan to a run directory with a report.

What runs here is what a real federation runs: the coordinator's driver and round machine, the node's
ClientApp, the same messages between them. Only the transport differs.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from concord_client.data import read_data, resolve_spec
from concord_client.devices import autocast_dtype, choose_device, prepare_process
from concord_client.state import NodeStates
from concord_client.trainer import Workbench, check_model
from concord_local.attacks import Attack
from concord_local.baselines import compare_with_baselines
from concord_local.environment import comparable, describe_environment
from concord_local.faults import Faults, FaultyTransport
from concord_local.federation import Federation
from concord_local.masked_transport import SimulatedNodes
from concord_local.memory import PeakMemory
from concord_local.nodes import NodeHost, model_builder, try_own_model
from concord_local.partitions import is_natural
from concord_local.ray_transport import RayTransport, check_ray
from concord_local.report import write_report
from concord_local.rundir import RunDirectory, describe_data, new_run_path
from concord_local.summary import cleaning_summary, robust_summary, summarise, summarise_seeds
from concord_local.transports import InProcessTransport, WorkerTransport, start_fork_server
from concord_server.checkpoints import RunStore
from concord_server.driver import Driver, RunResult
from concord_server.schedule import Schedule
from concord_shared.errors import ArtefactError, RunStoppedError, UsageError
from concord_shared.files import explain, file_digest
from concord_shared.metrics import Figures
from concord_shared.models import layout_of, new_model, new_vector, vector_of
from concord_shared.noise import check_noise
from concord_shared.plan import Plan, load_plan
from concord_shared.plan.load import LoadedPlan
from concord_shared.plan.models import OwnModel
from concord_shared.strategies import Strategy, strategy_for
from concord_shared.tensors import Float32Vector, Layout
from concord_shared.transport import Transport

__all__ = [
    "Observer",
    "Setting",
    "SimulationResult",
    "cores",
    "federate",
    "prepare",
    "run_plan",
    "setting_for",
    "simulate",
]

Observer = Callable[[Mapping[str, Any]], None]
STARTED_S = time.monotonic()
SHARED = "shared"
ENGINES = ("local", "ray")
REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})


Start = tuple[Layout, Float32Vector]


@dataclass(frozen=True)
class Setting:
    """What surrounds a plan in a simulation: not part of it, but needed to run it again.

    workers: processes that train; 0 where a Ray cluster has one for each of its cores. side_by_side: how many nodes one
    process trains as one computation; 0: each by itself.
    """

    data: str
    nodes: int | None
    partition: str
    workers: int
    faults: str = ""
    device: str = "auto"
    compare: bool = False
    engine: str = "local"
    ray_address: str = ""
    attack: str = ""
    attackers: int | None = None
    side_by_side: int = 0

    def document(self) -> dict[str, Any]:
        return {"schema": "concord/simulation/1", **asdict(self)}


@dataclass(frozen=True)
class SimulationResult:
    """A finished run. `summary` is what `--json` prints; `directory` holds everything else."""

    directory: Path
    summary: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.summary["metrics"])


@contextmanager
def _naming_options() -> Iterator[None]:
    """Where the disk refuses, the error names the options that lead on."""
    try:
        yield
    except ArtefactError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in REFUSALS:
            raise
        raise ArtefactError(f"{error}: go on with --resume, or name another directory with --out") from error


@_naming_options()
def simulate(
    plan: str = "digits-cnn",
    *,
    data: str | None = None,
    nodes: int | None = None,
    partition: str | None = None,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    seeds: int | None = None,
    faults: str = "",
    out: str | Path | None = None,
    resume: str | Path | None = None,
    compare: bool = False,
    model: str | None = None,
    device: str = "auto",
    engine: str = "local",
    ray_address: str = "",
    attack: str = "",
    attackers: int | None = None,
    observer: Observer = lambda record: None,
) -> SimulationResult:
    """Runs a plan over nodes on this machine; what the command calls, and notebooks.

    Args:
        plan: a TOML file or a shipped plan's name.
        data, nodes, partition: in place of the plan's `[simulate]` table.
        overrides: `KEY=VALUE`, as the command's --set.
        workers: processes that train; 1 trains in this process; default one a core.
        seeds: run seeds 0…K−1; metrics are means.
        faults: for example `dropout:0.2,slow:3`.
        out: the run's directory; default runs/NAME-TIME.
        resume: the directory of a run to go on with; all other arguments are then its own.
        compare: also train each node alone and all data pooled, on identical test rows.
        model: FILE.py:FUNCTION that builds an own nn.Module, for this machine only.
        engine: what carries messages to the nodes: `local`, or `ray` for Flower's simulation runtime.
        ray_address: a Ray cluster of several machines, for the engine ray.
        attack, attackers: what so many of the nodes do to the others, see `attacks`.
        observer: called with each line of metrics.jsonl, and with other events.

    Raises:
        ConcordError: anything a person can act on.
    """
    if engine == "local":
        start_fork_server()
    if resume is not None:
        return _resume(Path(resume), observer)
    loaded = load_plan(plan, overrides)
    for what, asked in (("--compare", compare), ("--seeds", seeds), ("--model", model), ("--attack", attack)):
        if asked:
            loaded.plan.check_trains(what)
    loaded = _with_own_model(loaded, model)
    setting = setting_for(
        loaded, data, nodes, partition, workers, faults, device, compare, engine, ray_address, attack, attackers
    )
    directory = new_run_path(loaded.plan.name, out)
    RunDirectory.check_free(directory)
    if seeds is None:
        return run_plan(loaded.plan, setting, directory, observer)
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected at least 1")
    return _run_seeds(loaded.plan, setting, seeds, directory, observer)


def setting_for(
    loaded: LoadedPlan,
    data: str | None = None,
    nodes: int | None = None,
    partition: str | None = None,
    workers: int | None = None,
    faults: str = "",
    device: str = "auto",
    compare: bool = False,
    engine: str = "local",
    ray_address: str = "",
    attack: str = "",
    attackers: int | None = None,
) -> Setting:
    """What was asked for, or else the plan's `[simulate]` table."""
    defaults = loaded.simulate
    chosen = partition or defaults.partition
    if nodes is not None and nodes < 1:
        raise UsageError(f"--nodes {nodes}: expected at least 1")
    if workers is not None and not 1 <= workers <= 1024:
        raise UsageError(f"--workers {workers}: expected 1 to 1024")
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if ray_address and engine != "ray":
        raise UsageError("--ray-address is for --engine ray; add that, or leave the address out")
    if ray_address and workers is not None:
        raise UsageError("--workers: a Ray cluster trains with each of its cores; leave one of the two options out")
    beside = defaults.side_by_side
    if beside and (attack or engine != "local" or (workers or 1) > 1):
        raise UsageError(
            "simulate.side_by_side trains nodes in one process: leave --attack, --engine and --workers out, or "
            "simulate.side_by_side"
        )
    Faults.parse(faults, loaded.plan.seed)
    return Setting(
        data=resolve_spec(data or defaults.data, defaults.data),
        nodes=nodes if nodes is not None or is_natural(chosen) else defaults.nodes,
        partition=chosen,
        workers=0 if ray_address else 1 if beside else workers or cores(),
        faults=faults,
        device=device,
        compare=compare,
        engine=engine,
        ray_address=ray_address,
        attack=attack,
        attackers=attackers,
        side_by_side=beside,
    )


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_own_model(loaded: LoadedPlan, source: str | None) -> LoadedPlan:
    if source is None:
        return loaded
    file = Path(source.rpartition(":")[0])
    if not file.is_file():
        raise UsageError(f"--model {source}: expected FILE.py:FUNCTION, and the file to exist")
    absolute = f"{file.resolve()}:{source.rpartition(':')[2]}"
    own = OwnModel(name="own", source=absolute, sha256=file_digest(file))
    return replace(loaded, plan=loaded.plan.with_changes(model=own.model_dump(mode="json")))


def _run_seeds(plan: Plan, setting: Setting, seeds: int, directory: Path, observer: Observer) -> SimulationResult:
    """Seeds 0…K−1, each in its own directory below; means on top."""
    prepare(plan.with_seed(0), setting)  # what is wrong shows before anything is written
    parent = RunDirectory.create(directory)
    parent.write_json("simulation.json", setting.document())
    parent.write_json("seeds.json", {"plan": plan.document(), "seeds": seeds})
    return _continue_seeds(parent, setting, observer)


def _continue_seeds(parent: RunDirectory, setting: Setting, observer: Observer) -> SimulationResult:
    """Runs what is not done yet of a directory of seeds."""
    (first, seeds), directory = parent.read_seeds(), parent.path
    _check_own_model(first)
    runs = []
    for seed in range(seeds):
        observer({"kind": "seed", "seed": seed, "of": seeds})
        runs.append(run_plan(first.with_seed(seed), setting, directory / f"seed-{seed}", observer).summary)
    summary = summarise_seeds(first, directory, runs)
    parent.write_json("summary.json", summary)
    return SimulationResult(directory, summary)


def _resume(directory: Path, observer: Observer) -> SimulationResult:
    run = RunDirectory.open(directory)
    setting = Setting(**{key: value for key, value in run.read_json("simulation.json").items() if key != "schema"})
    if run.exists("seeds.json"):
        return _continue_seeds(run, setting, observer)
    plan = run.read_plan()
    _check_own_model(plan)
    return run_plan(plan, setting, directory, observer)


def _check_own_model(plan: Plan) -> None:
    if not isinstance(plan.model, OwnModel):
        return
    file = Path(plan.model.source.rpartition(":")[0])
    if not file.is_file() or file_digest(file) != plan.model.sha256:
        raise UsageError(f"{file} is not the file that the run began with; put it back, or start a new run")


def run_plan(
    plan: Plan, setting: Setting, directory: Path, observer: Observer, strategy: Strategy | None = None
) -> SimulationResult:
    """One run in one directory: from the start, from its last checkpoint, or what it came to if it is finished.

    Raises:
        RunStoppedError: a person stopped it.
    """
    run = RunDirectory(directory)
    if run.exists("summary.json") and run.exists("report.html"):
        return SimulationResult(directory, run.read_json("summary.json"))
    try:
        federation, start = prepare(plan, setting)
        with run.claim():
            try:
                return _run(plan, federation, start, setting, run, observer, strategy)
            finally:
                shutil.rmtree(directory / SHARED, ignore_errors=True)
    except KeyboardInterrupt as error:
        again = (
            f"Go on with: concord simulate --resume {directory}" if run.exists("plan.json") else "Nothing was written"
        )
        raise RunStoppedError(f"stopped. {again}") from error
    except OSError as error:
        raise ArtefactError(f"cannot go on: {explain(error)}") from error


def prepare(plan: Plan, setting: Setting) -> tuple[Federation, Start]:
    """Everything that can be wrong with what was asked for, before a directory is made."""
    device = choose_device(setting.device)
    if setting.engine == "ray":
        check_ray(setting.ray_address)
    data = read_data(setting.data, plan, per_directory=setting.partition == "directory")
    federation = Federation.of(data, plan, setting.partition, setting.nodes)
    cohort = Schedule(plan, federation.names).step("train", 1).cohort
    Attack.of(setting.attack, setting.attackers, federation.names, plan)
    build = model_builder(plan)
    model = new_model(plan, build)
    layout = layout_of(plan, model)
    start = layout, vector_of(model, layout)
    check_noise(plan, layout.size, len(cohort))
    autocast_dtype(plan.training.precision, device)
    check_model(plan, model)
    if isinstance(plan.model, OwnModel):
        try_own_model(plan, model)
    if setting.side_by_side:
        from concord_local.side_by_side import check_side_by_side

        prepare_process(threads=1 if plan.training.deterministic else None)
        check_side_by_side(Workbench(plan, device, build))
    return federation, start


def _run(
    plan: Plan,
    federation: Federation,
    start: Start,
    setting: Setting,
    run: RunDirectory,
    observer: Observer,
    strategy: Strategy | None,
) -> SimulationResult:
    started_s = time.monotonic()
    described, environment = (
        describe_data(federation, plan),
        describe_environment(plan, setting.device, setting.side_by_side),
    )
    resumed = run.exists("plan.json")
    if resumed:
        _check_same(run, described, environment, observer)

    def begin() -> None:
        if not resumed:
            run.write_start(plan, setting.document(), environment, described)

    dropped = federation.dropped
    if setting.engine == "local" and setting.workers > 1:
        federation = federation.share(run.path / SHARED)  # one copy, which all processes map
    observer({"kind": "data", "run_dir": str(run.path), "plan": plan.name, **described})
    with PeakMemory() as memory:
        result, own, timing = federate(plan, federation, setting, run, observer, strategy, memory, start, begin)
    summary = summarise(plan, federation, setting.document(), run.path, result, own) | {
        "seconds": {
            "total": round(time.monotonic() - started_s, 3),
            "training": round(timing["training"], 3),
            "startup": round(timing["first_offer_at"] - max(STARTED_S, started_s), 3),
        },
        "peak_pss_mb": memory.peak_mb,
    }
    attack = Attack.of(setting.attack, setting.attackers, federation.names, plan)
    if plan.preprocessing.cleans and plan.preprocessing.scope != "per-node":
        summary |= cleaning_summary(federation, dropped, result)
    summary |= robust_summary(attack, RunStore(run.path).records())
    run.write_model(plan, result, summary)
    if setting.compare:
        states = NodeStates(run.node_states)
        comparison = compare_with_baselines(
            plan, federation, result, lambda name: states.current(name, plan.rounds.count), setting.device, observer
        )
        run.write_json("comparison.json", comparison)
        summary["comparison"] = comparison
    run.write_json("summary.json", summary)
    write_report(run.path)
    return SimulationResult(run.path, summary)


def _check_same(run: RunDirectory, described: dict[str, Any], environment: dict[str, Any], observer: Observer) -> None:
    """A resumed run goes on with the same rows; another environment is said and noted, for it may change the digest."""
    if run.read_json("data.json")["digest"] != described["digest"]:
        raise ArtefactError(
            f"{run.path}: the data are not those that the run began with; put them back, or start a new run"
        )
    before = run.read_json("environment.json")
    differences = comparable(before, environment)
    if differences:
        observer({"kind": "note", "text": "resumed in another environment: " + "; ".join(differences)})
        run.write_json("environment.json", before | {"resumed_in": [*before.get("resumed_in", []), environment]})


def federate(
    plan: Plan,
    federation: Federation,
    setting: Setting,
    run: RunDirectory,
    observer: Observer,
    strategy: Strategy | None,
    memory: PeakMemory,
    begun: Start | None = None,
    before_first: Callable[[], None] = lambda: None,
) -> tuple[RunResult, Mapping[str, Figures], dict[str, float]]:
    """The coordinator's driver over this machine's nodes: its result, what each node's owner knows of the last
    evaluation, and seconds of training and the time of the first offer. begun: the plan's seeded start, where it is
    made already. before_first: called when nodes and driver are ready, before the first offer.
    """
    layout, start = begun or new_vector(plan, model_builder(plan))
    entries = federation.entries(plan)
    store = RunStore(run.path)
    transport = _transport(plan, federation, setting, run, strategy, memory)
    with closing(transport):
        faults = Faults.parse(setting.faults, plan.seed)
        nodes = SimulatedNodes(transport, plan, entries) if plan.privacy.mode == "private" else None
        carried: Transport = nodes or transport
        if faults:
            carried = FaultyTransport(carried, faults, entries)
        driver = Driver(
            plan,
            strategy or strategy_for(plan),
            layout,
            start,
            entries,
            carried,
            store,
            observer,
            signers=nodes.signers if nodes else None,
        )
        before_first()
        result = driver.run()
    first_offer = driver.first_offer_s or time.monotonic()
    own = nodes.own if nodes else result.per_node
    return result, own, {"training": result.training_s, "first_offer_at": first_offer}


def _transport(
    plan: Plan,
    federation: Federation,
    setting: Setting,
    run: RunDirectory,
    strategy: Strategy | None,
    memory: PeakMemory,
) -> InProcessTransport | WorkerTransport | RayTransport:
    states = run.node_states
    attack = Attack.of(setting.attack, setting.attackers, federation.names, plan)
    if setting.side_by_side:
        from concord_local.side_by_side import SideBySideHost, SideBySideTransport

        prepare_process(threads=1 if plan.training.deterministic else None)
        return SideBySideTransport(
            SideBySideHost(plan, federation, states, setting.device, strategy), setting.side_by_side
        )
    if setting.engine == "local" and setting.workers == 1:
        prepare_process(threads=1 if plan.training.deterministic else None)
        return InProcessTransport(NodeHost(plan, federation, states, setting.device, strategy, attack))
    workers = min(setting.workers, len(federation.names))
    transport: WorkerTransport | RayTransport
    if setting.engine == "ray":
        address = setting.ray_address
        transport = RayTransport(plan, federation, workers, states, setting.device, strategy, address, attack)
    else:
        transport = WorkerTransport(plan, federation, workers, states, setting.device, strategy, attack)
    memory.watch(transport.process_ids)
    return transport
