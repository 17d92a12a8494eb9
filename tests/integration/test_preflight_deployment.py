"""A preflight between processes over TLS: the command, real nodes, and nothing of the data in what they left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from preflights import TABLE_PLAN, good_table, statuses

from concord_local.deployment import Deployment
from concord_server.client import Profile
from concord_server.client_nouns import create_study, offer_agreement, request_agreement

CANARY = b"CANARY8675309"
NODES = ("ward-a", "ward-b")


@pytest.mark.slow
def test_the_matrix_between_processes(tmp_path: Path) -> None:
    tables = {"ward-a": good_table(), "ward-b": good_table().replace(b"yes", CANARY).replace(b"age", b"alter")}
    (tmp_path / "plan.toml").write_text(TABLE_PLAN, "utf-8")
    with Deployment(tmp_path / "fed", "hearts") as running:
        lab = running.add_organisation("lab")
        for name in NODES:
            owner = running.add_organisation(f"{name}-org")
            partner = running.enrol(name, owner)
            table = tmp_path / f"{name}.csv"
            table.write_bytes(tables[name])
            partner.run("data", "add", "patients", f"csv:{table}", "--publish")
            running.start_node(partner)
        create_study(lab.api, lab.key, "heart", title="Heart", purpose="Who is at risk?")
        for name in NODES:
            asked = request_agreement(lab.api, lab.key, "heart", (f"{name}/patients",), terms={})
            owner = running.organisations[f"{name}-org"]
            offer_agreement(owner.api, owner.key, asked["agreement"])
        profile = tmp_path / "profile.json"
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("CONCORD_PROFILE", str(profile))
            token = lab.api._http.headers["Authorization"].partition(" ")[2]
            Profile(running.url, token, running.root_pem).write()

        def preflight(*options: str) -> "subprocess.CompletedProcess[str]":
            command = ["study", "preflight", "heart", "--plan", str(tmp_path / "plan.toml"), "--key", str(lab.key_file)]
            return subprocess.run(
                [sys.executable, "-m", "concord_local", *command, *options],
                env={**os.environ, "CONCORD_PROFILE": str(profile)},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )

        first = preflight("--json")
        assert first.returncode == 1, first.stderr
        found = json.loads(first.stdout)
        assert found["answered"]
        assert statuses(found, "ward-a")["round"] == "ok"
        assert statuses(found, "ward-a")["approval"] == "unknown"
        assert statuses(found, "ward-b")["contract"] == "no"
        (mismatch,) = [each["differences"] for each in found["nodes"] if each["node"] == "ward-b"]
        assert mismatch == [
            "column age: missing",
            "target ill: about 40 rows have a category or class that the contract does not list",
        ]
        partner = running.partners["ward-a"]
        partner.run("approvals", "approve", partner.run("approvals", "list")["requests"][0]["id"], "--yes")
        second = preflight("--nodes", "ward-a")
        assert second.returncode == 0, second.stdout + second.stderr
        assert "go" in second.stdout.splitlines()[-1]
        sent = [each["kind"] for each in partner.run("egress")["egress"]]
        assert sent.count("preflight") == 2
    left = [path for path in (tmp_path / "fed").rglob("*") if path.is_file()]
    assert any(path.name == "up.log" for path in left)
    assert any(path.name == "coordinator.log" for path in left)
    holding = {path.name for path in left if CANARY in path.read_bytes()}
    assert holding == {"patients.toml"}, "the schema that `data add` wrote for its owner to correct, and nothing else"
    assert CANARY.decode() not in first.stdout + first.stderr
