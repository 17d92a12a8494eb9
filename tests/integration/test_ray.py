"""The engine ray: the same conformance, the same models, and what is said where it cannot run."""

import gc
import importlib.util
import inspect
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_transports
from test_transports import PLAN, offers, receive_all

from concord_local.ray_transport import RayTransport, check_ray, load_flower
from concord_local.simulation import Setting, simulate
from concord_shared.errors import RunStoppedError, UsageError
from concord_shared.plan import Plan
from federations import driver, federation, run, small_plan

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="skipped: needs Ray, as `bash deploy/run.sh --with ray test -m slow` installs it",
)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
QUICK = ["rounds.count=2", "model.name=2nn"]


@pytest.fixture(scope="module", autouse=True)
def collect_garbage_here() -> Iterator[None]:
    """Ray forgets the processes that it has ended without asking how; Python warns of each when it is collected."""
    yield
    gc.collect()


def ray_transport(plan: Plan, directory: Path, **options: Any) -> RayTransport:
    return RayTransport(plan, federation(plan), 2, directory / "nodes", "cpu", **options)


@pytest.fixture(scope="class")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayTransport]:
    """One for the whole class, as Ray takes seconds to start; that it can be closed twice is asked last."""
    made = ray_transport(PLAN, tmp_path_factory.mktemp("ray"))
    yield made
    made.close()


@needs_ray
@pytest.mark.slow
class TestRay(test_transports.TestConformance):
    @pytest.fixture
    def carried(self, started: RayTransport) -> RayTransport:
        return started


@needs_ray
@pytest.mark.slow
def test_an_actor_that_dies_is_started_again_and_its_request_is_asked_again(tmp_path: Path) -> None:
    carried = ray_transport(PLAN, tmp_path)
    try:
        os.kill(carried.process_ids[0], 9)
        carried.send(offers([f"node-{i}" for i in range(1, 6)]))
        replies = receive_all(carried, 5)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3, 4, 5, 6]
        assert not any(reply.has_error() for reply in replies)
    finally:
        carried.close()


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("case", ["statistics", "scaffold"])
def test_the_driver_gets_the_model_of_the_local_engine(case: str, tmp_path: Path) -> None:
    """With offers that carry no model, and with a strategy that keeps a state at its nodes."""
    extra = ["preprocessing.scope=federated", "preprocessing.standardise=true", "preprocessing.scale=none"]
    plan = small_plan(*(extra if case == "statistics" else ["strategy.name=scaffold", "training.momentum=0.0"]))
    expected, _ = run(plan, tmp_path / "local")
    carried = ray_transport(plan, tmp_path)
    try:
        result = driver(plan, federation(plan), carried, tmp_path / "ray").run()
    finally:
        carried.close()
    assert result.model_digest == expected.model_digest


@needs_ray
@pytest.mark.slow
def test_simulate_gives_the_model_of_the_local_engine_when_it_goes_on_after_a_stop(tmp_path: Path) -> None:
    def stop(record: Any) -> None:
        if record["kind"] == "train":
            raise KeyboardInterrupt

    local = simulate(overrides=QUICK, nodes=5, workers=1, out=tmp_path / "local")
    with pytest.raises(RunStoppedError):
        simulate(overrides=QUICK, nodes=5, workers=2, out=tmp_path / "ray", engine="ray", observer=stop)
    resumed = simulate(resume=tmp_path / "ray")
    assert resumed.summary["setting"]["engine"] == "ray"
    assert resumed.summary["model_digest"] == local.summary["model_digest"]


@needs_ray
@pytest.mark.slow
def test_what_an_actor_cannot_build_ends_the_start(tmp_path: Path) -> None:
    plan = small_plan("training.precision=fp32")
    with pytest.raises(UsageError, match="device 'tpu' is not available"):
        RayTransport(plan, federation(plan), 1, tmp_path, "tpu")


@needs_ray
def test_flower_has_what_the_adapter_uses() -> None:
    """Another flwr fails here, by name, and not in a run."""
    _, backend = load_flower("")
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool, VirtualClientEngineActor

    assert list(inspect.signature(backend.__init__).parameters) == ["self", "backend_config"]
    assert list(inspect.signature(backend.build).parameters) == ["self", "app_fn"]
    assert {"init_args", "client_resources"} <= set(backend.__init__.__code__.co_consts)
    assert {"pool", "client_resources"} <= set(backend.__init__.__code__.co_names)
    assert "options" in inspect.getsource(BasicActorPool), "max_restarts reaches Ray as an option of the actor"
    expected = {
        "is_actor_available": ["self"],
        "submit": ["self", "actor_fn", "job"],
        "fetch_result_and_return_actor_to_pool": ["self", "future"],
        "add_actor_back_to_pool": ["self", "future"],
    }
    assert {name: list(inspect.signature(getattr(BasicActorPool, name)).parameters) for name in expected} == expected
    called = list(inspect.signature(VirtualClientEngineActor.run).parameters)
    assert called[:5] == ["self", "client_app_fn", "message", "cid", "context"]  # Ray adds one of its own


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    with pytest.raises(UsageError, match=r"bash deploy/run\.sh --with ray simulate --engine ray"):
        simulate(overrides=QUICK, engine="ray", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_ray
@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("auto", "expected HOST:PORT"),
        ("ray://here", "expected HOST:PORT"),
        ("127.0.0.1:{free}", "nothing answers"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, problem: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        with pytest.raises(UsageError, match=problem):
            check_ray(address.format(free=free.getsockname()[1]))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"engine": "dask"}, "--engine dask: expected one of local, ray"),
        ({"ray_address": "10.0.0.1:6379"}, "--ray-address is for --engine ray"),
        ({"engine": "ray", "ray_address": "10.0.0.1:6379", "workers": 2}, "--workers: a Ray cluster"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        simulate(overrides=QUICK, **options)


def test_a_setting_written_before_there_were_engines_is_that_of_the_local_one(tmp_path: Path) -> None:
    finished = simulate(overrides=QUICK, nodes=3, workers=1, out=tmp_path)
    document = json.loads((tmp_path / "simulation.json").read_text("utf-8"))
    older = {key: value for key, value in document.items() if key not in ("engine", "ray_address")}
    (tmp_path / "simulation.json").write_text(json.dumps(older), "utf-8")
    (tmp_path / "summary.json").unlink()
    resumed = simulate(resume=tmp_path)
    assert resumed.summary["model_digest"] == finished.summary["model_digest"]
    assert resumed.summary["setting"] == Setting("digits", 3, "dirichlet:0.5", 1).document()
