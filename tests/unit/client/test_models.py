"""Pulling a released model: whole, checked and usable offline, or not at all."""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from concord_client.cli import app
from concord_client.models import find_release, known_models, open_model, pull_model
from concord_local.nodes import NodeHost
from concord_shared.documents import ModelFile, Release
from concord_shared.errors import ArtefactError, DocumentRefusedError, UsageError
from concord_shared.model_files import read_strictly
from concord_shared.models import new_vector
from concord_shared.preprocessing import unfitted
from concord_shared.signing import seal
from concord_shared.tensors import Layout, model_digest, write_safetensors
from federations import federation

from .rounds_kit import DIGEST, Site, make_site


def read_file(path: Path, layout: Layout) -> Any:
    with path.open("rb") as file:
        return read_strictly(file, path.stat().st_size, layout)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Where the coordinator keeps its files."""
    directory = tmp_path / "shelf"
    directory.mkdir()
    return directory


def write_model(site: Site, shelf: Path, theta: Any = None, **metadata: str) -> Path:
    layout, start = new_vector(site.plan)
    vector = start if theta is None else theta
    said = {
        "format": "concord/model/1",
        "plan_digest": site.plan.digest,
        "model_digest": model_digest(layout, vector),
        "preprocessing": json.dumps(unfitted(site.plan).document()),
    }
    write_safetensors(shelf / "model.safetensors", layout.split(vector), said | metadata)
    (shelf / "MODEL_CARD.md").write_text("# A model\n")
    return shelf / "model.safetensors"


def release(site: Site, shelf: Path, key: Ed25519PrivateKey | None = None, **changes: Any) -> Release:
    files = tuple(
        ModelFile(name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        for path in sorted(shelf.iterdir())
    )
    fields: dict[str, Any] = {
        "model_digest": site.model_digest,
        "plan_digest": site.plan.digest,
        "study": "digits-2026",
        "run": "run-1",
        "organisation": "hospital-b",
        "files": files,
        "metrics": {"accuracy": "0.93"},
        "issued_at": 5,
    }
    made = Release(**(fields | changes))
    site.store.put("release", made.model_digest, seal(made, key or site.organisation))
    return made


def channel(shelf: Path) -> Any:
    """Serves the shelf's files as they are: the checks of the bytes are this side's."""

    class Channel:
        def download_model(self, digest: str, run: str, file: ModelFile, target: Path) -> None:
            target.write_bytes((shelf / file.name).read_bytes())

    @contextmanager
    def make(*_: Any) -> Iterator[Any]:
        yield Channel()

    return make


def nothing_kept(site: Site) -> bool:
    return not list(site.home.models.iterdir())


class TestPull:
    def test_a_release_is_pulled_whole_and_opens_offline(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        made = release(site, shelf)
        result = pull_model(site.home, site.store, made, channel(shelf))
        assert result["outcome"] == "pulled"
        model = open_model(site.home, site.store, made)
        assert np.array_equal(model.theta, site.theta)
        assert model.plan == site.plan
        assert pull_model(site.home, site.store, made, channel(shelf))["outcome"] == "was here already"

    def test_it_can_be_found_without_the_database(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        pull_model(site.home, site.store, release(site, shelf), channel(shelf))
        site.home.database.unlink()
        with site.home.store() as empty:
            [known] = known_models(site.home, empty)
        assert known.pulled
        assert known.release.model_digest == site.model_digest

    def test_a_release_signed_by_another_key(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        made = release(site, shelf, Ed25519PrivateKey.generate())
        with pytest.raises(DocumentRefusedError, match="lacks the signature"):
            pull_model(site.home, site.store, made, channel(shelf))
        assert nothing_kept(site)

    def test_another_model_under_the_released_digest(self, site: Site, shelf: Path) -> None:
        """Size and SHA-256 are the release's, so the digest over the tensors alone tells."""
        write_model(site, shelf, site.theta + np.float32(1))
        with pytest.raises(DocumentRefusedError, match="not those of the released model"):
            pull_model(site.home, site.store, release(site, shelf), channel(shelf))
        assert nothing_kept(site)

    def test_other_bytes_than_the_releases(self, site: Site, shelf: Path) -> None:
        path = write_model(site, shelf)
        made = release(site, shelf)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(DocumentRefusedError, match="not the file that the release names"):
            pull_model(site.home, site.store, made, channel(shelf))
        assert nothing_kept(site)

    def test_a_model_of_another_plan(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf, plan_digest=DIGEST)
        with pytest.raises(DocumentRefusedError, match="another plan"):
            pull_model(site.home, site.store, release(site, shelf), channel(shelf))

    @pytest.mark.parametrize("text", ["{}", "[" * 100_000, '{"contract": 1}', "not json"])
    def test_a_model_with_a_hostile_preprocessing(self, site: Site, shelf: Path, text: str) -> None:
        write_model(site, shelf, preprocessing=text)
        with pytest.raises(DocumentRefusedError, match="how its inputs are prepared"):
            pull_model(site.home, site.store, release(site, shelf), channel(shelf))

    def test_a_plan_that_is_not_held(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        with pytest.raises(DocumentRefusedError, match="holds no plan"):
            pull_model(site.home, site.store, release(site, shelf, plan_digest=DIGEST), channel(shelf))

    @pytest.mark.parametrize("name", ["../evil", "_release.json", ".hidden", "a/b", "x" * 200])
    def test_a_file_with_a_name_that_leads_elsewhere(self, site: Site, shelf: Path, name: str) -> None:
        write_model(site, shelf)
        files = (*release(site, shelf).files, ModelFile(name=name, sha256=DIGEST, size=3))
        with pytest.raises(DocumentRefusedError, match="no name for a file"):
            pull_model(site.home, site.store, release(site, shelf, files=files), channel(shelf))
        assert nothing_kept(site)

    def test_a_release_without_a_model_or_of_an_absurd_size(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        for files in (
            (ModelFile(name="MODEL_CARD.md", sha256=DIGEST, size=3),),
            (ModelFile(name="model.safetensors", sha256=DIGEST, size=1 << 40),),
        ):
            with pytest.raises(DocumentRefusedError, match=r"names no model\.safetensors"):
                pull_model(site.home, site.store, release(site, shelf, files=files), channel(shelf))

    def test_no_space(self, site: Site, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from collections import namedtuple

        monkeypatch.setattr(
            "concord_client.models.shutil.disk_usage", lambda _: namedtuple("Usage", "total used free")(9, 9, 9)
        )
        write_model(site, shelf)
        with pytest.raises(ArtefactError, match="Free some space"):
            pull_model(site.home, site.store, release(site, shelf), channel(shelf))

    def test_a_pulled_model_that_was_changed(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        made = release(site, shelf)
        pull_model(site.home, site.store, made, channel(shelf))
        file = site.home.models / made.model_digest / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
        with pytest.raises(ArtefactError, match="pull it again"):
            open_model(site.home, site.store, made)

    def test_a_pulled_model_under_a_release_of_another_signer(self, site: Site, shelf: Path) -> None:
        """Whoever can write into the home puts another model there, with a release of his own that fits it."""
        write_model(site, shelf)
        made = release(site, shelf)
        pull_model(site.home, site.store, made, channel(shelf))
        file = site.home.models / made.model_digest / "_release.json"
        forged = made.model_copy(update={"metrics": {"accuracy": "0.99"}})
        file.write_text(seal(forged, Ed25519PrivateKey.generate()).model_dump_json())
        with pytest.raises(ArtefactError, match="lacks the signature"):
            open_model(site.home, site.store, find_release(site.home, site.store, made.model_digest))
        file.write_text(seal(forged, site.organisation).model_dump_json())
        with pytest.raises(ArtefactError, match="another release"):
            open_model(site.home, site.store, made)
        site.store._connection.execute("DELETE FROM organisation_keys")
        with pytest.raises(ArtefactError, match="no key of hospital-b"):
            open_model(site.home, site.store, made)

    def test_a_digest_that_nobody_knows_or_several_share(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        release(site, shelf, model_digest="aa" + DIGEST[2:])
        release(site, shelf, model_digest="ab" + DIGEST[2:])
        assert find_release(site.home, site.store, "AB").model_digest.startswith("ab")
        for text, words in (("a", "several models begin"), ("ff", "no released model"), ("", "no released model")):
            with pytest.raises(UsageError, match=words):
                find_release(site.home, site.store, text)


Header = dict[str, Any]


def swap(header: Header) -> None:
    first, second = header["1.bias"], header["1.weight"]
    first["data_offsets"], second["data_offsets"] = [0, 40], [0, 2560]


class TestStrictReading:
    """A safetensors file from somebody else: its header decides nothing."""

    def write(self, path: Path, header: bytes, tensors: bytes) -> Path:
        path.write_bytes(len(header).to_bytes(8, "little") + header + tensors)
        return path

    def parts(self, site: Site, shelf: Path) -> tuple[Header, bytes]:
        data = write_model(site, shelf).read_bytes()
        size = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + size]), data[8 + size :]

    def test_what_we_write_is_read(self, site: Site, shelf: Path) -> None:
        vector, metadata = read_file(write_model(site, shelf), new_vector(site.plan)[0])
        assert np.array_equal(vector, site.theta)
        assert metadata["plan_digest"] == site.plan.digest

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda h: h.update(extra=h["1.bias"]), "expected the tensors"),
            (lambda h: h.pop("1.bias"), "expected the tensors"),
            (lambda h: h["1.bias"].update(dtype="F16"), "expected F32"),
            (lambda h: h["1.bias"].update(shape=[1, 10]), "expected F32"),
            (lambda h: h["1.bias"].update(shape=[10.0]), "expected"),
            (lambda h: h["1.bias"].update(data_offsets=[0, 1 << 62]), "expected 40 bytes"),
            (lambda h: h["1.bias"].update(data_offsets=[-40, 0]), "begins at byte"),
            (lambda h: h["1.bias"].update(data_offsets=["0", "40"]), "no place"),
            (lambda h: h["1.bias"].update(data_offsets=[True, 41]), "no place"),
            (lambda h: h["1.bias"].update(more=1), "not described"),
            (lambda h: h.update({"1.bias": 3}), "not described"),
            (swap, "begins at byte"),
            (lambda h: h.update(__metadata__={"a": 1}), "not texts"),
            (lambda h: h.update(__metadata__=[]), "not texts"),
        ],
    )
    def test_another_header(self, site: Site, shelf: Path, change: Callable[[Header], Any], words: str) -> None:
        header, tensors = self.parts(site, shelf)
        change(header)
        path = self.write(shelf / "x", json.dumps(header).encode(), tensors)
        with pytest.raises(DocumentRefusedError, match=words):
            read_file(path, new_vector(site.plan)[0])

    def test_duplicate_keys(self, site: Site, shelf: Path) -> None:
        """safetensors itself takes one of the two, silently."""
        header, tensors = self.parts(site, shelf)
        text = json.dumps(header)[:-1] + f', "1.bias": {json.dumps(header["1.bias"])}}}'
        path = self.write(shelf / "x", text.encode(), tensors)
        with pytest.raises(DocumentRefusedError, match="stands in it twice"):
            read_file(path, new_vector(site.plan)[0])

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_nan_and_inf(self, site: Site, shelf: Path, value: float) -> None:
        theta = site.theta.copy()
        theta[7] = value
        with pytest.raises(DocumentRefusedError, match="NaN or Inf"):
            read_file(write_model(site, shelf, theta), new_vector(site.plan)[0])

    @pytest.mark.parametrize("length", [0, 1, 1 << 30, (1 << 62) + 1])
    def test_a_header_of_an_absurd_length(self, site: Site, shelf: Path, length: int) -> None:
        _, tensors = self.parts(site, shelf)
        path = shelf / "x"
        path.write_bytes(length.to_bytes(8, "little") + b"{}" + tensors)
        with pytest.raises(DocumentRefusedError, match="expected a header"):
            read_file(path, new_vector(site.plan)[0])

    @pytest.mark.parametrize("more", [b"x", b"\0" * 4])
    def test_trailing_bytes(self, site: Site, shelf: Path, more: bytes) -> None:
        path = write_model(site, shelf)
        path.write_bytes(path.read_bytes() + more)
        with pytest.raises(DocumentRefusedError, match="expected a header"):
            read_file(path, new_vector(site.plan)[0])

    @pytest.mark.parametrize("text", [b"[]", b"{" * 4000, b"\xff\xfe", b'"a"', b"\x80\x04]\x94."])
    def test_something_else_than_a_header(self, site: Site, shelf: Path, text: bytes) -> None:
        _, tensors = self.parts(site, shelf)
        with pytest.raises(DocumentRefusedError):
            read_file(self.write(shelf / "x", text, tensors), new_vector(site.plan)[0])


class TestUse:
    @pytest.fixture
    def pulled(self, site: Site, shelf: Path) -> Site:
        write_model(site, shelf)
        pull_model(site.home, site.store, release(site, shelf), channel(shelf))
        return site

    def call(self, site: Site, *arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--home", str(site.home.path)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_evaluate_and_predict_offline(self, pulled: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: Any, **__: Any) -> None:
            raise AssertionError("a socket was made")

        monkeypatch.setattr(socket, "socket", offline)
        digest = pulled.model_digest[:10]
        own = json.loads(self.call(pulled, "models", "evaluate", digest, "--dataset", "digits", "--json"))
        assert own["rows"] == 120
        every = json.loads(self.call(pulled, "models", "evaluate", digest, "--data", f"npz:{pulled.data}", "--json"))
        assert every["rows"] == 599
        out = tmp_path / "out.csv"
        self.call(pulled, "models", "predict", digest, "--data", f"npz:{pulled.data}", "--out", str(out))
        lines = out.read_text().splitlines()
        assert lines[0] == "prediction,probability"
        assert len(lines) == 600

    def test_the_figures_are_those_of_the_node(self, pulled: Site) -> None:
        """Its own test rows, as its answers to evaluate rounds."""
        from concord_shared.messages import RING, read_array
        from concord_shared.metrics import metric_sums

        host = NodeHost(pulled.plan, federation(pulled.plan, 3), pulled.home.path / "simulated", "cpu")
        reply = host.respond(pulled.message(kind="evaluate"))
        array = reply.content.array_records["blocks"]["metrics"]
        sums = read_array(array, np.dtype(np.int64), tuple(array.shape), RING)
        text = self.call(pulled, "models", "evaluate", pulled.model_digest, "--dataset", "digits", "--json")
        assert json.loads(text)["metrics"] == metric_sums(pulled.plan.data, sums).figures()

    def test_list_shows_what_is_here(self, pulled: Site) -> None:
        shown = json.loads(self.call(pulled, "models", "list", "--json"))["models"]
        assert [(each["model_digest"], each["pulled"], each["plan"]) for each in shown] == [
            (pulled.model_digest, True, pulled.plan.name)
        ]
        assert pulled.model_digest[:12] in self.call(pulled, "models", "list")

    def test_a_model_that_was_not_pulled(self, site: Site, shelf: Path) -> None:
        write_model(site, shelf)
        with pytest.raises(UsageError, match="models pull"):
            open_model(site.home, site.store, release(site, shelf))
