"""`concord check`: the matrix of a preflight, for each node of a simulation."""

import json
from pathlib import Path

from preflights import TABLE_PLAN, good_table
from typer.testing import CliRunner

from concord_local.cli import app
from concord_local.preflight import check
from helpers import REGRESSION

SMALL = ["model.name=logistic-regression", "rounds.count=4"]


def test_each_node_of_a_simulation_is_tried() -> None:
    found = check("digits-cnn", nodes=3, partition="iid", overrides=SMALL)
    assert [row["node"] for row in found["nodes"]] == ["node-1", "node-2", "node-3"]
    assert found["go"]
    figures = found["nodes"][0]["figures"]
    assert figures["rows"] == 480  # of 479
    assert figures["down_bytes"] == 2 * 4 * 650  # to train, and to evaluate
    assert 4 * figures["round_ms"] - 4 <= figures["total_ms"] <= 4 * figures["round_ms"]


def test_a_strategy_that_takes_rows_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(REGRESSION, "utf-8")
    lines = [f"{row % 7},{row % 5},{row % 3},{row % 11}" for row in range(100)]
    (tmp_path / "rows.csv").write_text("\n".join(["x0,x1,x2,y", *lines]) + "\n", "utf-8")
    found = check(
        str(tmp_path / "plan.toml"),
        data=f"csv:{tmp_path / 'rows.csv'}",
        nodes=2,
        partition="iid",
        overrides=["strategy.name=least-squares", "rounds.count=1"],
    )
    assert found["go"], found
    assert found["nodes"][0]["figures"]["batch_us"] > 0


def test_differential_privacy_and_a_proximal_term_too() -> None:
    for overrides in (
        ["privacy={mode='plain', dp={unit='record', epsilon=8.0, delta=1e-5, clip=1.0}}", "training.local_epochs=1"],
        ["strategy.name=fedprox"],
    ):
        found = check("digits-cnn", nodes=2, partition="iid", overrides=[*SMALL, *overrides])
        assert found["go"], found
        assert found["nodes"][0]["figures"]["batch_us"] > 0


def test_a_mismatch_is_told_with_exact_counts_on_the_persons_own_machine(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TABLE_PLAN, "utf-8")
    (tmp_path / "rows.csv").write_bytes(good_table().replace(b"yes", b"ill"))
    command = ["check", str(tmp_path / "plan.toml"), "--data", f"csv:{tmp_path / 'rows.csv'}", "--nodes", "2"]
    done = CliRunner().invoke(app, [*command, "--partition", "iid"])
    assert done.exit_code == 1, done.output
    assert "40 rows" in done.stdout
    (tmp_path / "rows.csv").write_bytes(good_table())
    done = CliRunner().invoke(app, [*command, "--partition", "iid", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["go"]
