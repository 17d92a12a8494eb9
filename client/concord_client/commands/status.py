"""`concord-node status`: how this node stands, from its own database; asks nobody."""

import json
import time
from typing import TYPE_CHECKING, Any

import typer

from concord_client.commands.common import Home, at_home, day, lines, write
from concord_shared.commands import Json, show
from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_client.home import NodeHome
    from concord_client.store import NodeStore

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("status", epilog="**Example**\n\n`concord-node status --json`")(status)


def status(home: Home = None, as_json: Json = False) -> None:
    """Show state, last contact, runs, what waits for you, and what arrived and was not believed."""
    with at_home(home) as (opened, store):
        show(_status(opened, store), as_json, _show)


def _status(home: "NodeHome", store: "NodeStore") -> dict[str, Any]:
    from concord_client.approvals import questions
    from concord_client.daemon_lock import running_daemon
    from concord_client.enrolment import certificate_ends
    from concord_client.evidence import alarms, remembered_head
    from concord_client.policy import Policy

    now, config, held = time.time(), home.config, remembered_head(store)
    waiting = [
        question.id
        for question in questions(home, store, Policy.load(home.policy_file), now)
        if question.state in ("pending", "expired")
    ]
    return {
        "federation": config.federation,
        "organisation": config.organisation,
        "node": config.node,
        "coordinator": config.url,
        "state": store.fact("state") or "unknown",
        "daemon": running_daemon(home),
        "since": (json.loads(store.fact("daemon") or "{}")).get("since"),
        "works": json.loads(store.fact("works") or "null"),
        "last_contact": {name: _number(store.fact(f"contact/{name}")) for name in ("control", "rounds")},
        "certificate_until": int(certificate_ends(home).timestamp()),
        "datasets": [dataset.name for dataset in store.datasets()],
        "approvals_waiting": waiting,
        "to_be_sent": len(store.outbox()),
        "log": {"entries": store.log_size(), "coordinator": held.mark if held else None},
        "alarms": [{"whose": each.whose, "at": each.at, "reason": each.reason} for each in alarms(store)],
        "receipts": len(store.receipts()),
        "runs": _runs(store),
        "refused": [
            {"at": each.at, "kind": each.kind, "subject": each.subject, "reason": each.reason}
            for each in store.refused()
        ],
    }


def _runs(store: "NodeStore") -> list[dict[str, Any]]:
    """Newest first."""
    found = []
    for stored in store.all("manifest"):
        manifest, said = store.manifest(stored.id), store.get("run", stored.id)
        assert manifest is not None
        plan = store.plan(manifest.plan_digest)
        answered = json.loads(store.fact(f"answered/{manifest.run}") or "null")
        found.append(
            {
                "run": manifest.run,
                "study": manifest.study,
                "plan": plan.name if plan else manifest.plan_digest[:12],
                "rounds": plan.rounds.count if plan else None,
                "answered_round": answered[1][0] if answered else 0,
                "state": said.body["state"] if said else "unknown",
                "reason": said.body["reason"] if said else "",
                "started_after": manifest.not_before,
            }
        )
    return sorted(found, key=lambda run: (-run["started_after"], run["run"]))


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _show(value: dict[str, Any]) -> None:
    daemon = f"running, process {value['daemon']}" if value["daemon"] else "not running; start it: concord-node up"
    contact = value["last_contact"]
    lines(
        [
            ("node", f"{value['organisation']}/{value['node']} of {value['federation']}"),
            ("coordinator", value["coordinator"]),
            ("state", value["state"]),
            ("daemon", daemon),
            (
                "works on",
                f"run {value['works']['run']} since {day(value['works']['since'])}" if value["works"] else "nothing",
            ),
            ("last contact", _when(contact["control"])),
            ("listened for rounds", _when(contact["rounds"])),
            ("certificate until", day(value["certificate_until"])),
            ("datasets", ", ".join(value["datasets"]) or "none"),
            ("waits for you", ", ".join(value["approvals_waiting"]) or "nothing"),
            ("waits to be sent", value["to_be_sent"]),
            ("audit log", f"{value['log']['entries']} entries, {value['receipts']} receipts"),
        ]
    )
    for alarm in value["alarms"]:
        write("", printable(f"ALARM since {day(alarm['at'])}: {alarm['reason']}; see: concord-node doctor"))
    if value["runs"]:
        write("", "runs:")
        head = ("run", "study", "plan", "round", "state", "reason")
        rows = [
            (
                run["run"],
                run["study"],
                run["plan"],
                f"{run['answered_round']} of {run['rounds'] or '?'}",
                run["state"],
                run["reason"],
            )
            for run in value["runs"]
        ]
        lines([head, *rows])
    if value["refused"]:
        write("", "arrived and was not believed:")
        write(
            *(
                printable(f"  {day(each['at'])}  {each['kind']} {each['subject']}: {each['reason']}")
                for each in value["refused"]
            )
        )


def _when(at: int | None) -> str:
    return "never" if at is None else day(at)
