"""Quarantine at a coordinator: in the audit log with its evidence, shown to people, and lifted by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select
from typer.testing import CliRunner
from worlds import OWNERS, STUDY, World, ready_world, small_plan

from concord_server.audit.tables import AuditEvent
from concord_server.commands import runs as commands
from concord_server.commands.plans import explain_privacy
from concord_server.commands.watching import robust_lines, round_line
from concord_server.runs import service
from concord_shared.errors import ConflictError

PLAN = small_plan("privacy={mode='robust', attackers=1, quarantine_after=2}")
RUN = "robust-1"
FIGURES = {"norm": 9.0, "distance": 9.5, "cosine": -0.4, "trimmed": 0.9, "score": 30.0}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ready_world(request, tmp_path_factory) as world:
        yield world


@pytest.fixture
def world(made: World) -> World:
    """A run whose second round put ward-b into quarantine."""
    made.clear()
    made.queued(PLAN, RUN)
    assert made.lease("w") == RUN
    for number in (1, 2):
        with made.database.session() as session:
            service.save_step(session, RUN, "w", record(number), {"version": number})
    return made


def record(number: int) -> dict[str, Any]:
    rows = {node: FIGURES | {"flag": "far, long" if node == "ward-b" else ""} for node in OWNERS}
    told = {"rule": "nnm-trimmed-mean", "attackers": 1, "nodes": rows}
    made = {"kind": "train", "round": number, "of": 3, "survivors": sorted(OWNERS), "seconds": 0.1, "anomalies": told}
    evidence = {"rule": "flagged in 2 rounds in a row", "rounds": [{"round": each, **FIGURES} for each in (1, 2)]}
    return made | ({"quarantined": {"ward-b": evidence}} if number == 2 else {})


def lift(world: World, node: str = "ward-b", organisation: str = "lab", run: str = RUN, **body: Any) -> Any:
    return world.people[organisation].post(f"/api/v1/runs/{run}/quarantine/{node}/lift", json=body)


def refused(answer: Any, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]


def events(world: World, action: str) -> list[AuditEvent]:
    """Of this run, the last first: the log itself is never cleared."""
    with world.database.reading() as session:
        query = select(AuditEvent).where(AuditEvent.action == action, AuditEvent.subject == RUN)
        return list(session.exec(query.order_by(col(AuditEvent.id).desc())))


def test_is_in_the_audit_log_with_its_figures(world: World) -> None:
    event = events(world, "node:quarantine")[0]
    assert event.actor == "coordinator"
    assert (event.detail["node"], event.detail["round"]) == ("ward-b", 2)
    assert event.detail["rule"] == "flagged in 2 rounds in a row"
    assert event.detail["rounds"][1] == {"round": 2, **FIGURES}


def test_show_and_watch_say_who_and_why(world: World) -> None:
    found = world.run(RUN)
    lines = robust_lines(found["robust"])
    assert lines[0] == "robust: nnm-trimmed-mean against 1 attackers"
    assert lines[1] == (
        "ward-b: flagged in 2 of 2 rounds (far, long); left out after round 2: flagged in 2 rounds in a row"
    )
    assert lines[2] == "2 of 3 nodes never stood out"
    said = round_line(record(2))
    assert "ward-b stands out (far, long)" in said
    assert "ward-b is left out from here" in said
    assert found["steps"] == 2


def test_other_modes_have_no_such_report(world: World) -> None:
    world.finish(RUN, "w")
    plain = small_plan()
    world.queued(plain, "plain-1")
    assert world.run("plain-1")["robust"] is None


def test_a_person_lifts_it(world: World) -> None:
    answer = lift(world, reason="a paediatric ward")
    assert answer.status_code == 200, answer.text
    row = answer.json()["robust"]["nodes"]["ward-b"]
    assert row["quarantined"] is None
    assert row["lifted_by"]
    assert answer.json()["steps"] == 2, "a word is no step"
    with world.database.reading() as session:
        assert set(service.lifted(session, RUN)) == {"ward-b"}
        last = service.records_after(session, RUN)[-1]
    assert "ward-b is asked again" in round_line(last.record)
    event = events(world, "quarantine:lift")[0]
    assert (event.detail, event.actor.partition(":")[0]) == (
        {"node": "ward-b", "reason": "a paediatric ward"},
        "person",
    )
    before = len(events(world, "quarantine:lift"))
    assert lift(world).status_code == 200, "again changes nothing"
    assert len(events(world, "quarantine:lift")) == before
    with world.database.session() as session:  # the worker goes on
        assert service.save_step(session, RUN, "w", record(1) | {"round": 3}, {"version": 3}).index == 3


def test_only_what_is_left_out_can_be_asked_again(world: World) -> None:
    refused(lift(world, "ward-a"), 409, "ward-a is not in quarantine in the run robust-1")
    refused(lift(world, "nobody"), 409, "nobody is not in quarantine")
    refused(lift(world, run="no-such-run"), 404, "no run")
    assert lift(world, by="eve").status_code == 422
    assert lift(world, reason="x" * 301).status_code == 422


def test_others_may_not_lift(world: World) -> None:
    refused(lift(world, organisation="rival"), 404, "no run")
    assert lift(world, organisation="hospital-b").status_code == 403, "its own node's organisation neither"
    assert world.run(RUN)["robust"]["nodes"]["ward-b"]["quarantined"]


def test_nothing_is_lifted_in_a_run_that_ended(world: World) -> None:
    world.finish(RUN, "w")
    refused(lift(world), 409, "is succeeded already")


def test_the_command(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "coordinator", lambda: world.api("lab"))
    from concord_local.cli import app

    done = CliRunner().invoke(app, ["run", "lift", RUN, "ward-b", "--reason", "checked"])
    assert done.exit_code == 0, done.output
    assert "ward-b: flagged in 2 of 2 rounds (far, long); asked again by" in done.output


def test_a_run_of_too_few_nodes_is_refused_when_its_manifest_comes(world: World) -> None:
    """Three wards cannot outvote two attackers, whoever signed that they can."""
    plan = small_plan("privacy={mode='robust', attackers=2}")
    with pytest.raises(ConflictError, match=r"a round of 3 nodes cannot outvote privacy\.attackers = 2"):
        world.start(plan, study=STUDY, run="hopeless")


def test_a_table_beyond_the_quota_is_refused_when_its_manifest_comes(tmp_path: Path) -> None:
    """650,000 numbers of three nodes are 7.8 MB; one of seven MB of disk was allowed."""
    world = World(tmp_path / "c", table_quota_mb=7)
    world.ready()
    wide = ("model.name=mlp", "model.hidden=[9600]")
    try:
        with pytest.raises(ConflictError, match=r"takes 8 MB of the coordinator's disk, .* 7 \(table_quota_mb"):
            world.start(small_plan("privacy={mode='robust', attackers=1}", *wide), run="wide")
        world.start(small_plan(*wide), run="plain-wide")
    finally:
        world.close()


def test_who_chooses_robust_mode_is_told_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    explain_privacy(small_plan("privacy={mode='robust', rule='median', attackers=4}"))
    told = capsys.readouterr().err
    assert "the coordinator sees each node's Update" in told
    assert "by median, up to 4 nodes" in told
    assert "needs 9 Updates" in told
    explain_privacy(small_plan("privacy.mode=private"))
    assert capsys.readouterr().err == ""
