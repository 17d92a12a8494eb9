"""Speed and memory, measured: `bash deploy/run.sh test -m benchmark -s` prints what it found."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concord_client.devices import prepare_process
from concord_client.trainer import Workbench
from concord_local import simulate
from concord_local.benchmark import bench_aggregation, bench_simulation
from concord_local.estimate import estimate
from concord_local.link_benchmark import bench_link
from concord_local.masking_benchmark import bench_masking
from concord_shared.plan import load_plan
from datasets import needs

pytestmark = pytest.mark.benchmark


def show(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=1))


@needs("fashion_mnist")
def test_a_simulation_is_no_slower_than_the_bare_loop() -> None:
    result = bench_simulation("idx:fashion_mnist", repeats=5, workers=None)
    show(result)
    assert result["ratio_fp32"] <= 1.0
    assert result["ratio_bf16"] <= 0.7
    assert result["first_offer_s"] <= 3


def test_summing_large_updates_reads_memory_about_once() -> None:
    result = bench_aggregation(20, 25_000_000, repeats=5)
    show(result)
    assert result["ratio"] <= 3
    assert result["process_mb"] < 800


@needs("fashion_mnist")
def test_a_thousand_nodes_need_no_more_memory_than_ten(tmp_path: Path) -> None:
    overrides = ["rounds.count=3", "rounds.cohort=10", "evaluation.every=0", "training.local_steps=2"]
    peaks = {}
    for nodes in (10, 1000):
        result = simulate(
            "fashion-cnn", nodes=nodes, partition="iid", overrides=overrides, workers=2, out=tmp_path / str(nodes)
        )
        peaks[nodes] = result.summary["peak_pss_mb"]
    show({"peak_pss_mb": peaks, "ratio": peaks[1000] / peaks[10]})
    assert peaks[1000] <= 1.1 * peaks[10]


def test_a_round_between_processes_over_tls_costs_half_a_second_at_most() -> None:
    result = bench_link(nodes=2, parameters=2_500, rounds=20)
    show(result)
    assert result["round_s"] <= 0.5


def test_a_model_of_100_mb_and_four_times_the_nodes() -> None:
    """The coordinator's memory does not grow with the nodes: replies wait on its disk, and are summed one by one."""
    two, eight = (bench_link(nodes=nodes, parameters=25_000_000, rounds=4) for nodes in (2, 8))
    show({"2 nodes": two, "8 nodes": eight})
    assert two["round_s"] <= 4
    assert sum(eight["peak_mb"].values()) <= 1.3 * sum(two["peak_mb"].values())


def test_fifty_nodes_lose_no_update_and_count_none_twice() -> None:
    result = bench_link(nodes=50, parameters=2_500, rounds=20)  # raises where the model tells of another count
    show(result)
    assert result["idle_node"]["core_percent"] < 1


@pytest.mark.parametrize(("nodes", "most_s"), [(10, 0.3), (100, 1.5)])
def test_a_masked_step_costs_a_node_little(nodes: int, most_s: float) -> None:
    result = bench_masking(nodes, 10_000_000, repeats=3)
    show(result)
    assert result["node_s"] <= most_s
    assert result["stream_gb_s"] >= 2


def test_a_masked_step_adds_few_bytes() -> None:
    result = bench_masking(100, 1_000_000, repeats=1)
    show(result)
    assert result["bytes_ratio"] <= 1.02


PRIVATE = [("mnist", "mnist-dp", 0.94), ("fashion_mnist", "fashion-dp", 0.80)]


@pytest.mark.parametrize(("data", "plan", "least"), [pytest.param(*each, marks=needs(each[0])) for each in PRIVATE])
def test_a_model_learns_with_each_record_hidden(data: str, plan: str, least: float, tmp_path: Path) -> None:
    """ε = 3, δ = 1e-5, 10 nodes: the median of three seeds. The noise is another one each time."""
    found = [simulate(plan, overrides=[f"seed={seed}"], out=tmp_path / str(seed)).metrics for seed in range(3)]
    show({"plan": plan, "accuracy": [figures["accuracy"] for figures in found]})
    assert statistics.median(figures["accuracy"] for figures in found) >= least


@pytest.mark.parametrize("model", ["tanh-cnn", "seed-cnn", "niid-cnn"])
def test_clipping_each_row_costs_at_most_two_and_a_half_steps(model: str) -> None:
    """Steps of 600 rows with DP-SGD, beside the same steps without; the median of five pairs, in turn."""
    seconds: list[tuple[float, float]] = []
    steps = ["training.batch_size=600", "training.local_steps=5", "rounds.count=10", f"model.name={model}"]
    private, plain = (load_plan("fashion-dp", [*steps, *more]).plan for more in ((), ("privacy={mode='plain'}",)))
    prepare_process(1)
    chance = np.random.default_rng(0)
    data = chance.random((6000, 1, 28, 28), np.float32), chance.integers(0, 10, 6000)
    benches = [Workbench(plan, torch.device("cpu")) for plan in (private, plain)]
    for _ in range(6):
        pair = []
        for bench in benches:
            rows, started = bench.rows(*data), time.perf_counter()
            bench.train(rows, 1e-3, 0)
            pair.append(time.perf_counter() - started)
        seconds.append((pair[0], pair[1]))
    ratio = statistics.median(first / second for first, second in seconds[1:])
    show({"model": model, "ratio": ratio, "private_s": [s[0] for s in seconds], "plain_s": [s[1] for s in seconds]})
    assert ratio <= 2.5


@pytest.mark.parametrize(
    ("plan", "overrides"),
    [
        ("digits-cnn", ["rounds.count=5"]),
        pytest.param(
            "fashion-cnn", ["rounds.count=2", "training.local_steps=40"], marks=needs("fashion_mnist"), id="fashion-cnn"
        ),
    ],
)
def test_an_estimate_is_within_30_percent_of_a_run(plan: str, overrides: list[str], tmp_path: Path) -> None:
    """The median of five pairs, one after the other, so that a busy machine is busy for both."""
    ratios: dict[str, list[float]] = {"seconds": [], "memory": []}
    for number in range(5):
        found = estimate(plan, overrides=overrides, workers=2)
        summary = simulate(plan, overrides=overrides, workers=2, out=tmp_path / str(number)).summary
        ratios["seconds"].append(found["seconds"]["total"] / summary["seconds"]["training"])
        ratios["memory"].append(found["memory_mb"]["total"] / summary["peak_pss_mb"])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    show({"plan": plan, "medians": medians, "ratios": ratios})
    assert all(abs(median - 1) <= 0.3 for median in medians.values()), medians
