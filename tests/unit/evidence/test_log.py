"""A log as a file: whatever is done to it is found, and named."""

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.errors import DocumentRefusedError, LogBrokenError
from concord_shared.evidence.log import verify_log
from concord_shared.signing import fingerprint, new_identity_key
from unit.evidence.logs import KEY, chain_of, entries_of, head_of, written

COUNT = 200
CHAIN = chain_of(entries_of(COUNT))
CONTENT = written(CHAIN)
TRUSTED = fingerprint(KEY.public_key())
LINES = CONTENT.splitlines(keepends=True)


def broken(content: bytes, *remembered: tuple[int, str]) -> LogBrokenError:
    with pytest.raises(LogBrokenError) as caught:
        verify_log(content, TRUSTED, remembered)
    return caught.value


def test_a_log_as_it_was_written_is_verified() -> None:
    half = head_of(CHAIN[:77])
    found = verify_log(CONTENT, TRUSTED, [(half.size, half.root)])
    assert (found.log, found.entries, found.key) == ("hearts/coordinator", COUNT, TRUSTED)


def test_every_byte_changed_once_is_found_and_the_entry_named() -> None:
    """Each position of the file, to another byte: whatever else a byte of an entry becomes, the entry is named."""
    chance, place = random.Random(7), 0
    for number, line in enumerate(LINES):
        for offset in range(len(line)):
            changed = bytearray(CONTENT)
            changed[place + offset] ^= chance.randrange(1, 256)
            with pytest.raises(DocumentRefusedError) as caught:
                verify_log(bytes(changed), TRUSTED)
            if number and place + offset < len(CONTENT) - 1:
                assert isinstance(caught.value, LogBrokenError)
                assert caught.value.entry == number
        place += len(line)


def test_every_deletion_is_found() -> None:
    for gone in range(1, COUNT + 1):
        error = broken(b"".join(LINES[:gone] + LINES[gone + 1 :]))
        assert error.entry == gone
        assert ("removed" if gone < COUNT else "cut") in str(error)


def test_several_that_were_removed_are_named() -> None:
    assert "entries 20 to 29 were removed" in str(broken(b"".join(LINES[:20] + LINES[30:])))


def test_every_swap_of_neighbours_is_found() -> None:
    for first in range(1, COUNT):
        error = broken(b"".join([*LINES[:first], LINES[first + 1], LINES[first], *LINES[first + 2 :]]))
        assert error.entry == first
        assert f"entry {first + 1} stands in the place of entry {first}" in str(error)


@pytest.mark.parametrize("left", [0, 1, 99, COUNT - 1])
def test_a_log_that_was_cut_is_found_against_its_head(left: int) -> None:
    error = broken(b"".join(LINES[: left + 1]))
    assert error.entry == left + 1
    assert "cut" in str(error)


def test_a_log_cut_with_a_new_head_is_found_by_who_remembers_one_and_by_nobody_else() -> None:
    remembered = head_of(CHAIN)
    for left in range(1, COUNT):
        cut = written(CHAIN[:left])
        verify_log(cut, TRUSTED)
        assert broken(cut, (remembered.size, remembered.root)).entry == left + 1


@pytest.mark.parametrize("at", range(1, COUNT + 1, 7))
def test_a_fork_signed_anew_is_found_by_who_remembers_a_head(at: int) -> None:
    entries = entries_of(COUNT)
    forked = chain_of([*entries[: at - 1], *entries_of(COUNT, by="another")[at - 1 :]])
    content, remembered = written(forked), head_of(CHAIN)
    verify_log(content, TRUSTED)
    assert "rewritten" in str(broken(content, (remembered.size, remembered.root)))
    short = head_of(CHAIN[:at])
    assert broken(content, (short.size, short.root)).entry == at


def test_two_marks_of_one_size_are_both_compared() -> None:
    """Who was shown two logs holds such a pair, and one of them is not of this log, in whichever order."""
    mine, other = (head_of(CHAIN).size, head_of(CHAIN).root), (head_of(CHAIN).size, "0" * 64)
    for marks in ([mine, other], [other, mine]):
        assert "rewritten" in str(broken(written(CHAIN), *marks))


def test_an_entry_inserted_or_repeated_is_found() -> None:
    assert broken(b"".join([*LINES[:50], LINES[20], *LINES[50:]])).entry == 50
    error = broken(b"".join([*LINES, LINES[-1]]))
    assert error.entry == COUNT + 1


def test_a_rewritten_chain_under_the_old_head_is_found() -> None:
    entries = entries_of(COUNT)
    forked = chain_of([*entries[:100], *entries_of(COUNT, by="another")[100:]])
    assert "rewritten" in str(broken(written(forked, head=head_of(CHAIN))))


def test_a_log_signed_by_another_key_is_refused() -> None:
    with pytest.raises(DocumentRefusedError, match="signed by key"):
        verify_log(written(CHAIN, new_identity_key()), TRUSTED)


def test_a_head_spelled_otherwise_is_found() -> None:
    """Base64 has spare bits: another letter may mean the same bytes, and the signature would hold."""
    header = LINES[0].decode()
    signature = json.loads(header)["head"]["signatures"][0]["signature"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature[:-3] + letters[letters.index(signature[-3]) ^ 1] + "=="
    assert base64.b64decode(other) == base64.b64decode(signature)
    with pytest.raises(DocumentRefusedError, match="altered"):
        verify_log(CONTENT.replace(signature.encode(), other.encode()), TRUSTED)


@given(st.binary(max_size=600))
def test_garbage_is_no_log(content: bytes) -> None:
    with pytest.raises(DocumentRefusedError):
        verify_log(content + b"\n", TRUSTED)


@given(st.binary(max_size=300), st.integers(0, len(CONTENT)))
def test_garbage_within_a_log_is_found(garbage: bytes, place: int) -> None:
    if garbage:
        with pytest.raises(DocumentRefusedError):
            verify_log(CONTENT[:place] + garbage + CONTENT[place:], TRUSTED)
