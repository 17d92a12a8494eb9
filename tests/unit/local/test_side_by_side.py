"""Nodes that are trained as one computation come to what each comes to alone, but for rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concord_client.trainer import Workbench
from concord_local import simulate
from concord_local.inference import compare_runs
from concord_local.side_by_side import _Job, train_side_by_side, why_not_side_by_side
from concord_shared.errors import UsageError
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from helpers import IMAGES, LANGUAGE, TABLE, TOPICS, plan_of

CPU = torch.device("cpu")
SIZES = (13, 40, 27, 8)
"""Rows of four nodes: other numbers of steps, and last batches of other sizes."""
OPTIMISERS = (
    {"optimiser": "sgd", "learning_rate": 0.1},
    {"optimiser": "sgd", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"optimiser": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
    {"optimiser": "sgd", "learning_rate": 0.1, "gradient_clip": 0.05},
)


def alone(plan: Plan, jobs: list[_Job]) -> list[tuple[np.ndarray, int]]:
    bench, found = Workbench(plan, CPU), []
    for job in jobs:
        bench.load(job.start)
        steps = bench.train(job.rows, job.learning_rate, job.seed)
        found.append((bench.read(), steps))
    return found


def jobs_of(plan: Plan, bench: Workbench) -> list[_Job]:
    chance, start = np.random.default_rng(3), new_vector(plan)[1]
    shape = (1, 8, 8) if plan.data.input == "image" else (len(plan.data.columns),)
    jobs = []
    for node, size in enumerate(SIZES):
        inputs = chance.normal(size=(size, *shape)).astype(np.float32)
        rows = bench.rows(inputs, chance.integers(0, len(plan.data.classes), size))
        jobs.append(_Job(rows, plan.training.learning_rate, 100 + node, start + np.float32(0.01 * node)))
    return jobs


def image_plan(model: dict[str, Any], **training: Any) -> Plan:
    return plan_of(IMAGES).with_changes(model=model, training={"batch_size": 8, "local_epochs": 2} | training)


@pytest.mark.parametrize("training", OPTIMISERS)
@pytest.mark.parametrize(
    "model", [{"name": "mlp", "hidden": [9]}, {"name": "seed-cnn"}, {"name": "resnet-18", "width": 0.125}]
)
def test_each_node_comes_to_what_it_comes_to_alone(model: dict[str, Any], training: dict[str, Any]) -> None:
    plan = image_plan(model, **training)
    bench = Workbench(plan, CPU)
    jobs = jobs_of(plan, bench)
    train_side_by_side(bench, jobs)
    for job, (theta, steps) in zip(jobs, alone(plan, jobs), strict=True):
        assert job.steps == steps
        assert job.result is not None
        moved = np.abs(theta - job.start).max()
        assert np.abs(job.result - theta).max() < 1e-4 * max(1.0, moved)
        assert moved > 1e-4


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_that_lie_otherwise_in_memory() -> None:
    """As those of an embedding do."""
    plan = plan_of(TOPICS, "model.dropout=0.0").with_changes(training={"batch_size": 4, "learning_rate": 0.5})
    bench = Workbench(plan, CPU)
    chance, start = np.random.default_rng(0), new_vector(plan)[1]
    jobs = [
        _Job(bench.rows(chance.integers(0, 64, (size, 8)), chance.integers(0, 3, size)), 0.5, size, start)
        for size in (9, 6)
    ]
    train_side_by_side(bench, jobs)
    for job, (theta, _) in zip(jobs, alone(plan, jobs), strict=True):
        assert job.result is not None
        assert np.abs(job.result - theta).max() < 1e-5
        assert np.abs(theta - start).max() > 1e-2


def test_steps_instead_of_epochs() -> None:
    plan = image_plan({"name": "mlp", "hidden": [4]}, local_epochs=0, local_steps=3)
    bench = Workbench(plan, CPU)
    jobs = jobs_of(plan, bench)
    train_side_by_side(bench, jobs)
    assert [job.steps for job in jobs] == [steps for _, steps in alone(plan, jobs)] == [3] * 4


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (plan_of(LANGUAGE), "language-model"),
        (plan_of(TOPICS), "text"),
        (plan_of(IMAGES, "strategy={name='fedprox'}"), "fedprox"),
        (plan_of(IMAGES, "training.micro_batch=2"), "micro_batch"),
        (
            plan_of(
                IMAGES, "data.shape=[1, 16, 16]", "model={name='efficientnet-b0', width=0.25, stochastic_depth=0.2}"
            ),
            "stochastic_depth",
        ),
        (plan_of(IMAGES, "privacy={mode='plain', dp={unit='record', epsilon=3.0, delta=1e-5, clip=1.0}}"), "record"),
    ],
)
def test_what_cannot_be_one_computation_is_named(plan: Plan, words: str) -> None:
    assert words in why_not_side_by_side(Workbench(plan, CPU))


def run(out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    small = ["model={name='mlp', hidden=[16]}", "rounds.count=2", *overrides]
    return simulate("digits-cnn", nodes=6, overrides=small, out=out, **options).summary


@pytest.mark.parametrize("places", [2, 50])
def test_a_run_is_the_sequential_one_within_rounding(tmp_path: Path, places: int) -> None:
    one = run(tmp_path / "one", workers=1)
    beside = run(tmp_path / "beside", f"simulate.side_by_side={places}")
    assert beside["plan_digest"] == one["plan_digest"]
    assert beside["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)
    assert beside["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=0.01)
    again = run(tmp_path / "again", f"simulate.side_by_side={places}")
    assert again["model_digest"] == beside["model_digest"]
    if beside["model_digest"] != one["model_digest"]:
        verdict = compare_runs([tmp_path / "one", tmp_path / "beside"])["verdict"]
        assert f"side_by_side: None and {places}" in verdict


def test_under_masks_too(tmp_path: Path) -> None:
    plain, private = (
        run(tmp_path / mode, "simulate.side_by_side=6", f"privacy.mode={mode}") for mode in ("plain", "private")
    )
    assert plain["model_digest"] == private["model_digest"]


def test_divergence_at_one_node_ends_no_other() -> None:
    plan = image_plan({"name": "mlp", "hidden": [9]}, optimiser="sgd", learning_rate=0.1)
    bench = Workbench(plan, CPU)
    jobs = jobs_of(plan, bench)
    jobs[1].start = np.full_like(jobs[1].start, np.float32(1e38))
    train_side_by_side(bench, jobs)
    assert jobs[1].result is not None
    assert not np.isfinite(jobs[1].result).all()
    for job in (jobs[0], jobs[2], jobs[3]):
        assert job.result is not None
        assert np.isfinite(job.result).all()


def test_options_that_do_not_go_with_it_are_refused(tmp_path: Path) -> None:
    for options in ({"workers": 2}, {"attack": "sign-flip"}, {"engine": "ray"}):
        with pytest.raises(UsageError, match="side_by_side"):
            run(tmp_path / "run", "simulate.side_by_side=4", **options)
    with pytest.raises(UsageError, match="strategy fedprox"):
        run(tmp_path / "run", "simulate.side_by_side=4", "strategy={name='fedprox'}", workers=1)


def test_tables_and_images_can() -> None:
    for plan in (plan_of(TABLE), plan_of(IMAGES)):
        assert why_not_side_by_side(Workbench(plan, CPU)) == ""
