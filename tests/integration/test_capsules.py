"""The capsule of a run: it verifies from the root's fingerprint alone, and nothing in it can be another."""

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from capsules import capsule_of, finished_run, sent_of_round
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from worlds import OWNERS, World, small_plan

from concord_client.cli import app as node_app
from concord_local.cli import app
from concord_server.evidence import export_run
from concord_shared.errors import ArtefactError, ConcordError, DocumentRefusedError
from concord_shared.evidence.capsule import INDEX, MEMBERS, MODEL, CapsuleIndex, open_capsule, write_capsule
from concord_shared.evidence.receipts import Receipt
from concord_shared.evidence.verify import verify_capsule
from concord_shared.files import file_digest
from concord_shared.signing import Envelope, new_identity_key, seal
from concord_shared.tensors import read_safetensors, write_safetensors

PLAN, PRIVATE = small_plan(), small_plan("privacy.mode=private", "seed=3")
ROBUST = small_plan("privacy={mode='robust', attackers=1, quarantine_after=1}", "seed=4")
Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("capsules") / "c")
    made.ready()
    finished_run(made, PLAN, "plain")
    finished_run(made, PRIVATE, "private", released=False)
    finished_run(made, ROBUST, "robust", released=False, lifting="ward-b")
    made.start(small_plan("seed=5"), run="waiting")
    yield made
    made.close()


@pytest.fixture(scope="module")
def root(world: World) -> str:
    return str(world.coordinator.made.root_fingerprint)


@pytest.fixture(scope="module")
def capsule(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capsule_of(world, "plain", tmp_path_factory.mktemp("plain") / "plain.capsule")


@pytest.fixture(scope="module")
def private(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capsule_of(world, "private", tmp_path_factory.mktemp("private") / "private.capsule")


@pytest.fixture(scope="module")
def lifted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capsule_of(world, "robust", tmp_path_factory.mktemp("robust") / "robust.capsule")


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def resealed(
    world: World, path: Path, to: Path, changes: dict[str, bytes | None], key: Any = None, **index: Any
) -> Path:
    """As a coordinator would make it that lies: other members, and an index of them that it signs."""
    members: dict[str, bytes | None] = {**members_of(path), **changes}
    envelope = Envelope.model_validate_json(members.pop(INDEX) or b"")
    document = CapsuleIndex.from_canonical(envelope.bytes).model_copy(update=index)
    signer = key or world.coordinator.app.state.concord.signer
    write_capsule(to, document, {name: content for name, content in members.items() if content is not None}, signer)
    return to


def changed(path: Path, member: str, change: Change) -> dict[str, bytes | None]:
    found = json.loads(members_of(path)[member])
    replaced = change(found)
    return {member: json.dumps(found if replaced is None else replaced).encode()}


def test_a_capsule_is_verified_from_the_root_alone(capsule: Path, root: str) -> None:
    found = verify_capsule(capsule, root)
    assert (found["run"], found["state"], found["steps"], found["updates"]) == ("plain", "succeeded", 3, 9)
    assert found["nodes"] == sorted(OWNERS)
    assert (found["approvals"], found["released"]) == (3, True)
    assert found["metrics"] == {"accuracy": 0.5}


def test_a_run_whose_quarantine_was_lifted_has_a_capsule(lifted: Path, world: World, root: str, tmp_path: Path) -> None:
    """A person's word is in rounds.json and in the log, and is no step."""
    found = verify_capsule(lifted, root)
    assert (found["privacy_mode"], found["steps"], found["updates"]) == ("robust", 3, 9)
    for change in (
        lambda found: found.pop(next(n for n, each in enumerate(found) if each["kind"] == "lift")) and None,
        lambda found: next(each for each in found if each["kind"] == "lift").update(lifted={"ward-a": "eve"}),
    ):
        other = resealed(world, lifted, tmp_path / "x", changed(lifted, "rounds.json", change))
        with pytest.raises(DocumentRefusedError, match=r"audit.json: the log tells of other nodes .* quarantine"):
            verify_capsule(other, root)


@pytest.mark.parametrize("charged", [True, False])
def test_noised_training_that_no_budget_was_charged_for_does_not_pass(
    world: World, root: str, tmp_path: Path, charged: bool
) -> None:
    plan = small_plan(
        "privacy={mode='plain', dp={unit='record', epsilon=3.0, delta=1e-5, clip=1.0}}", f"seed={7 + charged}"
    )
    finished_run(world, plan, f"noised-{charged}".lower(), charged=charged)
    capsule = capsule_of(world, f"noised-{charged}".lower(), tmp_path / "capsule.zip")
    shown = world.people["lab"].get(f"/api/v1/plans/{plan.digest}").json()
    assert (shown["guarantee"]["unit"], shown["guarantee"]["epsilon"]) == ("record", 3.0)
    if charged:
        assert verify_capsule(capsule, root)
        return
    with pytest.raises(DocumentRefusedError, match="charged no budget"):
        verify_capsule(capsule, root)


def test_its_card_says_of_which_model_the_figures_are(world: World, capsule: Path, tmp_path: Path) -> None:
    finished_run(world, small_plan("strategy.name=ditto", "seed=9"), "ditto", released=False)
    card = members_of(capsule_of(world, "ditto", tmp_path / "ditto.capsule"))["model-card.md"].decode()
    assert "figure of each node's own model on its test rows" in card
    assert "`model.safetensors` holds the shared part alone" in card
    assert "own model" not in members_of(capsule)["model-card.md"].decode()


def without_round(capsule: Path, number: int) -> dict[str, bytes | None]:
    """All that tells of a round of training, taken out of every member: the log's other entries are in it still."""
    members = members_of(capsule)
    rounds, updates, audit = (json.loads(members[f"{name}.json"]) for name in ("rounds", "updates", "audit"))

    def of_round(found: dict[str, Any]) -> bool:
        return (found.get("kind"), found.get("round", found.get("round_number"))) == ("train", number)

    def signed(each: Any) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(Envelope.model_validate_json(json.dumps(each["receipt"])).bytes)
        return told

    kept = {
        "rounds.json": [each for each in rounds if not of_round(each)],
        "updates.json": [each for each in updates if not of_round(signed(each))],
        "audit.json": audit
        | {"entries": [each for each in audit["entries"] if not of_round(json.loads(each["body"])["detail"])]},
    }
    return {name: json.dumps(content).encode() for name, content in kept.items()}


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_that_is_left_out_of_everything_is_missed(
    world: World, capsule: Path, root: str, tmp_path: Path, number: int
) -> None:
    with pytest.raises(DocumentRefusedError, match=r"rounds.json: .*(in the place of|asked about another model)"):
        verify_capsule(resealed(world, capsule, tmp_path / "x", without_round(capsule, number)), root)


def test_updates_to_different_models_are_no_round(world: World, capsule: Path, root: str, tmp_path: Path) -> None:
    """One ward signed for another model than the others of its step; the coordinator's receipt fits its word."""

    def other(found: Any) -> None:
        receipt = Receipt.from_canonical(Envelope.model_validate_json(json.dumps(found[0]["receipt"])).bytes)
        sent = sent_of_round(world, "plain", PLAN, "train", 1, "0" * 64)[receipt.node]
        given = receipt.model_copy(update={"sent": sent.digest})
        envelope = seal(given, world.coordinator.app.state.concord.signer).model_dump(mode="json")
        found[0] = {"receipt": envelope, "statement": sent.statement.decode(), "signature": sent.signature.hex()}

    with pytest.raises(DocumentRefusedError, match=r"updates.json: .*another attempt, or about another model"):
        verify_capsule(resealed(world, capsule, tmp_path / "x", changed(capsule, "updates.json", other)), root)


def test_the_commands_verify_it_anywhere(capsule: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PROFILE", "/nowhere/profile.json")
    for each in (app, node_app):
        result = CliRunner().invoke(each, ["verify", str(capsule), "--root", root, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["verified"] is True
    shown = CliRunner().invoke(app, ["verify", str(capsule), "--root", root.upper()])
    assert "each with its node's signature" in shown.output
    refused = CliRunner().invoke(app, ["verify", str(capsule), "--root", "0" * 64], standalone_mode=False)
    assert isinstance(refused.exception, DocumentRefusedError)
    assert "root key" in str(refused.exception)


def test_the_same_members_make_the_same_bytes(world: World, capsule: Path, tmp_path: Path) -> None:
    again = resealed(world, capsule, tmp_path / "again", {})
    assert file_digest(again) == file_digest(capsule)


def test_export_verifies_before_it_keeps_anything(world: World, root: str, tmp_path: Path) -> None:
    api = world.api("lab")
    api.root_pem = world.coordinator.authority.root_pem
    assert export_run(api, "plain", tmp_path / "plain.capsule")["run"] == "plain"
    assert [each.name for each in tmp_path.iterdir()] == ["plain.capsule"]
    download = api.download

    def other(path: str, to: Path, **query: Any) -> Path:
        return download(path.replace("plain", "private"), to, **query)

    api.download = other  # type: ignore[method-assign]
    with pytest.raises(DocumentRefusedError, match="in the place of plain"):
        export_run(api, "plain", tmp_path / "other.capsule")
    assert not (tmp_path / "other.capsule").exists()
    assert not [each for each in world.coordinator.home.runs.iterdir() if each.name.endswith(".capsule")]


def test_a_private_run_reveals_no_figure_of_a_node(private: Path, root: str) -> None:
    found = verify_capsule(private, root)
    assert (found["privacy_mode"], found["approvals"], found["updates"]) == ("private", 3, 9)
    members = members_of(private)
    assert all(set(each) == {"node", "digest"} for each in json.loads(members["approvals.json"]))
    everything = b"".join(content for name, content in members.items() if name != MODEL)
    assert b'"rows"' not in everything.replace(b'"rows":null', b"")
    assert b"evaluation_rows" not in everything


@pytest.mark.parametrize(
    ("member", "change", "why"),
    [
        ("rounds.json", lambda found: found[0].update(per_node={"ward-a": {"accuracy": 1}}), "single node"),
        ("rounds.json", lambda found: found[1].update(notes={"ward-a": {"rows": 7}}), "single node"),
        ("metrics.json", lambda found: found.update(per_node={"ward-a": {"accuracy": 1}}), "single node"),
        ("metrics.json", lambda found: found.update(worst_node={"node": "ward-a"}), "single node"),
        ("approvals.json", lambda found: found[0].update(rows=7), "by their digest only"),
    ],
)
def test_a_private_run_that_tells_of_a_node_is_refused(
    world: World, private: Path, root: str, tmp_path: Path, member: str, change: Change, why: str
) -> None:
    with pytest.raises(DocumentRefusedError, match=why):
        verify_capsule(resealed(world, private, tmp_path / "x", changed(private, member, change)), root)


def statement_of(found: Any, old: str, new: str) -> None:
    assert old in found[0]["statement"]
    found[0]["statement"] = found[0]["statement"].replace(old, new)


def signature_of(found: Any) -> None:
    found[0]["signature"] = found[1]["signature"]


LIES: list[tuple[str, Change, str]] = [
    ("manifest.json", lambda found: found.update(signatures=[]), r"manifest.json: .*lacks the signature"),
    ("manifest.json", lambda found: [], r"manifest.json: not as"),
    ("plan.json", lambda found: found.update(seed=77), r"plan.json: it is plan"),
    ("plan.json", lambda found: found.update(no_such=1), r"plan.json: not"),
    ("approvals.json", lambda found: found[0].update(signatures=[]), r"approvals.json: .*lacks the signature"),
    ("approvals.json", lambda found: found.pop() and None, r"approvals.json: .*without its own approval"),
    ("approvals.json", lambda found: found.append(found[0]), r"approvals.json: .* twice"),
    ("rounds.json", lambda found: found[0]["survivors"].pop() and None, r"rounds.json: train round 1 names"),
    ("rounds.json", lambda found: found[0].update(model_digest="0" * 64), r"rounds.json: .*another model"),
    ("rounds.json", lambda found: found.pop() and None, r"audit.json: the log tells of 3 steps"),
    ("rounds.json", lambda found: found[2].update(kind="train", round=1), r"rounds.json|audit.json"),
    ("rounds.json", lambda found: found[0].update(aborted="quorum"), r"audit.json: the log tells another step"),
    ("updates.json", lambda found: found.pop() and None, r"rounds.json: evaluate round 2 names"),
    ("updates.json", lambda found: found.append(found[0]), r"counted twice"),
    ("updates.json", lambda found: statement_of(found, "ward-", "ward+"), r"something else than the node signed"),
    ("updates.json", signature_of, r"signature of a reply's statement is wrong"),
    ("updates.json", lambda found: found[0]["receipt"].update(signatures=[]), r"lacks the signature"),
    ("updates.json", lambda found: found[0].update(signature="zz"), r"updates.json: not as"),
    ("audit.json", lambda found: found["entries"].pop() and None, r"did not|does not tell|tells of"),
    ("audit.json", lambda found: found["entries"].reverse(), r"out of order"),
    ("audit.json", lambda found: found["entries"].append(found["entries"][0]), r"out of order, or there twice"),
    ("audit.json", lambda found: found["entries"][0].update(before="0" * 64), r"is not in the log"),
    ("audit.json", lambda found: found["entries"][0]["proof"].pop() and None, r"audit.json"),
    ("audit.json", lambda found: found["head"].update(signatures=[]), r"lacks the signature"),
    ("metrics.json", lambda found: found.update(run="another"), r"metrics.json: figures of another run"),
    ("metrics.json", lambda found: found.update(model_digest="0" * 64), r"figures are of another model"),
    ("release.json", lambda found: found.update(signatures=[]), r"release.json: .*lacks the signature"),
    ("keys.json", lambda found: found["roster"].update(signatures=[]), r"keys.json: .*lacks the signature"),
    ("keys.json", lambda found: found.pop("roster") and None, r"keys.json: not as"),
]


@pytest.mark.parametrize(("member", "change", "why"), LIES)
def test_a_coordinator_that_lies_in_a_capsule_is_named(
    world: World, capsule: Path, root: str, tmp_path: Path, member: str, change: Change, why: str
) -> None:
    """The index is signed anew: what refuses is what others signed, and the log."""
    with pytest.raises(DocumentRefusedError, match=why):
        verify_capsule(resealed(world, capsule, tmp_path / "x", changed(capsule, member, change)), root)


def test_an_index_of_another_signer_run_or_federation_is_refused(
    world: World, capsule: Path, root: str, tmp_path: Path
) -> None:
    for options, why in (
        ({"key": new_identity_key()}, "index.json: .*lacks the signature"),
        ({"run": "another"}, "manifest.json: it is of another run"),
        ({"federation": "others"}, "index.json: of federation others"),
        ({"state": "failed"}, "audit.json: the log does not tell that the run ended as failed"),
    ):
        with pytest.raises(DocumentRefusedError, match=why):
            verify_capsule(resealed(world, capsule, tmp_path / "x", {}, **options), root)


def test_updates_of_another_run_do_not_pass(
    world: World, capsule: Path, private: Path, root: str, tmp_path: Path
) -> None:
    foreign: dict[str, bytes | None] = {"updates.json": members_of(private)["updates.json"]}
    with pytest.raises(DocumentRefusedError, match="another run, plan, manifest"):
        verify_capsule(resealed(world, capsule, tmp_path / "x", foreign), root)


def test_another_model_does_not_pass(world: World, capsule: Path, root: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(members_of(capsule)[MODEL])
    tensors, metadata = read_safetensors(path)
    for change, why in ((1.0, "not those of the released model"), (float("nan"), "NaN or Inf")):
        other = {name: tensor + tensor.dtype.type(change) for name, tensor in tensors.items()}
        write_safetensors(path, other, metadata)
        with pytest.raises(DocumentRefusedError, match=f"{MODEL}: .*{why}"):
            verify_capsule(resealed(world, capsule, tmp_path / "x", {MODEL: path.read_bytes()}), root)
    write_safetensors(path, tensors, metadata | {"note": "another file with the same tensors"})
    with pytest.raises(DocumentRefusedError, match=r"release.json: the released file is another one"):
        verify_capsule(resealed(world, capsule, tmp_path / "x", {MODEL: path.read_bytes()}), root)


@pytest.mark.parametrize("member", [name for name in MEMBERS[1:] if name != "guarantee.json"])
def test_a_member_that_was_altered_under_the_index_is_named(
    capsule: Path, root: str, tmp_path: Path, member: str
) -> None:
    content = bytearray(capsule.read_bytes())
    with zipfile.ZipFile(capsule) as archive:
        info = archive.getinfo(member)
    start = info.header_offset + 30 + len(member)
    content[start + info.file_size // 2] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DocumentRefusedError, match=member):
        verify_capsule(tmp_path / "x", root)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_passes_for_another_content(
    capsule: Path, root: str, tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever byte is another: it is refused by name, or what is shown is what was written."""
    content = bytearray(capsule.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "x").write_bytes(content)
    try:
        found = verify_capsule(tmp_path / "x", root)
    except (DocumentRefusedError, ArtefactError):
        return
    assert found == verify_capsule(capsule, root)
    assert members_of(tmp_path / "x") == members_of(capsule)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_no_capsule(capsule: Path, root: str, tmp_path: Path, garbage: bytes, behind: bool) -> None:
    content = capsule.read_bytes()
    for each in (garbage, *([garbage + content, content + garbage] if garbage else ())):
        (tmp_path / "x").write_bytes(each)
        with pytest.raises(DocumentRefusedError):
            verify_capsule(tmp_path / "x", root)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([name for name in MEMBERS[1:] if name.endswith(".json") and name != "guarantee.json"]), st.data()
)
def test_other_json_in_a_member_is_refused_by_name(
    world: World, capsule: Path, root: str, tmp_path: Path, member: str, data: st.DataObject
) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    other = resealed(world, capsule, tmp_path / "x", {member: json.dumps(data.draw(values)).encode()})
    if member in ("environment.json", "metrics.json"):  # told by the coordinator alone: any record will do
        try:
            verify_capsule(other, root)
        except DocumentRefusedError:
            return
        return
    with pytest.raises(DocumentRefusedError):
        verify_capsule(other, root)


def _zip(path: Path, write: Callable[[zipfile.ZipFile], None]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        write(archive)
    return path


def test_hostile_archives_are_refused(capsule: Path, root: str, tmp_path: Path) -> None:
    members = members_of(capsule)

    def archive(extra: str = "", compress: int = zipfile.ZIP_STORED, twice: bool = False) -> Callable[[Any], None]:
        def write(target: zipfile.ZipFile) -> None:
            for name, content in members.items():
                target.writestr(zipfile.ZipInfo(name), content, compress)
            if extra:
                target.writestr(extra, b"x")
            if twice:
                with pytest.warns(UserWarning, match="Duplicate"):
                    target.writestr("plan.json", b"{}")

        return write

    for write, why in (
        (archive("../outside"), "members"),
        (archive("/etc/passwd"), "members"),
        (archive("PLAN.JSON"), "members"),
        (archive(twice=True), "members|too large"),
        (archive(compress=zipfile.ZIP_DEFLATED), "compressed"),
        (archive(), "not stored as a capsule"),
        (lambda target: [target.writestr(f"{n}", b"") for n in range(100)], "directory is too large"),
        (lambda target: None, "members"),
    ):
        with pytest.raises(DocumentRefusedError, match=why):
            open_capsule(_zip(tmp_path / "x", write))
    with pytest.raises(ArtefactError):
        verify_capsule(tmp_path / "missing", root)


@pytest.mark.parametrize("place", [0, 1, 2, len(MEMBERS)])
def test_nothing_hides_between_the_members(capsule: Path, root: str, tmp_path: Path, place: int) -> None:
    """Bytes that no index names, before a member or the directory, whose offsets are moved to fit."""
    content, hidden = bytearray(capsule.read_bytes()), b"rows of patients"
    with zipfile.ZipFile(capsule) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    offsets = [info.header_offset for info in infos] + [directory]
    at = offsets[min(place, len(infos))]
    content[-6:-2] = struct.pack("<L", directory + len(hidden))
    entry = directory
    for info in infos:
        if info.header_offset >= at:
            content[entry + 42 : entry + 46] = struct.pack("<L", info.header_offset + len(hidden))
        entry += 46 + len(info.filename)
    (tmp_path / "x").write_bytes(bytes(content[:at]) + hidden + bytes(content[at:]))
    assert members_of(tmp_path / "x") == members_of(capsule), "to any other reader it is the same"
    with pytest.raises(DocumentRefusedError, match=r"not stored as a capsule|something lies between"):
        verify_capsule(tmp_path / "x", root)


def test_a_bomb_is_not_unpacked(tmp_path: Path, root: str) -> None:
    def write(target: zipfile.ZipFile) -> None:
        target.writestr("index.json", b"0" * (100 << 20), zipfile.ZIP_DEFLATED)

    path = _zip(tmp_path / "bomb", write)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DocumentRefusedError):
        verify_capsule(path, root)


def test_who_may_export(world: World) -> None:
    def status(who: str, run: str) -> int:
        return int(world.people[who].get(f"/api/v1/runs/{run}/capsule").status_code)

    assert (status("lab", "plain"), status("hospital-a", "plain")) == (200, 200)  # released
    assert status("hospital-a", "private") == 403
    assert status("rival", "plain") == 404
    assert status("lab", "waiting") == 409
    assert world.coordinator.anyone.get("/api/v1/runs/plain/capsule").status_code == 401
    assert world.sites["ward-a"].client.get("/api/v1/runs/plain/capsule").status_code == 401


def test_a_model_that_was_changed_at_the_coordinator_is_not_exported(world: World) -> None:
    [path] = world.coordinator.home.models.glob("*/private/model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    assert world.people["lab"].get("/api/v1/runs/private/capsule").status_code >= 500
    path.write_bytes(content)
    assert world.people["lab"].get("/api/v1/runs/private/capsule").status_code == 200


def test_every_error_is_one_of_ours(capsule: Path, root: str, tmp_path: Path) -> None:
    """Cut anywhere."""
    content = capsule.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 60)):
        (tmp_path / "x").write_bytes(content[:length])
        with pytest.raises(ConcordError):
            verify_capsule(tmp_path / "x", root)


def test_an_index_that_names_other_sizes_is_refused(world: World, capsule: Path, root: str, tmp_path: Path) -> None:
    members = members_of(capsule)
    index = CapsuleIndex.from_canonical(Envelope.model_validate_json(members[INDEX]).bytes)
    fewer = index.model_copy(update={"files": index.files[:-1]})
    signed = seal(fewer, world.coordinator.app.state.concord.signer).model_dump_json().encode()

    def write(target: zipfile.ZipFile) -> None:
        for name, content in {**members, INDEX: signed}.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o100600 << 16
            target.writestr(info, content)

    with pytest.raises(DocumentRefusedError, match="the index names other files"):
        verify_capsule(_zip(tmp_path / "x", write), root)
