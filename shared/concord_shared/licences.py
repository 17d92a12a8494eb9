"""Licences as SPDX writes them: identifiers of its list, `LicenseRef-…` for own ones, AND, OR, WITH and brackets."""

import re
from functools import cache
from typing import Any

from concord_shared.errors import UsageError

__all__ = ["read_licence"]

OWN = re.compile(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")
LENGTH_MAX = 300
NESTING_MAX = 10


def read_licence(text: str) -> str:
    """An SPDX expression, its identifiers written as the list writes them; "" stays "".

    Raises:
        UsageError: not such an expression, or an identifier that the list lacks.
    """
    if not text.strip():
        return ""
    wrong = UsageError(
        f"licence {text[:80]!r}: expected an SPDX expression, for example CC-BY-4.0, MIT OR Apache-2.0, or "
        "LicenseRef-NAME for terms of your own (https://spdx.org/licenses)"
    )
    if len(text) > LENGTH_MAX or not text.isprintable() or text.count("(") > NESTING_MAX:
        raise wrong
    list_ = _spdx()
    try:
        found = list_.parse(text)
        unknown = [key for key in list_.unknown_license_keys(found) if not OWN.fullmatch(key)]
    except Exception as error:  # what it raises differs from one wrong expression to another, AttributeError among them
        raise wrong from error
    if found is None or unknown:
        raise wrong
    return str(found.render())


@cache
def _spdx() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()
