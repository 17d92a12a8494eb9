"""Runs at the coordinator: manifests, approvals, leases, steps, lists, watching; on each database where it matters."""

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlmodel import col, select
from worlds import LEASE_S, OWNERS, STUDY, World, now, ready_world, small_plan

from concord_server import client
from concord_server import client_nouns as nouns
from concord_server.audit.tables import AuditEvent
from concord_server.client import Coordinator as Api
from concord_server.database import utc_now
from concord_server.models.tables import ModelVersion
from concord_server.nodes.service import current_roster
from concord_server.nodes.tables import Node
from concord_server.runs import service
from concord_server.runs.states import Waiting
from concord_server.runs.tables import ApprovalRow, Round, Run
from concord_server.worker.loop import Worker
from concord_shared.documents import Terms
from concord_shared.errors import ConflictError, UnavailableError, UnreachableError
from concord_shared.plan import Plan, parse_plan_document

DAY_S = 86_400
PLAN = small_plan()
one_database = pytest.mark.parametrize("made", ["sqlite"], indirect=True)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ready_world(request, tmp_path_factory) as world:
        yield world


@pytest.fixture
def world(made: World) -> World:
    """All wards' data are open to the lab's study."""
    made.clear()
    return made


def refused(answer: Any, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]


def later(seconds: float) -> datetime.datetime:
    return utc_now() + datetime.timedelta(seconds=seconds)


def promote(world: World, at: datetime.datetime | None = None) -> None:
    with world.database.session() as session:
        service.promote_waiting(session, at or utc_now())


def rounds(world: World, run: str) -> list[int]:
    with world.database.reading() as session:
        return [each.index for each in service.records_after(session, run)]


def waits(world: World, run: str) -> list[tuple[str, str]]:
    return [(each["node"], each["what"]) for each in world.run(run)["waiting_for"]]


# The whole walk


def test_from_a_study_to_a_released_model(world: World) -> None:
    world.start(PLAN, run="run")
    assert waits(world, "run") == [(node, "offline") for node in OWNERS]
    for node in OWNERS:
        assert world.run("run")["state"] == "waiting"
        assert world.approve(node, PLAN).status_code == 204
    assert world.run("run")["state"] == "queued"
    assert world.lease("w") == "run"
    for number in (1, 2):
        world.step("run", "w", number, f"{number}" * 64)
    digest = world.finish_with_model("run", "w", PLAN)
    assert (world.run("run")["state"], world.run("run")["steps"]) == ("succeeded", 2)
    assert nouns.release_model(world.api("lab"), world.keys["lab"], digest)["released"]
    for node in OWNERS:
        assert world.kinds(node) == ["study", "agreement", "plan", "manifest", "run", "release"]
        path = f"/api/node/models/{digest}/model.safetensors"
        assert world.sites[node].client.get(path).status_code == 200
    with world.database.reading() as session:
        assert len(service.load_run(session, "run").approvals) == 3


# Manifests: each numbered check


def participants(world: World, *nodes: str, **changes: Any) -> tuple[dict[str, Any], ...]:
    told = {"dataset": "heart", "dataset_version": "d" * 64}
    return tuple({"node": node, "organisation": OWNERS[node]} | told | changes for node in nodes)


def manifest_with(world: World, plan: Plan = PLAN, **changes: Any) -> dict[str, Any]:
    from concord_shared.documents import Participant

    if "participants" in changes:
        changes["participants"] = tuple(Participant(**each) for each in changes["participants"])
    return world.manifest(plan, **changes)


@one_database
@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"plan_digest": "0" * 64}, 409, "has no plan"),
        ({"not_before": now() + 3600}, 400, "not_before is"),
        ({"not_after": now() - 1}, 400, "not_after: expected"),
        ({"not_after": now() + 400 * DAY_S}, 400, "not_after: expected"),
        ({"roster_version": 10_000}, 409, "version 10000 of the roster"),
        ({"participants": ("ward-a", "ward-a")}, 400, "name each node once"),
        ({"participants": ("ward-a", "ward-b"), "dataset": "lung"}, 409, "no agreement opens ward-a/lung"),
        ({"participants": ("ward-a", "ward-b"), "organisation": "lab"}, 400, "not of lab"),
        ({"participants": ("ward-a", "ward-b"), "dataset_version": "e" * 64}, 409, "is at version dddd"),
        ({"cohort_seed": 1}, 400, "cohort_seed"),
        ({"participants": ("ward-a",)}, 409, "an agreement wants at least 2"),
        ({"start_model": "0" * 64}, 409, "has no model"),
        ({"study": "unknown"}, 404, "no study"),
        ({"organisation": "hospital-a"}, 403, "of hospital-a"),
    ],
)
def test_a_manifest_is_refused(world: World, changes: dict[str, Any], status: int, said: str) -> None:
    if "participants" in changes:
        field = {key: value for key, value in changes.items() if key != "participants"}
        changes = {"participants": participants(world, *changes["participants"], **field)}
    refused(world.send(manifest_with(world, **changes)), status, said)
    assert world.api("lab").get("/api/v1/runs")["items"] == []


@one_database
def test_a_manifest_is_its_organisations(world: World) -> None:
    refused(world.send(world.manifest(PLAN, key="hospital-a")), 400, "lacks the signature")
    refused(world.send(world.manifest(PLAN), "hospital-a"), 403, "of lab")
    refused(world.send(world.manifest(PLAN), "rival"), 404, "no study")
    foreign = world.manifest(PLAN, key="rival", organisation="rival")
    refused(world.coordinator.admin.post("/api/v1/runs", json=foreign), 403, "not a member of the study")


@one_database
def test_a_plan_of_another_study_is_refused(world: World) -> None:
    world.study("other")
    other = small_plan("seed=9")
    nouns.submit_plan(world.api("lab"), "other", other)
    refused(world.send(world.manifest(PLAN, plan_digest=other.digest)), 409, "has no plan")


@one_database
def test_a_roster_of_long_ago_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.database.reading() as session:
        current = current_roster(session).version
    assert world.send(world.manifest(PLAN, roster_version=max(1, current - 20))).status_code == 201
    monkeypatch.setattr("concord_server.runs.manifests.ROSTER_VERSIONS_MAX", 3)
    refused(world.send(world.manifest(PLAN, roster_version=current - 4)), 409, "make it anew")


@one_database
def test_only_active_nodes_take_part(world: World) -> None:
    everybody = participants(world, *OWNERS)
    world.coordinator.admin.post("/api/v1/nodes/ward-b/suspend", json={})
    refused(world.send(manifest_with(world, participants=everybody)), 409, "ward-b is suspended")


@one_database
@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"rounds_max": 1}, "allows 1 rounds; the plan has 2"),
        ({"models": ("2nn",)}, "allows the models 2nn; the plan's is logistic-regression"),
        ({"not_after": now() + 7 * DAY_S}, "ends before the manifest does"),
        ({"minimum_cohort": 4}, "an agreement wants at least 4"),
    ],
)
def test_a_manifest_keeps_to_the_terms(world: World, terms: dict[str, Any], said: str) -> None:
    (before,) = world.people["hospital-a"].get("/api/v1/agreements").json()["items"]
    world.withdraw(before["agreement"], "hospital-a")
    given = world.agreement(terms=Terms(**{"not_after": now() + 365 * DAY_S} | terms))
    assert world.post("lab", "agreements", given, "lab").status_code == 201
    assert world.post("hospital-a", "agreements/asked/offer", given, "hospital-a").json()["state"] == "agreed"
    refused(world.send(world.manifest(PLAN, not_after=now() + 30 * DAY_S)), 409, said)


@one_database
def test_a_plan_for_more_nodes_than_there_are_is_refused(world: World) -> None:
    refused(world.send(world.manifest(small_plan("rounds.cohort=5"))), 409, "the plan cannot run on 3 nodes")


@one_database
def test_a_run_starts_from_a_model_of_its_kind_and_study(world: World) -> None:
    world.queued(PLAN, "first")
    world.lease("w")
    digest = world.finish_with_model("first", "w", PLAN)
    assert world.send(world.manifest(small_plan("seed=4"), start_model=digest)).status_code == 201
    other = small_plan("model.name=2nn")
    refused(world.send(world.manifest(other, start_model=digest)), 409, "is of another kind")


def test_a_manifest_sent_again_is_the_same_run(world: World) -> None:
    sent = world.manifest(PLAN, run="run")
    first, second = world.send(sent), world.send(sent | {"priority": 9})
    assert first.status_code == second.status_code == 201
    assert first.json() == second.json()
    refused(world.send(world.manifest(PLAN, run="run")), 409, "the run id run is taken")
    assert len(world.api("lab").get("/api/v1/runs")["items"]) == 1


# Approvals


@one_database
@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"node": "ward-b"}, 403, "decides for itself alone"),
        ({"organisation": "hospital-b"}, 403, "decides for itself alone"),
        ({"plan_digest": "0" * 64}, 409, "nothing was approved"),
        ({"study": "unknown"}, 409, "nothing was approved"),
        ({"dataset": "lung"}, 409, "publish the dataset first"),
        ({"issued_at": now() + DAY_S}, 400, "in the future"),
    ],
)
def test_an_approval_is_refused(world: World, changes: dict[str, Any], status: int, said: str) -> None:
    world.start(PLAN, run="run")
    refused(world.approve("ward-a", PLAN, **changes), status, said)
    with world.database.reading() as session:
        assert session.exec(select(ApprovalRow)).all() == []


@one_database
def test_an_approval_that_another_signed_is_refused(world: World) -> None:
    world.start(PLAN, run="run")
    site = world.sites["ward-a"]
    site.keys, own = world.sites["ward-b"].keys, site.keys
    answer = world.approve("ward-a", PLAN)
    site.keys = own
    refused(answer, 400, "lacks the signature")


@one_database
def test_an_older_word_does_not_replace_a_newer_one(world: World) -> None:
    world.start(PLAN, run="run")
    told = {"issued_at": now(), "not_after": now() + 3600}
    assert world.approve("ward-a", PLAN, "approved", 2, **told).status_code == 204
    refused(world.approve("ward-a", PLAN, "rejected", 1), 409, "sequence 3 or later, got 1")
    refused(world.approve("ward-a", PLAN, "rejected", 2), 409, "sequence 3 or later, got 2")
    assert world.approve("ward-a", PLAN, "approved", 2, **told).status_code == 204
    with world.database.reading() as session:
        assert len(session.exec(select(ApprovalRow)).all()) == 1
    assert world.approve("ward-a", PLAN, "rejected", 3).status_code == 204
    assert world.approve("ward-a", PLAN, "approved", 2, **told).status_code == 204, "known already"
    assert ("ward-a", "approval") not in waits(world, "run")


@one_database
@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_version": "e" * 64},
        {"dataset": "lung"},
        {"study": "other"},
        {"not_after": now() - 1},
        {"plan": "other"},
    ],
)
def test_a_word_on_something_else_does_not_count(world: World, changes: dict[str, Any]) -> None:
    other = small_plan("seed=7")
    world.study("other")
    nouns.submit_plan(world.api("lab"), "other", PLAN)
    nouns.submit_plan(world.api("lab"), STUDY, other)
    world.publish("ward-a", "lung")
    world.start(PLAN, run="run")
    for node in ("ward-b", "ward-c"):
        world.approve(node, PLAN)
    on = other if changes.pop("plan", "") else PLAN
    assert world.approve("ward-a", on, **changes).status_code == 204
    assert waits(world, "run") == [("ward-a", "offline")]


@one_database
def test_a_run_goes_without_who_rejected_and_fails_without_enough(world: World) -> None:
    world.start(PLAN, run="run")
    world.approve("ward-a", PLAN, "rejected")
    world.approve("ward-b", PLAN)
    world.start(PLAN, run="second")
    world.approve("ward-c", PLAN)
    assert world.run("run")["state"] == "queued"
    assert [each["node"] for each in world.row("run").admitted] == ["ward-b", "ward-c"]
    world.approve("ward-c", PLAN, "withdrawn", 2)
    found = world.run("run")
    assert found["state"] == "failed"
    assert found["reason"] == "too few nodes can take part: 2 of 3 are needed; rejected: ward-a; withdrawn: ward-c"
    assert world.run("second")["state"] == "failed"
    assert world.kinds("ward-b")[-2:] == ["run", "run"]


@one_database
def test_a_run_that_runs_tells_whom_it_lost_and_its_end_waits_for_nobody(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("w")
    world.approve("ward-a", PLAN, "withdrawn", 2)
    world.publish("ward-b", dataset_version="e" * 64)
    promote(world)
    assert (world.run("run")["state"], waits(world, "run")) == (
        "running",
        [("ward-a", "withdrawn"), ("ward-b", "changed")],
    )
    world.finish("run", "w")
    assert (world.run("run")["state"], waits(world, "run")) == ("succeeded", [])


@one_database
def test_a_suspended_node_is_waited_for(world: World) -> None:
    world.start(PLAN, run="run")
    world.coordinator.admin.post("/api/v1/nodes/ward-a/suspend", json={})
    for node in OWNERS:
        assert world.approve(node, PLAN).status_code == 204
    assert waits(world, "run") == [("ward-a", "suspended")]
    fingerprint = world.sites["ward-a"].keys.fingerprint
    world.coordinator.admin.post("/api/v1/nodes/ward-a/activate", json={"fingerprint": fingerprint})
    promote(world)
    assert world.run("run")["state"] == "queued"


# Leases


def test_a_run_is_one_workers(world: World) -> None:
    world.queued(PLAN, "run")
    assert world.lease("one") == "run"
    assert world.lease("two") is None
    assert world.lease("one") is None
    assert (world.row("run").state, world.row("run").lease_owner) == ("running", "one")


def test_a_worker_whose_lease_ran_out_writes_nothing_more(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("one")
    world.step("run", "one", 1, "1" * 64)
    assert world.lease("two", later(LEASE_S + 1)) == "run"
    before = world.row("run").model_dump()
    writes: list[Callable[[], Any]] = [
        lambda: world.step("run", "one", 2, "2" * 64),
        lambda: world.finish("run", "one"),
        lambda: world.finish_with_model("run", "one", PLAN),
    ]
    for write in writes:
        with pytest.raises(ConflictError, match="no longer leased to one: it is running; nothing was stored"):
            write()
    with world.database.session() as session:
        assert not service.renew_lease(session, "run", "one", later(60), LEASE_S).still_mine
        service.release_lease(session, "run", "one", utc_now())
    assert world.row("run").model_dump() == before
    assert rounds(world, "run") == [0]
    world.step("run", "two", 2, "2" * 64)
    assert rounds(world, "run") == [0, 1]


@one_database
def test_a_lease_that_nobody_took_is_still_held(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("one", later(-3600))
    world.step("run", "one")
    with world.database.session() as session:
        assert service.renew_lease(session, "run", "one", utc_now(), LEASE_S).still_mine
    assert world.lease("two") is None


def test_a_run_given_back_is_the_next_ones(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("one")
    with world.database.session() as session:
        service.release_lease(session, "run", "one", utc_now())
    assert world.lease("two") == "run"
    assert world.row("run").started_at is not None


def test_the_highest_priority_goes_first_then_the_longest_unserved(world: World) -> None:
    world.queued(PLAN, "a", "b")
    world.start(PLAN, run="urgent", priority=9)
    world.start(PLAN, run="c")
    assert [world.lease("w") for _ in range(5)] == ["urgent", "a", "b", "c", None]


def test_a_run_that_ends_its_workers_loses_its_turn(world: World) -> None:
    """Each lease without a step takes one off its priority: of priority 2 it has two turns before the other's first."""
    world.queued(PLAN, "other")
    world.start(PLAN, run="poison", priority=2)
    times = [later(step * (LEASE_S + 1)) for step in range(6)]
    taken = [world.lease(f"w-{step}", at) for step, at in enumerate(times)]
    assert taken == ["poison", "poison", "other", "poison", "other", "poison"]


def test_a_run_that_makes_progress_keeps_its_priority(world: World) -> None:
    world.queued(PLAN, "other")
    world.start(PLAN, run="urgent", priority=2)
    for step in range(4):
        assert world.lease(f"w-{step}", later(step * (LEASE_S + 1))) == "urgent"
        world.step("urgent", f"w-{step}", step)


def test_two_workers_at_once_share_the_runs(world: World) -> None:
    names = [f"run-{number}" for number in range(8)]
    world.queued(PLAN, *names)
    got: dict[str, list[str]] = {"one": [], "two": []}
    together = threading.Barrier(2)

    def work(owner: str) -> None:
        together.wait()
        idle = 0
        while idle < 3:
            run = world.lease(owner)
            idle = 0 if run else idle + 1
            if run:
                got[owner].append(run)
                world.step(run, owner)
                world.finish(run, owner)

    threads = [threading.Thread(target=work, args=(owner,)) for owner in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(got["one"] + got["two"]) == names
    assert all(rounds(world, name) == [0] for name in names)


@pytest.mark.parametrize("made", ["postgresql"], indirect=True)
def test_a_worker_does_not_wait_for_one_that_is_taking_a_run(world: World) -> None:
    world.queued(PLAN, "a", "b")
    with world.database.session() as session:
        first = service.lease_next(session, "one", utc_now(), LEASE_S)
        assert first is not None
        got: list[str | None] = []
        other = threading.Thread(target=lambda: got.extend([world.lease("two"), world.lease("three")]))
        other.start()
        other.join(5)
        assert got == ["b", None]
    assert (world.row("a").lease_owner, world.row("b").lease_owner) == ("one", "two")


# Stops and ends


def test_a_run_is_stopped_in_every_state(world: World) -> None:
    world.queued(PLAN, "running", "lost", "queued")
    world.start(small_plan("seed=3"), run="waiting")
    world.lease("w")
    world.lease("dead", later(-60))
    stop = world.people["lab"].post
    for run in ("waiting", "queued"):
        found = stop(f"/api/v1/runs/{run}/stop").json()
        assert (found["state"], found["reason"]) == ("stopped", "stopped by people-of-lab")
        assert found["waiting_for"] == []
        refused(stop(f"/api/v1/runs/{run}/stop"), 409, "is stopped already")
    for _ in range(2):
        for run in ("running", "lost"):
            found = stop(f"/api/v1/runs/{run}/stop").json()
            assert (found["state"], found["stop_requested"]) == ("running", True)
    assert world.lease("w") == "lost", "somebody has to end it"
    for run in ("running", "lost"):
        with world.database.session() as session:
            control = service.renew_lease(session, run, "w", utc_now(), LEASE_S)
        assert (control.stop_requested, control.reason) == (True, "stopped by people-of-lab")
        world.finish(run, "w", "stopped", control.reason)
        assert world.run(run)["state"] == "stopped"
    assert len(world.coordinator.audited("run:stop")) >= 4
    refused(world.people["hospital-a"].post("/api/v1/runs/running/stop"), 403, "of lab")
    refused(world.people["rival"].post("/api/v1/runs/running/stop"), 404, "no run")


def test_a_run_whose_manifest_ran_out_ends_with_a_reason(world: World) -> None:
    world.queued(PLAN, "queued")
    other = small_plan("seed=3")
    world.start(other, run="waiting")
    world.approve("ward-a", other, not_after=now() + 300 * DAY_S)
    promote(world, later(29 * DAY_S))
    assert world.run("waiting")["state"] == "waiting"
    promote(world, later(31 * DAY_S))
    assert world.run("waiting")["state"] == "failed"
    assert "it did not begin in time: still undecided: ward-b, ward-c" in world.run("waiting")["reason"]
    assert world.run("queued")["state"] == "failed"
    assert "did not begin in time" in world.run("queued")["reason"]


def test_a_run_that_ended_stays_as_it_ended(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("w")
    world.finish("run", "w", "failed", "too few answered")
    ended = world.row("run").model_dump()
    for write in (lambda: world.step("run", "w"), lambda: world.finish("run", "w")):
        with pytest.raises(ConflictError, match="it is failed"):
            write()
    assert world.approve("ward-a", PLAN, "withdrawn", 2).status_code == 204
    promote(world, later(100 * DAY_S))
    assert world.lease("other", later(100 * DAY_S)) is None
    assert world.row("run").model_dump() == ended
    assert [each.body["state"] for each in world.updates("ward-a") if each.kind == "run"] == ["failed"]


def test_a_run_that_starts_while_its_agreement_is_withdrawn_is_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start has passed its checks, and is not stored yet."""
    agreement = world.api("lab").get("/api/v1/agreements")["items"][0]
    sent = world.manifest(PLAN, run="run")
    checked, go_on = threading.Event(), threading.Event()
    assess = service.assess

    def slow(*given: Any) -> None:
        checked.set()
        assert go_on.wait(10)
        assess(*given)

    monkeypatch.setattr(service, "assess", slow)
    starting = threading.Thread(target=world.send, args=(sent,))
    withdrawing = threading.Thread(target=world.withdraw, args=(agreement["agreement"], agreement["owner"]))
    starting.start()
    assert checked.wait(10)
    withdrawing.start()
    time.sleep(0.3)
    go_on.set()
    starting.join(10)
    withdrawing.join(10)
    assert world.api("lab").get(f"/api/v1/agreements/{agreement['agreement']}")["state"] == "withdrawn"
    assert world.run("run")["state"] == "stopped"


# The worker


@pytest.fixture
def worker(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Worker]]:
    """Workers of so many slots; what they drive goes on until something ends its lease."""
    made: list[Worker] = []

    def endless(home: Any, database: Any, link: Any, lease: Any, owner: str) -> None:
        while True:
            lease.check()
            time.sleep(0.005)

    monkeypatch.setattr("concord_server.worker.task._drive", endless)
    home = world.coordinator.home

    def make(slots: int) -> Worker:
        monkeypatch.setitem(home.__dict__, "settings", home.settings.model_copy(update={"runs_parallel": slots}))
        made.append(Worker(home, None))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        for lease, thread in each._running.values():
            lease.drain()
            thread.join(10)


def settle(worker: Worker, *runs: str) -> None:
    for run in runs:
        worker._running[run][1].join(10)


@one_database
def test_a_run_keeps_its_slot_until_it_ends_and_the_next_one_follows_at_once(
    world: World, worker: Callable[[int], Worker]
) -> None:
    """While there is work to do: with one slot, also a more urgent run waits for the end of the one that has it."""
    world.queued(PLAN, "first")
    one = worker(1)
    one.look()
    world.start(PLAN, run="urgent", priority=9)
    for _ in range(5):
        one._renewed_at_s = 0.0
        one.look()
    assert (world.run("first")["state"], world.run("urgent")["state"]) == ("running", "queued")
    world.people["lab"].post("/api/v1/runs/first/stop")
    one.look()
    settle(one, "first")
    one.look()
    assert (world.run("first")["state"], world.run("urgent")["state"]) == ("stopped", "running")


@one_database
def test_a_run_that_waits_for_a_silent_node_keeps_nobody_from_its_turn(
    world: World, worker: Callable[[int], Worker]
) -> None:
    world.queued(PLAN, "first", "second", "third")
    one = worker(1)
    one.look()
    one._running["first"][0].awaited = lambda: [Waiting("ward-a", "answer", 0)]
    one.look()
    assert [world.run(run)["state"] for run in ("first", "second", "third")] == ["running", "running", "queued"]
    one._running["second"][0].awaited = lambda: [Waiting("ward-b", "away", 0)]
    one._home.__dict__["settings"] = one._home.settings.model_copy(update={"runs_held": 2})
    one.look()
    assert world.run("third")["state"] == "queued", "no more are held in memory than the settings say"
    one._home.__dict__["settings"] = one._home.settings.model_copy(update={"runs_held": 3})
    one.look()
    assert world.run("third")["state"] == "running"


@one_database
def test_a_run_whose_manifest_ends_meanwhile_is_stopped(
    world: World, worker: Callable[[int], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.queued(PLAN, "run")
    one = worker(1)
    one.look()
    monkeypatch.setattr("concord_server.worker.loop.utc_now", lambda: later(400 * DAY_S))
    one.look()
    one.look()
    settle(one, "run")
    ended = world.run("run")
    assert ended["state"] == "stopped"
    assert "its manifest is over" in ended["reason"]


@one_database
def test_another_slot_is_not_held_up(world: World, worker: Callable[[int], Worker]) -> None:
    world.queued(PLAN, "first", "second", "third")
    worker(2).look()
    assert [world.run(run)["state"] for run in ("first", "second", "third")] == ["running", "running", "queued"]


@one_database
def test_a_worker_that_lost_its_run_leaves_it_alone(world: World, worker: Callable[[int], Worker]) -> None:
    world.queued(PLAN, "run")
    slow = worker(1)
    slow.look()
    assert world.lease("fast", later(LEASE_S + 1)) == "run"
    slow.look()
    settle(slow, "run")
    assert (world.row("run").state, world.row("run").lease_owner) == ("running", "fast")


@one_database
def test_a_worker_that_drains_gives_its_run_back(world: World, worker: Callable[[int], Worker]) -> None:
    world.queued(PLAN, "run")
    ending = worker(1)
    ending.look()
    ending._running["run"][0].drain()
    settle(ending, "run")
    assert (world.row("run").state, world.row("run").lease_owner) == ("running", None)
    assert world.lease("next") == "run"


# A step is one transaction


def stored(world: World) -> tuple[Any, ...]:
    """All that a step changes."""
    with world.database.reading() as session:
        return (
            [each.index for each in session.exec(select(Round))],
            sorted(each.digest for each in session.exec(select(ModelVersion))),
            session.get_one(Run, "run").checkpoint,
            session.get_one(Run, "run").fruitless,
            len(session.exec(select(AuditEvent).where(AuditEvent.subject == "run")).all()),
        )


def test_a_step_whose_commit_fails_leaves_nothing(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("w")
    world.step("run", "w", 1, "1" * 64)
    before = stored(world)

    def fail(_: Any) -> None:
        raise OperationalError("COMMIT", {}, Exception("the disk is full"))

    engine = world.database._engine
    event.listen(engine, "commit", fail)
    try:
        with pytest.raises(UnavailableError, match="nothing was changed"):
            world.step("run", "w", 2, "2" * 64)
    finally:
        event.remove(engine, "commit", fail)
    assert stored(world) == before
    world.step("run", "w", 2, "2" * 64)
    indices, digests, checkpoint, _, events = stored(world)
    assert (indices, digests, checkpoint) == ([0, 1], ["1" * 64, "2" * 64], {"version": 2})
    assert events == before[-1] + 1


def test_a_step_with_a_model_that_cannot_be_stored_leaves_nothing(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("w")
    before = stored(world)
    model = ModelVersion(digest="1" * 64, run="run", plan_digest="", round=1, path=None, sha256="", size=1)  # type: ignore[arg-type]
    with pytest.raises(ConflictError), world.database.session() as session:
        service.save_step(session, "run", "w", {"kind": "train", "round": 1}, {"version": 1}, model)
    assert stored(world) == before


@one_database
def test_a_round_that_changed_nothing_makes_no_second_model(world: World) -> None:
    world.queued(PLAN, "run")
    world.lease("w")
    for number in (1, 2):
        world.step("run", "w", number, "1" * 64)
    assert stored(world)[:2] == ([0, 1], ["1" * 64])


# Lists, and creations sent twice


def pages(world: World, path: str, **query: Any) -> list[list[dict[str, Any]]]:
    found, after = [], None
    while True:
        page = world.api("lab").get(path, limit=2, after=after, **query)
        found.append(page["items"])
        after = page["next"]
        if after is None:
            return found


def test_runs_are_listed_newest_first_and_each_once(world: World) -> None:
    names = ["e", "d", "c", "b", "a"]
    for name in names:
        world.start(PLAN, run=name)
    found = pages(world, "/api/v1/runs")
    assert [[each["id"] for each in page] for page in found] == [["a", "b"], ["c", "d"], ["e"]]
    world.people["lab"].post("/api/v1/runs/c/stop")
    assert [each["id"] for page in pages(world, "/api/v1/runs", state="waiting") for each in page] == list("abde")
    assert pages(world, "/api/v1/runs", study="other") == [[]]
    first = world.api("lab").get("/api/v1/runs", limit=2)
    world.start(PLAN, run="late")
    following = world.api("lab").get("/api/v1/runs", limit=2, after=first["next"])["items"]
    assert [each["id"] for each in following] == ["c", "d"], "what is new does not move the pages"


@one_database
def test_models_are_listed_newest_first_and_each_once(world: World) -> None:
    world.queued(PLAN, "one", "two")
    for run in ("one", "two"):
        assert world.lease("w") == run
        for number in (1, 2):
            world.step(run, "w", number, f"{number}" * 64)
    digest = world.finish_with_model("two", "w", PLAN)
    found = [
        (each["run"], each["digest"][0], each["final"]) for page in pages(world, "/api/v1/models") for each in page
    ]
    assert found == [
        ("two", digest[0], True),
        ("two", "2", False),
        ("two", "1", False),
        ("one", "2", False),
        ("one", "1", False),
    ]
    assert [each["digest"] for page in pages(world, "/api/v1/models", final=True) for each in page] == [digest]
    assert len([each for page in pages(world, "/api/v1/models", run="one") for each in page]) == 2
    assert world.api("lab").get(f"/api/v1/models/{'1' * 64}", run="one")["run"] == "one"
    assert world.api("lab").get(f"/api/v1/models/{'1' * 64}")["run"] == "two"


def test_agreements_are_listed_in_order_and_each_once(world: World) -> None:
    for name in ("z-1", "z-2", "z-3"):
        assert world.post("lab", "agreements", world.agreement(agreement=name), "lab").status_code == 201
    found = [each["agreement"] for page in pages(world, "/api/v1/agreements") for each in page]
    assert found == sorted(found)
    assert len(found) == len(set(found)) == 5
    asked = pages(world, "/api/v1/agreements", state="requested")
    assert [[each["agreement"] for each in page] for page in asked] == [["z-1", "z-2"], ["z-3"]]
    assert pages(world, "/api/v1/agreements", study="other") == [[]]


def test_a_run_sent_twice_at_once_is_started_once(world: World) -> None:
    sent = world.manifest(PLAN, run="run")
    answers: list[Any] = []
    together = threading.Barrier(2)

    def send() -> None:
        together.wait()
        answers.append(world.people["lab"].post("/api/v1/runs", json=sent, headers={"Idempotency-Key": "the-same-key"}))

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [each.status_code for each in answers] == [201, 201], [each.text for each in answers]
    assert answers[0].json() == answers[1].json()
    assert len(world.api("lab").get("/api/v1/runs")["items"]) == 1
    with world.database.reading() as session:
        started = select(AuditEvent).where(AuditEvent.action == "run:start", AuditEvent.subject == "run")
        assert session.exec(started.order_by(col(AuditEvent.id).desc()).limit(1)).one().detail["study"] == STUDY


def test_a_key_is_for_one_creation(world: World) -> None:
    post, key = world.people["lab"].post, {"Idempotency-Key": "the-same-key"}
    first = post("/api/v1/runs", json=world.manifest(PLAN, run="run"), headers=key)
    assert first.status_code == 201
    refused(post("/api/v1/runs", json=world.manifest(PLAN, run="other"), headers=key), 409, "another request")
    again = world.people["hospital-a"].post("/api/v1/runs", json=world.manifest(PLAN, run="other"), headers=key)
    assert again.status_code == 403, "a key is its person's"
    world.people["lab"].post("/api/v1/runs/run/stop")
    assert world.run("run")["state"] == "stopped"


@one_database
def test_a_refused_creation_does_not_use_its_key_up(world: World) -> None:
    post, key = world.people["lab"].post, {"Idempotency-Key": "the-same-key"}
    sent = world.manifest(PLAN, run="run")
    world.coordinator.admin.post("/api/v1/nodes/ward-b/suspend", json={})
    refused(post("/api/v1/runs", json=sent, headers=key), 409, "is suspended")
    fingerprint = world.sites["ward-b"].keys.fingerprint
    world.coordinator.admin.post("/api/v1/nodes/ward-b/activate", json={"fingerprint": fingerprint})
    assert post("/api/v1/runs", json=sent, headers=key).status_code == 201


# Watching


def events(answer: Any) -> list[tuple[str, str, Any]]:
    """(event, id, data) of a stream, comments left out."""
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"])))
    return found


@pytest.fixture
def watched(world: World) -> World:
    """A run of four steps that goes on."""
    world.queued(PLAN, "run")
    world.lease("w")
    for number in range(4):
        world.step("run", "w", number)
    return world


@one_database
def test_a_watcher_sees_every_step_and_the_end(watched: World) -> None:
    watched.finish("run", "w")
    found = events(watched.people["lab"].get("/api/v1/runs/run/events"))
    assert [(kind, id) for kind, id, _ in found] == [
        ("state", ""),
        *(("round", str(index)) for index in range(4)),
        ("end", ""),
    ]
    assert found[-1][2] == watched.run("run")
    assert [data["round"] for kind, _, data in found if kind == "round"] == [0, 1, 2, 3]


@one_database
@pytest.mark.parametrize(
    ("headers", "query", "first"),
    [
        ({"Last-Event-ID": "1"}, {}, 2),
        ({}, {"after": 2}, 3),
        ({"Last-Event-ID": "0"}, {"after": 2}, 3),
        ({}, {"after": 3}, None),
    ],
)
def test_a_watcher_that_comes_back_goes_on(
    watched: World, headers: dict[str, str], query: dict[str, int], first: int | None
) -> None:
    watched.finish("run", "w")
    found = events(watched.people["lab"].get("/api/v1/runs/run/events", headers=headers, params=query))
    seen = [int(id) for kind, id, _ in found if kind == "round"]
    assert seen == ([] if first is None else list(range(first, 4)))
    assert found[-1][0] == "end"


@one_database
def test_a_long_run_is_replayed_whole(watched: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concord_server.runs.watching.ROUNDS_AT_ONCE", 2)
    watched.finish("run", "w")
    found = events(watched.people["lab"].get("/api/v1/runs/run/events"))
    assert [kind for kind, *_ in found] == ["state", *["round"] * 4, "end"]


@one_database
def test_a_watcher_waits_for_the_end_and_hears_heart_beats(watched: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More often than the client gives a silent connection up."""
    from fastapi import routing

    assert routing._PING_INTERVAL < client.TIMEOUT_S
    monkeypatch.setattr(routing, "_PING_INTERVAL", 0.05)
    threading.Timer(0.4, lambda: watched.finish("run", "w", "failed", "too few answered")).start()
    began = time.monotonic()
    answer = watched.people["lab"].get("/api/v1/runs/run/events")
    assert 0.4 < time.monotonic() - began < 5
    assert ": ping" in answer.text
    assert [(kind, data.get("state")) for kind, _, data in events(answer) if kind != "round"] == [
        ("state", "running"),
        ("state", "failed"),
        ("end", "failed"),
    ]


@one_database
def test_a_stream_ends_after_its_time_and_with_the_coordinator(watched: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concord_server.runs.watching.LASTS_S", -1.0)
    assert events(watched.people["lab"].get("/api/v1/runs/run/events"))[-1][0] == "round"
    monkeypatch.undo()
    closing = watched.coordinator.app.state.concord.closing
    closing.set()
    answer = watched.people["lab"].get("/api/v1/runs/run/events")
    closing.clear()
    assert events(answer)[-1][0] == "round"


@one_database
def test_a_stranger_watches_nothing(watched: World) -> None:
    answer = watched.people["rival"].get("/api/v1/runs/run/events")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert watched.people["lab"].get("/api/v1/runs/run/events", params={"after": -1}).status_code == 422


class Cut(httpx.BaseTransport):
    """Breaks the first answers off, each after so many events and half of the next; None: no connection at all."""

    def __init__(self, inner: Any, *cuts: int | None) -> None:
        self._inner, self._cuts = inner, list(cuts)
        self.asked: list[str | None] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.params.get("after"))
        cut = self._cuts.pop(0) if self._cuts else 1000
        if cut is None:
            raise httpx.ConnectError("refused")
        response: httpx.Response = self._inner.handle_request(request)
        blocks = response.read().split(b"\n\n")
        if cut >= len(blocks):
            return httpx.Response(200, content=b"\n\n".join(blocks))
        return httpx.Response(200, stream=Broken(b"\n\n".join([*blocks[:cut], blocks[cut][:20]])))


class Broken(httpx.SyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self._content
        raise httpx.ReadError("cut")


@pytest.fixture
def line(watched: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Cut, Api]]:
    monkeypatch.setattr(nouns, "RETRY_S", 0.0)

    def make(*cuts: int | None) -> tuple[Cut, Api]:
        person = watched.people["lab"]
        cut = Cut(person._transport, *cuts)
        return cut, Api("https://testserver", person.headers["Authorization"].split()[1], transport=cut)

    return make


@one_database
def test_the_client_comes_back_after_a_cut_and_misses_nothing(
    watched: World, line: Callable[..., tuple[Cut, Api]]
) -> None:
    watched.finish("run", "w")
    cut, api = line(2, None, 3)
    found = list(nouns.watch_run(api, "run"))
    assert [kind for kind, _ in found] == ["state", *["round"] * 4, "end"]
    assert [data["round"] for kind, data in found if kind == "round"] == [0, 1, 2, 3]
    assert cut.asked == [None, "0", "0", "2"]


@one_database
def test_the_client_comes_back_when_a_stream_is_over(
    watched: World, line: Callable[..., tuple[Cut, Api]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concord_server.runs.watching.LASTS_S", -1.0)
    cut, api = line()
    found = []
    for kind, _ in nouns.watch_run(api, "run"):
        found.append(kind)
        if len(found) == 5:
            watched.step("run", "w", 4)
            watched.finish("run", "w")
    assert found == ["state", *["round"] * 5, "state", "end"] or found == [
        "state",
        *["round"] * 4,
        "state",
        "round",
        "end",
    ]
    assert cut.asked[:2] == [None, "3"]


@one_database
def test_the_client_gives_up_when_the_coordinator_stays_away(
    watched: World, line: Callable[..., tuple[Cut, Api]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nouns, "RETRIES", 3)
    cut, api = line(*[None] * 20)
    with pytest.raises(UnreachableError, match="cannot reach the coordinator"):
        list(nouns.watch_run(api, "run"))
    assert len(cut.asked) == 4


@one_database
def test_offline_is_said_of_a_node_that_was_not_seen_for_a_minute(world: World) -> None:
    world.start(PLAN, run="run")
    for node in OWNERS:
        world.sites[node].client.get("/api/node/updates")
    with world.database.session() as session:
        session.get_one(Node, "ward-b").last_seen_at = later(-61)
    promote(world)
    assert waits(world, "run") == [("ward-a", "approval"), ("ward-b", "offline"), ("ward-c", "approval")]


def test_statistics_are_told_to_those_who_may_see_the_run_once_it_succeeded(world: World) -> None:
    document = {key: small_plan().document()[key] for key in ("schema", "name", "seed", "data")}
    asked = parse_plan_document(document | {"kind": "statistics"})
    world.queued(asked, "counted")
    world.queued(PLAN, "trained")
    refused(world.people["lab"].get("/api/v1/runs/counted/statistics"), 409, "it has statistics once it succeeded")
    refused(world.people["lab"].get("/api/v1/runs/trained/statistics"), 404, "trains a model")
    assert world.lease("w") == "counted"
    found = {"rows": 9, "columns": {}}
    with world.database.session() as session:
        service.finish(session, "counted", "w", "succeeded", "", {"statistics": found})
    told = world.people["lab"].get("/api/v1/runs/counted/statistics").json()
    assert (told["run"], told["found"], told["plan"]["kind"]) == ("counted", found, "statistics")
    refused(world.people["rival"].get("/api/v1/runs/counted/statistics"), 404, "no run")
