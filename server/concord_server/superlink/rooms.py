"""What the coordinator's worker asks of its SuperLink beside Flower's API: which nodes are there, a run to speak in.

A "room" is one run of Flower's, with the token that opens it. It says nothing of concord's run: after a SuperLink has
died, the worker opens another one and asks again what was not answered.
"""

import logging
import secrets
import threading
from collections.abc import Mapping
from typing import Any

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SubStatus
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType

from concord_server.superlink.access import FleetNode

__all__ = ["Rooms"]

log = logging.getLogger(__name__)


class Rooms:
    """Over the SuperLink's own state, in its process.

    instance: a random name; another one means that the SuperLink was restarted and has forgotten everything.
    """

    def __init__(self, state: LinkState) -> None:
        self.instance = secrets.token_hex(8)
        self._state = state
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._keys: dict[str, bytes] = {}
        self._activations: dict[str, int] = {}
        self._tokens: dict[int, tuple[int, str]] = {}
        self.reply_bytes_max: dict[int, int] = {}

    def admit(self, nodes: Mapping[str, FleetNode]) -> None:
        """Registers new nodes with their Flower keys, and takes out those that are not active any more."""
        wanted = {node.name: node.flower_key for node in nodes.values()}
        with self._lock:
            for name in [name for name, key in self._keys.items() if wanted.get(name) != key]:
                self._state.deactivate_node(self._ids[name])
                del self._ids[name], self._keys[name]
            for name, key in wanted.items():
                if name not in self._keys:
                    known = self._state.get_node_id_by_public_key(key)  # of a node that was suspended and came back
                    self._ids[name] = known or self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
                    self._keys[name] = key

    def make_way(self, name: str) -> None:
        """A node comes that seems to listen already: it died, or its link did. It has shown both of its keys, so it
        need not wait until the heartbeats of its predecessor are missed, as Flower would have it.
        """
        node_id = self.node_id(name)
        if node_id is not None and self._state.deactivate_node(node_id):
            log.warning("a node took its own place; was it killed?", extra={"node": name})

    def activated(self, name: str) -> None:
        """A node has begun to listen (again): what it was sent before may be lost."""
        with self._lock:
            self._activations[name] = self._activations.get(name, 0) + 1

    def node_id(self, name: str) -> int | None:
        with self._lock:
            return self._ids.get(name)

    def nodes(self) -> dict[str, Any]:
        self._close_abandoned()
        with self._lock:
            ids = dict(self._ids)
            activations = dict(self._activations)
        online = {
            info.node_id
            for info in self._state.get_node_info(node_ids=list(ids.values()), statuses=[NodeStatus.ONLINE])
        }
        return {
            "instance": self.instance,
            "nodes": {
                name: {"node_id": node_id, "online": node_id in online, "activations": activations.get(name, 0)}
                for name, node_id in ids.items()
            },
        }

    def open(self, reply_bytes_max: int) -> dict[str, Any]:
        """A new run of Flower's: its id, its task and the token that lets the worker speak in it."""
        self._close_abandoned()
        run_id = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task_id = self._state.get_run_info(run_ids=[run_id])[0].primary_task_id
        assert task_id is not None
        token = self._state.claim_task(task_id)
        assert token is not None
        self._state.activate_task(task_id)
        self.reply_bytes_max[run_id], self._tokens[run_id] = reply_bytes_max, (task_id, token)
        return {"instance": self.instance, "run_id": run_id, "task_id": task_id, "token": token}

    def _close_abandoned(self) -> None:
        """Takes away what lies in rooms without a heartbeat for a minute: the worker was killed, or has another one."""
        for run_id, (task_id, token) in list(self._tokens.items()):
            if self._state.get_task_by_token(token) is None:
                log.warning("a room was abandoned", extra={"room": run_id})
                self.close(run_id, task_id)

    def close_of(self, token: str) -> None:
        """Takes away the room that the token opens: the worker will open another one."""
        for run_id, (task_id, known) in list(self._tokens.items()):
            if known == token:
                self.close(run_id, task_id)

    def close(self, run_id: int, task_id: int) -> None:
        """Takes away what lies there; nothing where it is closed already."""
        if self._tokens.pop(run_id, None) is None:
            return
        self.reply_bytes_max.pop(run_id, None)
        self._state.finish_task(task_id, SubStatus.COMPLETED, "")
        self._state.cleanup_run(run_id)
