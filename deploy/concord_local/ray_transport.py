"""The same nodes on Flower's simulation runtime: Ray actors on this machine, or on all machines of a Ray cluster.

The only module that imports from below Flower's public names; a test tells when another version has them differently:

    flwr.server.superlink.fleet.vce.backend.raybackend.RayBackend
        init_args and client_resources; build and pool
    flwr.simulation.ray_transport.ray_actor.BasicActorPool, as the backend's `pool`
        is_actor_available, submit, fetch_result_and_return_actor_to_pool, add_actor_back_to_pool

Data and models go once into Ray's object store, which brings them once to each machine. What runs on a Ray cluster
trusts all of it: whoever reaches its port can run code there. It is one person's machines, not partners'.
"""

import importlib.util
import logging
import math
import os
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from concord_client.devices import prepare_process
from concord_local.attacks import Attack
from concord_local.federation import Federation
from concord_local.nodes import NodeHost
from concord_local.transports import _without_model
from concord_shared.errors import ConcordError, RunFailedError, UsageError
from concord_shared.messages import decline
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.strategies import Strategy

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["RayTransport", "check_ray", "load_flower"]

log = logging.getLogger(__name__)

HELP_CLUSTER = (
    "Expected a running cluster: `ray start --head` on one machine, on the others the command that it prints, and the "
    "same versions of Python, Ray and concord on all"
)
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Nobody is told of a run; no warning about the GPUs of actors that ask for none."""
CONNECT_TIMEOUT_S = 5
RESTARTS_MAX = 10
"""How often Ray starts an actor again; what the dead one was asked is asked again, once."""


def check_ray(address: str) -> None:
    """Raises `UsageError` where Ray is not installed, or nothing listens at the cluster's `address`."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs Ray, which is not installed here. Install it and run with: "
            "bash deploy/run.sh --with ray simulate --engine ray"
        )
    if not address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--ray-address {address}: expected HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()  # Ray itself tries for minutes
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray-address {address}: nothing answers ({error}). {HELP_CLUSTER}") from error


@dataclass(frozen=True)
class _Task:
    """What an actor needs to begin."""

    plan: dict[str, Any]
    federation: Federation
    states: Path
    device: str
    strategy: Strategy | None
    attack: Attack | None


@dataclass(frozen=True)
class _Begin:
    """Flower asks an actor for a ClientApp with this; the answer is the actor's process id, or what is wrong."""

    task: "ObjectRef[_Task]"

    def __call__(self) -> Callable[..., int | str]:
        return self._begin

    def _begin(self, **_: object) -> int | str:
        try:
            _host(self.task).warm_up()
        except ConcordError as error:
            return str(error)
        return os.getpid()


@dataclass(frozen=True)
class _Answer:
    """Flower asks an actor for a ClientApp with this: that of the node which the message is for."""

    task: "ObjectRef[_Task]"
    model: "ObjectRef[ArrayRecord] | None"

    def __call__(self) -> Callable[..., Message]:
        return self._answer

    def _answer(self, message: Message, **_: object) -> Message:
        if self.model is not None:
            message.content["model"] = _model(self.model)
        return _host(self.task).respond(message)


@lru_cache(maxsize=1)
def _host(reference: "ObjectRef[_Task]") -> NodeHost:
    """The nodes of this actor's process; their arrays are the object store's own pages."""
    import ray

    task: _Task = ray.get(reference)
    prepare_process(threads=1)
    plan = parse_plan_document(task.plan)
    return NodeHost(plan, task.federation, task.states, task.device, task.strategy, task.attack)


@lru_cache(maxsize=1)
def _model(reference: "ObjectRef[ArrayRecord]") -> ArrayRecord:
    import ray

    record: ArrayRecord = ray.get(reference)
    return record


class RayTransport:
    """Flower's pool of Ray actors, one training thread each; a free one takes the next request, whatever the node.

    Args:
        workers: actors on this machine; a cluster has one for each of its cores.
        address: a cluster's, as `ray start --head` prints it; empty for a Ray of its own on this machine.
        states: where nodes keep what stays with them between rounds; on a cluster, where all machines find it.

    Raises:
        RunFailedError: Ray does not start, or the cluster does not answer.
        UsageError: an actor cannot build its nodes.
    """

    def __init__(
        self,
        plan: Plan,
        federation: Federation,
        workers: int,
        states: Path,
        device: str = "auto",
        strategy: Strategy | None = None,
        address: str = "",
        attack: Attack | None = None,
    ) -> None:
        self._waiting: deque[tuple[Message, ObjectRef[ArrayRecord] | None]] = deque()
        self._asked: dict[ObjectRef[Any], Message] = {}
        self._ray, self._pool = _start(workers, device, address)
        try:
            self._task = self._ray.put(_Task(plan.document(), federation, states.absolute(), device, strategy, attack))
            started = self._begin()
            self.process_ids = [] if address else started  # of this machine
        except BaseException:
            self.close()
            raise

    def send(self, messages: Iterable[Message]) -> None:
        models: dict[int, tuple[ArrayRecord, ObjectRef[ArrayRecord]]] = {}  # holds the record, so that its id stays
        for message in messages:
            record = message.content.array_records.get("model")
            if record is not None and id(record) not in models:
                models[id(record)] = record, self._ray.put(record)
            self._waiting.append((_without_model(message), None if record is None else models[id(record)][1]))
            self._feed()

    def receive(self, timeout_s: float) -> list[Message]:
        if not self._asked:
            time.sleep(timeout_s)
            return []
        done, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=timeout_s)
        replies = [self._take(future) for future in done]
        self._feed()
        return replies

    def withdraw(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        self.withdraw()
        self._asked.clear()
        self._ray.shutdown()  # takes the actors along; Flower's own `terminate` would have Ray start them again

    def _begin(self) -> list[int]:
        """Every actor builds its nodes and takes a throw-away step; their process ids."""
        futures = []
        while self._pool.is_actor_available():
            futures.append(self._submit(_Begin(self._task), None))
        try:
            answers = [self._pool.fetch_result_and_return_actor_to_pool(future)[0] for future in futures]
        except self._ray.exceptions.RayError as error:
            raise RunFailedError(f"a Ray actor ended while starting: {_brief(error)}") from error
        for answer in answers:
            if isinstance(answer, str):
                raise UsageError(answer)
        return answers

    def _feed(self) -> None:
        while self._waiting and self._pool.is_actor_available():
            message, model = self._waiting.popleft()
            self._asked[self._submit(_Answer(self._task, model), message)] = message

    def _submit(self, load_app: _Begin | _Answer, message: Message | None) -> "ObjectRef[Any]":
        node = "" if message is None else str(message.metadata.dst_node_id)
        return self._pool.submit(lambda actor, *job: actor.run.remote(*job), (load_app, message, node, None))

    def _take(self, future: "ObjectRef[Any]") -> Message:
        message = self._asked.pop(future)
        try:
            reply: Message = self._pool.fetch_result_and_return_actor_to_pool(future)[0]
        except self._ray.exceptions.RayError as error:
            self._pool.add_actor_back_to_pool(future)
            log.warning("a Ray actor failed: %s", _brief(error))
            return decline(message, f"the Ray actor failed: {_brief(error)}")
        return reply


def load_flower(address: str) -> tuple[Any, Any]:
    """Ray, and the backend of Flower's simulation runtime. An own Ray asks for a token that nobody else has."""
    if "ray" not in sys.modules:  # it reads these when it is imported, and never again
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        for name, value in (QUIET if address else QUIET | own).items():
            os.environ.setdefault(name, value)
    import ray
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    return ray, RayBackend


def _start(workers: int, device: str, address: str) -> tuple[Any, Any]:
    """Ray, and Flower's pool with an actor for each core. Where actors may use GPUs, each has its part of one."""
    ray, backend_type = load_flower(address)
    if ray.is_initialized():
        raise UsageError("Ray is in use in this process already; call ray.shutdown() first, or use another process")
    init = {"address": address} if address else {"address": "local", "num_cpus": workers}
    actors = {"num_cpus": 1, "max_restarts": RESTARTS_MAX, "max_task_retries": 1}
    try:
        backend = backend_type({"init_args": {**init, "logging_level": "warning"}, "client_resources": actors})
        found = ray.cluster_resources()
        if device in ("auto", "cuda") and found.get("GPU"):
            backend.client_resources["num_gpus"] = math.floor(1e4 * found["GPU"] / found["CPU"]) / 1e4
        backend.build(ClientApp)
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        what = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise RunFailedError(
            f"{what} did not start any actor: {_brief(error)}{'. ' + HELP_CLUSTER if address else ''}"
        ) from error
    return ray, backend.pool


def _brief(error: Exception) -> str:
    """The last line: what went wrong, after Ray's own account of where."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
