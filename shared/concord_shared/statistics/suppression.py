"""Small counts are not told, nor what would give them away.

One column's counts (its categories or bins, the missing ones, those outside) add up to the rows, which everybody knows.
So a single cell left out is the rest of the others. Therefore cells are left out in groups: what is left out together
counts at least `minimum` rows and is at least two cells that are not empty. Empty cells are told: they say nothing of
anybody that the contract's list of categories does not. Of hashed words they would: who tries a word would learn that
nobody has it.
"""

from collections.abc import Sequence

__all__ = ["suppressed"]


def suppressed(cells: Sequence[int], minimum: int, of_hashed: bool = False) -> list[int | None]:
    """`cells` with None where a count is below `minimum` and above 0, or is left out to hide one that is.

    of_hashed: the cells but the last two (missing, unknown) are bins, and one that is empty is left out too, where
    any count is.
    """
    bins = len(cells) - 2 if of_hashed and minimum > 1 else 0
    hidden = {place for place, count in enumerate(cells) if count < minimum and (count > 0 or place < bins)}
    if not hidden:
        return list(cells)
    others = sorted((count, place) for place, count in enumerate(cells) if count >= max(1, minimum))
    for _, place in others:
        if sum(cells[each] > 0 for each in hidden) >= 2 and sum(cells[each] for each in hidden) >= minimum:
            break
        hidden.add(place)
    return [None if place in hidden else count for place, count in enumerate(cells)]
