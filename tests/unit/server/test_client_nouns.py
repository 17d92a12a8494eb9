"""What people sign: nothing but what they were shown, whatever the coordinator answers. No sockets."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from concord_server import client_nouns as nouns
from concord_server.client import Coordinator
from concord_server.commands import agreements, output
from concord_shared.documents import Agreement, Study, Terms
from concord_shared.errors import ConcordError, ConflictError, DocumentRefusedError, UsageError
from concord_shared.signing import (
    Envelope,
    PrivateKey,
    fingerprint,
    new_identity_key,
    public_text,
    seal,
    write_private_key,
)

STUDY = Study(
    study="heart", title="Heart", purpose="Who is at risk?", organisation="uni", members=("hospital-a",), issued_at=1
)
OTHER_STUDY = STUDY.model_copy(update={"purpose": "To sell hearts"})
ASKED = Agreement(
    agreement="heart-a",
    study="heart",
    study_digest=STUDY.digest,
    requester="uni",
    owner="hospital-a",
    datasets=("ward-a/patients",),
    terms=Terms(not_after=1 << 32),
    issued_at=1,
)
LOOSER = ASKED.model_copy(update={"terms": Terms(not_after=1 << 33, use="anything")})


@dataclass
class Hostile:
    """A coordinator that answers whatever a test wants, and keeps what it got signed."""

    keys: dict[str, PrivateKey] = field(
        default_factory=lambda: {name: new_identity_key() for name in ("uni", "hospital-a", "evil")}
    )
    state: str = "requested"
    study: Envelope = field(init=False)
    agreement: Envelope = field(init=False)
    signed: list[Agreement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.study, self.agreement = self.by("uni", STUDY), self.by("uni", ASKED)

    def by(self, organisation: str, document: Any) -> Envelope:
        return seal(document, self.keys[organisation])

    @property
    def api(self) -> Coordinator:
        return Coordinator("https://c", "token", transport=httpx.MockTransport(self._answer))

    def offer(self, **options: Any) -> Any:
        return nouns.offer_agreement(self.api, self.keys["hospital-a"], "heart-a", **options)

    def agree(self, **options: Any) -> Any:
        return nouns.agree(self.api, self.keys["uni"], "heart-a", **options)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        noun, name = request.url.path.split("/")[3:5]
        if request.method == "POST":
            self.agreement = Envelope.model_validate_json(request.content)
            self.signed.append(Agreement.from_canonical(self.agreement.bytes))
            self.state = "agreed"
        if noun == "organisations":
            return httpx.Response(200, json={"key": public_text(self.keys[name].public_key())})
        if noun == "studies":
            return httpx.Response(200, json={"document": self.study.model_dump(mode="json"), "digest": STUDY.digest})
        lies = ASKED.model_dump(mode="json") | {"state": self.state, "digest": ASKED.digest}
        return httpx.Response(200, json=lies | {"document": self.agreement.model_dump(mode="json")})


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hostile:
    made = Hostile()
    monkeypatch.setenv("CONCORD_PROFILE", str(tmp_path / "profile.json"))
    monkeypatch.setattr(agreements, "coordinator", lambda: made.api)
    return made


def test_the_owner_signs_the_very_bytes_that_were_requested(hostile: Hostile) -> None:
    hostile.offer(digest=ASKED.digest)
    assert hostile.signed == [ASKED]


def test_offer_refuses_terms_that_the_requester_did_not_sign(hostile: Hostile) -> None:
    hostile.agreement = hostile.by("evil", LOOSER)
    with pytest.raises(DocumentRefusedError, match="lacks the signature of uni"):
        hostile.offer()
    assert hostile.signed == []


def test_offer_refuses_another_agreement_under_the_id(hostile: Hostile) -> None:
    hostile.agreement = hostile.by("uni", ASKED.model_copy(update={"agreement": "heart-b"}))
    with pytest.raises(DocumentRefusedError, match="heart-b in the place of heart-a"):
        hostile.offer()
    assert hostile.signed == []


def test_offer_refuses_what_was_not_seen(hostile: Hostile) -> None:
    """The requester signed both; a person has seen the stricter one."""
    hostile.agreement = hostile.by("uni", LOOSER)
    with pytest.raises(ConflictError, match="changed since it was shown"):
        hostile.offer(digest=ASKED.digest)
    assert hostile.signed == []


def test_offer_refuses_a_study_with_another_purpose(hostile: Hostile) -> None:
    hostile.study = hostile.by("uni", OTHER_STUDY)
    with pytest.raises(DocumentRefusedError, match="not about the study"):
        hostile.offer()
    hostile.study = hostile.by("evil", STUDY)
    with pytest.raises(DocumentRefusedError, match="lacks the signature of uni"):
        hostile.offer()
    assert hostile.signed == []


def test_agree_refuses_an_offer_that_the_owner_did_not_sign(hostile: Hostile) -> None:
    hostile.agreement = hostile.by("evil", LOOSER)
    with pytest.raises(DocumentRefusedError, match="lacks the signature of hospital-a"):
        hostile.agree()
    hostile.agreement = hostile.by("hospital-a", LOOSER)
    hostile.agree()
    assert hostile.signed == [LOOSER]


def test_an_owner_may_change_its_own_offer(hostile: Hostile) -> None:
    hostile.agreement = hostile.by("hospital-a", LOOSER)
    hostile.offer(terms={"rounds_max": 5})
    assert hostile.signed[0].terms.rounds_max == 5


def test_a_request_is_about_the_study_as_its_organisation_signed_it(hostile: Hostile) -> None:
    """The coordinator says the digest of a study; the one of its bytes is signed."""
    hostile.study = hostile.by("evil", OTHER_STUDY)
    with pytest.raises(DocumentRefusedError, match="lacks the signature of uni"):
        nouns._study(hostile.api, "heart")
    hostile.study = hostile.by("uni", OTHER_STUDY)
    assert nouns._study(hostile.api, "heart").digest == OTHER_STUDY.digest


# The commands


def run(hostile: Hostile, tmp_path: Path, *arguments: str, answer: str | None = None) -> Any:
    """answer: what a person types; None where nobody is there."""
    key = tmp_path / "organisation.key"
    if not key.exists():
        write_private_key(key, hostile.keys["hospital-a"])
    app = typer.Typer()
    agreements.register(app)
    signing = ["--key", str(key)] if arguments[0] == "offer" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreements, "_somebody_is_there", lambda: answer is not None)
        return CliRunner().invoke(app, ["agreement", *arguments, *signing], input=answer)


def test_offer_signs_without_a_terminal_what_was_shown_and_nothing_else(hostile: Hostile, tmp_path: Path) -> None:
    blind = run(hostile, tmp_path, "offer", "heart-a")
    assert isinstance(blind.exception, UsageError)
    assert "concord agreement show heart-a" in str(blind.exception)
    assert run(hostile, tmp_path, "show", "heart-a").exit_code == 0
    shown, hostile.agreement = hostile.agreement, hostile.by("uni", LOOSER)
    assert isinstance(run(hostile, tmp_path, "offer", "heart-a").exception, UsageError)
    assert hostile.signed == []
    hostile.agreement = shown
    assert run(hostile, tmp_path, "offer", "heart-a").exit_code == 0
    assert hostile.signed == [ASKED]


def test_offer_shows_and_asks_at_a_terminal(hostile: Hostile, tmp_path: Path) -> None:
    refused = run(hostile, tmp_path, "offer", "heart-a", answer="n\n")
    assert isinstance(refused.exception, ConflictError)
    assert hostile.signed == []
    done = run(hostile, tmp_path, "offer", "heart-a", answer="y\n")
    assert done.exit_code == 0, done.exception
    for told in ("ward-a/patients", "Who is at risk?", ASKED.digest, fingerprint(hostile.keys["uni"].public_key())[:4]):
        assert told in done.stderr
    assert hostile.signed == [ASKED]


def test_scripts_say_what_they_sign(hostile: Hostile, tmp_path: Path) -> None:
    wrong = run(hostile, tmp_path, "offer", "heart-a", "--digest", LOOSER.digest)
    assert isinstance(wrong.exception, ConflictError)
    assert run(hostile, tmp_path, "offer", "heart-a", "--digest", ASKED.digest, "--json").exit_code == 0
    hostile.state, hostile.agreement = "requested", hostile.by("uni", ASKED)
    done = run(hostile, tmp_path, "offer", "heart-a", "--yes", "--json")
    assert json.loads(done.stdout)["digest"] == ASKED.digest
    assert hostile.signed == [ASKED, ASKED]


def test_show_says_what_the_bytes_say_and_not_what_the_coordinator_says(hostile: Hostile, tmp_path: Path) -> None:
    hostile.agreement = hostile.by("evil", LOOSER)
    done = run(hostile, tmp_path, "show", "heart-a")
    assert "anything" in done.stdout
    assert LOOSER.digest in done.stdout
    assert ASKED.digest not in done.stdout
    assert "nobody" in done.stdout


def test_terms_cannot_steer_a_terminal(hostile: Hostile, tmp_path: Path) -> None:
    sly = ASKED.model_copy(update={"terms": Terms(not_after=1 << 32, use="sell all\x1b[2K\x1b[1A\x9b2Kharmless")})
    hostile.agreement = hostile.by("uni", sly)
    done = run(hostile, tmp_path, "show", "heart-a")
    assert "sell all" in done.stdout
    assert not {"\x1b", "\x9b"} & set(done.stdout)


def test_tables_and_records_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_items([{"reason": "no\x1b[2K\nyes"}], ("reason",), as_json=False)
    output.show_record({"reason": "no\x1b[2K", "fingerprint\x1b": "x"}, as_json=False)
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert len(told.splitlines()) == 4


@pytest.mark.parametrize("document", [None, {}, {"payload_type": "x", "payload": "%", "signatures": []}])
def test_what_is_no_document_is_one_clear_error(hostile: Hostile, document: Any) -> None:
    with pytest.raises(ConcordError):
        nouns.told({"agreement": "heart-a", "document": document})
