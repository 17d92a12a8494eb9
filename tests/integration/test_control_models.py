"""Models of a coordinator's runs: what becomes of them after the run."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from workers import Wards, begin, ended, work
from worlds import World, now

from concord_server import client_nouns as nouns
from concord_server.studies.envelopes import document_of
from concord_server.worker import task
from concord_shared.documents import Release


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(task, "FlowerTransport", Wards)
    monkeypatch.setattr(Wards, "states", tmp_path / "nodes")
    made = World(tmp_path / "coordinator")
    made.ready()
    yield made
    made.close()


def test_two_runs_with_one_model_are_released_and_pulled_each_for_itself(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deterministic plan ends with the same model again; its summary is that of the other run."""
    digests = set()
    for run in ("first", "second"):
        begin(world, run)
        work(world, run)
        digests.add(ended(world, run)["summary"]["model_digest"])
    [digest] = digests
    api, node = world.api("lab"), world.sites["ward-b"].client
    releases = {}
    for run, issued_at in (("first", now()), ("second", now() - 60)):
        monkeypatch.setattr(nouns, "_now", lambda at=issued_at: at)
        nouns.release_model(api, world.keys["lab"], digest, run)
        told = [each.body for each in world.updates("ward-b") if each.kind == "release"]
        releases[run] = document_of(told[-1], Release)
    assert [releases[run].run for run in releases] == ["first", "second"]
    for run, release in releases.items():
        for file in release.files:
            answer = node.get(f"/api/node/models/{digest}/{file.name}", params={"run": run})
            assert answer.status_code == 200, (run, file.name, answer.text)
            assert hashlib.sha256(answer.content).hexdigest() == file.sha256
            assert len(answer.content) == file.size
        assert nouns.download_model(api, digest, tmp_path / run, run)["run"] == run
        assert f'"run": "{run}"' in (tmp_path / run / "summary.json").read_text()
    assert releases["first"].issued_at > releases["second"].issued_at
    for file in releases["first"].files:  # a node names no run and keeps the newest by what it says of itself
        answer = node.get(f"/api/node/models/{digest}/{file.name}")
        assert hashlib.sha256(answer.content).hexdigest() == file.sha256


def test_a_release_that_is_not_there(world: World) -> None:
    begin(world, "first")
    work(world, "first")
    digest = ended(world, "first")["summary"]["model_digest"]
    node = world.sites["ward-b"].client
    assert node.get(f"/api/node/models/{digest}/model.safetensors").status_code == 404, "not released"
    nouns.release_model(world.api("lab"), world.keys["lab"], digest, "first")
    assert node.get(f"/api/node/models/{digest}/model.safetensors").status_code == 200
    assert node.get(f"/api/node/models/{digest}/model.safetensors", params={"run": "other"}).status_code == 404
    assert node.get(f"/api/node/models/{digest}/plan.toml").status_code == 404
