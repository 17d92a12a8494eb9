"""Preflights: what is asked and answered between a real node and a coordinator, and what of the data never is."""

import base64
import json
import logging
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preflights import (
    DATASET,
    NODE,
    TABLE_PLAN,
    Clinic,
    check_of,
    good_table,
    report_of,
    row_of,
    statuses,
    table_plan,
)
from typer.testing import CliRunner
from worlds import STUDY, World, body, now, small_plan

from concord_client import contract
from concord_client.approvals import approve, find_question, withdraw
from concord_client.data.files import files_of, stamps_of
from concord_client.logs import JsonFormatter
from concord_client.policy import Policy
from concord_client.registry import add_dataset, infer_schema
from concord_client.training_process import TrainingProcess
from concord_local.cli import app
from concord_server import client_nouns as nouns
from concord_server.commands.preflights import show_matrix
from concord_server.database import utc_now
from concord_server.logs import JsonFormatter as ServerFormatter
from concord_server.preflights import service
from concord_server.preflights.tables import PreflightRow
from concord_server.studies import service as studies
from concord_shared.preflight import NODE_CHECKS, Check, PreflightRequest
from concord_shared.signing import write_private_key

PLAN = table_plan()
CANARY = "CANARY8675309"
NUMBER = "8675309.25"
FRACTION = ",0.8675309"
"""The beginning of numbers in another unit; more digits than a time has."""
PAYLOAD = re.compile(rb'"payload": ?"([A-Za-z0-9+/=]+)"')


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    folder = tmp_path_factory.mktemp("clinic")
    world = World(folder / "c")
    made = Clinic.beside(world, folder)
    made.change_policy("per_day = 20", "per_day = 1000")
    yield made
    made.store.close()
    world.close()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """Good data, and no failure left over."""
    if "clinic" in request.fixturenames:
        made: Clinic = request.getfixturevalue("clinic")
        made.examiner.fails.clear()
        if made.table.read_bytes() != good_table():
            made.register(good_table())


def approve_it(clinic: Clinic, plan: Any = PLAN) -> Any:
    policy = Policy.load(clinic.home.policy_file)
    id = check_of(clinic.ask(plan), "approval")["next"].split()[-1]
    question = find_question(clinic.home, clinic.store, policy, id, time.time())
    approve(clinic.home, clinic.store, policy, question, time.time(), by="ada")
    return find_question(clinic.home, clinic.store, policy, id, time.time())


class TestAsked:
    def test_all_is_go_where_a_person_has_approved(self, clinic: Clinic) -> None:
        found = clinic.ask(PLAN)
        assert {name for name, status in statuses(found).items() if status != "ok"} == {"approval"}
        assert not found["go"]
        question = approve_it(clinic)
        found = clinic.ask(PLAN)
        assert set(statuses(found).values()) == {"ok"}
        assert found["go"] is found["answered"] is row_of(found)["go"] is True
        figures = row_of(found)["figures"]
        assert figures["rows"] == 50  # of 48, told coarsely
        assert 0 < figures["batch_us"] < 60e6
        assert figures["total_ms"] >= figures["round_ms"] >= 1
        assert figures["down_bytes"] == 2 * 4 * (2 * 2 + 2)  # to train, and to evaluate
        assert figures["memory_mb"] % 10 == 0
        withdraw(clinic.home, clinic.store, question, time.time(), by="ada")
        found = clinic.ask(PLAN)
        assert check_of(found, "approval")["status"] == "no"
        assert not found["go"]

    def test_who_does_not_answer_is_no_go(self, clinic: Clinic) -> None:
        found = clinic.ask(PLAN, nodes=())
        assert [row["node"] for row in found["nodes"]] == [NODE, "ward-a", "ward-b", "ward-c"]
        assert not found["answered"]
        silent = row_of(found, "ward-b")
        assert silent["answered_at"] is None
        assert not silent["go"]
        assert {check["status"] for check in silent["checks"][1:]} == {"unknown"}

    def test_a_suspended_node_is_named(self, clinic: Clinic) -> None:
        admin = clinic.world.coordinator.admin
        admin.post(f"/api/v1/nodes/{NODE}/suspend", json={})
        found = clinic.ask(PLAN)
        assert check_of(found, "node") | {"next": ""} == {
            "name": "node", "status": "no", "says": "the node is suspended", "next": ""
        }  # fmt: skip
        told = {"fingerprint": admin.get(f"/api/v1/nodes/{NODE}").json()["fingerprint"]}
        assert admin.post(f"/api/v1/nodes/{NODE}/activate", json=told).status_code == 200
        clinic.turn()

    def test_a_plan_beyond_terms_and_policy_is_refused_before_data_are_looked_at(self, clinic: Clinic) -> None:
        asked = len(clinic.examiner.asked)
        found = clinic.ask(table_plan("rounds.count=2000"))
        assert statuses(found)["agreement"] == statuses(found)["policy"] == "no"
        assert "1000" in check_of(found, "agreement")["says"]
        assert {statuses(found)[name] for name in ("data", "contract", "budget", "round")} == {"unknown"}
        assert len(clinic.examiner.asked) == asked

    def test_changed_files_are_no(self, clinic: Clinic) -> None:
        clinic.table.write_bytes(good_table(61))
        found = clinic.ask(PLAN)
        assert check_of(found, "data")["status"] == "no"
        assert "--replace" in check_of(found, "data")["next"]
        assert statuses(found)["contract"] == "unknown"

    def test_a_failure_of_the_work_is_a_no_in_our_own_words(
        self, clinic: Clinic, caplog: pytest.LogCaptureFixture
    ) -> None:
        from concord_client.training_job import TrainingFailedError

        clinic.examiner.fails["round"] = TrainingFailedError(f"ValueError: {CANARY}", CANARY)
        found = clinic.ask(table_plan("seed=77"))
        assert statuses(found)["contract"] == "ok"
        assert statuses(found)["round"] == statuses(found)["memory"] == "no"
        assert CANARY not in json.dumps(found)
        assert CANARY not in logged(caplog)


# What never leaves


CASES: dict[str, tuple[bytes, str]] = {
    "another unit": (re.sub(rb",(1\d\d),", FRACTION.encode() + rb"\1,", good_table()), "range"),
    "a value far off": (good_table().replace(b"\n20,100,", f"\n20,{NUMBER},".encode()), "fewer than 10"),
    "class names": (good_table().replace(b"yes", CANARY.encode()), "does not list"),
    "a missing column": (good_table().replace(b"pressure", CANARY.encode()), "column pressure: missing"),
    "another encoding": (good_table().replace(b"no", f"{CANARY}é".encode("latin-1")), "UTF-8"),
    "UTF-16": (good_table().replace(b"no", CANARY.encode()).decode().encode("utf-16"), ""),
    "no numbers": (good_table().replace(b"\n20,", f"\n{CANARY},".encode()), "not numbers"),
    "no header": (good_table().replace(b"age,pressure,ill\n", f"{CANARY},{NUMBER},no\n".encode()), ": missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mismatch_is_refused_in_words_without_a_value(
    clinic: Clinic, case: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = CASES[case]
    caplog.set_level(logging.DEBUG)
    clinic.heard.clear()
    if case in ("another encoding", "UTF-16"):  # a table that cannot be read cannot be registered either
        clinic.table.write_bytes(content)
        pretend_registered(clinic)
    else:
        clinic.register(content)
    found = clinic.ask(PLAN)
    check = check_of(found, "contract")
    assert check["status"] == "no"
    assert "concord-node check" in check["next"]
    assert any(expected in each for each in row_of(found)["differences"]), row_of(found)["differences"]
    assert statuses(found)["round"] == "unknown"
    show_matrix(found)
    places = everywhere(clinic, caplog) | {"terminal": capsys.readouterr().out}
    if case in ("a missing column", "no header"):
        del places["node"]  # its owner's own list of the dataset's columns
    assert found_in(places) == []


def test_a_unit_that_the_plan_cannot_convert_is_named_and_the_nodes_own_is_not(clinic: Clinic) -> None:
    spec = f"csv:{clinic.table}"
    plain = infer_schema(spec)
    assert plain is not None
    columns = tuple(
        each.model_copy(update={"unit": "kPa"} if each.name == "pressure" else {}) for each in plain.columns
    )
    stated = plain.model_copy(update={"columns": columns})
    wanted = table_plan("data.columns=[{name='age', range=[0, 120]}, {name='pressure', range=[20, 300], unit='mmHg'}]")
    try:
        add_dataset(clinic.store, DATASET, spec, time.time(), replaces=True, schema=stated)
        found = clinic.ask(wanted)
        assert row_of(found)["differences"] == ["column pressure: in another unit than mmHg"]
        assert "kPa" not in json.dumps(row_of(found)["checks"])
    finally:
        add_dataset(clinic.store, DATASET, spec, time.time(), replaces=True, schema=plain)
    assert statuses(clinic.ask(wanted))["contract"] == "ok"


def test_the_search_finds_what_leaks(
    clinic: Clinic, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: an adapter that passes on what it read."""
    clinic.heard.clear()
    monkeypatch.setattr("concord_client.dry_round.sentences", lambda found, plan: [f"column age: {CANARY}"])
    preflight = clinic.ask(PLAN)["preflight"]
    assert {"wire", "coordinator"} <= set(found_in(everywhere(clinic, caplog)))
    with clinic.world.database.session() as session:
        session.get_one(PreflightRow, preflight).created_at = utc_now().replace(year=2020)
    with clinic.world.database.session() as session:
        assert service.forget(session, utc_now(), 90) == 1
    assert "coordinator" not in found_in(everywhere(clinic, caplog))


def test_in_a_process_of_its_own_too(clinic: Clinic, caplog: pytest.LogCaptureFixture) -> None:
    """As the daemon does it: one answer of all checks, and one of a mismatch."""
    here, clinic.examiner = clinic.examiner, TrainingProcess(idle_s=0.0)  # type: ignore[assignment]
    clinic.heard.clear()
    try:
        found = clinic.ask(table_plan("seed=5"))
        assert statuses(found) | {"approval": "ok"} == dict.fromkeys(("node", *NODE_CHECKS), "ok")
        assert clinic.examiner.pid is None  # type: ignore[attr-defined]
        clinic.register(CASES["class names"][0])
        found = clinic.ask(table_plan("seed=5"))
        assert statuses(found)["contract"] == "no"
        assert found_in(everywhere(clinic, caplog)) == []
    finally:
        clinic.examiner.close()  # type: ignore[attr-defined]
        clinic.examiner = here


def pretend_registered(clinic: Clinic) -> None:
    """As it lies there: what a file can become that was fine when it was registered."""
    held = clinic.store.dataset(DATASET)
    assert held is not None
    clinic.store.put_dataset(replace(held, files=stamps_of(files_of(held.spec))))


def everywhere(clinic: Clinic, caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Every byte on the wire, every row of both databases, every line that either side would log; readable."""
    wire = b"\n".join(clinic.heard)
    return {
        "wire": wire.decode("utf-8", "replace") + opened(wire),
        "coordinator": rows_of(clinic.world.coordinator.home.database_file),
        "node": rows_of(clinic.home.database),
        "logs": logged(caplog),
    }


def logged(caplog: pytest.LogCaptureFixture) -> str:
    formatters = (JsonFormatter(), ServerFormatter("control"))
    return "\n".join(each.format(record) for record in caplog.records for each in formatters)


def rows_of(database: Path) -> str:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        text = "\n".join(connection.iterdump())
    return text + opened(text.encode())


def opened(content: bytes) -> str:
    """What signed documents say."""
    return "\n".join(base64.b64decode(each).decode("utf-8", "replace") for each in PAYLOAD.findall(content))


def found_in(places: dict[str, str]) -> list[str]:
    return [name for name, text in places.items() if "CANARY8675309" in text or NUMBER in text or FRACTION[1:] in text]


# The command


def test_the_command_waits_and_says_who_does_what(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_private_key(tmp_path / "lab.key", clinic.world.keys["lab"])
    (tmp_path / "plan.toml").write_text(TABLE_PLAN, "utf-8")
    monkeypatch.setattr("concord_server.commands.studies.coordinator", lambda: clinic.world.api("lab"))
    monkeypatch.setattr(nouns.time, "sleep", lambda seconds: clinic.turn())
    clinic.register(CASES["class names"][0])
    command = ["study", "preflight", STUDY, "--plan", str(tmp_path / "plan.toml"), "--nodes", NODE]
    command += ["--key", str(tmp_path / "lab.key")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "clinic-1" in done.stdout
    assert "✗ clinic-1 · contract" in done.stdout
    assert "→" in done.stdout
    assert "no go: 0 of 1" in done.stdout
    assert "clinic-1: no go (1 of 1)" in done.stderr
    clinic.register(good_table())
    approve_it(clinic)
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["go"] is True


def test_words_of_others_do_not_steer_a_terminal(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    """A hostile coordinator's answer."""
    found = clinic.ask(PLAN)
    for check in found["nodes"][0]["checks"]:
        check |= {"status": "no", "says": "\x1b[2J[bold red]:skull:" + "x" * 5000, "next": "\u202e\x07"}
    found["nodes"][0] |= {"node": "\x1b]0;evil\x07", "differences": ["\x1b[31m"]}
    show_matrix(found)
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert "[bold red]:skull:" in shown


# What the coordinator refuses


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world") / "c")
    made.ready()
    yield made
    made.close()


@pytest.fixture(scope="module")
def images(world: World) -> Any:
    plan = small_plan()
    nouns.submit_plan(world.api("lab"), STUDY, plan, "lab")
    return plan


@pytest.fixture
def asked(world: World, images: Any) -> dict[str, Any]:
    return nouns.ask_preflight(world.api("lab"), world.keys["lab"], STUDY, images)


def asking(plan: Any, **changes: Any) -> PreflightRequest:
    fields = {
        "preflight": f"p-{time.monotonic_ns()}",
        "study": STUDY,
        "plan_digest": plan.digest,
        "organisation": "lab",
        "datasets": ("ward-a/heart",),
        "participants": 3,
        "issued_at": now(),
        "not_after": now() + 60,
    }
    return PreflightRequest(**fields | changes)


class TestRequests:
    def test_a_request_is_told_to_each_node_that_it_names_and_to_no_other(self, world: World, images: Any) -> None:
        before = {node: len(world.updates(node)) for node in ("ward-a", "ward-b")}
        request = asking(images)
        assert world.post("lab", f"studies/{STUDY}/preflights", request, "lab").status_code == 201
        assert world.post("lab", f"studies/{STUDY}/preflights", request, "lab").status_code == 201  # changes nothing
        assert len(world.updates("ward-a")) == before["ward-a"] + 1
        assert world.updates("ward-a")[-1].kind == "preflight"
        assert len(world.updates("ward-b")) == before["ward-b"]

    @pytest.mark.parametrize(
        ("changes", "status"),
        [
            ({"study": "lungs"}, 400),
            ({"plan_digest": "0" * 64}, 409),
            ({"datasets": ("ward-a/lungs",)}, 409),
            ({"datasets": ("ward-a/heart", "ward-a/heart")}, 400),
            ({"not_after": now() - 1}, 400),
            ({"not_after": now() + 7200}, 400),
            ({"issued_at": now() + 3000, "not_after": now() + 3060}, 400),
        ],
    )
    def test_requests_about_something_else_are_refused(
        self, world: World, images: Any, changes: dict[str, Any], status: int
    ) -> None:
        answer = world.post("lab", f"studies/{STUDY}/preflights", asking(images, **changes), "lab")
        assert answer.status_code == status, answer.text

    def test_only_a_member_asks_and_with_its_own_key(self, world: World, images: Any) -> None:
        path = f"studies/{STUDY}/preflights"
        assert world.post("lab", path, asking(images), "rival").status_code == 400
        assert world.post("lab", path, asking(images, organisation="hospital-a"), "lab").status_code == 403
        assert world.post("rival", path, asking(images, organisation="rival"), "rival").status_code == 404
        assert (
            world.post("hospital-b", path, asking(images, organisation="hospital-b"), "hospital-b").status_code == 403
        )

    def test_a_taken_id_is_not_overwritten(self, world: World, images: Any) -> None:
        first = asking(images)
        assert world.post("lab", f"studies/{STUDY}/preflights", first, "lab").status_code == 201
        other = first.model_copy(update={"participants": 2})
        assert world.post("lab", f"studies/{STUDY}/preflights", other, "lab").status_code == 409

    def test_too_many_in_a_day_wait(self, world: World, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "PER_DAY_MAX", 0)
        answer = world.post("lab", f"studies/{STUDY}/preflights", asking(images), "lab")
        assert answer.status_code == 429


class TestReports:
    def test_a_node_answers_for_itself_once_and_in_time(
        self, world: World, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = world.sites["ward-a"]
        report = world.preflight_report("ward-a", asked)

        def send(**changes: Any) -> int:
            signed = body(report.model_copy(update=changes), site.keys.identity)
            return int(site.client.post("/api/node/preflights", json=signed).status_code)

        assert send(node="ward-b", organisation="hospital-b") == 403
        assert send(organisation="hospital-b") == 403
        assert send(dataset="lungs") == 409
        assert send(request_digest="0" * 64) == 409
        assert send(preflight="another") == 404
        assert send(issued_at=now() + 3000) == 400
        foreign = body(report, world.sites["ward-b"].keys.identity)
        assert site.client.post("/api/node/preflights", json=foreign).status_code == 400
        with monkeypatch.context() as later:
            later.setattr(service, "LATE_S", -10_000)
            assert send() == 409
        assert send() == 204
        assert send() == 204
        assert send(more=1) == 409
        found = world.api("lab").get(f"/api/v1/studies/{STUDY}/preflights/{asked['preflight']}")
        assert row_of(found, "ward-a")["more"] == 0
        assert report_of(found, "ward-a") == report

    @pytest.mark.parametrize(
        "says", ["x" * 301, "\x1b[2Jgone", "right\u202eleft", "two\nlines"], ids=["huge", "escape", "bidi", "lines"]
    )
    def test_huge_or_odd_text_is_refused(self, world: World, asked: dict[str, Any], says: str) -> None:
        good = world.preflight_report("ward-a", asked)
        site = world.sites["ward-a"]
        odd = (good.checks[0].model_copy(update={"says": says}), *good.checks[1:])
        for changes in ({"checks": odd}, {"differences": (says,)}):
            signed = body(good.model_copy(update=changes), site.keys.identity)
            assert site.client.post("/api/node/preflights", json=signed).status_code == 400

    @pytest.mark.parametrize("count", [0, len(NODE_CHECKS) - 1])
    def test_a_report_has_every_check_once(self, world: World, asked: dict[str, Any], count: int) -> None:
        good = world.preflight_report("ward-a", asked)
        repeated = (*good.checks[:count], *[Check(name="agreement", status="ok", says="")] * (len(NODE_CHECKS) - count))
        signed = body(good.model_copy(update={"checks": repeated}), world.sites["ward-a"].keys.identity)
        assert world.sites["ward-a"].client.post("/api/node/preflights", json=signed).status_code == 400


def test_an_owner_is_told_of_its_own_nodes_and_a_stranger_of_nothing(world: World, asked: dict[str, Any]) -> None:
    path = f"/api/v1/studies/{STUDY}/preflights/{asked['preflight']}"
    assert world.answer_preflight("ward-a", asked).status_code == 204
    told = {name: world.people[name].get(path) for name in ("lab", "hospital-a", "hospital-b", "rival")}
    assert told["rival"].status_code == 404
    nodes = {name: [row["node"] for row in told[name].json()["nodes"]] for name in ("lab", "hospital-a", "hospital-b")}
    assert nodes["lab"] == nodes["hospital-a"] == ["ward-a", "ward-b", "ward-c"]  # both are members
    assert nodes["hospital-b"] == ["ward-b", "ward-c"]
    assert world.people["rival"].get(f"/api/v1/studies/{STUDY}/preflights").status_code == 404


def test_what_was_asked_and_answered_is_audited(world: World, asked: dict[str, Any]) -> None:
    world.answer_preflight("ward-a", asked)
    coordinator = world.coordinator
    assert any(each["subject"] == asked["preflight"] for each in coordinator.audited("preflight:request"))
    (event,) = [each for each in coordinator.audited("preflight:report") if each["subject"] == asked["preflight"]]
    assert event["actor"] == "node:ward-a"
    assert event["detail"]["checks"]["contract"] == "ok"


def test_a_dataset_whose_agreement_ended_cannot_be_asked_about(world: World, images: Any) -> None:
    with world.database.reading() as session:
        assert "ward-a/heart" in studies.agreed_datasets(session, STUDY, now())
    api = world.api("lab")
    (agreement,) = [each["agreement"] for each in api.pages("/api/v1/agreements") if each["owner"] == "hospital-a"]
    assert world.withdraw(agreement, "hospital-a").status_code == 200
    assert world.post("lab", f"studies/{STUDY}/preflights", asking(images), "lab").status_code == 409


def test_coarse_counts_never_tell_a_small_one() -> None:
    assert [contract.coarse(count) for count in (0, 1, 10, 11, 47, 99, 101, 303, 12_345)] == [
        10, 10, 10, 20, 50, 100, 110, 310, 13_000
    ]  # fmt: skip
    assert contract.coarse_words(1) == contract.coarse_words(9) == "fewer than 10"
    assert contract.coarse_words(44) == "about 40"
