"""The OpenAPI document is true: whatever is asked within it or beside it, no 5xx and no answer that it lacks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from coordinators import Coordinator, NodeKeys, make_coordinator, new_database_url

schemathesis: Any = pytest.importorskip("schemathesis")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.response_schema_conformance,
]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def described(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    server = request.getfixturevalue("postgresql") if request.param == "postgresql" else None
    made = make_coordinator(
        tmp_path_factory.mktemp("openapi") / "c",
        "" if server is None else new_database_url(server),
        requests_per_minute=10**9,
        enrolments_per_minute=10**9,
    )
    made.enrol("ward-1", "hospital-a")
    made.app.state.concord.closing.set()  # long polls answer at once
    yield made
    made.close()


@pytest.fixture
def api(described: Coordinator) -> Any:
    """The application as its administrator sees it, over a connection of a node that is in the federation anew."""
    keys = NodeKeys()
    described.admin.post("/api/v1/nodes/ward-1/revoke", json={})
    answer = described.post_enrolment(keys.enrolment(described.invite("ward-1", "hospital-a")))
    certificate = x509.load_pem_x509_certificate(answer.json()["certificate"]["chain"].encode())
    peer = described.seen_with(certificate.public_bytes(Encoding.DER))
    return schemathesis.openapi.from_asgi("/api/openapi.json", peer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_answer_is_a_surprise(api: Any, described: Coordinator) -> None:
    """As it is described: the status, its content type, its headers and its content; never 5xx."""
    headers = {"Authorization": f"Bearer {described.token}", "Concord-Protocol": "1"}
    operations = [each.ok() for each in api.get_all_operations()]
    assert len(operations) > 20
    surprises = {}
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            def ask(case: Any) -> None:
                case.call_and_validate(headers=headers, checks=CHECKS)

            try:
                with contextlib.suppress(Unsatisfiable):  # nothing wrong can be asked of it
                    ask()
            except Exception as error:
                surprises[f"{operation.label} ({mode.value})"] = str(error)[:2000]
    assert surprises == {}, "\n\n".join(f"{label}\n{said}" for label, said in surprises.items())


def test_every_refusal_is_described_as_a_problem(coordinator: Coordinator) -> None:
    document = coordinator.anyone.get("/api/openapi.json").json()
    assert "HTTPValidationError" not in str(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status in ("401", "403", "404", "409", "422", "429", "503"):
                content = operation["responses"][status]["content"]
                assert list(content) == ["application/problem+json"], f"{method} {path} {status}"
            assert operation.get("description") or operation.get("summary"), f"{method} {path}"
