"""Run directories that were damaged: one sentence names the file, what is wrong with it, and what to do."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from concord_local import simulate
from concord_local.inference import compare_runs, evaluate_run
from concord_local.run_files import SettingFile
from concord_local.rundir import RunDirectory
from concord_local.simulation import Setting
from concord_shared.errors import ArtefactError

Command = Callable[[Path], object]
AGAIN = "put the file back as it was, or run again with another --out"
ANEW = "remove it, and write it anew with concord simulate --resume"


def resume(run: Path) -> object:
    return simulate(resume=run)


def go_on(run: Path) -> object:
    """As where the run was stopped in its last moment."""
    (run / "summary.json").unlink()
    return simulate(resume=run)


def evaluate(run: Path) -> object:
    return evaluate_run(run, "digits")


def compare(run: Path) -> object:
    return compare_runs([run, run])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rundir") / "run"
    simulate("digits-cnn", nodes=3, workers=1, overrides=("rounds.count=1", "model.name=2nn"), out=out)
    return out


DAMAGES = {
    "no setting": ("simulation.json", "[]", (resume, evaluate), "expected a JSON object", AGAIN),
    "another setting": ("simulation.json", '{"schema": "x", "foo": 1}', (resume, evaluate), "data: missing", AGAIN),
    "a cut setting": ("simulation.json", '{"data": "dig', (resume, evaluate), "no JSON: Unterminated string", AGAIN),
    "a list of summaries": ("summary.json", "[1, 2]", (resume, compare), "expected a JSON object", ANEW),
    "an empty summary": ("summary.json", "{}", (resume, compare), "run_dir: missing", ANEW),
    "a cut summary": ("summary.json", '{"run_dir"', (resume, compare), "no JSON", ANEW),
    "no data": ("data.json", "{}", (go_on,), "nodes: missing", AGAIN),
    "data of other types": ("data.json", '{"nodes": {"a": 1}, "digest": 0}', (go_on,), "nodes.a: expected", AGAIN),
    "no environment": ("environment.json", "0", (go_on, compare), "expected a JSON object", AGAIN),
    "no plan": ("plan.json", "[]", (go_on, evaluate), "expected a JSON object", AGAIN),
    "an empty plan": ("plan.json", "{}", (go_on, evaluate), "not a plan of this version of concord", AGAIN),
    "no records": ("metrics.jsonl", "x" * 100_000, (go_on,), "not the records of a run", "start a new run"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_named_with_what_to_do(case: str, finished: Path, tmp_path: Path) -> None:
    name, text, commands, wrong, advice = DAMAGES[case]
    for place, command in enumerate(commands):
        run = tmp_path / str(place)
        shutil.copytree(finished, run)
        (run / name).write_text(text, "utf-8")
        with pytest.raises(ArtefactError) as refused:
            command(run)
        said = str(refused.value)
        assert said.startswith(f"{run / name}: "), said
        assert wrong in said
        assert advice in said


def test_an_unknown_key_of_the_setting_is_named(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    setting = json.loads((run / "simulation.json").read_text("utf-8"))
    (run / "simulation.json").write_text(json.dumps(setting | {"colour": "red"}), "utf-8")
    with pytest.raises(ArtefactError, match="colour: unknown key"):
        resume(run)


@pytest.mark.parametrize("document", [{"plan": {}, "seeds": 2}, {"plan": [], "seeds": 2}, {"plan": {}, "seeds": 0}, []])
def test_a_damaged_list_of_seeds(document: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "simulation.json", run)
    (run / "seeds.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(ArtefactError, match=r"seeds\.json: expected a file of this run, got: .*another --out"):
        resume(run)


def test_a_summary_that_was_removed_is_written_anew(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = json.loads((run / "summary.json").read_text("utf-8"))
    (run / "summary.json").unlink()
    after = simulate(resume=run).summary
    assert (after["model_digest"], after["metrics"]) == (before["model_digest"], before["metrics"])


def test_a_place_that_is_taken_is_told_for_what_it_is(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(ArtefactError, match=r"notes\.txt is a file, expected a directory .* another with --out$"):
        RunDirectory.check_free(tmp_path / "notes.txt")
    with pytest.raises(ArtefactError, match=r"exists already; name another directory with --out$"):
        RunDirectory.check_free(tmp_path)
    with pytest.raises(ArtefactError, match=rf"with --out, or go on with --resume {finished}$"):
        RunDirectory.check_free(finished)


def test_every_key_of_a_setting_is_read_again() -> None:
    assert SettingFile.model_fields.keys() - {"named"} == {field.name for field in fields(Setting)}
