"""Bodies that are records of the protocol: strict, and read as the JSON that they are."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ValidationError

from concord_shared.protocol import EnrolRequest, HeadSent, RenewRequest
from concord_shared.signing import Envelope

__all__ = ["Enrolment", "OwnHead", "Renewal", "Signed", "from_json"]


def from_json(kind: type[BaseModel]) -> Callable[[Any], Any]:
    """A validator: strict as for JSON text, where a list is a tuple's only spelling."""

    def read(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        try:
            return kind.model_validate_json(json.dumps(value))
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False))
            raise ValueError("; ".join(faults)) from None
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"expected {kind.__name__} in JSON") from None

    return read


Signed = Annotated[Envelope, BeforeValidator(from_json(Envelope))]
Enrolment = Annotated[EnrolRequest, BeforeValidator(from_json(EnrolRequest))]
Renewal = Annotated[RenewRequest, BeforeValidator(from_json(RenewRequest))]
OwnHead = Annotated[HeadSent, BeforeValidator(from_json(HeadSent))]
