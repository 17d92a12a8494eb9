"""Released models at a partner: which there are, getting one, and trusting it only after everything was checked.

A pulled model is a directory of its own, models/<digest>/: the files of the release, the release itself and the plan.
With that it can be used offline, for ever, without the coordinator's code.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from concord_client.control import ControlChannel
from concord_client.home import NodeHome
from concord_client.inference import TrainedModel
from concord_client.personal import read_kept
from concord_client.store import NodeStore
from concord_client.sync import FILE_NAME
from concord_shared.documents import ModelFile, Release
from concord_shared.errors import ArtefactError, DocumentRefusedError, PlanError, UsageError
from concord_shared.files import explain, file_digest, write_atomically
from concord_shared.model_files import HEADER_BYTES_MAX, read_model
from concord_shared.models.registry import build_model, layout_of
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.signing import Envelope, open_envelope, read_public_text
from concord_shared.tensors import Layout

__all__ = ["KnownModel", "find_release", "known_models", "open_model", "pull_model"]

MODEL_FILE = "model.safetensors"
RELEASE_FILE, PLAN_FILE = "_release.json", "_plan.json"
"""Names that no file of a release can have."""
OTHER_BYTES_MAX = 64 << 20
MARGIN_BYTES = 64 << 20
"""What must stay free on the disk."""

ChannelMaker = Callable[[NodeHome, NodeStore], AbstractContextManager[ControlChannel]]


@dataclass(frozen=True)
class KnownModel:
    release: Release
    plan_name: str
    pulled: bool


def known_models(home: NodeHome, store: NodeStore) -> list[KnownModel]:
    """Every release that this node holds, newest first. Of a pulled model the one that it was pulled by."""
    releases = {stored.id: store.release(stored.id) for stored in store.all("release")}
    for path in sorted(home.models.glob(f"[0-9a-f]*/{RELEASE_FILE}")):
        releases[path.parent.name] = _read_release(path.parent)
    found = []
    for release in releases.values():
        assert release is not None
        plan = store.plan(release.plan_digest)
        pulled = (home.models / release.model_digest / RELEASE_FILE).is_file()
        found.append(KnownModel(release, plan.name if plan else release.plan_digest[:12], pulled))
    return sorted(found, key=lambda each: (-each.release.issued_at, each.release.model_digest))


def find_release(home: NodeHome, store: NodeStore, digest: str) -> Release:
    """By the model's digest, or the beginning of it. Raises: UsageError: none, or several."""
    known = [each.release for each in known_models(home, store)]
    found = [each for each in known if digest and each.model_digest.startswith(digest.lower())]
    if len(found) == 1:
        return found[0]
    what = "several models begin" if found else "no released model begins"
    there = ", ".join(each.model_digest[:12] for each in known) or "none"
    raise UsageError(f"{what} with {digest!r}; there are: {there}. `concord-node models list` shows them")


def pull_model(
    home: NodeHome, store: NodeStore, release: Release, channel: ChannelMaker = ControlChannel
) -> dict[str, Any]:
    """Downloads a released model into models/<digest>/, whole or not at all, after these checks:

    1  the release is signed by its organisation, with the key that this node pinned
    2  its plan is held, and the model's file has the size that the plan's layout needs
    3  each file has the size and the SHA-256 of the release
    4  the tensors are exactly the plan's, and finite; the digest over them is the release's
    5  what prepares its inputs is of the plan's contract

    Raises:
        DocumentRefusedError: a check failed; nothing is kept.
        ArtefactError: no space, or the home cannot be written.
        UnreachableError, ApiError: the coordinator does not give it.
    """
    target = home.models / release.model_digest
    if (target / RELEASE_FILE).is_file():
        open_model(home, store, release)
        return _summary(release, target, "was here already")
    envelope = _signed(store, release)
    plan = store.plan(release.plan_digest)
    if plan is None:
        raise DocumentRefusedError(f"this node holds no plan {release.plan_digest[:12]}, which made the model")
    layout = layout_of(plan, build_model(plan))
    _check_files(home, release, layout)
    temporary = home.models / f".{release.model_digest}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        with channel(home, store) as connection:
            for file in release.files:
                connection.download_model(release.model_digest, release.run, file, temporary / file.name)
        for file in release.files:
            _check_file(temporary / file.name, file)
        _trained_model(temporary / MODEL_FILE, plan, release, layout)
        write_atomically(temporary / PLAN_FILE, json.dumps(plan.document(), ensure_ascii=False))
        write_atomically(temporary / RELEASE_FILE, envelope.model_dump_json())
        temporary.replace(target)
    except OSError as error:
        raise ArtefactError(f"cannot write {target}: {explain(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _summary(release, target, "pulled")


def open_model(home: NodeHome, store: NodeStore, release: Release) -> TrainedModel:
    """A pulled model: its release is signed by the organisation whose key this node pinned, its bytes are the
    release's. Checked whenever it is used. Asks nobody.

    Raises:
        UsageError: it was not pulled.
        ArtefactError: the files were changed.
    """
    directory = home.models / release.model_digest
    if not (directory / RELEASE_FILE).is_file():
        raise UsageError(
            f"model {release.model_digest[:12]} is not here yet; pull it: concord-node models pull "
            f"{release.model_digest[:12]}"
        )
    try:
        _check_signed(directory, store, release)
        plan = parse_plan_document(json.loads((directory / PLAN_FILE).read_text("utf-8")))
        if plan.digest != release.plan_digest:
            raise DocumentRefusedError("the plan beside it is another one than the release names")
        for file in release.files:
            _check_file(directory / file.name, file)
        model = _trained_model(directory / MODEL_FILE, plan, release, layout_of(plan, build_model(plan)))
    except (OSError, ValueError, PlanError, DocumentRefusedError) as error:
        raise ArtefactError(
            f"{directory}: not the model that was pulled: {error}. Remove the directory and pull it again"
        ) from error
    return replace(model, kept=read_kept(home, release.run))


def _trained_model(path: Path, plan: Plan, release: Release, layout: Layout) -> TrainedModel:
    with path.open("rb") as file:
        return TrainedModel(plan, *read_model(file, path.stat().st_size, plan, layout, release.model_digest))


def _signed(store: NodeStore, release: Release) -> Envelope:
    """The release's envelope, its signature checked now and not only when it arrived."""
    stored = store.get("release", release.model_digest)
    key = store.organisation_key(release.organisation)
    if stored is None or key is None:
        raise DocumentRefusedError(f"no key of {release.organisation} is known that could have signed the release")
    envelope = Envelope.model_validate_json(json.dumps(stored.body))
    if open_envelope(envelope, Release, [read_public_text(key)]) != release:
        raise DocumentRefusedError("the release was replaced meanwhile; try again")
    return envelope


def _check_signed(directory: Path, store: NodeStore, release: Release) -> None:
    """The release that lies beside the files, whoever put it there. Raises: DocumentRefusedError, OSError."""
    key = store.organisation_key(release.organisation)
    if key is None:
        raise DocumentRefusedError(f"no key of {release.organisation} is known that could have signed the release")
    envelope = Envelope.model_validate_json((directory / RELEASE_FILE).read_text("utf-8"))
    if open_envelope(envelope, Release, [read_public_text(key)]) != release:
        raise DocumentRefusedError("another release lies beside it")


def _check_files(home: NodeHome, release: Release, layout: Layout) -> None:
    """Before a byte is asked for: sizes that can be, and space for them."""
    sizes = {file.name: file.size for file in release.files}
    tensors = 4 * layout.size
    if not tensors < sizes.get(MODEL_FILE, 0) <= 8 + HEADER_BYTES_MAX + tensors:
        raise DocumentRefusedError(f"the release names no {MODEL_FILE} of the plan's {layout.size} parameters")
    for name, size in sizes.items():
        if FILE_NAME.fullmatch(name) is None:
            raise DocumentRefusedError(f"the release names a file {name[:80]!r}, which is no name for a file")
        if name != MODEL_FILE and size > OTHER_BYTES_MAX:
            raise DocumentRefusedError(f"the release's file {name} is larger than {OTHER_BYTES_MAX} bytes")
    free = shutil.disk_usage(home.path).free
    if free < sum(sizes.values()) + MARGIN_BYTES:
        raise ArtefactError(
            f"the model has {sum(sizes.values())} bytes and {home.path} only {free} free. Free some space first"
        )


def _check_file(path: Path, file: ModelFile) -> None:
    if path.stat().st_size != file.size or file_digest(path) != file.sha256:
        raise DocumentRefusedError(f"{path.name} is not the file that the release names")


def _read_release(directory: Path) -> Release:
    """Of a pulled model: its signature was checked when it was pulled, its bytes are whenever it is used."""
    try:
        text = (directory / RELEASE_FILE).read_text("utf-8")
        return Release.from_canonical(Envelope.model_validate_json(text).bytes)
    except (OSError, ValueError, DocumentRefusedError) as error:
        raise ArtefactError(f"{directory}: not a pulled model: {error}") from error


def _summary(release: Release, target: Path, what: str) -> dict[str, Any]:
    return {
        "model_digest": release.model_digest,
        "plan_digest": release.plan_digest,
        "run": release.run,
        "organisation": release.organisation,
        "directory": str(target),
        "files": [file.name for file in release.files],
        "outcome": what,
    }
