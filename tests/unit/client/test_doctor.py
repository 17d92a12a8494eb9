"""`concord-node doctor` and `status`: every fault has a finding that says what to do, and none hides another."""

import datetime
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from concord_client.cli import app
from concord_client.daemon_lock import claim_home
from concord_client.doctor import Finding, examine
from concord_client.home import NodeHome
from concord_shared.certificates import read_certificate, root_fingerprint
from concord_shared.errors import NotAllowedError, UnreachableError
from concord_shared.protocol import Trust, Updates

from .rounds_kit import Site, make_site

DAY = datetime.timedelta(days=1)


def certify(site: Site, days: float = 30, membership_days: float = 90) -> None:
    """Root, membership and node certificates in the home; the root is the pinned one."""
    now = datetime.datetime.now(datetime.UTC)
    root_key, membership_key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())

    def certificate(name: str, key: Any, signer: Any, issuer: str, life: float, ca: bool) -> str:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 100 * DAY)
            .not_valid_after(now + life * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), True)
        )
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    site.home.root.write_text(certificate("root", root_key, root_key, "root", 3650, True))
    site.home.membership.write_text(certificate("membership", membership_key, root_key, "root", membership_days, True))
    site.home.certificate.write_text(
        certificate("node", site.home.tls_key(), membership_key, "membership", days, False)
    )
    root = root_fingerprint(read_certificate(site.home.root.read_text()))
    site.home.write_config(site.home.config.model_copy(update={"root": root}))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    certify(made)
    yield made
    made.store.close()


@contextmanager
def answering(shift_s: int, state: str) -> Iterator[Any]:
    class Channel:
        def updates(self, wait_s: int) -> Updates:
            if state == "refused":
                raise NotAllowedError("this node's certificate does not admit it (any more)")
            return Updates(updates=(), cursor=0, state=state, now=int(time.time()))

        def trust(self) -> Trust:
            return Trust(
                federation="test",
                protocols=(1,),
                root_certificate="",
                membership_certificate="",
                superlink="127.0.0.1:2",
                now=int(time.time()) + shift_s,
            )

    yield Channel()


def findings(site: Site, shift_s: int = 0, state: str = "active", **changes: Any) -> dict[str, Finding]:
    given = {"channel": lambda *_: answering(shift_s, state), "with_device": False} | changes
    return {finding.name: finding for finding in examine(site.home, site.store, **given)}


class TestDoctor:
    def test_a_healthy_home(self, site: Site) -> None:
        """But for what is not running in a test: the daemon, and the fleet at a port where nobody is."""
        with claim_home(site.home):
            site.store.set_fact("contact/control", str(int(time.time())))
            found = findings(site)
        wrong = {name: finding for name, finding in found.items() if finding.state != "ok"}
        assert set(wrong) == {"fleet"}, wrong
        assert {"versions", "keys", "certificate", "membership", "proxy", "clock", "policy", "data", "disk"} <= set(
            found
        )

    def test_the_device_is_named(self, site: Site) -> None:
        site.change_policy('device = "auto"', 'device = "cpu"')
        assert findings(site, with_device=True)["device"].said.startswith("cpu")

    @pytest.mark.parametrize(("days", "state"), [(-1, "fail"), (2, "warn"), (20, "ok")])
    def test_the_certificates_life(self, site: Site, days: int, state: str) -> None:
        certify(site, days)
        assert findings(site)["certificate"].state == state

    def test_an_ended_certificate_has_a_way_back(self, site: Site) -> None:
        """A new invitation alone is refused while the node is active."""
        certify(site, -1)
        advice = findings(site)["certificate"].advice
        ways = ("concord node revoke node-1", "concord invite node-1 --organisation hospital-a", "concord-node enrol")
        assert [way for way in ways if way in advice] == list(ways)

    def test_what_it_works_on_is_said(self, site: Site) -> None:
        works = {"run": "run-7", "plan": "digits", "since": 0, "until": 600}
        site.store.set_fact("works", json.dumps(works))
        with claim_home(site.home):
            said = findings(site)["daemon"].said
            assert "works on run run-7 since 1970-01-01 00:00 UTC, until 1970-01-01 00:10 UTC at the latest" in said
            site.store.set_fact("works", "")
            assert "works on" not in findings(site)["daemon"].said

    def test_a_proxy_that_cannot_be_used_is_a_finding(self, site: Site) -> None:
        site.home.write_config(site.home.config.model_copy(update={"proxy": "ftp://me:secret@proxy"}))
        found = findings(site)["fleet"]
        assert found.state == "fail"
        assert "proxy of node.toml cannot be used" in found.said
        assert "secret" not in found.said

    @pytest.mark.parametrize(("days", "state"), [(-1, "fail"), (5, "warn"), (60, "ok")])
    def test_the_memberships_life(self, site: Site, days: int, state: str) -> None:
        certify(site, membership_days=days)
        assert findings(site)["membership"].state == state

    def test_another_root_than_the_pinned_one(self, site: Site) -> None:
        site.home.write_config(site.home.config.model_copy(update={"root": "0" * 64}))
        assert findings(site)["membership"].state == "fail"

    @pytest.mark.parametrize(("shift_s", "state"), [(0, "ok"), (-60, "warn"), (3600, "fail")])
    def test_the_clock(self, site: Site, shift_s: int, state: str) -> None:
        assert findings(site, shift_s)["clock"].state == state

    def test_a_coordinator_that_cannot_be_reached_hides_nothing_else(self, site: Site) -> None:
        def unreachable(*_: Any) -> Any:
            raise UnreachableError("no route")

        found = findings(site, channel=unreachable)
        assert found["coordinator"].state == "fail"
        assert found["coordinator"].advice
        assert {"state", "policy", "data", "disk"} <= set(found)

    @pytest.mark.skipif(os.name != "posix", reason="skipped: needs modes of files")
    def test_a_key_that_others_may_read(self, site: Site) -> None:
        site.home.key_file("identity").chmod(0o644)
        finding = findings(site)["keys"]
        assert finding.state == "fail"
        assert finding.advice.startswith("chmod go=")

    def test_a_key_that_is_gone(self, site: Site) -> None:
        site.home.key_file("flower").unlink()
        assert findings(site)["keys"].said == "missing: flower.key"

    def test_data_that_changed(self, site: Site) -> None:
        site.data.write_bytes(b"x")
        assert findings(site)["data"].state == "fail"

    def test_a_policy_that_cannot_be_read(self, site: Site) -> None:
        site.home.policy_file.write_text("model = 1")
        found = findings(site)
        assert (found["policy"].state, found["approvals"].state) == ("fail", "fail")

    @pytest.mark.parametrize(
        ("state", "finding"), [("active", "ok"), ("enrolled", "warn"), ("suspended", "warn"), ("refused", "fail")]
    )
    def test_the_nodes_state(self, site: Site, state: str, finding: str) -> None:
        found = findings(site, state=state)["state"]
        assert found.state == finding
        assert bool(found.advice) == (finding != "ok")

    def test_what_waits_for_a_person(self, site: Site) -> None:
        ask(site)
        assert findings(site)["approvals"].said == "1 wait for you"

    def test_a_full_disk(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        from collections import namedtuple

        monkeypatch.setattr(
            "concord_client.doctor.shutil.disk_usage", lambda _: namedtuple("Usage", "total used free")(9, 9, 9)
        )
        assert findings(site)["disk"].state == "fail"

    def test_a_proxy_is_named_without_its_password(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.example:3128")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        site.home.write_config(site.home.config.model_copy(update={"url": "https://coordinator.example:8443"}))
        said = findings(site)["proxy"].said
        assert "proxy.example:3128" in said
        assert "secret" not in said

    def test_the_command_fails_where_something_fails(self, site: Site) -> None:
        """Nobody answers at the kit's address."""
        result = CliRunner().invoke(app, ["doctor", "--home", str(site.home.path), "--json"])
        assert result.exit_code == 1
        value = json.loads(result.stdout)
        assert value["worst"] == "fail"
        assert {each["name"] for each in value["findings"]} >= {"coordinator", "fleet", "device"}
        text = CliRunner().invoke(app, ["doctor", "--home", str(site.home.path)])
        assert "fail  coordinator" in text.stdout
        assert "→" in text.stdout


def ask(site: Site) -> None:
    from concord_shared.plan.schema import parse_plan_document

    plan = parse_plan_document(site.plan.document() | {"name": "another"})
    site.store.put("plan", plan.digest, plan.document())
    request = {"study": "digits-2026", "plan_digest": plan.digest, "requested_by": "hospital-b", "received_at": 1}
    site.store.put("request", f"digits-2026/{plan.digest}", request)


class TestStatus:
    def test_it_says_how_the_node_stands_without_asking_anybody(self, site: Site) -> None:
        from concord_client.exposition import Counts
        from concord_client.rounds import Rounds

        from .rounds_kit import Scripted

        ask(site)
        Rounds(site.home, site.store, Scripted(), Counts()).answer(site.message(round_number=2))
        site.store.refuse(time.time(), "roster", "7", "older than \x1b[31m", {})
        result = CliRunner().invoke(app, ["status", "--home", str(site.home.path), "--json"])
        assert result.exit_code == 0, result.output
        value = json.loads(result.stdout)
        assert (value["node"], value["state"], value["daemon"]) == ("node-1", "active", None)
        assert len(value["approvals_waiting"]) == 1
        [run] = value["runs"]
        assert (run["run"], run["answered_round"], run["rounds"]) == ("run-1", 2, 3)
        assert value["refused"][0]["subject"] == "7"
        text = CliRunner().invoke(app, ["status", "--home", str(site.home.path)]).stdout
        assert "not running; start it: concord-node up" in text
        assert "\x1b" not in text

    def test_a_home_that_is_none(self, tmp_path: Path) -> None:
        from concord_shared.errors import ArtefactError

        with pytest.raises(ArtefactError, match="not the home of an enrolled node"):
            CliRunner().invoke(app, ["status", "--home", str(tmp_path)], catch_exceptions=False)


def test_the_homes_config_is_read_again_after_it_was_written(site: Site) -> None:
    assert NodeHome.open(site.home.path).config == site.home.config
