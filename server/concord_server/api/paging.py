"""Long lists, a page at a time: `?limit=&after=`, answered with `{"items": […], "next": cursor | null}`."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Query
from pydantic import BaseModel
from sqlmodel import Session
from sqlmodel.sql.expression import SelectOfScalar

from concord_shared.errors import UsageError

__all__ = ["Listing", "Page", "PageQuery", "paged"]

LIMIT_MAX = 200
Row = TypeVar("Row")
Item = TypeVar("Item")


class Listing(BaseModel, Generic[Item]):
    """next: what to send as `after` for the following page; null at the end."""

    items: list[Item]
    next: str | None = None


class PageQuery:
    def __init__(
        self,
        limit: Annotated[int, Query(ge=1, le=LIMIT_MAX, description="How many at most.")] = 50,
        after: Annotated[str | None, Query(max_length=200, description="The `next` of the page before.")] = None,
    ) -> None:
        self.limit = limit
        self.after = after


Page = Annotated[PageQuery, Depends()]


def paged(
    session: Session,
    query: SelectOfScalar[Row],
    column: Any,
    page: PageQuery,
    view: Callable[[Row], Item],
    *,
    newest_first: bool = False,
) -> Listing[Item]:
    """One page of `query`, in the order of `column`, which is unique; `after` is that column's value."""
    if page.after is not None:
        last = _typed(column, page.after)
        query = query.where(column < last if newest_first else column > last)
    query = query.order_by(column.desc() if newest_first else column.asc()).limit(page.limit + 1)
    rows: Sequence[Row] = session.exec(query).all()
    shown = rows[: page.limit]
    cursor = str(getattr(shown[-1], column.key)) if len(rows) > page.limit else None
    return Listing(items=[view(row) for row in shown], next=cursor)


def _typed(column: Any, text: str) -> Any:
    if column.type.python_type is not int:
        return text
    if not text.isdecimal() or len(text) > 18:
        raise UsageError("after: expected the `next` of the page before")
    return int(text)
