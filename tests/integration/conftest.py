"""Fixtures of the coordinator, see coordinators.py; and the command in this process."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from concord_local.cli import main
from coordinators import coordinator, database_url, postgresql

__all__ = ["coordinator", "database_url", "here", "postgresql"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`concord` in this process, below `tmp_path`: for what ends before anything begins."""

    def concord_here(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["concord", *arguments])
        monkeypatch.setattr("concord_shared.commands.signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, err)

    return concord_here
