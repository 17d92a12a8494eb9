"""The control channel: HTTPS from a node to its coordinator, never the other way.

What leaves is written to the egress log before it leaves. What comes back has a size limit, and is nothing but bytes
until `protocol.py`'s records, and then `sync.py`, have checked it.
"""

import hashlib
import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import ValidationError

from concord_client.home import NodeHome
from concord_client.store import NodeStore, Posted
from concord_shared.documents import ModelFile
from concord_shared.errors import (
    ApiError,
    ArtefactError,
    ConflictError,
    DocumentRefusedError,
    NotAllowedError,
    NotFoundError,
    NotSignedInError,
    UnreachableError,
)
from concord_shared.files import explain
from concord_shared.protocol import (
    PROTOCOL,
    PROTOCOL_HEADER,
    Certificate,
    Heads,
    HeadSent,
    LedgerWitness,
    Problem,
    Receipts,
    RenewRequest,
    Trust,
    Updates,
)
from concord_shared.signing import Envelope, Record

__all__ = ["Connection", "ControlChannel", "is_untrusted"]

ANSWER_BYTES_MAX = 64 << 20
SMALL_ANSWER_BYTES_MAX = 8 << 20
PROBLEM_BYTES_MAX = 64 << 10
CONNECT_S, READ_S, WRITE_S = 10.0, 30.0, 60.0
ERRORS: Mapping[int, type[ApiError]] = {
    401: NotSignedInError,
    403: NotAllowedError,
    404: NotFoundError,
    409: ConflictError,
}
PATHS = {
    "card": "/api/node/cards",
    "card-withdrawal": "/api/node/cards",
    "approval": "/api/node/approvals",
    "leave": "/api/node/leave",
    "ledger-head": "/api/node/ledger-head",
    "preflight": "/api/node/preflights",
}
Answer = TypeVar("Answer", bound=Record)


class Connection:
    """HTTPS to one coordinator: protocol version, proxy, limits, and errors that a person can act on."""

    def __init__(
        self,
        url: str,
        context: ssl.SSLContext,
        store: NodeStore,
        proxy: str = "",
        clock: Callable[[], float] = time.time,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """proxy: a URL, or empty for what HTTPS_PROXY and NO_PROXY say. transport: for tests."""
        self.url, self._store, self._clock = url, store, clock
        try:
            self._client = httpx.Client(
                base_url=url,
                verify=context,
                proxy=proxy or None,
                trust_env=not proxy,
                transport=transport,
                headers={PROTOCOL_HEADER: str(PROTOCOL), "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(READ_S, connect=CONNECT_S, write=WRITE_S),
            )
        except (ValueError, ImportError) as error:  # the second where it speaks SOCKS
            where = "of --proxy, or node.toml," if proxy else "of HTTPS_PROXY"
            raise UnreachableError(f"the proxy {where} cannot be used: {error}") from error

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, query: Mapping[str, int], bytes_max: int, read_s: float = READ_S) -> bytes:
        with self._request("GET", path, params=dict(query), timeout=self._timeout(read_s)) as response:
            return b"".join(_limited(response, bytes_max))

    def post(self, path: str, kind: str, subject: str, body: bytes) -> bytes:
        """Logged as leaving, then sent."""
        digest = hashlib.sha256(body).hexdigest()
        self._store.log_egress(self._clock(), self.url, kind, subject, len(body), digest)
        return self.send(path, body)

    def send(self, path: str, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        with self._request("POST", path, content=body, headers=headers) as response:
            return b"".join(_limited(response, SMALL_ANSWER_BYTES_MAX))

    def download(self, path: str, target: Path, size: int, sha256: str) -> None:
        """Writes what comes to `target`, if it is exactly these bytes."""
        digest, part = hashlib.sha256(), target.with_name(f".{target.name}.part")
        try:
            with self._request("GET", path) as response, part.open("wb") as file:
                for chunk in _limited(response, size):
                    digest.update(chunk)
                    file.write(chunk)
            if part.stat().st_size != size or digest.hexdigest() != sha256:
                raise DocumentRefusedError(f"{path}: the bytes that came are not those that the release names")
            part.replace(target)
        except OSError as error:
            raise ArtefactError(f"cannot write {target}: {explain(error)}") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def trust(self) -> Trust:
        """Raises: UnreachableError: also where the coordinator speaks no version of the protocol that we do."""
        trust = read_answer(Trust, self.get("/api/trust", {}, SMALL_ANSWER_BYTES_MAX), self.url)
        if PROTOCOL not in trust.protocols:
            spoken = ", ".join(map(str, trust.protocols))
            raise UnreachableError(f"{self.url} speaks version {spoken} of the protocol, this node {PROTOCOL}")
        return trust

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, int] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> Iterator[httpx.Response]:
        request = self._client.build_request(
            method,
            path,
            params=params,
            content=content,
            headers=dict(headers or {}),
            timeout=timeout or self._client.timeout,
        )
        try:
            response = self._client.send(request, stream=True)
            try:
                if response.status_code not in (200, 204):
                    raise _error(response, self.url)
                yield response
            finally:
                response.close()
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
            raise UnreachableError(_why(error, self.url)) from error

    def _timeout(self, read_s: float) -> httpx.Timeout:
        return httpx.Timeout(read_s, connect=CONNECT_S, write=WRITE_S)


class ControlChannel:
    """An enrolled node's calls, with its certificate. A context manager; after a renewal, open a new one."""

    def __init__(
        self,
        home: NodeHome,
        store: NodeStore,
        clock: Callable[[], float] = time.time,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Raises: ArtefactError: the home's keys or certificates cannot be used."""
        self._store = store
        config = home.config
        self._connection = Connection(config.url, home.tls_context(), store, config.proxy, clock, transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def updates(self, wait_s: int) -> Updates:
        """What is new since the store's cursor; waits for it up to `wait_s` seconds. The cursor is not moved."""
        query = {"after": self._store.cursor, "wait_s": wait_s}
        body = self._connection.get("/api/node/updates", query, ANSWER_BYTES_MAX, READ_S + wait_s)
        return read_answer(Updates, body, self._connection.url)

    def trust(self) -> Trust:
        return self._connection.trust()

    def send_card(self, envelope: Envelope, dataset: str) -> None:
        self._send("card", dataset, envelope)

    def send_approval(self, envelope: Envelope, subject: str) -> None:
        self._send("approval", subject, envelope)

    def leave(self, envelope: Envelope, node: str) -> None:
        self._send("leave", node, envelope)

    def renew(self, request: RenewRequest, node: str) -> Certificate:
        body = request.model_dump_json().encode()
        answer = self._connection.post("/api/node/renew", "renewal", node, body)
        return read_answer(Certificate, answer, self._connection.url)

    def ledger_witness(self) -> Envelope | None:
        """Where this node's privacy ledger once stood, as this node itself told the coordinator."""
        body = self._connection.get(PATHS["ledger-head"], {}, SMALL_ANSWER_BYTES_MAX)
        return read_answer(LedgerWitness, body, self._connection.url).head

    def heads(self, since: int) -> Heads:
        """The coordinator's head, with the proof that its log begins with `since` entries; and what it remembers."""
        body = self._connection.get("/api/node/heads", {"since": since}, SMALL_ANSWER_BYTES_MAX)
        return read_answer(Heads, body, self._connection.url)

    def send_head(self, sent: HeadSent) -> None:
        """A head holds no more than how many entries there are, so it is not an entry itself."""
        self._connection.send("/api/node/heads", sent.model_dump_json().encode())

    def receipts(self, after: int) -> Receipts:
        body = self._connection.get("/api/node/receipts", {"after": after}, SMALL_ANSWER_BYTES_MAX)
        return read_answer(Receipts, body, self._connection.url)

    def download_model(self, model_digest: str, run: str, file: ModelFile, target: Path) -> None:
        """Of that run's release: another run may have ended with the same model.

        Raises:
            DocumentRefusedError: other bytes than those of the release.
        """
        path = f"/api/node/models/{model_digest}/{file.name}?run={run}"
        self._connection.download(path, target, file.size, file.sha256)

    def deliver(self) -> int:
        """Sends what is posted, oldest first, and returns how many the coordinator took.

        What it will never take is noted among the refused; what it cannot take now stays.

        Raises:
            UnreachableError, NotAllowedError: what is left waits for another time.
        """
        taken = 0
        for posted in self._store.outbox():
            try:
                self._send(posted.kind, posted.subject, posted.envelope)
                taken += 1
            except NotAllowedError:
                raise
            except ApiError as error:
                self._note_refusal(posted, error)
            self._store.delivered(posted.id)
        return taken

    def _send(self, kind: str, subject: str, envelope: Envelope) -> None:
        self._connection.post(PATHS[kind], kind, subject, envelope.model_dump_json().encode())

    def _note_refusal(self, posted: Posted, error: ApiError) -> None:
        reason = f"the coordinator did not take it: {error}"
        self._store.refuse(self._connection._clock(), f"sent {posted.kind}", posted.subject, reason, {})


def read_answer(kind: type[Answer], body: bytes, url: str) -> Answer:
    """Raises: UnreachableError: not such a record."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnreachableError(
            f"{url}: the answer is not a {kind.__name__} of protocol {PROTOCOL} ({where}: {first['msg']}). Is this a "
            "coordinator, of a version that this node knows?"
        ) from error


def is_untrusted(error: BaseException | None) -> bool:
    """Whether a connection failed because nobody that it trusts vouches for the server."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _limited(response: httpx.Response, bytes_max: int) -> Iterator[bytes]:
    """The body, unless it is larger than it may be. Never unpacked: a node asks for plain bytes."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise UnreachableError("the coordinator packed its answer; a node takes plain bytes only")
    size = 0
    for chunk in response.iter_raw():
        size += len(chunk)
        if size > bytes_max:
            raise UnreachableError(f"the coordinator's answer is larger than {bytes_max} bytes; nothing of it was used")
        yield chunk


def _error(response: httpx.Response, url: str) -> Exception:
    """What an answer other than yes means: to be tried again, or refused for good."""
    status, problem = response.status_code, _problem(response)
    said = _said(problem) or f"status {status}"
    if status == 426:
        return UnreachableError(f"{url} speaks another version of the protocol than this node's {PROTOCOL}: {said}")
    if status == 429 or status >= 500 or status < 400:
        return UnreachableError(f"{url} cannot answer now: {said}")
    error = ERRORS.get(status, ApiError)(said)
    error.status = status
    error.code = problem.code if problem else error.code
    return error


def _problem(response: httpx.Response) -> Problem | None:
    try:
        body = b"".join(_limited(response, PROBLEM_BYTES_MAX))
        return Problem.model_validate_json(body)
    except (ValidationError, UnreachableError, httpx.HTTPError):
        return None


def _said(problem: Problem | None) -> str:
    """The coordinator's words, short and without control characters: they go to a terminal."""
    if problem is None:
        return ""
    text = " ".join(part for part in (problem.detail or problem.title, *problem.errors) if part)
    return "".join(letter for letter in text if letter.isprintable())[:1000]


def _why(error: Exception, url: str) -> str:
    if is_untrusted(error):
        return (
            f"{url} shows a certificate that this node does not trust: {error}. If a company's proxy or authority is "
            "in between, name its certificate with --ca FILE"
        )
    detail = json.dumps(str(error) or type(error).__name__, ensure_ascii=False)
    return f"{url} cannot be reached: {detail}. Check address, network and proxy (HTTPS_PROXY, or --proxy URL)"
