"""NodeState: what stays at a node between rounds (control variates, residuals, personal parameters).

A state is written *pending* with its round. It becomes current only when a later offer names that round as
applied with this node's Update in it; otherwise it is dropped. So an aborted round, or a refused reply,
leaves no trace.
"""

from pathlib import Path

from concord_shared.strategies.base import State
from concord_shared.tensors import read_safetensors, write_safetensors

__all__ = ["PERSONAL", "NodeStates"]

PERSONAL = "personal"
"""Under this name a NodeState keeps the personal part of the model, as one vector."""


class NodeStates:
    """The states of nodes in one directory; two files a node at the most."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def settle(self, node: str, applied_round: int) -> State:
        """Promotes or drops what is pending, and returns the current state (empty at first)."""
        state = self.current(node, applied_round)
        self._pending(node).unlink(missing_ok=True)
        return state

    def current(self, node: str, applied_round: int) -> State:
        """As `settle`, and drops nothing: an offer to evaluate may be older than what was trained meanwhile."""
        pending, current = self._pending(node), self._current(node)
        if pending.exists() and int(read_safetensors(pending)[1]["round"]) == applied_round:
            pending.replace(current)
        return read_safetensors(current)[0] if current.exists() else {}

    def write_pending(self, node: str, round_number: int, state: State) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._pending(node).exists() and int(read_safetensors(self._pending(node))[1]["round"]) > round_number:
            return  # of a step that is over: what a younger round left stays
        write_safetensors(self._pending(node), state, {"round": str(round_number)})

    def _pending(self, node: str) -> Path:
        return self._directory / f"{node}.pending.safetensors"

    def _current(self, node: str) -> Path:
        return self._directory / f"{node}.current.safetensors"
