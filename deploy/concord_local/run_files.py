"""What a run's directory must hold where it is read again: files that people can edit, copy in part, or mix up.

These models only check; what is read are the documents themselves.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

__all__ = ["SettingFile", "what_is_wrong"]

Table = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


class SettingFile(BaseModel):
    """simulation.json: a `Setting`, of which runs of before have not every key."""

    model_config = ConfigDict(extra="forbid")

    named: str = Field(alias="schema")
    data: str
    nodes: Count | None
    partition: str
    workers: Annotated[int, Field(ge=0)]
    faults: str = ""
    device: str = ""
    compare: bool = False
    engine: str = ""
    ray_address: str = ""
    attack: str = ""
    attackers: int | None = None
    side_by_side: Annotated[int, Field(ge=0)] = 0


class SeedsFile(BaseModel):
    plan: Table
    seeds: Count


class DataFile(BaseModel):
    nodes: dict[str, Table]
    digest: str


class EnvironmentFile(BaseModel):
    concord: str
    resumed_in: list[Table] = []


class SecondsOfRun(BaseModel):
    total: float
    training: float
    startup: float


class SummaryFile(BaseModel):
    """Of a run, or of a run over seeds."""

    run_dir: str
    plan: str
    plan_digest: str
    model_digest: str | None
    deterministic: bool
    guarantee: Table | None = None
    nodes: int
    rounds: int
    statistics: Table = {}
    plan_document: Table = {}
    metrics: Table
    deviation: Table = {}
    per_node: dict[str, Table] | None
    worst_node: Table | None = None
    owners: dict[str, Table]
    seconds: SecondsOfRun
    peak_pss_mb: float | None = None
    bytes_up: int
    bytes_down: int
    setting: Table
    comparison: Table = {}


class AnyFile(RootModel[Table]):
    """Of which more is checked where it is read."""


_FILES: dict[str, type[BaseModel]] = {
    "simulation.json": SettingFile,
    "seeds.json": SeedsFile,
    "data.json": DataFile,
    "environment.json": EnvironmentFile,
    "summary.json": SummaryFile,
}


def what_is_wrong(name: str, value: object) -> str:
    """In what the value of a file of this name differs from what a run writes there: its first difference, or ""."""
    try:
        _FILES.get(name, AnyFile).model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        words = {"missing": "missing", "extra_forbidden": "unknown key"}.get(first["type"])
        says = words or first["msg"].replace("Input should be", "expected").replace("valid dictionary", "JSON object")
        return f"{key}: {says}" if key else says
    return ""
