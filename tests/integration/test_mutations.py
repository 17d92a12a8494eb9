"""Would the tests notice? Each line that a claim of SECURITY.md rests on is broken in a copy of the code, and the tests
that are named for it there must fail. `bash deploy/run.sh test -m slow -k mutation` (minutes).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FOLDERS = ("shared", "client", "server", "deploy")

MUTATIONS = {
    "the mask stream is a constant": (
        "shared/concord_shared/masking/stream.py",
        "update_into(filled, buffer)",
        "buffer[: len(filled)] = bytes(len(filled))",
        "tests/unit/masking/test_stream.py",
    ),
    "the consistency round is skipped": (
        "client/concord_client/masked_step.py",
        "            self.attempt.check_consent(place, self._agreed, self._shared, self._survivors, signature)",
        "            pass",
        "tests/unit/masking/test_hostile.py",
    ),
    "a node's keys are not those of the roster": (
        "shared/concord_shared/masking/attempt.py",
        "            verify_bytes(",
        "            (lambda *_: None)(",
        "tests/unit/masking/test_hostile.py",
    ),
    "a charge does not wait for the disk": (
        "client/concord_client/ledger/ledger.py",
        "PRAGMA synchronous=FULL",
        "PRAGMA synchronous=OFF",
        "tests/unit/client/test_ledger.py",
    ),
    "the noise is seeded": (
        "shared/concord_shared/noise.py",
        "os.urandom(32)",
        "bytes(32)",
        "tests/unit/client/test_private_training.py",
    ),
    "the noise is half as wide": (
        "client/concord_client/private_training.py",
        "_add_noise(parameter, multiplier * clip,",
        "_add_noise(parameter, multiplier * clip / 2,",
        "tests/unit/client/test_private_training.py",
    ),
    "rows' gradients are not clipped": (
        "client/concord_client/private_training.py",
        "clipped_gradients(model, layers, losses_of, inputs[part], targets[part], clip)",
        "clipped_gradients(model, layers, losses_of, inputs[part], targets[part], 1e9)",
        "tests/unit/client/test_private_training.py",
    ),
    "noise is drawn again for another attempt": (
        "client/concord_client/rounds.py",
        "return self._drawn(message, permit) or train()",
        "return train()",
        "tests/unit/client/test_rounds.py tests/unit/client/test_ledger_rounds.py",
    ),
    "a node does not ask whether the coordinator's log has grown": (
        "client/concord_client/evidence.py",
        "check_grown(",
        "(lambda *_, **__: None)(",
        "tests/unit/client/test_evidence.py",
    ),
}


def outcome(folder: Path, tests: str) -> "subprocess.CompletedProcess[str]":
    """The tests of this repository over the code in `folder`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(folder / each) for each in FOLDERS)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for each in FOLDERS:
        shutil.copytree(ROOT / each, tmp_path / each, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_without_a_mutation_they_pass_on_the_copy(copied: Path) -> None:
    done = outcome(copied, " ".join(sorted({each[3] for each in MUTATIONS.values()})))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_noticed(mutation: str, copied: Path) -> None:
    file, line, instead, tests = MUTATIONS[mutation]
    source = (copied / file).read_text("utf-8")
    assert source.count(line) == 1, f"{file} has changed; name the line that {mutation!r} breaks now"
    (copied / file).write_text(source.replace(line, instead), "utf-8")
    done = outcome(copied, tests)
    assert done.returncode == 1, f"nothing failed though {mutation}:\n{done.stdout[-2000:]}"
    print(f"{mutation}: " + next(line for line in done.stdout.splitlines() if line.startswith("FAILED")))
