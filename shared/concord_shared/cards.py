"""What a dataset's card says: its number of rows, as far as the owner tells it, and the terms that bound agreements."""

from datetime import UTC, datetime
from typing import Literal

from concord_shared.documents import Agreement, DatasetCard, DataTerms

__all__ = ["CARD_BYTES_MAX", "beyond_terms", "figure", "most_rows", "rows_text", "terms_lines", "told_rows"]

CARD_BYTES_MAX = 1 << 20
"""Of a card's canonical form."""
STEPS = (1, 2, 5, 10, 20, 50)
"""Per cent that shares are rounded to."""


def told_rows(rows: int, about: bool, minimum: int) -> tuple[int, Literal["", "about", "fewer"]]:
    """A card's `rows` and `rows_told`: below `minimum` only that; about, to two digits but no finer than tens."""
    if rows < minimum:
        return minimum, "fewer"
    if not about:
        return rows, ""
    unit = _unit(rows)
    return max(unit, round(rows / unit) * unit), "about"


def most_rows(card: DatasetCard) -> int:
    """The most that the dataset can have, by what its card says."""
    if card.rows_told == "fewer":
        return max(0, card.rows - 1)
    return card.rows + _unit(card.rows) // 2 if card.rows_told == "about" else card.rows


def rows_text(card: DatasetCard) -> str:
    words = {"": "", "about": "about ", "fewer": "fewer than "}
    return f"{words[card.rows_told]}{card.rows}"


def figure(count: int, rows: int, minimum: int) -> str:
    """A `Figure`: `count` of `rows` in steps that stand for at least `minimum` rows each; none of too few rows."""
    if rows < 2 * minimum:
        return ""
    if count < minimum:
        return f"<{minimum}"
    step = next(step for step in STEPS if step * rows >= 100 * minimum)
    return f"{min(100, max(step, round(100 * count / rows / step) * step))}%"


def beyond_terms(ceiling: DataTerms | None, agreement: Agreement) -> tuple[str, ...]:
    """What of an agreement the terms of a card do not allow, one line each; none where it is within them."""
    if ceiling is None:
        return ()
    terms, found = agreement.terms, []
    if ceiling.purposes and not (terms.purposes and set(terms.purposes) <= set(ceiling.purposes)):
        said = ", ".join(terms.purposes) or "no purpose"
        found.append(f"the agreement names {said}: the dataset's terms allow {', '.join(ceiling.purposes)}")
    if ceiling.who and agreement.requester not in ceiling.who:
        found.append(f"requester {agreement.requester}: the dataset's terms allow {', '.join(ceiling.who)}")
    if ceiling.not_after and terms.not_after > ceiling.not_after:
        found.append(f"until {_day(terms.not_after)}: the dataset's terms end {_day(ceiling.not_after)}")
    if terms.minimum_cohort < ceiling.minimum_cohort:
        found.append(
            f"the agreement asks for {terms.minimum_cohort} nodes in a round: the dataset's terms ask for at least "
            f"{ceiling.minimum_cohort}"
        )
    if ceiling.outputs is not None and (terms.outputs is None or not set(terms.outputs) <= set(ceiling.outputs)):
        said = "does not say what may be made of models" if terms.outputs is None else f"allows {_all(terms.outputs)}"
        found.append(f"the agreement {said}: the dataset's terms allow {_all(ceiling.outputs)}")
    return tuple(found)


def terms_lines(terms: DataTerms) -> list[tuple[str, str]]:
    """Each restriction: what, and to what."""
    rows = {
        "purposes": ", ".join(terms.purposes),
        "who": ", ".join(terms.who),
        "until": _day(terms.not_after) if terms.not_after else "",
        "minimum cohort": str(terms.minimum_cohort or ""),
        "epsilon": f"at most {terms.epsilon}" if terms.epsilon else "",
        "outputs": "" if terms.outputs is None else _all(terms.outputs),
    }
    return [(what, said) for what, said in rows.items() if said]


def _unit(rows: int) -> int:
    """Of the second digit, at least ten."""
    return int(max(10, 10 ** (len(str(rows)) - 2)))


def _all(outputs: tuple[str, ...]) -> str:
    return ", ".join(outputs) or "nothing"


def _day(at: int) -> str:
    return f"{datetime.fromtimestamp(min(at, 253_402_300_799), UTC):%Y-%m-%d}"
