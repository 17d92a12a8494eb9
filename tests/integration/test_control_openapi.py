"""The OpenAPI document is true: whatever is asked within it or beside it, no 5xx and no answer that it lacks."""

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from worlds import STUDY, World, body, now, small_plan

from concord_server import client_nouns as nouns
from concord_server.runs import service
from concord_shared.documents import Leave
from concord_shared.evidence.heads import TreeHead, node_log
from concord_shared.protocol import LedgerHead, RenewRequest
from coordinators import FEDERATION, Coordinator, NodeKeys, new_database_url

schemathesis: Any = pytest.importorskip("schemathesis")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.response_schema_conformance,
]
PLAN = small_plan()
RUN, AGREEMENT = "run-1", "asked"


class Recorder(httpx.BaseTransport):
    """Passes requests on, and keeps the answers."""

    def __init__(self, inner: Any, heard: list[httpx.Response]) -> None:
        self._inner, self._heard = inner, heard

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        found: httpx.Response = self._inner.handle_request(request)
        response = httpx.Response(found.status_code, headers=found.headers, content=found.read(), request=request)
        response.elapsed = datetime.timedelta(0)
        self._heard.append(response)
        return response


def recorded(coordinator: Coordinator) -> list[httpx.Response]:
    """Everything that this coordinator answers from now on."""
    heard: list[httpx.Response] = []
    for client in coordinator._clients:
        client._transport = Recorder(client._transport, heard)  # type: ignore[assignment]
    return heard


def populate(world: World) -> dict[str, str]:
    """One of everything that a path can name, reached by the walk of a released model; its ids."""
    world.ready()
    world.queued(PLAN, RUN)
    assert world.lease("w") == RUN
    for number in (1, 2):
        world.step(RUN, "w", number, f"{number}" * 64)
    model = world.finish_with_model(RUN, "w", PLAN)
    nouns.release_model(world.api("lab"), world.keys["lab"], model)
    request = world.agreement("hospital-a", agreement=AGREEMENT)
    assert world.post("lab", "agreements", request, "lab").status_code == 201
    world.start(small_plan("seed=2"), run="run-2")
    ids = {"study": STUDY, "agreement": AGREEMENT, "run": RUN, "node": "ward-a", "dataset": "heart", "model": model}
    return ids | {"preflight": world.preflight(PLAN)}


def leave_out(world: World, run: str, node: str) -> None:
    """A robust run that put a node into quarantine."""
    world.queued(small_plan("privacy={mode='robust', attackers=1}"), run)
    assert world.lease("w") == run
    row = {"norm": 1.0, "distance": 1.0, "cosine": 0.0, "trimmed": 1.0, "score": 9.0, "flag": "far"}
    record = {"kind": "train", "round": 1, "of": 2, "survivors": [node], "seconds": 0.1}
    record["anomalies"] = {"rule": "median", "attackers": 1, "nodes": {node: row}}
    record["quarantined"] = {node: {"rule": "flagged in 1 round", "rounds": [row]}}
    with world.database.session() as session:
        service.save_step(session, run, "w", record, {"version": 1})


def filled(path: str, ids: dict[str, str]) -> dict[str, str]:
    """What stands for the parameters of a path that only reads."""
    noun = path.split("/")[3]
    names = {"organisations": "lab", "people": "admin", "nodes": "ward-a", "models": "model.safetensors"}
    known = ids | {"digest": ids["model"] if "/models/" in path else PLAN.digest, "name": names.get(noun, "")}
    known["sequence"] = "1"
    return {name: known[name] for name in re.findall(r"{(\w+)}", path)}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def described(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = request.getfixturevalue("postgresql") if request.param == "postgresql" else None
    world = World(
        tmp_path_factory.mktemp("openapi") / "c",
        "" if server is None else new_database_url(server),
        requests_per_minute=10**9,
        enrolments_per_minute=10**9,
    )
    world.coordinator.app.state.concord.closing.set()  # long polls and streams answer at once
    yield world
    world.close()


@pytest.fixture(scope="module")
def ids(described: World) -> dict[str, str]:
    return populate(described)


@pytest.fixture
def api(described: World) -> Any:
    """The application as its administrator sees it, over a connection of a node that is in the federation anew."""
    keys, coordinator = NodeKeys(), described.coordinator
    coordinator.admin.post("/api/v1/nodes/ward-1/revoke", json={})
    answer = coordinator.post_enrolment(keys.enrolment(coordinator.invite("ward-1", "hospital-a")))
    coordinator.admin.post("/api/v1/nodes/ward-1/activate", json={"fingerprint": keys.fingerprint})
    certificate = x509.load_pem_x509_certificate(answer.json()["certificate"]["chain"].encode())
    peer = coordinator.seen_with(certificate.public_bytes(Encoding.DER))
    return schemathesis.openapi.from_asgi("/api/openapi.json", peer)


def surprises(
    api: Any, described: World, examples: int, known: Callable[[Any], dict[str, Any]], *modes: Any
) -> tuple[dict[str, str], set[str]]:
    """What was not as described, by operation; and the operations that succeeded. known: arguments that are fixed."""
    headers = {"Authorization": f"Bearer {described.coordinator.token}", "Concord-Protocol": "1"}
    found, succeeded = {}, set()
    for operation in (each.ok() for each in api.get_all_operations()):
        for mode in modes:
            statuses: list[int] = []

            @given(case=operation.as_strategy(generation_mode=mode, **known(operation)))
            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            def ask(case: Any) -> None:
                statuses.append(case.call_and_validate(headers=headers, checks=CHECKS).status_code)  # noqa: B023

            try:
                with contextlib.suppress(Unsatisfiable):  # nothing wrong can be asked of it
                    ask()
            except Exception as error:
                found[f"{operation.label} ({mode.value})"] = str(error)[:2000]
            if any(status < 300 for status in statuses):
                succeeded.add(operation.label)
    return found, succeeded


def existing(ids: dict[str, str]) -> Callable[[Any], dict[str, Any]]:
    """Fixes what a path that reads names to what exists."""

    def known(operation: Any) -> dict[str, Any]:
        reads = operation.method == "get" and "{" in operation.path
        return {"path_parameters": filled(operation.path, ids)} if reads else {}

    return known


def nothing(_: Any) -> dict[str, Any]:
    return {}


def told(found: dict[str, str]) -> str:
    return "\n\n".join(f"{label}\n{said}" for label, said in found.items())


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_answer_is_a_surprise(api: Any, described: World, ids: dict[str, str]) -> None:
    """As it is described: the status, its content type, its headers and its content; never 5xx."""
    for known, modes in ((existing(ids), (POSITIVE,)), (nothing, (POSITIVE, NEGATIVE))):
        found, _ = surprises(api, described, 15, known, *modes)
        assert found == {}, told(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("described", ["sqlite"], indirect=True)
def test_what_exists_is_told_as_described(api: Any, described: World, ids: dict[str, str]) -> None:
    """Every operation, briefly; every path that reads succeeds where it names what exists."""
    found, succeeded = surprises(api, described, 2, existing(ids), POSITIVE)
    assert found == {}, told(found)
    operations = [each.ok() for each in api.get_all_operations()]
    assert len(operations) > 50
    of_another_kind = {"GET /api/v1/runs/{run}/statistics"}  # the described runs train: test_control_runs has one
    assert {each.label for each in operations if each.method == "get"} - succeeded == of_another_kind
    found, _ = surprises(api, described, 2, nothing, NEGATIVE)
    assert found == {}, told(found)


@pytest.mark.parametrize("described", ["sqlite"], indirect=True)
def test_every_success_of_the_walk_is_as_described(described: World, api: Any) -> None:
    """All operations that change something, each at least once carried out."""
    coordinator = described.coordinator
    described.clear()
    heard = recorded(coordinator)
    populate(described)
    admin, lab = coordinator.admin, described.people["lab"]
    leave_out(described, "run-3", "ward-a")
    lab.post("/api/v1/runs/run-3/quarantine/ward-a/lift", json={"reason": "looked at"})
    offer = described.agreement("hospital-a", agreement=AGREEMENT)
    described.post("hospital-a", f"agreements/{AGREEMENT}/offer", offer, "hospital-a")
    described.post("lab", f"agreements/{AGREEMENT}/agree", offer, "lab")
    described.withdraw(AGREEMENT, "hospital-a")
    lab.post("/api/v1/runs/run-2/stop")
    coordinator.new_organisation("clinic")
    coordinator.new_person("zoe", "clinic", "researcher")
    admin.post("/api/v1/people/zoe/roles", json={"role": "auditor", "organisation": "clinic"})
    admin.delete("/api/v1/people/zoe/roles/auditor", params={"organisation": "clinic"})
    for token in admin.get("/api/v1/tokens").json()["items"]:
        if token["person"] == "zoe":
            admin.delete(f"/api/v1/tokens/{token['id']}")
    key = admin.get("/api/v1/organisations/lab").json()["key"]
    lab.put("/api/v1/organisations/lab/key", json={"key": key})
    coordinator.invite("ward-8", "clinic")
    for invitation in admin.get("/api/v1/invitations").json()["items"]:
        admin.delete(f"/api/v1/invitations/{invitation['id']}")
    keys, node = coordinator.enrol("ward-9", "clinic")
    node._transport = Recorder(node._transport, heard)  # type: ignore[assignment]
    for size in (2, 1):  # the second is an alarm
        head = TreeHead(log=node_log(FEDERATION, "clinic", "ward-9"), size=size, root="1" * 64, issued_at=now())
        node.post("/api/node/heads", json={"head": body(head, keys.identity), "proof": []})
    admin.post("/api/v1/audit/heads/ward-9/accept", json={"reason": "looked"})
    admin.post("/api/v1/nodes/ward-9/suspend", json={})
    node.post("/api/node/renew", json=RenewRequest(request=keys.request()).model_dump())
    head = LedgerHead(node="ward-9", organisation="clinic", sequence=1, hash="a" * 64, issued_at=now())
    node.post("/api/node/ledger-head", json=body(head, keys.identity))
    node.post("/api/node/leave", json=body(Leave(node="ward-9", issued_at=now()), keys.identity))
    admin.post("/api/v1/nodes/ward-9/revoke", json={})
    operations = {each.ok().label: each.ok() for each in api.get_all_operations()}
    patterns = {label: re.compile(re.sub(r"{\w+}", "[^/]+", label)) for label in operations}
    succeeded = set()
    for response in heard:
        asked = f"{response.request.method} {response.request.url.path}"
        (label,) = [each for each, pattern in patterns.items() if pattern.fullmatch(asked)]
        assert response.status_code < 500, response.text
        operations[label].validate_response(response)
        succeeded |= {label} if response.status_code < 300 else set()
    changing = {label for label in operations if not label.startswith("GET")}
    assert changing - succeeded == set()


def test_every_refusal_is_described_as_a_problem(coordinator: Coordinator) -> None:
    document = coordinator.anyone.get("/api/openapi.json").json()
    assert "HTTPValidationError" not in str(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status in ("401", "403", "404", "409", "422", "429", "503"):
                content = operation["responses"][status]["content"]
                assert list(content) == ["application/problem+json"], f"{method} {path} {status}"
            assert operation.get("description") or operation.get("summary"), f"{method} {path}"
