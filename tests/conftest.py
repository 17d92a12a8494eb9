"""Fixtures for all tests: where the datasets are, the committed test vectors, how hypothesis explores."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from datasets import data_root

TESTS = Path(__file__).parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background ignores interrupts for them, and for all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("concord", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("concord")


@pytest.fixture(scope="session")
def dataset_path() -> Callable[[str], Path]:
    """Finds a dataset's directory by name, or skips the test."""
    root = data_root()

    def find(name: str) -> Path:
        if root is None or not (root / name).is_dir():
            pytest.skip(f"skipped: needs the dataset {name} in $CONCORD_DATA")
        return root / name

    return find


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Digests that must never change: each would void the approvals that name it."""
    loaded: dict[str, Any] = json.loads((TESTS / "vectors.json").read_text("utf-8"))
    return loaded
