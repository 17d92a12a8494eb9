"""What a person reads while a run goes on."""

from typing import Any

import pytest

from concord_server.commands.watching import ago, round_line, state_lines

STATE = {"state": "waiting", "reason": "", "stop_requested": False, "waiting_for": []}


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (-5, "0 s"), (59, "59 s"), (60, "1 min"), (10_800, "3 h"), (200_000, "2 d")]
)
def test_ago(seconds: int, words: str) -> None:
    assert ago(1_000_000, 1_000_000 + seconds) == words


def test_a_run_says_for_whom_it_waits() -> None:
    waits = [{"node": "hospital-b", "what": "approval", "since": 1000}, {"node": "", "what": "start time", "since": 0}]
    assert state_lines(STATE | {"waiting_for": waits}, 11_800) == [
        "waiting",
        "hospital-b: approval, since 3 h",
        "all: start time, since 3 h",
    ]


def test_a_run_that_is_asked_to_stop() -> None:
    asked = {"state": "running", "stop_requested": True, "reason": "stopped by ann"}
    assert state_lines(STATE | asked, 0) == ["stopping: stopped by ann"]


RECORD: dict[str, Any] = {"kind": "train", "round": 3, "of": 10, "survivors": ["a", "b"], "seconds": 1.234}


def test_a_step() -> None:
    assert round_line(RECORD) == "train 3/10: 2 nodes, 1.2 s"
    told = {"metrics": {"accuracy": 0.98765, "confusion": [[1]]}, "failures": {"c": "full disk"}, "silent": ["d"]}
    assert round_line(RECORD | told) == "train 3/10: 2 nodes, without c, d, 1.2 s, accuracy 0.9877; c: full disk"


def test_a_step_without_a_result() -> None:
    assert round_line(RECORD | {"aborted": "1 of 3 nodes answered"}).endswith("unchanged: 1 of 3 nodes answered")
