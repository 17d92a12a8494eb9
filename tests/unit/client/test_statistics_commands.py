"""`concord-node statistics` as its owner types it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from concord_client.cli import app
from concord_client.statistics_guard import Answer, StatisticsGuard
from concord_shared.errors import UsageError

from .fake_coordinator import Partner, partner_in, use_commands_at

AGE = {"age": {"range": [0, 120]}}


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    """Two answers left this node, over two datasets."""
    made = partner_in(tmp_path)
    use_commands_at(made, monkeypatch)
    guard = StatisticsGuard(made.store)
    guard.note(Answer("run-1", "p" * 64, "heart", "patients", "v1", "all", 1, AGE, ("a", "b", "c")))
    guard.note(Answer("run-2", "q" * 64, "heart", "others", "v2", "all", 2, AGE))
    yield made
    made.store.close()


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["statistics", *words], input="", standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_lists_what_left_and_with_whom(partner: Partner) -> None:
    text = run("list")
    assert "patients  run run-1 with 3 nodes: age" in text
    assert "others  run run-2: age" in text
    assert [each["run"] for each in json.loads(run("list", "--json"))] == ["run-1", "run-2"]


def test_forgetting_is_loud_asks_first_and_is_of_one_dataset(partner: Partner) -> None:
    with pytest.raises(UsageError, match="confirm with --yes"):
        run("forget", "patients")
    assert len(StatisticsGuard(partner.store).answers()) == 2
    text = run("forget", "patients", "--yes")
    assert "warning: 1 answers over dataset patients left this node and cannot be taken back" in text
    assert "forgot 1 answers" in text
    assert [answer.dataset for answer in StatisticsGuard(partner.store).answers()] == ["others"]
    assert [entry.action for entry, _ in partner.store.log_entries()][-1] == "statistics:forget"
