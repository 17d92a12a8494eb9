"""Which pretrained models this machine has, each in a folder named by the hash of its files.

A directory brings data alone: weights as safetensors, a configuration and a tokenizer as JSON. Whatever could run when
it is read (pickles, Python files, a configuration that names code) is refused, beside good files too.
"""

import functools
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concord_shared.canonical import canonical_digest
from concord_shared.errors import UsageError
from concord_shared.files import explain, file_digest
from concord_shared.plan.models import PRETRAINED_NAME, PretrainedModel
from concord_shared.pretrained.trial import try_configuration, try_tokenizer

__all__ = ["Pretrained", "add", "fault_of", "find", "inspect", "kept", "store_folder"]

VARIABLE = "CONCORD_PRETRAINED"
CONFIG, TOKENIZER, WEIGHTS, INDEX = "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"
NAME = "_name.txt"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack", ".npy", ".npz")
CONFIG_BYTES_MAX = 64 << 20
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
REFUSED_KEYS = {
    "auto_map": "names code of its own, which is never run",
    "quantization_config": "its weights are quantised, and cannot be trained; name the full ones",
    "transformers_weights": "names other files for its weights, which no hash would hold",
}


@dataclass(frozen=True)
class Pretrained:
    """sha256: over the names and contents of all its files. vocabulary: how many tokens it knows."""

    name: str
    sha256: str
    folder: Path
    architecture: str
    vocabulary: int
    bytes: int

    def document(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}


def store_folder() -> Path:
    """Where this machine's are: $CONCORD_PRETRAINED, or concord/pretrained among the user's data."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "concord" / "pretrained"


def add(directory: Path, name: str = "") -> Pretrained:
    """Copies what a model needs of a Hugging Face directory into the store, whole or not at all.

    Raises:
        UsageError: the directory is not one, brings something that could run, describes what cannot be built, or
            cannot be copied.
    """
    found = inspect(directory, name or directory.resolve().name)
    _check_words(directory)
    try_tokenizer(directory / TOKENIZER)
    try_configuration(
        directory / CONFIG, [directory / each for each in _files(directory) if each.endswith(".safetensors")]
    )
    target = store_folder() / found.sha256
    temporary = target.with_name(f".{found.sha256}.{os.getpid()}")
    try:
        temporary.mkdir(mode=0o700, parents=True)
        for each in _files(directory):
            shutil.copyfile(directory / each, temporary / each)
        (temporary / NAME).write_text(found.name + "\n", "utf-8")
        copied = inspect(temporary, found.name)
        if copied.sha256 != found.sha256:
            raise UsageError(f"{directory}: changed while it was copied; try again")
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {explain(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return inspect(target, found.name)


def kept() -> list[Pretrained]:
    """What this machine has, by name. A folder that is not what its name says is left out."""
    found = []
    for folder in sorted(store_folder().glob("[0-9a-f]*")):
        try:
            each = inspect(folder, (folder / NAME).read_text("utf-8").strip())
        except (UsageError, OSError, UnicodeDecodeError):
            continue
        if each.sha256 == folder.name:
            found.append(each)
    return sorted(found, key=lambda each: (each.name, each.sha256))


def fault_of(model: PretrainedModel) -> str:
    """Why this model cannot be built here; "" where it can."""
    try:
        find(model.sha256, model.package)
    except UsageError as error:
        return str(error)
    return ""


def find(sha256: str, name: str = "") -> Pretrained:
    """The one with this hash. Its files are read whole and compared, once in a process.

    Raises:
        UsageError: it is not here, or was changed.
    """
    called = f"the pretrained model {name or sha256[:12]}"
    folder = store_folder() / sha256
    if not folder.is_dir():
        raise UsageError(
            f"{called} ({sha256[:12]}) is not on this machine. Add its Hugging Face directory: "
            "`concord pretrained add DIR`, or `concord-node pretrained add DIR`"
        )
    found = _verified(folder)
    if found.sha256 != sha256:
        raise UsageError(f"{called}: {folder} was changed; remove it and add the directory again")
    return found


@functools.lru_cache(16)
def _verified(folder: Path) -> Pretrained:
    """Of the store, where a folder is named by its hash; once in a process, whoever asks."""
    return inspect(folder, folder.name)


def inspect(directory: Path, name: str) -> Pretrained:
    """What a directory holds, after it was checked.

    Raises:
        UsageError: a file is missing, is not what it should be, or could run.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: expected a Hugging Face directory, with {CONFIG}, {TOKENIZER} and {WEIGHTS}")
    _refuse_code(directory)
    if not re.fullmatch(PRETRAINED_NAME, name):
        raise UsageError(f"{name!r}: expected a name of letters, digits, '.', '_' and '-'; give one with --name")
    config = _json(directory / CONFIG)
    for key, why in REFUSED_KEYS.items():
        if config.get(key):
            raise UsageError(f"{directory / CONFIG}: {why} ({key})")
    if any("/" in str(config.get(key)) for key in ("attn_implementation", "_attn_implementation")):
        raise UsageError(f"{directory / CONFIG}: names code of its own (attn_implementation), which is never run")
    files = _files(directory)
    for each in files:
        if each.endswith(".safetensors"):
            _check_weights(directory / each)
    try:
        digest = canonical_digest({each: file_digest(directory / each) for each in files})
        size = sum((directory / each).stat().st_size for each in files)
    except OSError as error:
        raise UsageError(f"{directory}: {explain(error)}") from error
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type", "")
    vocabulary = config.get("vocab_size", 0)
    return Pretrained(name, digest, directory, str(named), vocabulary if isinstance(vocabulary, int) else 0, size)


def _refuse_code(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise UsageError(
                f"{path}: refused, as such files can run code when they are read. Remove it, or download the model "
                "with safetensors only"
            )
        if path.suffix.lower() == ".py":
            raise UsageError(f"{path}: refused: a pretrained model brings weights, never code")


def _check_words(directory: Path) -> None:
    """Raises: UsageError: the tokenizer is no JSON object, or the configuration does not say what every one says."""
    _json(directory / TOKENIZER)
    config = _json(directory / CONFIG)
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise UsageError(f'{directory / CONFIG}: architectures: expected a list of words, such as ["BertModel"]')
    size = config.get("vocab_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"{directory / CONFIG}: vocab_size: expected a whole number above 0, got {str(size)[:40]!r}")


def _files(directory: Path) -> tuple[str, ...]:
    """The names of what makes the model, in order."""
    weights: tuple[str, ...] = (WEIGHTS,)
    if not (directory / WEIGHTS).exists() and (directory / INDEX).exists():
        parts = _json(directory / INDEX).get("weight_map")
        beside = [*parts.values()] if isinstance(parts, dict) else []
        if not beside or not all(isinstance(each, str) and SHARD.fullmatch(each) for each in beside):
            raise UsageError(f"{directory / INDEX}: expected weight_map, from tensors to *.safetensors files beside it")
        weights = (INDEX, *sorted(set(beside)))
    names = (CONFIG, TOKENIZER, *weights)
    if missing := [each for each in names if not (directory / each).is_file()]:
        hint = {
            TOKENIZER: ". Older directories have none: load the tokenizer with transformers, and save_pretrained it",
            WEIGHTS: ". Weights must be safetensors",
        }
        raise UsageError(f"{directory}: {missing[0]} is missing{hint.get(missing[0], '')}")
    return names


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: not safetensors: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path.parent}: {path.name} is missing")
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise UsageError(f"{path}: expected at most {CONFIG_BYTES_MAX} bytes")
        found = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise UsageError(f"{path}: expected JSON: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected JSON: {explain(error) if isinstance(error, OSError) else error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return found
