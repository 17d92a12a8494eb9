"""Words of another party, before a person sees them."""

__all__ = ["printable"]


def printable(text: str, keep: str = "") -> str:
    """`text`, unable to steer a terminal: what does not print, but for the letters of `keep`, is a space."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in text)
