"""Studies and agreements at the coordinator: each step, each refusal, and who sees what of others."""

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from worlds import OWNERS, STUDY, World, body, now, small_plan

from concord_server import client_nouns as nouns
from concord_server.database import utc_now
from concord_shared.documents import Agreement, Release, Study, Terms, Withdrawal
from concord_shared.preflight import PreflightRequest
from concord_shared.signing import new_identity_key, public_text, seal
from coordinators import sealed_json, tampered

DAY_S = 86_400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Cards of all wards, and a study of the lab's with hospital A as a member."""
    world = World(tmp_path_factory.mktemp("studies") / "c")
    for node in OWNERS:
        assert world.publish(node).status_code == 204
    world.study()
    world.keep()
    yield world
    world.close()


@pytest.fixture
def world(made: World) -> World:
    made.clear()
    return made


def study_of(**changes: Any) -> Study:
    fields = {"study": "other", "title": "T", "purpose": "P", "organisation": "lab", "members": (), "issued_at": now()}
    return Study(**fields | changes)


def terms(**changes: Any) -> Terms:
    return Terms(**{"not_after": now() + DAY_S} | changes)


def refused(answer: Any, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]


def requested(world: World, **changes: Any) -> Agreement:
    given = world.agreement(**changes)
    assert world.post("lab", "agreements", given, "lab").status_code == 201
    return given


def offered(world: World, **changes: Any) -> Agreement:
    """An offer on terms of the owner's own."""
    given = requested(world).model_copy(update={"terms": terms(rounds_max=5)} | changes)
    assert world.post("hospital-a", "agreements/asked/offer", given, "hospital-a").json()["state"] == "offered"
    return given


def agreed(world: World) -> Agreement:
    given = offered(world)
    assert world.post("lab", "agreements/asked/agree", given, "lab").json()["state"] == "agreed"
    return given


def state(world: World) -> str:
    return str(world.api("lab").get("/api/v1/agreements/asked")["state"])


# Studies


def test_the_same_study_again_changes_nothing(world: World) -> None:
    given = study_of(members=("hospital-b",))
    first, second = (world.post("lab", "studies", given, "lab") for _ in range(2))
    assert first.status_code == second.status_code == 201
    assert first.json() == second.json()
    assert first.json()["members"] == ["hospital-b", "lab"]


@pytest.mark.parametrize(
    ("changes", "sender", "key", "status", "said"),
    [
        ({}, "lab", "hospital-a", 400, "lacks the signature"),
        ({}, "hospital-a", "lab", 403, "of lab"),
        ({"organisation": "hospital-a"}, "lab", "lab", 403, "of hospital-a"),
        ({"members": ("nobody",)}, "lab", "lab", 409, "no such organisation: nobody"),
        ({"issued_at": now() + 2 * DAY_S}, "lab", "lab", 400, "in the future"),
        ({"study": STUDY}, "lab", "lab", 409, "taken"),
    ],
)
def test_a_study_is_refused(
    world: World, changes: dict[str, Any], sender: str, key: str, status: int, said: str
) -> None:
    refused(world.post(sender, "studies", study_of(**changes), key), status, said)


# Cards


def test_a_card_is_refused(world: World) -> None:
    refused(world.publish("ward-a", organisation="hospital-b"), 403, "cards of its own datasets")
    refused(world.publish("ward-a", node="ward-b"), 403, "cards of its own datasets")
    refused(world.publish("ward-a", issued_at=now() - 60), 409, "a newer card")
    refused(world.publish("ward-a", issued_at=now() + 600), 400, "in the future")
    foreign = world.sites["ward-b"].keys.identity
    world.sites["ward-a"].keys.identity, own = foreign, world.sites["ward-a"].keys.identity
    answer = world.publish("ward-a")
    world.sites["ward-a"].keys.identity = own
    refused(answer, 400, "lacks the signature")


# The walk


def test_the_walk_of_an_agreement(world: World) -> None:
    nouns.submit_plan(world.api("lab"), STUDY, small_plan())
    given = offered(world)
    assert world.kinds("ward-a") == [], "what is not agreed concerns no node"
    answer = world.post("lab", "agreements/asked/agree", given, "lab").json()
    assert answer["state"] == "agreed"
    assert len(answer["document"]["signatures"]) == 2
    assert world.kinds("ward-a") == ["study", "agreement", "plan"]
    assert world.updates("ward-a")[1].body["envelope"] == answer["document"]
    assert world.withdraw("asked", "hospital-a").json()["state"] == "withdrawn"
    assert world.kinds("ward-a") == ["study", "agreement", "plan", "withdrawal"]
    assert world.kinds("ward-b") == []
    told = [each for each in world.coordinator.admin.get("/api/v1/audit").json()["items"] if each["subject"] == "asked"]
    assert [each["action"] for each in told[:4]] == [
        f"agreement:{verb}" for verb in ("withdraw", "agree", "offer", "request")
    ]


def test_the_owners_signature_on_the_request_itself_agrees(world: World) -> None:
    given = requested(world)
    assert world.post("hospital-a", "agreements/asked/offer", given, "hospital-a").json()["state"] == "agreed"


def test_each_step_again_changes_nothing(world: World) -> None:
    given = requested(world)
    assert world.post("lab", "agreements", given, "lab").json()["state"] == "requested"
    offer = given.model_copy(update={"terms": terms(rounds_max=5)})
    for _ in range(2):
        assert world.post("hospital-a", "agreements/asked/offer", offer, "hospital-a").json()["state"] == "offered"
    for _ in range(2):
        assert world.post("lab", "agreements/asked/agree", offer, "lab").json()["state"] == "agreed"
    assert world.post("hospital-a", "agreements/asked/offer", offer, "hospital-a").json()["state"] == "agreed"
    for _ in range(2):
        assert world.withdraw("asked", "hospital-a").json()["state"] == "withdrawn"
    assert world.kinds("ward-a") == ["study", "agreement", "withdrawal"]


# Requests


@pytest.mark.parametrize(
    ("changes", "sender", "key", "status", "said"),
    [
        ({}, "lab", "hospital-a", 400, "lacks the signature"),
        ({}, "hospital-a", "lab", 403, "of lab"),
        ({}, "rival", "rival", 404, "no study"),
        ({"requester": "hospital-a"}, "lab", "lab", 403, "of hospital-a"),
        ({"study": "unknown"}, "lab", "lab", 404, "no study"),
        ({"study_digest": "0" * 64}, "lab", "lab", 409, "another version of the study"),
        ({"owner": "nobody"}, "lab", "lab", 409, "no organisation nobody"),
        ({"datasets": ("ward-b/heart",)}, "lab", "lab", 409, "hospital-a has no dataset ward-b/heart"),
        ({"datasets": ("ward-a/heart", "ward-a/lung")}, "lab", "lab", 409, "no dataset ward-a/lung"),
        ({"datasets": ("ward-a/heart",) * 2}, "lab", "lab", 400, "each dataset once"),
        ({"terms": terms(not_after=now() - 1)}, "lab", "lab", 400, "in the past"),
        ({"issued_at": now() + DAY_S}, "lab", "lab", 400, "in the future"),
    ],
)
def test_a_request_is_refused(
    world: World, changes: dict[str, Any], sender: str, key: str, status: int, said: str
) -> None:
    refused(world.post(sender, "agreements", world.agreement(**changes), key), status, said)
    assert world.api("lab").get("/api/v1/agreements")["items"] == []


def test_only_a_member_of_the_study_requests(world: World) -> None:
    """Even where the sender may speak for everybody."""
    signed = body(world.agreement(requester="rival"), world.keys["rival"])
    refused(world.coordinator.admin.post("/api/v1/agreements", json=signed), 403, "not a member of the study")


def test_a_changed_document_is_refused(world: World) -> None:
    envelope = tampered(seal(world.agreement(), world.keys["lab"]), agreement="changed")
    refused(world.people["lab"].post("/api/v1/agreements", json=sealed_json(envelope)), 400, "is wrong")
    refused(world.post("lab", "agreements", study_of(), "lab"), 400, "not a document of concord/agreement/1")


def test_an_id_is_taken_once(world: World) -> None:
    requested(world)
    refused(world.post("lab", "agreements", world.agreement(terms=terms(rounds_max=1)), "lab"), 409, "is taken")


# Offers


@pytest.mark.parametrize(
    ("changes", "sender", "key", "status", "said"),
    [
        ({}, "lab", "hospital-a", 403, "of hospital-a"),
        ({}, "rival", "hospital-a", 404, "no agreement"),
        ({}, "hospital-b", "hospital-a", 404, "no agreement"),
        ({}, "hospital-a", "lab", 400, "lacks the signature"),
        ({"agreement": "another"}, "hospital-a", "hospital-a", 400, "only terms and datasets may differ"),
        ({"requester": "hospital-b"}, "hospital-a", "hospital-a", 400, "only terms and datasets may differ"),
        ({"owner": "hospital-b"}, "hospital-a", "hospital-a", 400, "only terms and datasets may differ"),
        ({"study_digest": "0" * 64}, "hospital-a", "hospital-a", 409, "another version of the study"),
        ({"datasets": ("ward-b/heart",)}, "hospital-a", "hospital-a", 409, "hospital-a has no dataset"),
        ({"datasets": ("ward-a/heart", "ward-a/lung")}, "hospital-a", "hospital-a", 400, "not asked for: ward-a/lung"),
        ({"terms": terms(not_after=now() - 1)}, "hospital-a", "hospital-a", 400, "in the past"),
    ],
)
def test_an_offer_is_refused(
    world: World, changes: dict[str, Any], sender: str, key: str, status: int, said: str
) -> None:
    world.publish("ward-a", "lung")
    given = requested(world).model_copy(update={"terms": terms(rounds_max=5)} | changes)
    refused(world.post(sender, "agreements/asked/offer", given, key), status, said)
    assert state(world) == "requested"


def test_an_earlier_offer_does_not_come_back(world: World) -> None:
    """A person of the owner's without its key still has what the owner signed before, on terms that it took back."""
    first = offered(world, issued_at=now() - 60)
    stricter = first.model_copy(update={"terms": terms(rounds_max=1), "issued_at": now()})
    assert world.post("hospital-a", "agreements/asked/offer", stricter, "hospital-a").status_code == 200
    refused(world.post("hospital-a", "agreements/asked/offer", first, "hospital-a"), 409, "a newer offer")
    assert world.api("lab").get("/api/v1/agreements/asked")["terms"]["rounds_max"] == 1


def test_an_offer_of_fewer_datasets_opens_no_more(world: World) -> None:
    world.publish("ward-a", "lung")
    given = requested(world, datasets=("ward-a/heart", "ward-a/lung"))
    less = given.model_copy(update={"datasets": ("ward-a/lung",)})
    world.post("hospital-a", "agreements/asked/offer", less, "hospital-a")
    assert world.post("lab", "agreements/asked/agree", less, "lab").status_code == 200
    found = world.api("lab").get(f"/api/v1/studies/{STUDY}/participants")["items"]
    assert [each["name"] for each in found] == ["ward-a/lung"]


def test_an_offer_after_the_end_is_refused(world: World) -> None:
    given = agreed(world)
    other = given.model_copy(update={"terms": terms(rounds_max=9)})
    refused(world.post("hospital-a", "agreements/asked/offer", other, "hospital-a"), 409, "is agreed")
    world.withdraw("asked", "hospital-a")
    for again in (given, other):
        refused(world.post("hospital-a", "agreements/asked/offer", again, "hospital-a"), 409, "is withdrawn")


# Agreeing


@pytest.mark.parametrize(
    ("changes", "sender", "key", "status", "said"),
    [
        ({}, "hospital-a", "lab", 403, "of lab"),
        ({}, "rival", "lab", 404, "no agreement"),
        ({}, "lab", "hospital-a", 400, "lacks the signature"),
        ({"terms": terms(rounds_max=1000)}, "lab", "lab", 409, "not what hospital-a offers"),
    ],
)
def test_agreeing_is_refused(
    world: World, changes: dict[str, Any], sender: str, key: str, status: int, said: str
) -> None:
    given = offered(world).model_copy(update=changes)
    refused(world.post(sender, "agreements/asked/agree", given, key), status, said)
    assert state(world) == "offered"


def test_nobody_agrees_before_the_owner_offers_or_after_it_withdraws(world: World) -> None:
    given = requested(world)
    refused(world.post("lab", "agreements/asked/agree", given, "lab"), 409, "is requested; expected offered")
    world.withdraw("asked", "hospital-a")
    refused(world.post("lab", "agreements/asked/agree", given, "lab"), 409, "is withdrawn")
    assert world.kinds("ward-a") == [], "its nodes never knew of it"


def test_an_offer_that_is_over_is_not_agreed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given = offered(world)
    monkeypatch.setattr(
        "concord_server.studies.agreements.utc_now", lambda: utc_now() + datetime.timedelta(seconds=DAY_S + 1)
    )
    refused(world.post("lab", "agreements/asked/agree", given, "lab"), 409, "is over already")


def test_an_offer_under_a_key_that_was_replaced_is_not_agreed(world: World) -> None:
    given = offered(world)
    key = "/api/v1/organisations/hospital-a/key"
    fresh = public_text(new_identity_key().public_key())
    world.people["hospital-a"].put(key, json={"key": fresh, "replace": True})
    refused(world.post("lab", "agreements/asked/agree", given, "lab"), 400, "lacks the signature")
    own = public_text(world.keys["hospital-a"].public_key())
    assert world.people["hospital-a"].put(key, json={"key": own, "replace": True}).status_code == 200


# Withdrawing


@pytest.mark.parametrize(
    ("changes", "sender", "key", "status", "said"),
    [
        ({}, "lab", "hospital-a", 403, "of hospital-a"),
        ({}, "rival", "hospital-a", 404, "no agreement"),
        ({}, "hospital-a", "lab", 400, "lacks the signature"),
        ({"agreement": "another"}, "hospital-a", "hospital-a", 400, "the withdrawal is of another"),
        ({"organisation": "lab"}, "hospital-a", "hospital-a", 400, "by lab"),
    ],
)
def test_a_withdrawal_is_refused(
    world: World, changes: dict[str, Any], sender: str, key: str, status: int, said: str
) -> None:
    agreed(world)
    told = {"agreement": "asked", "organisation": "hospital-a", "issued_at": now()}
    refused(world.post(sender, "agreements/asked/withdraw", Withdrawal(**told | changes), key), status, said)
    assert state(world) == "agreed"


def test_a_withdrawal_stops_the_runs_that_live_by_it_and_no_other(world: World) -> None:
    ids = world.ready_agreements()
    plan = small_plan()
    world.queued(plan, "running", "queued")
    world.start(plan, run="others", nodes=["ward-b", "ward-c"])
    world.start(small_plan("seed=5"), run="waiting")
    assert world.lease("w") == "running"
    assert world.withdraw(ids["hospital-a"], "hospital-a").status_code == 200
    reason = f"hospital-a withdrew the agreement {ids['hospital-a']}"
    for run in ("waiting", "queued"):
        found = world.run(run)
        assert (found["state"], found["reason"], found["waiting_for"]) == ("stopped", reason, [])
    running = world.run("running")
    assert (running["state"], running["stop_requested"], running["reason"]) == ("running", True, reason)
    assert (world.run("others")["state"], world.run("others")["stop_requested"]) == ("queued", False)
    assert world.kinds("ward-a")[-2:] == ["run", "withdrawal"], "of the one that it knew"
    assert [each.subject for each in world.updates("ward-a") if each.kind == "run"] == ["queued"]


def test_a_dataset_that_another_agreement_opens_keeps_its_runs(world: World) -> None:
    ids = world.ready_agreements()
    world.agreed("hospital-a", ("ward-a/heart",))
    world.queued(small_plan(), "run")
    world.withdraw(ids["hospital-a"], "hospital-a")
    assert world.run("run")["state"] == "queued"


# People who may no longer


def test_a_revoked_token_signs_nobody_in(world: World) -> None:
    given = requested(world)
    ben = world.coordinator.new_person("ben", "hospital-a", "data-steward")
    (token,) = ben.get("/api/v1/tokens").json()["items"]
    assert world.coordinator.admin.delete(f"/api/v1/tokens/{token['id']}").status_code == 200
    answer = ben.post("/api/v1/agreements/asked/offer", json=body(given, world.keys["hospital-a"]))
    assert answer.status_code == 401
    assert state(world) == "requested"


def test_a_person_whose_role_was_taken_acts_no_more(world: World) -> None:
    """Not with the organisation's signature either."""
    given = requested(world)
    cid = world.coordinator.new_person("cid", "hospital-a", "data-steward")
    signed = body(given.model_copy(update={"terms": terms(rounds_max=2)}), world.keys["hospital-a"])
    assert cid.post("/api/v1/agreements/asked/offer", json=signed).status_code == 200
    taken = world.coordinator.admin.delete(
        "/api/v1/people/cid/roles/data-steward", params={"organisation": "hospital-a"}
    )
    assert taken.status_code == 200, taken.text
    assert cid.post("/api/v1/agreements/asked/offer", json=signed).status_code == 403
    withdrawal = Withdrawal(agreement="asked", organisation="hospital-a", issued_at=now())
    answer = cid.post("/api/v1/agreements/asked/withdraw", json=body(withdrawal, world.keys["hospital-a"]))
    assert answer.status_code == 403


def test_a_researcher_of_the_owner_opens_no_data(world: World) -> None:
    given = requested(world)
    dan = world.coordinator.new_person("dan", "hospital-a", "researcher")
    answer = dan.post("/api/v1/agreements/asked/offer", json=body(given, world.keys["hospital-a"]))
    assert answer.status_code == 403


# Who sees what


LISTS = ("studies", "agreements", "plans", "runs", "models")


@pytest.fixture
def everything(world: World) -> dict[str, str]:
    """One of each, with its id; between the lab and hospital A, whose model is released."""
    agreement = world.agreed("hospital-a", ("ward-a/heart",), minimum_cohort=1)
    plan = small_plan("rounds.quorum=1")
    world.start(plan, run="run")
    world.approve("ward-a", plan)
    assert world.lease("w") == "run"
    digest = world.finish_with_model("run", "w", plan)
    nouns.release_model(world.api("lab"), world.keys["lab"], digest)
    asked = world.post("lab", f"studies/{STUDY}/preflights", preflight(plan.digest, "first", "lab"), "lab")
    assert asked.status_code == 201, asked.text
    ids = {"study": STUDY, "agreement": agreement, "plan": plan.digest, "run": "run", "model": digest}
    return ids | {"preflight": "first"}


def preflight(plan: str, name: str, organisation: str) -> PreflightRequest:
    return PreflightRequest(
        preflight=name,
        study=STUDY,
        plan_digest=plan,
        organisation=organisation,
        datasets=("ward-a/heart",),
        participants=1,
        issued_at=now(),
        not_after=now() + 60,
    )


def asked(world: World, ids: dict[str, str], who: str) -> dict[tuple[str, str], Any]:
    """What `who` is answered on every route that names a study, an agreement, a plan, a run or a model."""
    key = world.keys[who]
    agreement = world.agreement()
    withdrawal = Withdrawal(agreement=ids["agreement"], organisation="hospital-a", issued_at=now())
    release = Release(
        model_digest=ids["model"],
        plan_digest=ids["plan"],
        study=STUDY,
        run="run",
        organisation="lab",
        files=({"name": "m", "sha256": "0" * 64, "size": 1},),
        metrics={},
        issued_at=now(),
    )
    bodies = {
        "offer": body(agreement, key),
        "agree": body(agreement, key),
        "withdraw": body(withdrawal, key),
        "release": body(release, key),
        "stop": {},
        "lift": {"reason": "by phone"},
        "preflights": body(preflight(ids["plan"], "again", who), key),
    }
    answers = {}
    for path, methods in world.coordinator.anyone.get("/api/openapi.json").json()["paths"].items():
        noun = path.removeprefix("/api/v1/").partition("/")[0]
        if noun not in LISTS or "{" not in path:
            continue
        filled = path.replace("{digest}", ids.get(noun.removesuffix("s"), "")).replace("{name}", "model.safetensors")
        filled = filled.replace("{node}", "ward-a")
        for kind in ("study", "agreement", "run", "preflight"):
            filled = filled.replace(f"{{{kind}}}", ids[kind])
        for method in methods:
            sent = {"json": bodies[path.rpartition("/")[2]]} if method == "post" else {}
            answers[method, path] = world.people[who].request(method.upper(), filled, **sent)
    return answers


def test_a_stranger_is_told_of_nothing(world: World, everything: dict[str, str]) -> None:
    answers = asked(world, everything, "rival")
    assert len(answers) >= 15
    assert {route: each.status_code for route, each in answers.items()} == dict.fromkeys(answers, 404)
    for noun in LISTS:
        assert world.people["rival"].get(f"/api/v1/{noun}").json()["items"] == []
        assert len(world.people["lab"].get(f"/api/v1/{noun}").json()["items"]) == 1
    for field, noun in (("study", "agreements"), ("study", "runs"), ("run", "models"), ("study", "plans")):
        found = world.people["rival"].get(f"/api/v1/{noun}", params={field: everything[field]})
        assert found.json()["items"] == []


def test_an_owner_reads_what_its_data_serve_and_changes_nothing_of_others(
    world: World, everything: dict[str, str]
) -> None:
    answers = asked(world, everything, "hospital-a")
    trained = "/api/v1/runs/{run}/statistics"
    assert answers.pop(("get", trained)).status_code == 404, "the run trained"
    assert {each.status_code for (method, _), each in answers.items() if method == "get"} == {200}
    told = {path.rpartition("/")[2]: each.status_code for (method, path), each in answers.items() if method == "post"}
    assert (told["stop"], told["release"], told["agree"]) == (403, 403, 403)


def test_an_owner_who_was_only_asked_sees_the_study_and_nothing_that_came_of_it(
    world: World, everything: dict[str, str]
) -> None:
    request = world.agreement("hospital-b", agreement="asked-b")
    assert world.post("lab", "agreements", request, "lab").status_code == 201
    answers = asked(world, everything, "hospital-b")
    seen = {path for (_, path), each in answers.items() if each.status_code == 200}
    assert seen == {
        "/api/v1/studies/{study}",
        "/api/v1/studies/{study}/participants",
        "/api/v1/studies/{study}/preflights",
        "/api/v1/plans/{digest}",
    }
    assert answers["get", "/api/v1/studies/{study}/preflights"].json()["items"] == []
    assert {each.status_code for (_, path), each in answers.items() if path not in seen} == {404}
    assert answers["get", "/api/v1/studies/{study}/participants"].json()["items"] == [], "others' terms are theirs"
    mine = world.people["hospital-b"].get("/api/v1/agreements").json()["items"]
    assert [each["agreement"] for each in mine] == ["asked-b"]


def test_a_withdrawn_owner_who_is_no_member_no_longer_reads_runs(world: World) -> None:
    agreement = world.agreed("hospital-b", ("ward-b/heart", "ward-c/heart"))
    world.queued(small_plan(), "run")
    see = world.people["hospital-b"].get
    assert see("/api/v1/runs/run").status_code == 200
    world.withdraw(agreement, "hospital-b")
    assert see("/api/v1/runs/run").status_code == 404
    assert see("/api/v1/runs").json()["items"] == []


def test_a_node_downloads_only_what_its_organisation_takes_part_in(world: World, everything: dict[str, str]) -> None:
    path = f"/api/node/models/{everything['model']}/model.safetensors"
    assert world.sites["ward-a"].client.get(path).status_code == 200
    assert world.sites["ward-b"].client.get(path).status_code == 404
    assert "release" in world.kinds("ward-a")
    assert world.kinds("ward-b") == []
