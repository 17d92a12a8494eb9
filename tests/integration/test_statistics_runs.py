"""Plans of kind statistics as whole runs: exact, masked, resumed, and without any node's own figure."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_local.progress import show_result
from concord_local.simulation import simulate
from concord_shared.errors import PlanError

ROWS = 600
PLAN = """
name = "trial"
kind = "statistics"
[simulate]
data = "csv:{file}"
nodes = 5
partition = "iid"
[data]
task = "classification"
input = "table"
target = "ill"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[[data.columns]]
name = "city"
kind = "category"
categories = ["bonn", "ulm", "wien"]
[[data.columns]]
name = "dose"
range = [-5, 5]
[statistics]
of = ["moments", "extremes", "classes", "correlation", "sites"]
quantiles = [0.25, 0.5]
bins = 8
resolution = 1e-5
[privacy]
mode = "private"
"""
MOMENTS = "statistics={of=['moments','classes','correlation','sites']}"


@pytest.fixture
def table(tmp_path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    age = rng.uniform(20, 90, ROWS)
    found = {
        "age": np.where(rng.random(ROWS) < 0.1, np.nan, age),
        "city": rng.choice(["bonn", "ulm", "wien", "rom"], ROWS, p=[0.5, 0.3, 0.1, 0.1]),
        "dose": np.where(rng.random(ROWS) < 0.05, 77.0, np.clip(age / 30 - 2 + rng.normal(0, 1, ROWS), -5, 5)),
        "ill": rng.choice(["no", "yes"], ROWS),
    }
    lines = [",".join(found)]
    for row in zip(*found.values(), strict=True):
        lines.append(",".join("" if value != value else str(value) for value in row))
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    (tmp_path / "plan.toml").write_text(PLAN.format(file=tmp_path / "rows.csv"))
    return found


def run(tmp_path: Path, name: str = "run", *overrides: str, **options: Any) -> dict[str, Any]:
    settings = {"workers": 1, "out": tmp_path / name, **options}
    return simulate(str(tmp_path / "plan.toml"), overrides=overrides, **settings).summary


def test_figures_equal_the_pooled_ones_with_masks_on(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    found = run(tmp_path)["statistics"]
    assert found["rows"] == ROWS
    for name, low, high in (("age", 0, 120), ("dose", -5, 5)):
        values = table[name][(table[name] >= low) & (table[name] <= high)]
        about = found["columns"][name]
        assert about["mean"] == pytest.approx(values.mean(), rel=1e-6)
        assert about["variance"] == pytest.approx(values.var(), rel=1e-6)
        for level in (0.25, 0.5):
            true = np.quantile(values, level, method="inverted_cdf")
            assert abs(about["quantiles"][repr(level)] - true) <= 1e-5 * (high - low) / 2
        assert about["minimum"] == pytest.approx(np.sort(values)[4], abs=1e-5 * (high - low))
        assert about["missing"] == np.isnan(table[name]).sum() or about["missing"] is None
    counts = {word: int((table["city"] == word).sum()) for word in ("bonn", "ulm", "wien", "rom")}
    assert found["columns"]["city"]["counts"] == [counts["bonn"], counts["ulm"], counts["wien"]]
    assert found["columns"]["city"]["unknown"] == counts["rom"]
    assert found["columns"]["ill"]["counts"] == [int((table["ill"] == word).sum()) for word in ("no", "yes")]
    both = ~np.isnan(table["age"]) & (table["dose"] <= 5)
    expected = np.corrcoef(table["age"][both], table["dose"][both])[0, 1]
    assert found["correlation"]["values"][0][1] == pytest.approx(expected, rel=1e-6)


def test_masked_figures_are_those_of_plain_mode_and_of_any_number_of_workers(
    tmp_path: Path, table: dict[str, np.ndarray]
) -> None:
    masked = run(tmp_path, "masked", MOMENTS)
    plain = run(tmp_path, "plain", MOMENTS, "privacy={mode='plain'}", workers=2)
    assert masked["statistics"] == plain["statistics"]


def test_no_nodes_own_figure_is_in_what_the_coordinator_gets_or_keeps(
    tmp_path: Path, table: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node's own vector is known here, behind its back; none of its integers is in any message or file."""
    from concord_local.masked_transport import SimulatedNodes
    from concord_shared.messages import ring_blocks

    owns: list[np.ndarray] = []
    told: list[bytes] = []
    take, receive = SimulatedNodes._take, SimulatedNodes.receive

    def spy_take(self: SimulatedNodes, name: str, reply: Any) -> None:
        owns.append(ring_blocks(reply)["statistics"])
        take(self, name, reply)

    def spy_receive(self: SimulatedNodes, timeout_s: float) -> Any:
        replies = receive(self, timeout_s)
        for reply in replies:
            told.extend(
                bytes(array.data) for record in reply.content.array_records.values() for array in record.values()
            )
            told.append(repr(reply.content.config_records).encode())
        return replies

    monkeypatch.setattr(SimulatedNodes, "_take", spy_take)
    monkeypatch.setattr(SimulatedNodes, "receive", spy_receive)
    run(tmp_path)
    files = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*.json*"))
    assert len(owns) == 5 * 2
    assert len(told) >= 5 * 2 * 2
    large = {int(value) for own in owns for value in own if abs(int(value)) > 1 << 32}
    assert len(large) > 20
    for value in large:
        assert str(value).encode() not in files
        assert not any(value.to_bytes(8, "little", signed=True) in message for message in told)
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["per_node"] is None


def test_a_run_that_was_stopped_goes_on_with_what_its_first_stage_found(
    tmp_path: Path, table: dict[str, np.ndarray]
) -> None:
    whole = run(tmp_path, "whole")
    (tmp_path / "cut").mkdir()
    stopping = """
import os, sys
from concord_local.simulation import simulate
def observe(record):
    if record["kind"] == "statistics" and record["round"] == 1:
        os._exit(9)
simulate(sys.argv[1], workers=1, out=sys.argv[2], observer=observe)
"""
    plan = str(tmp_path / "plan.toml")
    done = subprocess.run([sys.executable, "-c", stopping, plan, str(tmp_path / "cut")], check=False)
    assert done.returncode == 9
    resumed = simulate(resume=tmp_path / "cut").summary
    assert resumed["statistics"] == whole["statistics"]
    records = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]


def test_the_page_and_the_table_say_what_was_found(
    tmp_path: Path, table: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(tmp_path)
    show_result(summary)
    text = capsys.readouterr().out
    assert "600 rows of all nodes together" in text
    assert "age" in text
    assert "q0.25" in text
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "600 rows of 5 nodes" in page
    assert f"{summary['statistics']['columns']['age']['mean']:.4g}" in page
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("option", "value"), [("compare", True), ("seeds", 2), ("attack", "nan"), ("model", "x.py:f")])
def test_what_needs_a_model_is_refused(tmp_path: Path, table: dict[str, np.ndarray], option: str, value: Any) -> None:
    (tmp_path / "x.py").write_text("def f(): ...")
    asked = {option: str(tmp_path / value) if option == "model" else value}
    with pytest.raises(PlanError, match="for plans that train a model"):
        run(tmp_path, **asked)
