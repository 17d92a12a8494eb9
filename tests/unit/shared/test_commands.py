"""What the two commands have in common."""

from concord_shared.commands import readable


def test_fingerprint_is_read_in_groups() -> None:
    assert readable("0123456789ab") == "0123 4567 89ab"
