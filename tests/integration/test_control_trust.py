"""What the coordinator does not take on trust from its members: sizes, and numbers that others depend on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wheels import install
from worlds import OWNERS, STUDY, World, small_plan

from concord_server.runs.approvals import ROWS_MAX
from concord_shared.models.plugins import installed_plugins
from concord_shared.plan import Plan
from helpers import TOPICS, plan_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("wheels")
    install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        plugins = {each.package: each.sha256 for each in installed_plugins()}
        world = World(tmp_path_factory.mktemp("trust") / "c", metrics_max=20_000, plugins=plugins)
        yield world
        world.close()


@pytest.fixture
def world(made: World) -> World:
    made.clear()
    for node in OWNERS:
        assert made.publish(node).status_code == 204
    made.study()
    made.agreed("hospital-a", ("ward-a/heart",))
    return made


def submit(world: World, plan: Plan) -> Any:
    body = {"study": STUDY, "document": plan.document(), "organisation": "lab"}
    return world.people["lab"].post("/api/v1/plans", json=body)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.name=mlp", "model.hidden=[65536, 65536]"), "(parameters_max)"),
        ((f"data.classes={[str(label) for label in range(30)]}",), "at most 20000 (metrics_max)"),
    ],
)
def test_a_plan_that_no_worker_holds_is_refused_when_it_is_submitted(
    world: World, overrides: tuple[str, ...], words: str
) -> None:
    answer = submit(world, small_plan(*overrides))
    assert answer.status_code == 400
    assert words in answer.json()["detail"]
    assert world.kinds("ward-a") == ["study", "agreement"]
    assert submit(world, small_plan()).status_code == 201


@pytest.mark.parametrize(("rows", "evaluation_rows"), [(101, 0), (80, 21), (1 << 52, 1 << 52)])
def test_an_approval_counts_no_more_rows_than_the_card(world: World, rows: int, evaluation_rows: int) -> None:
    plan = small_plan()
    assert submit(world, plan).status_code == 201
    refused = world.approve("ward-a", plan, rows=rows, evaluation_rows=evaluation_rows)
    assert refused.status_code == 409
    assert "at most 100 together of ward-a/heart" in refused.json()["detail"]
    assert world.approve("ward-a", plan, rows=80, evaluation_rows=20).status_code == 204


def test_a_card_is_not_believed_any_number_of_rows(world: World) -> None:
    plan = small_plan()
    assert submit(world, plan).status_code == 201
    assert world.publish("ward-a", rows=(1 << 53) - 1).status_code == 204
    assert world.approve("ward-a", plan, rows=ROWS_MAX, evaluation_rows=1).status_code == 409
    assert world.approve("ward-a", plan, dataset_version="e" * 64, rows=ROWS_MAX + 1).status_code == 409
    assert world.approve("ward-a", plan, rows=ROWS_MAX, evaluation_rows=0).status_code == 204


def test_a_plan_with_pretrained_weights_is_taken_only_where_they_are(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCORD_PRETRAINED", str(tmp_path))
    digest = "a" * 64
    answer = submit(
        world,
        plan_of(TOPICS).with_changes(
            model={"name": "pretrained-encoder", "package": "tiny", "sha256": digest, "parameters": 600},
            preprocessing={"tokens": {"length": 8, "pretrained": digest}},
        ),
    )
    assert answer.status_code == 400
    assert "the pretrained model tiny (aaaaaaaaaaaa) is not on this machine" in answer.json()["detail"]


def test_a_plan_with_a_wheel_is_taken_only_where_the_settings_name_it(world: World) -> None:
    digest = next(each.sha256 for each in installed_plugins() if each.package == "their-models")
    model = {"name": "plugin", "package": "their-models", "model": "small-net", "sha256": digest, "parameters": 600}
    assert submit(world, small_plan().with_changes(model=model)).status_code == 201
    for change, words in (
        ({"sha256": "0" * 64}, "is none of the coordinator's plugins"),
        ({"package": "another"}, "is none of the coordinator's plugins"),
        ({"model": "other"}, "has no model other; it has small-net"),
    ):
        answer = submit(world, small_plan().with_changes(model=model | change))
        assert answer.status_code == 400
        assert words in answer.json()["detail"]
