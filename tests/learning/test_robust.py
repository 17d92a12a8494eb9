"""Three attackers among ten nodes: `bash deploy/run.sh test -m benchmark -k robust -s` prints the table."""

from pathlib import Path
from typing import Any

import pytest

from concord_local import simulate
from datasets import needs

pytestmark = pytest.mark.benchmark
ATTACKS = ("label-flip", "sign-flip", "scale:-10", "alie")
ROUNDS = ["rounds.count=6", "evaluation.every=0"]
ROBUST = ["privacy.mode=robust", "privacy.attackers=3", "privacy.quarantine_after=0"]
"""Nobody is left out: what is measured is the rule, and over the test rows of all ten nodes."""


def drill(folder: Path, partition: str, attack: str = "", rule: str = "") -> float:
    """The accuracy of ten nodes after six rounds, three of them attackers; rule: none for the weighted mean."""
    overrides = [*ROUNDS, *([*ROBUST, f"privacy.rule={rule}"] if rule else [])]
    options: dict[str, Any] = {"attack": attack, "attackers": 3} if attack else {}
    out = folder / f"{rule or 'mean'}-{attack or 'clean'}"
    summary = simulate(
        "fashion-cnn", nodes=10, partition=partition, overrides=overrides, workers=2, out=out, **options
    ).summary
    seen = summary.get("attack", {}).get("seen", {})
    told = f"; flags on attackers {seen['flags_on_attackers']}/{seen['flags']}" if seen.get("flags") else ""
    print(
        f"{partition:14} {rule or 'weighted mean':18} {attack or 'none':12} {summary['metrics']['accuracy']:.4f}{told}"
    )
    return float(summary["metrics"]["accuracy"])


@needs("fashion_mnist")
def test_of_robust_nodes_three_attackers_cost_less_than_a_point(tmp_path: Path) -> None:
    clean = drill(tmp_path, "iid")
    under = {attack: drill(tmp_path, "iid", attack, "nnm-trimmed-mean") for attack in ATTACKS}
    assert min(under.values()) >= clean - 0.01, under
    assert drill(tmp_path, "iid", "scale:-10") < 0.5, "the control: without a rule the attack must work"
    others = {rule: drill(tmp_path, "iid", "scale:-10", rule) for rule in ("trimmed-mean", "median", "clipped-mean")}
    assert min(others.values()) >= clean - 0.05, others


@needs("fashion_mnist")
def test_of_robust_nodes_with_unlike_rows_three_attackers_cost_less_than_ten_points(tmp_path: Path) -> None:
    clean = drill(tmp_path, "dirichlet:0.5")
    drill(tmp_path, "dirichlet:0.5", "", "nnm-trimmed-mean")
    under = {attack: drill(tmp_path, "dirichlet:0.5", attack, "nnm-trimmed-mean") for attack in ATTACKS}
    assert min(under.values()) >= clean - 0.10, under
