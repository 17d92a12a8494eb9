"""What concord uses of Flower's private modules, and how: fails where an installed version of Flower differs."""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Metadata, RecordDict

from concord_shared.flower_objects import ids_of, put_together, take_apart
from concord_shared.messages import model_record, with_metadata

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
ADAPTERS = (
    "shared/concord_shared/flower_objects.py",
    "client/concord_client/fleet.py",
    "server/concord_server/superlink",
    "deploy/concord_local/ray_transport.py",
)
EXTRAS = {"flwr.server.superlink.fleet.vce.backend.raybackend"}
"""Needs Ray, which is an extra; tests/integration/test_ray.py holds it to its use."""


def imported(path: Path) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "flwr":
            found |= {(node.module, alias.name) for alias in node.names}
    return {each for each in found if each[0] not in PUBLIC}


def adapter_files() -> list[Path]:
    paths = [ROOT / each for each in ADAPTERS]
    return [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]


NAMES = sorted({each for file in adapter_files() for each in imported(file) if each[0] not in EXTRAS})


def test_private_modules_of_flower_are_imported_by_the_adapters_alone() -> None:
    allowed = set(adapter_files())
    for folder in ("shared", "client", "server", "deploy"):
        for file in (ROOT / folder).rglob("*.py"):
            assert file in allowed or not imported(file), f"{file} imports {imported(file)}"


def test_the_version_is_the_one_that_the_adapters_were_written_for() -> None:
    assert version("flwr").startswith("1.41.")


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value)
def test_a_name_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


SIGNATURES = {
    "flwr.superlink.servicer.fleet.fleet_handlers": {
        "activate_node": ["request", "state"],
        "deactivate_node": ["request", "state"],
        "send_node_heartbeat": ["request", "state"],
        "pull_messages": ["request", "state", "store"],
        "push_messages": ["request", "state"],
        "push_object": ["request", "state"],
        "pull_object": ["request", "state"],
        "confirm_message_received": ["request", "state", "store"],
    },
    "flwr.superlink.servicer.runtime.runtime_handlers": {
        "push_messages": ["request", "state", "task"],
        "pull_messages": ["request", "state", "task"],
        "push_object": ["request", "state", "task"],
        "pull_object": ["request", "state", "task"],
        "confirm_message_received": ["request", "state", "task"],
    },
    "flwr.supercore.servicer.runtime.runtime_handlers": {"send_task_heartbeat": ["request", "state", "task"]},
    "flwr.common.serde": {"message_to_proto": ["message"]},
    "flwr.app.message": {"remove_content_from_message": ["message"]},
    "flwr.supercore.primitives.asymmetric": {
        "public_key_to_bytes": ["public_key"],
        "bytes_to_public_key": ["public_key_bytes"],
        "verify_signature": ["public_key", "message", "signature"],
    },
    "flwr.supercore.inflatable.inflatable_utils": {
        "inflate_object_from_contents": ["object_id", "object_contents", "keep_object_contents", "objects"],
    },
}


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [(module, name, parameters) for module, names in SIGNATURES.items() for name, parameters in names.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_function_takes_what_is_given(module: str, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(importlib.import_module(module), name)).parameters) == parameters


LINK_STATE = {
    "activate_node": ["node_id", "heartbeat_interval"],
    "deactivate_node": ["node_id"],
    "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval", "location", "name"],
    "get_node_id_by_public_key": ["public_key"],
    "get_task_by_token": ["token"],
    "claim_task": ["task_id"],
    "activate_task": ["task_id"],
    "finish_task": ["task_id", "sub_status", "details"],
    "cleanup_run": ["run_id"],
}


@pytest.mark.parametrize(("name", "parameters"), LINK_STATE.items(), ids=lambda value: str(value))
def test_the_link_state_has_what_the_rooms_use(name: str, parameters: list[str]) -> None:
    from flwr.server.superlink.linkstate import LinkState

    assert list(inspect.signature(getattr(LinkState, name)).parameters)[1:] == parameters


def test_the_stores_keep_things_where_the_door_looks() -> None:
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
    from flwr.superlink.federation import NoOpFederationManager

    factory = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    objects = factory.store_instance = InMemoryObjectStore()
    state: Any = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), factory).state()
    assert (state.message_ins_store, state.message_ins_id_to_message_res_id) == ({}, {})
    tree = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id="b" * 64)])
    objects.preregister(1, tree)
    assert {key: entry.child_object_ids for key, entry in objects.store.items()} == {"a" * 64: ["b" * 64], "b" * 64: []}
    assert not objects.store["b" * 64].is_available


def test_headers_are_those_that_the_door_reads() -> None:
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TASK_TOKEN_HEADER

    names = (TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TASK_TOKEN_HEADER)
    assert len({name.lower() for name in names}) == 4


def test_a_message_comes_back_from_its_parts() -> None:
    content: Any = RecordDict(
        {"model": model_record(np.arange(3_000_000, dtype=np.float32), {}), "c": ConfigRecord({"b": b"\x00"})}
    )
    message = with_metadata(content, Metadata(1, "", 1, 7, "", "", 0.0, 60.0, "train"))
    [tree], contents = take_apart([message])
    ids = ids_of(tree)
    parts = dict(contents(set(ids)))
    assert set(parts) == set(ids)
    assert ids[-1] == tree.object_id == message.metadata.message_id
    again = put_together(tree.object_id, parts, 1 << 30)
    assert again.object_id == message.object_id
    record = again.content.array_records["model"]
    assert record["theta"].data == message.content.array_records["model"]["theta"].data
