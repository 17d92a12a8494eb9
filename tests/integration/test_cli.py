"""The commands as people meet them: real processes, exit codes, JSON, messages without a stack trace."""

import gzip
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

QUICK = ("--set", "rounds.count=2", "--set", "model.name=2nn", "--nodes", "4", "--workers", "1")
KEYS = (
    "run_dir plan_digest model_digest deterministic nodes rounds metrics per_node worst_node owners seconds bytes_up "
    "bytes_down peak_pss_mb"
)


def concord(*arguments: str, cwd: Path, module: str = "concord_local") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("cli")
    done = concord("simulate", *QUICK, "--compare", "--out", "run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "out.json").write_text(done.stdout, "utf-8")
    return folder


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert concord("--help", cwd=tmp_path).returncode == 0
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 2, "0.5 s on a quiet machine"
    code = "import sys, concord_local.cli; print(sorted(m for m in ('torch', 'flwr', 'numpy') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_json_is_one_object_with_the_promised_keys(finished: Path) -> None:
    summary = json.loads((finished / "out.json").read_text("utf-8"))
    assert set(KEYS.split()) <= set(summary)
    assert {"accuracy", "loss", "recall_macro", "precision_macro", "f1_macro", "auc"} <= set(summary["metrics"])
    assert set(summary["seconds"]) == {"total", "training", "startup"}
    assert set(summary["per_node"]) == set(summary["owners"]) == {f"node-{i}" for i in range(1, 5)}
    worst = min(summary["per_node"].items(), key=lambda item: item[1]["accuracy"])
    assert summary["worst_node"]["accuracy"] == worst[1]["accuracy"]
    rows = [figures["rows"] for figures in summary["per_node"].values()]
    hits = sum(figures["accuracy"] * figures["rows"] for figures in summary["per_node"].values())
    assert summary["metrics"]["accuracy"] == pytest.approx(hits / sum(rows))
    assert len(summary["comparison"]["rows"]) == 4


def test_run_directory_holds_what_the_readme_says(finished: Path) -> None:
    names = {str(path.relative_to(finished / "run")) for path in (finished / "run").rglob("*") if path.is_file()}
    expected = (
        "plan.json plan.toml simulation.json environment.json data.json metrics.jsonl model.safetensors "
        "preprocessing.json MODEL_CARD.md summary.json comparison.json report.html"
    )
    assert set(expected.split()) <= names
    assert any(name.startswith("plots/") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    with safe_open(finished / "run" / "model.safetensors", framework="numpy") as model:
        assert json.loads(model.metadata()["preprocessing"])["schema"] == "concord/preprocessing/1"


def test_the_written_plan_runs_again_to_the_same_model(finished: Path) -> None:
    done = concord("simulate", "run/plan.toml", "--nodes", "4", "--partition", "dirichlet:0.5", "--workers", "1",
                   "--out", "again", "--json", cwd=finished)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = json.loads((finished / "out.json").read_text("utf-8"))
    assert json.loads(done.stdout)["model_digest"] == first["model_digest"]
    verdict = json.loads(concord("compare", "run", "again", "--json", cwd=finished).stdout)["verdict"]
    assert verdict == "the models are equal, bit for bit"


def test_evaluate_and_predict_use_the_runs_model(finished: Path) -> None:
    figures = json.loads(concord("evaluate", "run", "--data", "digits", "--json", cwd=finished).stdout)
    predictions = json.loads(concord("predict", "run", "--data", "digits", "--json", cwd=finished).stdout)
    from sklearn.datasets import load_digits

    truth = load_digits().target
    assert figures["rows"] == predictions["rows"] == len(truth)
    hits = np.mean([int(word) == target for word, target in zip(predictions["prediction"], truth, strict=True)])
    assert figures["metrics"]["accuracy"] == pytest.approx(hits)
    done = concord("predict", "run", "--data", "digits", "--out", "p.csv", cwd=finished)
    assert done.returncode == 0
    lines = (finished / "p.csv").read_text("utf-8").splitlines()
    assert lines[0] == "prediction,probability"
    assert len(lines) == len(truth) + 1


@pytest.mark.slow
def test_seeds_are_means_of_their_runs(tmp_path: Path) -> None:
    done = concord("simulate", *QUICK, "--seeds", "2", "--out", "run", "--json", cwd=tmp_path)
    summary = json.loads(done.stdout)
    values = [seed["metrics"]["accuracy"] for seed in summary["seeds"]]
    assert len(values) == 2
    assert summary["metrics"]["accuracy"] == pytest.approx(statistics.fmean(values))
    assert summary["seeds"][0]["model_digest"] != summary["seeds"][1]["model_digest"]
    (tmp_path / "run" / "seed-1" / "summary.json").unlink()  # as if it had been stopped in its last moment
    (tmp_path / "run" / "summary.json").unlink()
    again = json.loads(concord("simulate", "--resume", "run", "--json", cwd=tmp_path).stdout)
    assert [seed["model_digest"] for seed in again["seeds"]] == [seed["model_digest"] for seed in summary["seeds"]]
    assert again["metrics"] == summary["metrics"]


def test_sweep_chooses_on_validation_and_writes_the_best_plan(tmp_path: Path) -> None:
    done = concord(
        "sweep", "digits-cnn", "--set", "model.name=2nn", "--set", "rounds.count=2", "--set",
        "training.learning_rate=0.0001,0.05", "--nodes", "4", "--workers", "1", "--out", "sweep", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads(done.stdout)
    assert summary["chosen_on"] == "validation"
    assert "training.learning_rate=0.05" in summary["best"]["set"]
    for state in tmp_path.glob("sweep/point-*/seed-*/plan.json"):
        assert json.loads(state.read_text("utf-8"))["evaluation"]["on"] == "validation"
    best = concord("plans", "sweep/best.toml", "--json", cwd=tmp_path)
    assert json.loads(best.stdout)["document"]["evaluation"]["on"] == "test"


def test_interrupt_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "concord_local", "simulate", "--set", "rounds.count=500", "--nodes", "4",
         "--out", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint" / "state.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "concord simulate --resume run" in errors


@pytest.mark.slow
def test_own_model_trains_here_and_resumes_only_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))\n",
        "utf-8",
    )
    options = ("--set", "rounds.count=2", "--nodes", "4", "--workers", "2")
    done = concord("simulate", "--model", "net.py:build", *options, "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(concord("evaluate", "run", "--data", "digits", "--json", cwd=tmp_path).stdout)["rows"] == 1797
    (tmp_path / "net.py").write_text("def build(): ...\n", "utf-8")
    again = concord("simulate", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert "not the file that the run began with" in again.stderr


def _table(folder: Path, text: str) -> str:
    (folder / "rows.csv").write_text(text, "utf-8")
    plan = """
name = "small-table"
[data]
task = "classification"
input = "table"
target = "sick"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[preprocessing]
scope = "federated"
standardise = true
[model]
name = "logistic-regression"
[rounds]
count = 2
[simulate]
data = "csv:rows.csv"
nodes = 2
"""
    (folder / "plan.toml").write_text(plan, "utf-8")
    return "plan.toml"


ROWS = "age,sick\n" + "".join(f"{20 + i},{'yes' if i % 2 else 'no'}\n" for i in range(40))

BAD_TABLES = {
    "missing column": (ROWS.replace("age", "years"), 1, "column age: missing; the plan's contract names it"),
    "class outside the contract": (
        ROWS.replace("yes", "maybe", 1),
        1,
        "1 rows have a class outside the contract's 2 classes",
    ),
    "missing value": (ROWS.replace("\n20,", "\n,"), 1, "1 of 40 values are missing"),
    "NaN": (ROWS.replace("\n20,", "\nNaN,"), 1, "1 of 40 values are missing"),
    "out of range": (ROWS.replace("\n20,", "\n999,"), 1, "outside the range"),
    "text for a number": (ROWS.replace("\n20,", "\nold,"), 1, "1 values are not numbers"),
    "no rows": ("age,sick\n", 1, "no rows"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_table(case: str, tmp_path: Path, here: Any) -> None:
    text, code, message = BAD_TABLES[case]
    _one_clear_message(here("simulate", _table(tmp_path, text)), code, message)
    assert not list(tmp_path.glob("runs/*/model.safetensors"))


def test_good_table(tmp_path: Path) -> None:
    done = concord("simulate", _table(tmp_path, ROWS), "--workers", "1", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "new.csv").write_text("age\n30\n50\n", "utf-8")
    done = concord("predict", "run", "--data", "csv:new.csv", cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 3, done.stderr


BAD_USE = {
    "unknown plan": (["simulate", "digits-cmm"], "Did you mean digits-cnn?"),
    "unknown key": (["simulate", "--set", "rounds.cuont=3"], "Did you mean count?"),
    "unknown option": (["simulate", "--node", "3"], "No such option"),
    "more nodes than rows": (["simulate", "--nodes", "5000"], "more nodes than"),
    "cohort above nodes": (["simulate", "--nodes", "4", "--set", "rounds.cohort=9"], "more nodes than there are"),
    "quorum above cohort": (["simulate", "--set", "rounds.cohort=4", "--set", "rounds.quorum=5"], "above the cohort"),
    "privacy": (["simulate", "--set", "privacy.mode=secret"], "privacy.mode: expected one of plain, private, robust"),
    "too few under masks": (["simulate", "--nodes", "2", "--set", "privacy.mode=private"], "needs 3 of them"),
    "too few to outvote": (
        ["simulate", "--nodes", "6", "--set", "privacy.mode=robust", "--set", "privacy.attackers=3"],
        "a round of 6 nodes cannot outvote privacy.attackers = 3: expected at least 7",
    ),
    "unknown attack": (["simulate", "--attack", "krum"], "expected label-flip, sign-flip, scale:-10"),
    "attackers without an attack": (["simulate", "--attackers", "3"], "say what they do with --attack"),
    "all nodes attack": (
        ["simulate", "--nodes", "4", "--attack", "alie", "--attackers", "4"],
        "fewer than the 4 nodes",
    ),
    "no such data": (["simulate", "--data", "idx:nowhere"], "no such file or directory"),
    "no such adapter": (["simulate", "--data", "xlsx:table"], "expected one of digits, idx"),
    "no such partition": (["simulate", "--partition", "even"], "expected iid, dirichlet:ALPHA"),
    "bad faults": (["simulate", "--faults", "flood:1"], "expected dropout:P"),
    "nodes below one": (["simulate", "--nodes", "0"], "expected at least 1"),
    "no such model file": (["simulate", "--model", "none.py:build"], "the file to exist"),
    "compare one": (["compare", "x"], "at least two runs"),
}


@pytest.mark.parametrize("case", BAD_USE)
def test_wrong_use_exits_2(case: str, here: Any) -> None:
    arguments, message = BAD_USE[case]
    _one_clear_message(here(*arguments), 2, message)


def test_output_directory_that_exists(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine", "utf-8")
    done = concord("simulate", *QUICK, "--out", "run", cwd=tmp_path)
    _one_clear_message(done, 1, "exists already")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    _one_clear_message(concord("simulate", "--resume", ".", cwd=tmp_path), 1, "expected the directory of a run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip at all", "gzip file is damaged"),
        (gzip.compress(b"\0\0\x08\x03" + b"\0" * 100, mtime=0)[:-9], "gzip file is damaged"),
        (gzip.compress(b"\x89PNG" + b"\0" * 100, mtime=0), "expected an IDX file"),
        (gzip.compress(b"\0\0\x08\x03" + (9).to_bytes(4, "big") * 3 + b"\0" * 10, mtime=0), "header says shape"),
    ],
)
def test_bad_idx(content: bytes, message: str, tmp_path: Path, here: Any) -> None:
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(content)
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(content)
    _one_clear_message(here("simulate", "mnist-cnn", "--data", f"idx:{tmp_path}"), 1, message)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("writes", [3, *(pytest.param(writes, marks=SLOW) for writes in (9, 14, 31))])
def test_a_full_disk_is_one_clear_message_and_the_run_can_be_resumed(writes: int, tmp_path: Path) -> None:
    """The disk is full from the `writes`-th file on."""
    code = (
        "import errno, os, sys\n"
        "fsync, left = os.fsync, [int(sys.argv.pop())]\n"
        "def full(descriptor):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    fsync(descriptor)\n"
        "os.fsync = full\n"
        "from concord_local.cli import main; main()\n"
    )
    options = ["simulate", *QUICK, "--out", "run", str(writes)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    _one_clear_message(done, 1, "the disk is full. Free some space and try again: go on with --resume")
    assert not list(tmp_path.rglob("*.tmp"))
    if (tmp_path / "run" / "plan.json").exists():
        assert concord("simulate", "--resume", "run", cwd=tmp_path).returncode == 0
        assert (tmp_path / "run" / "report.html").exists()


def test_node_command_checks_data_and_names_its_device(tmp_path: Path) -> None:
    plan = _table(tmp_path, ROWS)
    done = concord("check", plan, "--data", "csv:rows.csv", "--json", cwd=tmp_path, module="concord_client")
    assert json.loads(done.stdout)["rows"] == 40
    assert concord("device", cwd=tmp_path, module="concord_client").returncode == 0
    bad = concord("check", plan, "--data", "csv:absent.csv", cwd=tmp_path, module="concord_client")
    _one_clear_message(bad, 2, "no such file")


def _one_clear_message(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
