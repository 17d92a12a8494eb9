"""Language models in whole runs: each speaker a node, plain and under masks, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client.data import RawData, Split, read_data
from concord_local import simulate
from concord_local.partitions import deal
from concord_local.slices import write_slice
from concord_shared.errors import ContractError, DataError, UsageError
from concord_shared.plan import load_plan
from datasets import data_root, needs
from helpers import LANGUAGE, plan_of

SMALL = [
    "model={name='gpt-mini', layers=1, width=16, heads=2}",
    "rounds.count=3",
    "rounds.cohort=3",
    "evaluation.every=1",
    "strategy={name='fedadam', server_learning_rate=0.02, tau=1e-8}",
]
PEOPLE = {"FIRST WITCH": "Double, double toil\nand trouble. ", "ROMEO": "O, speak again! ", "Iago": "I am not so. "}


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """Three who say enough, and one who does not."""
    folder = tmp_path / "play"
    folder.mkdir()
    speeches = [f"{name}:\n{words * 50}" for _ in range(4) for name, words in PEOPLE.items()]
    (folder / "input.txt").write_text("\n\n".join([*speeches, "BOY:\nAh."]) + "\n", "utf-8")
    return folder


def speak(play: Path, out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return simulate(
        "shakespeare-gpt",
        data=f"tiny-shakespeare:{play}",
        nodes=3,
        overrides=[*SMALL, *overrides],
        workers=1,
        out=out,
        **options,
    ).summary


def test_each_speaker_is_a_node_and_the_end_of_what_each_says_is_held_out(play: Path) -> None:
    plan = load_plan("shakespeare-gpt").plan
    data = read_data(f"tiny-shakespeare:{play}", plan)
    nodes = deal(data, plan.data, "natural:speaker", None, 0)
    assert sorted(nodes) == ["first-witch", "iago", "romeo"]
    assert data.split is not None
    rows = nodes["romeo"]
    parts = {split: data.inputs[rows[data.split[rows] == split]] for split in (Split.TRAIN, Split.TEST)}
    whole = "\n\n".join(["O, speak again! " * 50] * 4)
    told = {split: windows[0] + "".join(window[1:] for window in windows[1:]) for split, windows in parts.items()}
    assert told[Split.TRAIN] + told[Split.TEST] == whole  # windows share a letter, the two splits none
    assert len(told[Split.TEST]) == round(0.1 * len(whole))


def test_a_run_learns_and_says_how_well(play: Path, tmp_path: Path) -> None:
    summary = speak(play, tmp_path / "run", "rounds.count=12", "evaluation.every=4", compare=True)
    assert set(summary["metrics"]) == {"rows", "tokens", "loss", "perplexity", "accuracy"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [line["metrics"]["loss"] for line in map(json.loads, lines) if line["kind"] == "evaluate"]
    assert losses == sorted(losses, reverse=True)
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text("utf-8"))
    assert [each["round"] for each in comparison["pooled_course"]] == [4, 8, 12]
    assert comparison["all"]["pooled"] == comparison["pooled_course"][-1]["loss"]
    pooled = [each["loss"] for each in comparison["pooled_course"]]
    assert pooled == sorted(pooled, reverse=True)
    assert comparison["all"]["alone_mean"] is None
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "perplexity" in page
    assert '<polyline class="ref pooled"' in page  # both curves


def test_masks_change_neither_the_model_nor_its_figures(play: Path, tmp_path: Path) -> None:
    plain, private = (
        speak(play, tmp_path / mode, f"privacy.mode={mode}", "rounds.cohort=all") for mode in ("plain", "private")
    )
    assert private["model_digest"] == plain["model_digest"]
    assert private["metrics"] == plain["metrics"]


def test_records_can_be_hidden(play: Path, tmp_path: Path) -> None:
    dp = "privacy={mode='plain', dp={unit='record', epsilon=8.0, delta=1e-5, clip=1.0}}"
    summary = speak(play, tmp_path / "run", dp, "training.gradient_clip=0.0")
    assert summary["guarantee"]["unit"] == "record"
    assert np.isfinite(summary["metrics"]["loss"])


def test_a_partners_file_holds_the_same_rows_as_the_simulation(tmp_path: Path) -> None:
    """White space at the edges, and words that a table takes for missing ones, are text."""
    plan = plan_of(LANGUAGE)
    data = RawData(np.array([" ab ", "NA", "a\nb\n", "null", "gone"]), np.zeros(5, np.int64), np.array([0, 0, 2, 0, 0]))
    spec = write_slice(data, np.arange(4), plan, tmp_path)
    read = read_data(spec, plan)
    assert read.inputs.tolist() == [" ab ", "NA", "a\nb\n", "null"]
    assert read.split is not None
    assert read.split.tolist() == [0, 0, 2, 0]


def test_texts_of_one_character_or_too_many_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"words": "a"}\n{"words": "abcdefgh a"}\n{"words": "ab"}\n')
    with pytest.raises(ContractError, match="texts have") as caught:
        read_data(f"jsonl:{tmp_path / 'rows.jsonl'}", plan_of(LANGUAGE))
    assert caught.value.differences[0].count == 2
    with pytest.raises(ContractError, match="never_there"):
        read_data(f"jsonl:{tmp_path / 'rows.jsonl'}", plan_of(LANGUAGE, "data.text=never_there"))


@pytest.mark.parametrize("partition", ["dirichlet:0.5", "shards:2"])
def test_texts_without_classes_are_not_dealt_by_class(play: Path, partition: str) -> None:
    plan = load_plan("shakespeare-gpt").plan
    with pytest.raises(UsageError, match="have none"):
        deal(read_data(f"tiny-shakespeare:{play}", plan), plan.data, partition, 2, 0)


def test_a_study_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("ROMEO:\nAh.\n")
    with pytest.raises(DataError, match=r"input\.txt: expected this file of the study"):
        read_data(f"tiny-shakespeare:{tmp_path}", load_plan("shakespeare-gpt").plan)


def test_processes_and_one_process_come_to_the_same_model(play: Path, tmp_path: Path) -> None:
    one = speak(play, tmp_path / "one")
    two = simulate(
        "shakespeare-gpt", data=f"tiny-shakespeare:{play}", nodes=3, overrides=SMALL, workers=2, out=tmp_path / "two"
    ).summary
    assert one["model_digest"] == two["model_digest"]


@needs("tinyshakespeare", "tang_poems")
def test_the_studies_have_the_nodes_that_they_should() -> None:
    root = data_root()
    for name, folder, group, nodes in (
        ("shakespeare-gpt", "tiny-shakespeare:{}/tinyshakespeare", "speaker", 99),
        ("tang-gpt", "tang-poems:{}/tang_poems", "author", 20),
    ):
        plan = load_plan(name).plan
        data = read_data(folder.format(root), plan)
        dealt = deal(data, plan.data, f"natural:{group}", None, 0)
        assert len(dealt) == nodes
        assert data.split is not None
        assert min((data.split[rows] == Split.TEST).sum() for rows in dealt.values()) >= 1


@pytest.mark.slow
@needs("tinyshakespeare", "tang_poems")
@pytest.mark.parametrize("plan", ["shakespeare-gpt", "tang-gpt"])
def test_a_language_model_comes_near_pooled(plan: str, tmp_path: Path) -> None:
    """Whole courses, 20 minutes and more: at the same budget of at least 3 million tokens within 3 %."""
    simulate(plan, workers=2, compare=True, out=tmp_path / "run")
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text("utf-8"))
    assert comparison["all"]["federated"] <= 1.03 * comparison["all"]["pooled"]
    assert comparison["pooled_course"][-1]["loss"] < comparison["pooled_course"][0]["loss"]


@pytest.mark.slow
@needs("sentiment")
def test_sentiment_of_three_sites_is_near_pooled(tmp_path: Path) -> None:
    simulate("sentiment-encoder", overrides=["evaluation.every=0"], workers=1, compare=True, out=tmp_path / "run")
    totals = json.loads((tmp_path / "run" / "comparison.json").read_text("utf-8"))["all"]
    assert totals["federated"] >= totals["pooled"] - 0.02
    assert totals["federated"] > totals["alone_mean"]


@pytest.mark.slow
@needs("sms_spam")
def test_unwanted_messages_are_told(tmp_path: Path) -> None:
    overrides = ["evaluation.every=0"]
    assert simulate("sms-encoder", overrides=overrides, workers=1, out=tmp_path / "run").metrics["accuracy"] >= 0.98
