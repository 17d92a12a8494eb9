"""A Flower message as the objects that travel: taken apart by the sender, put together by the receiver.

Flower stores a message as a tree of content-addressed objects (a model that goes to all nodes is stored once). What
arrives was built by another party: its tree, sizes and contents are checked before anything is allocated from them.
This module and the two adapters (`concord_client.fleet`, `concord_server.superlink`) alone import Flower's private
modules; tests/integration/test_flower_contract.py fails where a version of Flower lacks what they use.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flwr.app import Array, Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from concord_shared.errors import DocumentRefusedError

__all__ = ["Objects", "ids_of", "pull_all", "put_together", "take_apart"]

DIVIDER = b"\x00"
OBJECTS_MAX = 100_000
"""Chunks of 5 MiB: enough for models that no node could hold."""
DEPTH_MAX = 8
PARALLEL = 2

Objects = Iterator[tuple[str, bytes]]


def take_apart(messages: Iterable[Message]) -> tuple[list[ObjectTree], Callable[[set[str]], Objects]]:
    """The messages' trees, and a function that gives the wanted objects, one at a time, children before parents.

    Sets each message's id, which is the digest of all that it holds. What messages share is digested once.
    """
    trees, nested = [], {}
    with no_object_id_recompute():
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            nested.update(get_all_nested_objects(message))
            trees.append(get_object_tree(message))

    def contents(wanted: set[str]) -> Objects:
        for object_id, item in nested.items():
            if object_id in wanted:
                yield object_id, item.deflate()

    return trees, contents


def ids_of(tree: ObjectTree) -> list[str]:
    """All object ids of a received tree, each once, children before parents.

    Raises:
        DocumentRefusedError: it is deeper or larger than any message of a round.
    """
    found: dict[str, None] = {}

    def walk(node: ObjectTree, depth: int) -> None:
        if depth > DEPTH_MAX or len(found) > OBJECTS_MAX:
            raise DocumentRefusedError("a message is deeper or has more parts than any message of a round")
        for child in node.children:
            walk(child, depth + 1)
        found[node.object_id] = None

    walk(tree, 0)
    return list(found)


def pull_all(object_ids: Iterable[str], pull: Callable[[str], bytes], bytes_max: int) -> dict[str, bytes]:
    """The objects by id, each the one that its id names, together at most `bytes_max`.

    Raises:
        DocumentRefusedError: one is another, or they are too large; what `pull` raises.
    """
    contents: dict[str, bytes] = {}
    total = 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        for object_id, content in _in_order(pool, list(object_ids), pull):
            total += len(content)
            if total > bytes_max:
                raise DocumentRefusedError(f"a message is larger than the {bytes_max} bytes that one may have")
            if get_object_id(content) != object_id:
                raise DocumentRefusedError("a part of a message is not the one that its id names")
            contents[object_id] = content
    return contents


def _in_order(pool: ThreadPoolExecutor, ids: list[str], pull: Callable[[str], bytes]) -> Objects:
    """A few requests at a time, so that no more than a few parts are held beyond those that were counted."""
    window = 2 * PARALLEL
    running = [pool.submit(pull, object_id) for object_id in ids[:window]]
    for index, object_id in enumerate(ids):
        content = running[index].result()
        running[index] = None  # type: ignore[call-overload] # let go of the bytes
        if index + window < len(ids):
            running.append(pool.submit(pull, ids[index + window]))
        yield object_id, content


def put_together(message_id: str, contents: dict[str, bytes], bytes_max: int) -> Message:
    """The message of these objects; `contents` is emptied while it is built.

    Raises:
        DocumentRefusedError: the parts do not fit together, or claim more bytes than they have.
    """
    try:
        message = inflate_object_from_contents(message_id, contents, objects=_arrays(contents, bytes_max))
    except DocumentRefusedError:
        raise
    except Exception as error:  # Flower's readers raise whatever a malformed part makes them raise
        raise DocumentRefusedError(f"a message cannot be read: {type(error).__name__}") from error
    if not isinstance(message, Message):
        raise DocumentRefusedError(f"expected a message, got {type(message).__name__}")
    message.metadata.__dict__["_message_id"] = message_id
    return message


def _arrays(contents: dict[str, bytes], bytes_max: int) -> dict[str, InflatableObject]:
    """The arrays by id, each chunk copied once (Flower's own way copies it four times); their chunks are let go.

    An array may name one chunk a million times: what would be allocated is counted before it is.
    """
    found: dict[str, InflatableObject] = {}
    used: set[str] = set()
    total = 0
    for object_id, content in contents.items():
        if not content.startswith(b"Array "):
            continue
        head, _, body = content.partition(DIVIDER)
        children = head.decode().split(" ")[1].split(",")
        document: Any = json.loads(body)
        chunks = [children[index] for index in document["arraychunk_ids"]]
        total += sum(len(contents[chunk]) for chunk in chunks)
        if total > bytes_max:
            raise DocumentRefusedError(
                f"the arrays of a message are larger than the {bytes_max} bytes that one may have"
            )
        data = b"".join(_chunk(contents[chunk]) for chunk in chunks)
        found[object_id] = Array(document["dtype"], tuple(document["shape"]), document["stype"], data)
        used.update(chunks)
    for chunk in used:
        del contents[chunk]
    return found


def _chunk(content: bytes) -> memoryview:
    if not content.startswith(b"ArrayChunk "):
        raise DocumentRefusedError("an array of a message consists of something else than chunks")
    return memoryview(content)[content.index(DIVIDER) + 1 :]
