"""A small privacy ledger for tests, and workers on it that are killed at random instants."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from concord_client.ledger.filter import conversion
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.ledger.words import Cap, Reservation
from concord_shared.errors import BudgetRefusedError
from concord_shared.signing import new_identity_key, read_private_key, write_private_key

__all__ = ["ORDERS", "Deaths", "cap", "die_often", "open_ledger", "reservation"]

ORDERS = (2.0, 8.0, 32.0)
COST = (0.001, 0.01, 0.1)
"""RDP of one round at these orders."""
VERSION = "a" * 64
PACE_S = 0.02
"""Between two rounds of a worker that is to be killed: a fast disk would else end the budget after a few kills."""


def open_ledger(folder: Path, **options: Any) -> PrivacyLedger:
    """Of a folder's own key."""
    file = folder / "identity.key"
    if not file.exists():
        write_private_key(file, new_identity_key())
    key = read_private_key(file)
    assert isinstance(key, Ed25519PrivateKey)
    return PrivacyLedger(folder / "ledger.db", "node-1", key, ORDERS, **options)


def cap(epsilon: float = 3.0, **changes: Any) -> Cap:
    fields: dict[str, Any] = {"group": "patients", "datasets": ("patients",), "delta": 1e-5, "order": 8.0}
    return Cap(**{**fields, "epsilon": epsilon, **changes})


def reservation(run: str = "run-1", rounds: int = 5, **changes: Any) -> Reservation:
    """epsilon: far above every cap, so that only the sums at the budget's order count."""
    fields: dict[str, Any] = {
        "run": run,
        "study": "heart",
        "plan_digest": "b" * 64,
        "dataset": "patients",
        "dataset_version": VERSION,
        "rows": 100,
        "rounds": rounds,
        "rdp": COST,
        "epsilon": 1e6,
        "delta": 1e-5,
    }
    return Reservation(**{**fields, **changes})


# Deaths


@dataclass
class Deaths:
    """What was found afterwards. uncharged: answers that left though no charge of theirs is in the ledger.

    kills_at_work: of workers that had charged something. capacity: rounds that the budget holds.
    """

    kills: int
    kills_at_work: int
    releases: int
    charges: int
    capacity: int
    uncharged: int
    overspent: bool
    seconds: float


def die_often(folder: Path, kills: int, workers: int = 3, broken: bool = False, seed: int = 0) -> Deaths:
    """Workers reserve, charge and release, and are killed at random instants; others follow.

    broken: they release before they charge, as a node must not.
    """
    chance, begun = random.Random(seed), time.monotonic()
    capacity = 6 * kills
    with open_ledger(folder) as ledger:
        ledger.set_cap(cap(conversion(8.0, 1e-5) + COST[1] * (capacity + 0.5)))
    living = [_worker(folder, broken) for _ in range(workers)]
    dead = []
    for _ in range(kills):
        time.sleep(chance.uniform(0, 0.12))
        dead.append(living.pop(chance.randrange(workers)))
        _kill(dead[-1])
        living.append(_worker(folder, broken))
    for worker in living:
        _kill(worker)
    with contextlib.suppress(BudgetRefusedError):  # what they left of the budget
        _work(folder, broken, until_refused=True)
    with open_ledger(folder) as ledger:
        ledger.verify()
        books = ledger.books()
    charged = {(run, number) for run, each in books.standings.items() for number in each.charged}
    left = [tuple(json.loads(line)) for line in (folder / "released").read_text().splitlines()]
    at_work = {run.split("-")[1] for run, _ in charged}
    budget = books.budgets["patients"]
    return Deaths(
        kills=kills,
        kills_at_work=len([pid for pid in dead if str(pid) in at_work]),
        releases=len(left),
        charges=len(charged),
        capacity=capacity,
        uncharged=len([each for each in left if each not in charged]),
        overspent=not books.spent(budget) <= budget.cap,
        seconds=time.monotonic() - begun,
    )


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"a worker ended by itself: {status}"


def _worker(folder: Path, broken: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _work(folder, broken)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    os._exit(1)


def _work(folder: Path, broken: bool, until_refused: bool = False) -> None:
    out = os.open(folder / "released", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    with open_ledger(folder) as ledger:
        for number in range(1 << 30):
            run = f"run-{os.getpid()}-{number}"
            try:
                ledger.reserve(reservation(run, 3))
                for round_number in (1, 2, 3):
                    line = (json.dumps([run, round_number]) + "\n").encode()
                    if broken:
                        os.write(out, line)
                    ledger.charge(run, round_number)
                    if not broken:
                        os.write(out, line)
                    ledger.release(run, round_number, VERSION)
                    if not until_refused:
                        time.sleep(PACE_S)
            except BudgetRefusedError:
                if until_refused:
                    raise
                time.sleep(PACE_S)


if __name__ == "__main__":
    made = Path(sys.argv[1])
    found = die_often(made, int(sys.argv[2]), broken=sys.argv[3] == "broken", seed=int(sys.argv[4]))
    sys.stdout.write(json.dumps(vars(found)) + "\n")
