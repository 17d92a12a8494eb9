"""The Python client: what is asked again, what errors become, where a profile lies. No sockets."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from concord_server import client
from concord_server.client import Coordinator, Profile
from concord_shared.errors import (
    ApiError,
    ArtefactError,
    ConflictError,
    NotAllowedError,
    NotFoundError,
    NotSignedInError,
    TooManyError,
    UnavailableError,
    UnreachableError,
    UsageError,
)
from concord_shared.protocol import Problem

Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.time, "sleep", lambda _: None)


def _coordinator(answer: Answer) -> Coordinator:
    return Coordinator("https://c", "token", transport=httpx.MockTransport(answer))


def _problem(status: int, code: str = "x") -> httpx.Response:
    content = Problem(title="t", status=status, detail="what happened", code=code, errors=("body.name: wrong",))
    return httpx.Response(status, content=content.model_dump_json())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ApiError),
        (401, NotSignedInError),
        (403, NotAllowedError),
        (404, NotFoundError),
        (409, ConflictError),
        (422, ApiError),
        (429, TooManyError),
        (503, UnavailableError),
        (426, UnreachableError),
    ],
)
def test_a_problem_is_the_error_that_it_was(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="what happened") as caught:
        _coordinator(lambda _: _problem(status, "a-code")).get("/x")
    if isinstance(caught.value, ApiError):
        assert (caught.value.status, caught.value.code) == (status, "a-code")
        assert "body.name: wrong" in str(caught.value)


@pytest.mark.parametrize("content", [b"<html>", b"", b"[]"])
def test_what_is_not_concords_is_unreachable(content: bytes) -> None:
    with pytest.raises(UnreachableError):
        _coordinator(lambda _: httpx.Response(502, content=content)).get("/x")


def test_a_creation_is_asked_again_with_the_same_key() -> None:
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            raise httpx.ReadError("lost")
        return httpx.Response(201, json={"ok": True}) if len(keys) == 3 else _problem(503)

    assert _coordinator(answer).post("/things", {"name": "x"}) == {"ok": True}
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_nobody_is_asked_for_ever() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ConnectError("refused")

    with pytest.raises(UnreachableError, match="https://c"):
        _coordinator(answer).get("/x")
    assert len(asked) == client.ATTEMPTS


def test_pages_are_followed_to_the_end_or_the_limit() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        first = int(request.url.params.get("after", 0))
        count = min(int(request.url.params["limit"]), 3)
        items = list(range(first, min(first + count, 8)))
        return httpx.Response(200, json={"items": items, "next": str(first + count) if first + count < 8 else None})

    assert list(_coordinator(answer).pages("/things")) == list(range(8))
    assert list(_coordinator(answer).pages("/things", 4)) == [0, 1, 2, 3]


def test_events_are_read_as_they_come() -> None:
    body = 'event: round\ndata: {"n": 1}\n\n: comment\n\ndata: {"a":\ndata: 2}\n\n'
    found = list(_coordinator(lambda _: httpx.Response(200, text=body)).events("/x"))
    assert found == [("round", {"n": 1}), ("message", {"a": 2})]


def test_a_download_is_whole_or_absent(tmp_path: Path) -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        def chunks():  # type: ignore[no-untyped-def]
            yield b"part"
            raise httpx.ReadError("lost")

        return httpx.Response(200, content=chunks())

    with pytest.raises(UnreachableError):
        _coordinator(broken).download("/x", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    _coordinator(lambda _: httpx.Response(200, content=b"all")).download("/x", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"all"


def test_a_profile_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PROFILE", str(tmp_path / "a" / "profile.json"))
    monkeypatch.delenv("CONCORD_TOKEN", raising=False)
    with pytest.raises(UsageError, match="concord login"):
        Profile.read()
    path = Profile("https://c", "token", "pem").write()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Profile.read() == Profile("https://c", "token", "pem")
    monkeypatch.setenv("CONCORD_TOKEN", "other")
    assert Profile.read().token == "other"
    path.write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ArtefactError):
        Profile.read()


def test_a_token_goes_over_tls_only() -> None:
    with pytest.raises(UsageError, match="https"):
        client.log_in("http://c:1", "0" * 64, "token")
