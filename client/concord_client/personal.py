"""What a node keeps of a run that is over: its own part of the model, for its own predictions. It never leaves."""

from pathlib import Path

from concord_client.home import NodeHome
from concord_client.state import PERSONAL
from concord_shared.strategies.base import State
from concord_shared.strategies.ditto import OWN
from concord_shared.tensors import read_safetensors

__all__ = ["keep_state", "read_kept"]


def keep_state(home: NodeHome, run: str, states: Path) -> None:
    """Moves the NodeState of a run out of `states`, before these are forgotten, if it has a part of a model in it."""
    for file in states.glob("*.current.safetensors"):
        if read_safetensors(file)[0].keys() & {PERSONAL, OWN}:
            home.personal.mkdir(mode=0o700, exist_ok=True)  # a home may be older than this folder
            file.replace(_file(home, run))


def read_kept(home: NodeHome, run: str) -> State:
    """The NodeState that this node kept of a run; empty where it has none. Raises: ArtefactError: it is damaged."""
    states = list((home.states / run).glob("*.current.safetensors"))  # of a run that is not tidied away yet
    file = states[0] if states else _file(home, run)
    return read_safetensors(file)[0] if file.is_file() else {}


def _file(home: NodeHome, run: str) -> Path:
    return home.personal / f"{run}.safetensors"
