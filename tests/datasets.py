"""Which real datasets are here, and a mark for tests that need some."""

import os
from pathlib import Path

import pytest

__all__ = ["data_root", "needs"]


def data_root() -> Path | None:
    """`$CONCORD_DATA`, or `../shared/data` beside the repository; None where neither is there."""
    places = [os.environ.get("CONCORD_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test, and says why, where one of the named datasets is absent."""
    root = data_root()
    absent = [name for name in names if root is None or not (root / name).is_dir()]
    return pytest.mark.skipif(bool(absent), reason=f"skipped: needs {', '.join(absent)} in $CONCORD_DATA")
