"""A Python client of the coordinator's API for people; every command of `concord` uses it.

with Coordinator.from_profile() as coordinator:
    for node in coordinator.pages("/api/v1/nodes"):
        print(node["name"], node["state"])
"""

import contextlib
import json
import os
import secrets
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import ValidationError

from concord_shared import __version__
from concord_shared.certificates import membership_key
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
from concord_shared.files import explain
from concord_shared.protocol import PROTOCOL, PROTOCOL_HEADER, Problem, Trust

__all__ = ["Coordinator", "Profile", "log_in", "profile_path"]

TIMEOUT_S = 30.0
ATTEMPTS = 4
ERRORS: tuple[type[ApiError], ...] = (
    NotSignedInError,
    NotAllowedError,
    NotFoundError,
    ConflictError,
    TooManyError,
    UnavailableError,
)


@dataclass(frozen=True)
class Profile:
    """What `concord login` stores. system_ca: the listener's certificate is one of the system's authorities."""

    url: str
    token: str
    root_pem: str
    system_ca: bool = False

    @classmethod
    def read(cls) -> "Profile":
        """The stored profile; CONCORD_TOKEN is above its token. Raises: UsageError: there is none yet."""
        path = profile_path()
        try:
            profile = cls(**json.loads(path.read_text("utf-8")))
        except FileNotFoundError as error:
            raise UsageError("not logged in; run: concord login URL --root FINGERPRINT --token-file FILE") from error
        except (OSError, ValueError, TypeError) as error:
            raise ArtefactError(f"{path}: not a profile of concord; log in again: concord login URL …") from error
        token = os.environ.get("CONCORD_TOKEN", "").strip()
        return cls(profile.url, token or profile.token, profile.root_pem, profile.system_ca)

    def write(self) -> Path:
        """Stores the profile, for its owner only."""
        path = profile_path()
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)
            fresh.replace(path)
        except OSError as error:
            raise ArtefactError(f"cannot write the profile {path}: {explain(error)}") from error
        return path


def profile_path() -> Path:
    named = os.environ.get("CONCORD_PROFILE", "")
    return Path(named) if named else Path.home() / ".config" / "concord" / "profile.json"


class Coordinator:
    """A connection to one coordinator. Paths are those of the API; answers are its JSON.

    root_pem: the federation's root certificate; system_ca: also trust the system's authorities.
    hostname: the name that the certificate must have, where the address is another one: then it is one of this machine,
    and no proxy is asked for it. Otherwise one that HTTPS_PROXY and NO_PROXY say.
    What is not answered is asked again: creations carry a key by which the coordinator knows them.

    Raises, from every method:
        ApiError: the coordinator refused; the class says how, `code` what.
        UnreachableError: no coordinator answers there, or not the one of this root.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        root_pem: str = "",
        *,
        system_ca: bool = False,
        hostname: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"User-Agent": f"concord/{__version__}", PROTOCOL_HEADER: str(PROTOCOL)}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        verify = _verified(root_pem, system_ca) if transport is None else True
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            verify=verify,
            timeout=TIMEOUT_S,
            transport=transport,
            trust_env=hostname is None,
        )
        self._extensions = {"sni_hostname": hostname} if hostname else {}
        self.url, self.root_pem = url, root_pem

    @classmethod
    def from_profile(cls) -> "Coordinator":
        """The coordinator that `concord login` named. Raises: UsageError: not logged in."""
        profile = Profile.read()
        return cls(profile.url, profile.token, profile.root_pem, system_ca=profile.system_ca)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._ask("GET", path, query=query)

    def post(self, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        return self._ask("POST", path, body={} if body is None else body, query=query)

    def put(self, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        return self._ask("PUT", path, body={} if body is None else body, query=query)

    def delete(self, path: str, **query: Any) -> dict[str, Any]:
        return self._ask("DELETE", path, query=query)

    def pages(self, path: str, limit: int | None = None, **query: Any) -> Iterator[dict[str, Any]]:
        """The items of a list, over all its pages; at most `limit`."""
        left, after = limit, None
        while left is None or left > 0:
            page = self.get(path, **query, limit=min(left or 200, 200), **({"after": after} if after else {}))
            yield from page["items"]
            left = None if left is None else left - len(page["items"])
            after = page["next"]
            if after is None:
                return

    def events(self, path: str, **query: Any) -> Iterator[tuple[str, Any]]:
        """Server-sent events as (event, data), as long as the coordinator sends them."""
        with self._stream(path, query, "text/event-stream") as response:
            name, data = "message", list[str]()
            for line in response.iter_lines():
                field, _, value = line.partition(":")
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data.append(value.removeprefix(" "))
                elif not line and data:
                    yield name, json.loads("\n".join(data))
                    name, data = "message", []

    def download(self, path: str, to: Path, **query: Any) -> Path:
        """A file's bytes, written whole or not at all."""
        partial = to.with_name(f".{to.name}.{secrets.token_hex(4)}.part")
        try:
            with self._stream(path, query, "*/*") as response, partial.open("xb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
            partial.replace(to)
        except OSError as error:
            raise ArtefactError(f"cannot write {to}: {explain(error)}") from error
        finally:
            partial.unlink(missing_ok=True)
        return to

    def _ask(self, method: str, path: str, *, body: Any = None, query: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Idempotency-Key": secrets.token_hex(16)} if method == "POST" else {}
        request = self._http.build_request(
            method,
            path,
            json=body,
            params={key: value for key, value in query.items() if value is not None},
            headers=headers,
            extensions=self._extensions,
        )
        response = self._send(request)
        if response.status_code == 204 or not response.content:
            return {}
        found = _json(response)
        if not isinstance(found, dict):
            raise UnreachableError(f"{self.url} answered with something that is not concord's; check the address")
        return found

    def _send(self, request: httpx.Request) -> httpx.Response:
        """Asks again, a little later each time, where nothing was answered or the coordinator cannot just now."""
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                response = self._http.send(request)
            except httpx.HTTPError as error:
                if last or isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE" in str(error):
                    raise self._unreachable(error) from error
            else:
                if last or response.status_code not in (429, 503):
                    _refuse_problem(response)
                    return response
            time.sleep(0.2 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    @contextlib.contextmanager
    def _stream(self, path: str, query: Mapping[str, Any], accept: str) -> Iterator[httpx.Response]:
        params = {key: value for key, value in query.items() if value is not None}
        try:
            with self._http.stream(
                "GET", path, params=params, headers={"Accept": accept}, extensions=self._extensions
            ) as response:
                if response.is_error:
                    response.read()
                _refuse_problem(response)
                yield response
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(f"cannot reach the coordinator at {self.url}: {error or type(error).__name__}")


def log_in(url: str, root: str, token: str, system_ca: bool = False) -> tuple[Profile, dict[str, Any]]:
    """Makes sure that the coordinator at `url` is that of the root key, as a node does; then, and only then, shows the
    token to it. Returns the profile, and who the token is.

    root: the root key's fingerprint, as `concord server init` and invitations say it. system_ca: the coordinator shows
    a certificate of the system's authorities; whoever these vouch for sees the token.

    Raises:
        DocumentRefusedError: another coordinator. NotSignedInError: the token does not hold. UnreachableError.
    """
    import datetime

    url = url if "://" in url else f"https://{url}"
    if not url.startswith("https://"):
        raise UsageError(f"expected https://HOST:PORT, got {url}")
    trust = _fetch_trust(url.rstrip("/"))
    membership_key(
        trust.root_certificate,
        trust.membership_certificate,
        root.lower().replace(":", ""),
        datetime.datetime.now(datetime.UTC),
    )
    profile = Profile(url.rstrip("/"), token, trust.root_certificate, system_ca)
    try:
        with Coordinator(profile.url, token, profile.root_pem, system_ca=system_ca) as coordinator:
            return profile, coordinator.get("/api/v1/me")
    except UnreachableError as error:
        if system_ca or "CERTIFICATE" not in str(error):
            raise
        raise UnreachableError(
            f"{error}. The token was not sent: the root key does not vouch for this certificate. Something may be in "
            "between; where the coordinator's people say that theirs is of a public authority, add --system-ca"
        ) from error


def _fetch_trust(url: str) -> Trust:
    """Over a connection that proves nothing yet; what it says is checked against the fingerprint, nothing is told."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        response = httpx.get(f"{url}/api/trust", verify=context, timeout=TIMEOUT_S)
        _refuse_problem(response)
        return Trust.model_validate_json(response.content)
    except httpx.HTTPError as error:
        raise UnreachableError(f"cannot reach a coordinator at {url}: {error or type(error).__name__}") from error
    except ValidationError as error:
        raise UnreachableError(f"what answers at {url} is not a coordinator of concord; check the address") from error


def _verified(root_pem: str, system_ca: bool) -> ssl.SSLContext:
    context = ssl.create_default_context() if system_ca or not root_pem else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if root_pem:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # what is named is trusted, also where it is not a root
        try:
            context.load_verify_locations(cadata=root_pem)
        except ssl.SSLError as error:
            raise ArtefactError("the root certificate of the profile is damaged; log in again") from error
    return context


def _refuse_problem(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        raise UnreachableError(
            f"the coordinator's address answered {response.status_code} and nothing of concord's; is a proxy between?"
        ) from None
    if problem.status == 426:
        raise UnreachableError(problem.detail)
    kind = next((each for each in ERRORS if each.status == problem.status), ApiError)
    error = kind("; ".join([problem.detail or problem.title, *problem.errors]))
    error.code, error.status = problem.code, problem.status
    raise error


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
