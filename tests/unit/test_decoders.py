"""Every decoder of what another party sends, fed what nobody would send: it answers, or refuses in its own words.

Arbitrary bytes rarely pass the first check, so most of what is tried here is something valid with a few bytes changed,
cut out, repeated or put in.
"""

import datetime
import json
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Array, ConfigRecord
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as some
from pydantic import ValidationError

from concord_server.superlink.access import peer_of
from concord_server.superlink.calls import FLEET, CallRefusedError, node_of
from concord_shared import documents
from concord_shared.certificates import membership_key, read_certificate, root_fingerprint
from concord_shared.errors import ArtefactError, ConcordError, DocumentRefusedError, MaskingRefusedError, UsageError
from concord_shared.flower_objects import ids_of, put_together, take_apart
from concord_shared.masking.shamir import SHARE_BYTES, combine, split
from concord_shared.masking.tables import PREFIX, TABLES, pack_table, read_table
from concord_shared.messages import RAW, model_record, offer_message, read_array, read_offer
from concord_shared.plan.schema import parse_plan_document
from concord_shared.protocol import EnrolRequest, InvitationLine, Trust, Updates
from concord_shared.signing import (
    Document,
    Envelope,
    new_identity_key,
    open_envelope,
    public_text,
    read_public_text,
    seal,
)
from concord_shared.tensors import read_safetensors, write_safetensors
from helpers import IMAGES, offer_of, plan_of
from unit.client.fake_coordinator import NOW, Authority

DOCUMENTS = [
    kind
    for kind in vars(documents).values()
    if isinstance(kind, type) and issubclass(kind, Document) and kind is not Document
]
STUDY = documents.Study(
    study="heart", title="Heart", purpose="Who is at risk?", organisation="lab", members=("hospital-a",), issued_at=NOW
)
KEY = new_identity_key()


@some.composite
def mutated(draw: some.DrawFn, valid: bytes) -> bytes:
    """`valid` with one to four places changed."""
    made = bytearray(valid)
    for _ in range(draw(some.integers(1, 4))):
        at = draw(some.integers(0, max(0, len(made) - 1)))
        length = draw(some.sampled_from([1, 2, 4, 8, 64]))
        how = draw(some.sampled_from(["flip", "cut", "repeat", "put"]))
        if how == "flip" and made:
            made[at] ^= 1 << draw(some.integers(0, 7))
        elif how == "cut":
            del made[at : at + length]
        elif how == "repeat":
            made[at:at] = made[at : at + length]
        else:
            made[at:at] = draw(some.binary(min_size=length, max_size=length))
    return bytes(made)


def or_noise(valid: bytes) -> some.SearchStrategy[bytes]:
    return mutated(valid) | some.binary(max_size=300)


def refuses(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What it gives, or None where it refuses by one of `errors`; anything else that it raises fails the test."""
    try:
        return call()
    except errors:
        return None


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
@given(data=some.data())
def test_documents(kind: type[Document], data: some.DataObject) -> None:
    """What is read is exactly the canonical bytes of what it says."""
    fields = {"schema": kind.SCHEMA} | dict.fromkeys(kind.model_fields, data.draw(JSON))
    payload = data.draw(or_noise(STUDY.canonical) | some.just(json.dumps(fields).encode()))
    read = refuses(lambda: kind.from_canonical(payload), DocumentRefusedError)
    assert read is None or read.canonical == payload


@given(or_noise(seal(STUDY, KEY).model_dump_json().encode()))
def test_signed_documents(sent: bytes) -> None:
    """A changed envelope is refused, or says and means what was signed."""

    def read() -> documents.Study:
        return open_envelope(Envelope.model_validate_json(sent), documents.Study, [KEY.public_key()])

    opened = refuses(read, ValidationError, DocumentRefusedError)
    assert opened in (None, STUDY)


@pytest.mark.parametrize("kind", [Trust, EnrolRequest, Updates, Envelope], ids=lambda kind: kind.__name__)
@given(sent=some.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_answers_of_the_control_listener(kind: Any, sent: bytes) -> None:
    refuses(lambda: kind.model_validate_json(sent), ValidationError)


@given(JSON | some.just(plan_of(IMAGES).document()), some.text(max_size=10), JSON)
def test_plans(document: Any, key: str, value: Any) -> None:
    """Plans arrive as JSON objects; ValidationError and PlanError are what `parse_plan_document` says it raises."""
    if isinstance(document, dict):
        sent = document | {"schema": "concord/plan/1", key: value}
        refuses(lambda: parse_plan_document(sent), ConcordError, ValueError)


TABLE = {place: tuple(bytes([place]) * width for width in TABLES["adverts"].values()) for place in (0, 2, 5)}
ROWS = some.lists(some.integers(-3, 300), max_size=5) | some.lists(some.text(max_size=3), max_size=3) | some.floats()


@given(some.dictionaries(some.sampled_from(["places", "channel", "mask", "signature", "other"]), ROWS | some.binary()))
def test_tables_of_masked_steps(columns: dict[str, Any]) -> None:
    name, record = pack_table("adverts", TABLE)
    sent = ConfigRecord({**record, **{key: value for key, value in columns.items() if value != []}})
    read = refuses(lambda: read_table({name: sent}, "adverts"), MaskingRefusedError)
    if read is not None:
        assert {tuple(map(len, row)) for row in read.values()} <= {tuple(TABLES["adverts"].values())}
    assert name == f"{PREFIX}adverts"


@given(
    some.dictionaries(
        some.integers(-1, 400),
        some.binary(max_size=40) | some.binary(min_size=SHARE_BYTES, max_size=SHARE_BYTES),
        max_size=5,
    )
)
def test_shares(shares: dict[int, bytes]) -> None:
    secret = refuses(lambda: combine(shares), ConcordError, ValueError)
    assert secret is None or len(secret) == 32


@given(some.binary(min_size=32, max_size=32), some.integers(2, 5), some.data())
def test_shares_that_belong_together(secret: bytes, threshold: int, data: some.DataObject) -> None:
    shares = split(secret, range(1, 8), threshold)
    chosen = data.draw(some.permutations(sorted(shares)))[:threshold]
    assert combine({point: shares[point] for point in chosen}) == secret


@given(
    some.sampled_from(["float32", "object", "O", "", "float64"]),
    some.lists(some.integers(-(1 << 40), 1 << 40), max_size=4).map(tuple),
    some.binary(max_size=64),
)
def test_arrays(dtype: str, shape: tuple[int, ...], content: bytes) -> None:
    """A claim of a shape allocates nothing: the array is a view of the bytes that came."""
    read = refuses(lambda: read_array(Array(dtype, shape, RAW, content), np.dtype("float32"), (4,), RAW), ValueError)
    assert read is None or (read.shape, read.nbytes) == ((4,), 16)


MESSAGE = offer_message(offer_of(), model_record(np.ones(5, np.float32), {}), 2, NOW)
[TREE], PARTS = take_apart([MESSAGE])
OBJECTS = dict(PARTS(set(ids_of(TREE))))


@given(some.data())
def test_messages(data: some.DataObject) -> None:
    """One part of a message changed; the ids of parts are checked before, so that this is a peer who made it so."""
    contents = dict(OBJECTS)
    changed = data.draw(some.sampled_from(sorted(contents)))
    contents[changed] = data.draw(or_noise(contents[changed]))
    message = refuses(lambda: put_together(TREE.object_id, contents, 1 << 20), DocumentRefusedError)
    if message is not None:
        refuses(lambda: read_offer(message), ConcordError)


@given(or_noise(public_text(KEY.public_key()).encode()))
def test_public_keys(sent: bytes) -> None:
    text = sent.decode("utf-8", "replace")
    refuses(lambda: read_public_text(text), DocumentRefusedError)


def changed_der(certificate: x509.Certificate) -> some.SearchStrategy[bytes]:
    """In PEM, which hardly survives a change of its text."""
    der = or_noise(certificate.public_bytes(Encoding.DER))
    return der.map(lambda der: ssl.DER_cert_to_PEM_cert(der).encode())


ROOT = Authority.root()
MEMBERSHIP = ROOT.authority()


@given(or_noise(ROOT.pem.encode()) | or_noise(MEMBERSHIP.pem.encode()) | changed_der(MEMBERSHIP.certificate))
def test_certificates(sent: bytes) -> None:
    text = sent.decode("utf-8", "replace")
    refuses(lambda: read_certificate(text), DocumentRefusedError)
    now = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    pinned = root_fingerprint(ROOT.certificate)
    refuses(lambda: membership_key(text, MEMBERSHIP.pem, pinned, now), DocumentRefusedError)
    refuses(lambda: membership_key(ROOT.pem, text, pinned, now), DocumentRefusedError)


@given(or_noise(ROOT.certificate.public_bytes(Encoding.DER)))
def test_certificates_of_peers(sent: bytes) -> None:
    peer_of(sent)


@given(or_noise(f"concord://fl.example.org:8443/hospital/ward#{'a' * 64}.{'t' * 43}".encode()))
def test_invitations(sent: bytes) -> None:
    refuses(lambda: InvitationLine.parse(sent.decode("utf-8", "replace")), UsageError)


@pytest.mark.parametrize("path", sorted(FLEET))
@given(
    sent=or_noise(PullMessagesRequest(node=Node(node_id=7)).SerializeToString())
    | or_noise(PushMessagesRequest(node=Node(node_id=7)).SerializeToString())
)
def test_calls_of_nodes(path: str, sent: bytes) -> None:
    refuses(lambda: node_of(path, sent), CallRefusedError)


with tempfile.TemporaryDirectory() as made:
    write_safetensors(
        Path(made) / "model", {"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float32)}, {"k": "v"}
    )
    FILE = (Path(made) / "model").read_bytes()


@given(or_noise(FILE))
def test_files_of_tensors(sent: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(sent)
        refuses(lambda: read_safetensors(path), ArtefactError)
