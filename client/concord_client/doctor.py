"""`concord-node doctor`: what keeps a node from working, or soon will; each finding with what to do about it."""

import json
import os
import platform
import shutil
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Literal
from urllib.request import getproxies, proxy_bypass

import httpx

from concord_client.approvals import questions
from concord_client.control import ControlChannel
from concord_client.daemon_lock import running_daemon
from concord_client.enrolment import certificate_ends, overdue
from concord_client.evidence import alarms, remembered_head
from concord_client.fleet import new_client
from concord_client.home import NodeHome
from concord_client.ledger.witness import check_witness
from concord_client.policy import Policy
from concord_client.registry import verify
from concord_client.store import NodeStore
from concord_shared import __version__
from concord_shared.certificates import read_certificate
from concord_shared.errors import ConcordError, LedgerDamagedError, NotAllowedError, UnreachableError

__all__ = ["Finding", "examine"]

State = Literal["ok", "warn", "fail"]
ChannelMaker = Callable[[NodeHome, NodeStore], AbstractContextManager[ControlChannel]]

CLOCK_WARN_S, CLOCK_FAIL_S = 10, 300
DAY_S = 86_400
DISK_WARN, DISK_FAIL = 5 << 30, 500 << 20
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """advice: what to do; empty where nothing is to be done."""

    name: str
    state: State
    said: str
    advice: str = ""


def examine(
    home: NodeHome,
    store: NodeStore,
    channel: ChannelMaker = ControlChannel,
    clock: Callable[[], float] = time.time,
    with_device: bool = True,
) -> Iterator[Finding]:
    """All checks, one after the other; none stops another."""
    now = clock()
    yield _versions()
    yield _modes(home)
    yield _certificate(home, now)
    yield _membership(home, now)
    yield _proxy(home)
    yield from _coordinator(home, store, channel, clock)
    yield _fleet(home)
    yield _daemon(home, store, now)
    yield _policy(home)
    yield from _datasets(home, store)
    yield _ledger(home, store)
    yield _waiting(home, store, now)
    yield _refused(store)
    yield _evidence(store, now)
    yield _disk(home)
    if with_device:
        yield _device(home)


def _evidence(store: NodeStore, now: float) -> Finding:
    """Both logs are the ones of before, and somebody else knows it."""
    if found := alarms(store):
        return Finding(
            "evidence",
            "fail",
            found[0].reason,
            "Ask the coordinator's people what happened, on another way than this one; then: concord-node audit accept "
            "--reason WHY. Until then the policy's evidence.on_fork decides whether rounds go on",
        )
    at, held = store.fact("head/at"), remembered_head(store)
    if at is None or held is None:
        return Finding("evidence", "ok", "no head of the coordinator's log is held yet")
    if now - int(at) > DAY_S:
        said = f"no head of the coordinator's log since {_day(int(at))}"
        return Finding("evidence", "warn", said, "If rounds go on without heads, ask the coordinator's people why")
    return Finding("evidence", "ok", f"the coordinator's log only grew, to {held.size} entries")


def _versions() -> Finding:
    names = ("torch", "flwr", "numpy")
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    said = f"concord-node {__version__}, Python {platform.python_version()}, {found}, {platform.system()}"
    if "missing" in found:
        return Finding("versions", "fail", said, "Install concord-node anew, with its dependencies")
    return Finding("versions", "ok", said)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _modes(home: NodeHome) -> Finding:
    if os.name != "posix":
        return Finding("keys", "ok", "not checked on this system")
    files = [home.key_file(name) for name in ("tls", "identity", "flower")]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        return Finding("keys", "fail", f"missing: {', '.join(missing)}", "Restore them from a backup, or enrol anew")
    loose = [str(path) for path in (home.path, home.keys, *files) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if loose:
        return Finding("keys", "fail", f"open to others: {', '.join(loose)}", f"chmod go= {' '.join(loose)}")
    return Finding("keys", "ok", "three keys, for their owner only")


def _certificate(home: NodeHome, now: float) -> Finding:
    """A running node renews after two thirds of the life."""
    try:
        ends = certificate_ends(home).timestamp()
    except ConcordError as error:
        return Finding("certificate", "fail", str(error), "Restore it from a backup, or enrol anew")
    if ends <= now:
        return Finding("certificate", "fail", f"expired {_day(ends)}", overdue(home, now))
    if ends - now < 5 * DAY_S:
        return Finding(
            "certificate", "warn", f"until {_day(ends)}", "Run concord-node up: it renews the certificate by itself"
        )
    return Finding("certificate", "ok", f"until {_day(ends)}")


def _membership(home: NodeHome, now: float) -> Finding:
    """The key that signs rosters and certificates, under the pinned root."""
    try:
        home.membership_key(datetime.fromtimestamp(now, UTC))
        ends = read_certificate(home.membership.read_text("utf-8")).not_valid_after_utc.timestamp()
    except (ConcordError, OSError) as error:
        return Finding("membership", "fail", str(error), "Check this machine's clock; ask the coordinator to renew it")
    if ends - now < 14 * DAY_S:
        advice = "The coordinator's administrator renews it with the root key; ask whether that is planned"
        return Finding("membership", "warn", f"the membership key ends {_day(ends)}", advice)
    return Finding("membership", "ok", f"the membership key is under the pinned root, until {_day(ends)}")


def _proxy(home: NodeHome) -> Finding:
    config = home.config
    host = config.url.removeprefix("https://").rsplit(":", 1)[0]
    if config.proxy:
        return Finding("proxy", "ok", f"{_without_password(config.proxy)}, as node.toml says")
    found = getproxies().get("https") or getproxies().get("all")
    if not found:
        return Finding("proxy", "ok", "none")
    if proxy_bypass(host):
        return Finding("proxy", "ok", f"none for {host}, as NO_PROXY says")
    return Finding("proxy", "ok", f"{_without_password(found)}, as HTTPS_PROXY says")


def _without_password(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _coordinator(
    home: NodeHome, store: NodeStore, channel: ChannelMaker, clock: Callable[[], float]
) -> Iterator[Finding]:
    url = home.config.url
    begun, before = time.monotonic(), clock()
    try:
        with channel(home, store) as connection:
            trust = connection.trust()
            took = time.monotonic() - begun
            state = _told_state(connection)
    except ConcordError as error:
        yield Finding("coordinator", "fail", str(error), "Check address, network, proxy and --ca; see node.toml")
        yield _standing(store.fact("state") or "unknown")
        return
    yield Finding("coordinator", "ok", f"{url} answers in {1000 * took:.0f} ms; its certificate is trusted")
    difference = trust.now - (before + took / 2)
    said = f"{abs(difference):.0f} s {'behind' if difference > 0 else 'ahead of'} the coordinator"
    if abs(difference) <= CLOCK_WARN_S:
        yield Finding("clock", "ok", "as the coordinator's")
    else:
        grade: State = "fail" if abs(difference) > CLOCK_FAIL_S else "warn"
        yield Finding("clock", grade, said, "Set this machine's clock; let it follow a time server")
    yield _standing(state)


def _fleet(home: NodeHome) -> Finding:
    """The way that rounds take. Any answer will do: who asks without a round to take part in learns nothing there."""
    config = home.config
    try:
        with new_client(home.tls_context(), config.proxy, TIMEOUT_S) as client:
            client.get(f"https://{config.superlink}/health")
    except (UnreachableError, httpx.HTTPError, ssl.SSLError, OSError, ValueError) as error:
        advice = "Rounds come over this second address: let the firewall, or the proxy, allow outbound TLS to it"
        return Finding("fleet", "fail", f"{config.superlink} cannot be reached: {error}"[:300], advice)
    except ConcordError as error:
        return Finding("fleet", "fail", str(error), "See keys and certificate above")
    return Finding("fleet", "ok", f"{config.superlink} answers")


def _told_state(connection: ControlChannel) -> str:
    """What the coordinator says of this node, which shows its certificate."""
    try:
        return connection.updates(0).state
    except NotAllowedError:
        return "refused"


def _standing(state: str) -> Finding:
    if state == "active":
        return Finding("state", "ok", "active")
    advice = {
        "enrolled": "Wait for the coordinator's administrator to activate it: concord node activate NAME",
        "suspended": "Ask the coordinator's administrator why",
        "refused": "It was revoked, or its certificate is over: ask for a new invitation, and enrol into a new home",
    }.get(state, "Run concord-node up, so that the coordinator can say")
    return Finding("state", "fail" if state == "refused" else "warn", state, advice)


def _daemon(home: NodeHome, store: NodeStore, now: float) -> Finding:
    contact = store.fact("contact/control")
    last = f"; last contact {_ago(now - float(contact))} ago" if contact else "; no contact yet"
    pid = running_daemon(home)
    if pid is None:
        return Finding("daemon", "warn", "concord-node up is not running" + last, "Start it: concord-node up")
    if works := json.loads(store.fact("works") or "null"):
        last += (
            f"; works on run {works['run']} since {_day(works['since'])}, until {_day(works['until'])} at the latest"
        )
    if contact is None or now - float(contact) > 300:
        return Finding("daemon", "warn", f"running, process {pid}{last}", f"See its log: {home.logs / 'node.log'}")
    return Finding("daemon", "ok", f"running, process {pid}{last}")


def _policy(home: NodeHome) -> Finding:
    try:
        policy = Policy.load(home.policy_file)
    except ConcordError as error:
        return Finding("policy", "fail", str(error), "Every plan and round is refused until it is mended")
    return Finding("policy", "ok", f"valid; automatic rules: {len(policy.approvals.automatic)}")


def _datasets(home: NodeHome, store: NodeStore) -> Iterator[Finding]:
    datasets = store.datasets()
    try:
        roots = Policy.load(home.policy_file).data.roots
    except ConcordError:
        roots = ()  # said where the policy is looked at
    if not datasets:
        yield Finding("data", "warn", "no dataset is registered", "Register one: concord-node data add NAME SPEC")
    for dataset in datasets:
        try:
            verify(store, dataset, roots)
            yield Finding("data", "ok", f"{dataset.name}: {dataset.rows} rows, as registered")
        except ConcordError as error:
            advice = f"Register it again: concord-node data add {dataset.name} SPEC --replace; then approve anew"
            yield Finding("data", "fail", str(error), advice)


def _ledger(home: NodeHome, store: NodeStore) -> Finding:
    """Every entry is read and verified, against what was noted elsewhere too."""
    try:
        with home.ledger() as ledger:
            check_witness(store, ledger)
            books, head, durable = ledger.books(), ledger.head, ledger.synchronous
    except LedgerDamagedError as error:
        return Finding("ledger", "fail", str(error), "Nothing is trained until then: concord-node ledger repair --help")
    except ConcordError as error:
        return Finding("ledger", "fail", str(error), "Nothing is trained until it can be used")
    if durable != ("wal", 2):
        said = f"this system's SQLite keeps it as {durable[0]}, level {durable[1]}; expected wal, 2"
        return Finding("ledger", "fail", said, "Put the node's home on a local disk, not on a network share")
    accounts = [books.account(budget) for budget in books.budgets.values()]
    left = ", ".join(f"{each.group} ε {each.left:.3g} of {each.epsilon:g} left" for each in accounts)
    said = f"{head.sequence} entries, as they were written; {left or 'no cap is set'}"
    used_up = [each.group for each in accounts if each.left <= 0]
    if used_up:
        return Finding("ledger", "warn", said, f"Used up: {', '.join(used_up)}. Plans on it are refused")
    return Finding("ledger", "ok", said)


def _waiting(home: NodeHome, store: NodeStore, now: float) -> Finding:
    try:
        asked = questions(home, store, Policy.load(home.policy_file), now)
    except ConcordError as error:
        return Finding("approvals", "fail", str(error), "Mend policy.toml")
    waiting = [each for each in asked if each.state in ("pending", "expired")]
    if waiting:
        return Finding("approvals", "warn", f"{len(waiting)} wait for you", "concord-node approvals list")
    return Finding("approvals", "ok", "nothing waits")


def _refused(store: NodeStore) -> Finding:
    refused = store.refused()
    if not refused:
        return Finding("documents", "ok", "everything that arrived was believed")
    last = refused[-1]
    said = f"{len(refused)} were not believed, the last: {last.kind} {last.subject}: {last.reason}"[:300]
    return Finding("documents", "warn", said, "concord-node status lists them")


def _disk(home: NodeHome) -> Finding:
    free = shutil.disk_usage(home.path).free
    said = f"{free / (1 << 30):.1f} GB free at {home.path}"
    if free >= DISK_WARN:
        return Finding("disk", "ok", said)
    return Finding("disk", "fail" if free < DISK_FAIL else "warn", said, "Free some space")


def _device(home: NodeHome) -> Finding:
    """Imports torch: seconds."""
    from concord_client.devices import autocast_dtype, choose_device, describe_device

    try:
        device = choose_device(Policy.load(home.policy_file).resources.device)
    except ConcordError as error:
        return Finding("device", "fail", str(error), "Name another device in policy.toml, or install torch for it")
    precision = "fp32" if autocast_dtype("auto", device) is None else "bf16"
    return Finding("device", "ok", f"{device} ({describe_device(device)}), {precision} where a plan leaves it open")


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def _ago(seconds: float) -> str:
    for unit, size in (("days", DAY_S), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
