"""From a TOML file, or the name of a shipped plan, to a `Plan`; every mistake named with what would be right."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from concord_shared.errors import PlanError
from concord_shared.plan.schema import About, Plan, SimulateDefaults, completed

__all__ = ["LoadedPlan", "load_plan", "parse_plan", "shipped_plans"]

PLAN_BYTES_MAX = 1 << 20
_INSTEAD = {"local_steps": "local_epochs", "local_epochs": "local_steps"}
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class LoadedPlan:
    plan: Plan
    simulate: SimulateDefaults
    about: About
    source: str


def load_plan(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedPlan:
    """Reads a plan by file or by shipped name and applies `KEY=VALUE` overrides.

    Raises:
        PlanError: no such plan, not TOML, or not valid.
    """
    text, source = _read(name_or_path)
    return parse_plan(text, source, overrides)


def parse_plan(text: str, source: str, overrides: Sequence[str] = ()) -> LoadedPlan:
    """As `load_plan`, from text; `source` is the name that messages give."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{source}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{source}: not valid TOML: nested too deeply") from error
    for override in overrides:
        _apply_override(table, override)
    sections = {key: value for key, value in table.items() if key not in ("simulate", "about")}
    return LoadedPlan(
        plan=_validate(Plan, completed(sections, source), source),
        simulate=_validate(SimulateDefaults, table.get("simulate", {}), source, "simulate."),
        about=_validate(About, table.get("about", {}), source, "about."),
        source=source,
    )


def shipped_plans() -> Iterator[str]:
    """Names of the plans that come with concord, sorted."""
    folder = resources.files("concord_shared") / "plans"
    yield from sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read(name_or_path: str) -> tuple[str, str]:
    shipped = resources.files("concord_shared") / "plans" / f"{name_or_path}.toml"
    if "/" not in name_or_path and shipped.is_file():
        return shipped.read_text("utf-8"), name_or_path
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, list(shipped_plans()), 1)
        hint = f" Did you mean {near[0]}?" if near else " `concord plans` lists the shipped ones."
        raise PlanError(f"no plan {name_or_path!r}: expected a TOML file or a shipped plan's name.{hint}")
    if path.stat().st_size > PLAN_BYTES_MAX:
        raise PlanError(f"{path}: expected a plan of at most {PLAN_BYTES_MAX} bytes, got {path.stat().st_size}")
    try:
        return path.read_text("utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: expected UTF-8 text, got other bytes at offset {error.start}") from error


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise PlanError(f"--set {override}: expected KEY=VALUE, for example rounds.count=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is text: --set training.optimiser=adam
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise PlanError(f"--set {override}: {part} is not a section")
    if (last == "name" and isinstance(table.get("name"), str) and path in (["strategy"], ["model"])) or (
        last == "mode" and path == ["privacy"]
    ):
        kept = {"dp": table["dp"]} if "dp" in table else {}  # it belongs to every mode, and is never lost by accident
        table.clear()  # another strategy, model or mode has other keys: start from its defaults
        table.update(kept)
    if path == ["training"] and last in _INSTEAD and value:
        table.pop(_INSTEAD[last], None)
    table[last] = value


def _validate(schema: type[Model], table: Mapping[str, Any], source: str, prefix: str = "") -> Model:
    try:
        return schema.model_validate_json(json.dumps(table, default=_no_json))
    except ValidationError as error:
        lines = [_explain(schema, item, source, prefix) for item in error.errors(include_url=False)]
        raise PlanError("\n".join(dict.fromkeys(lines))) from error


def _no_json(value: object) -> object:
    """TOML's dates and times, which no key of a plan is: an object, so that every key refuses it."""
    return {"date or time": str(value)}


def _explain(schema: type[BaseModel], item: Any, source: str, prefix: str) -> str:
    section, keys = _walk(schema, item["loc"])
    key = (prefix + ".".join(keys)).rstrip(".")
    where = f"{source}: {key}" if key else source
    got = json.dumps(item["input"], ensure_ascii=False, default=str)
    got = got if len(got) <= 80 else got[:77] + "…"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], list(section.model_fields), 1, 0.5)
        known = ", ".join(section.model_fields)
        return f"{where}: unknown key. " + (f"Did you mean {near[0]}?" if near else f"Known here: {known}")
    tag = "mode" if keys and keys[0] == "privacy" else "name"
    if item["type"] == "union_tag_not_found":
        return f"{where}.{tag}: missing. Add it; it says which one"
    if item["type"] == "missing":
        return f"{where}: missing. Add it; {_who_needs(schema, section, item['loc'], keys, tag)} needs it"
    if item["type"] == "union_tag_invalid":
        allowed = [tag.strip(" '") for tag in item["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(item["ctx"]["tag"]), allowed, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{where}.{tag}: expected one of {', '.join(allowed)}, got {item['ctx']['tag']!r}.{hint}"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{where}: {message}" + ("" if isinstance(item["input"], dict) else f", got {got}")
    if item["type"] == "literal_error":
        near = difflib.get_close_matches(str(item["input"]), item["ctx"]["expected"].replace("'", "").split(" or "), 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        return f"{where}: expected {item['ctx']['expected']}, got {got}{hint}"
    return f"{where}: {_expected(item['msg'])}, got {got}"


def _who_needs(
    schema: type[BaseModel], section: type[BaseModel], loc: tuple[int | str, ...], keys: list[str], tag: str
) -> str:
    """Of a missing key: every plan, one of the models, strategies or modes, or the section that it stands in."""
    if chosen := [part for part in loc if part in _tags(section)]:
        return f'{keys[0]}.{tag} = "{chosen[0]}"'
    if len(keys) == 1 or (len(keys) == 2 and schema.model_fields[keys[0]].is_required()):
        return "every plan"
    return ".".join(keys[:-1])


def _expected(message: str) -> str:
    return message.replace("Input should be", "expected").replace("a valid ", "a ")


def _walk(schema: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """The section that an error's location is in, and its keys without the tags of unions."""
    candidates, keys = [schema], []
    for part in loc:
        tagged = [c for c in candidates if len(candidates) > 1 and part in _tags(c)]
        if tagged:
            candidates = tagged
            continue
        keys.append(str(part))
        field = candidates[0].model_fields.get(str(part))
        candidates = list(_models_in(field.annotation)) or candidates if field else candidates
    return candidates[0], keys


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    fields = section.model_fields
    tag = fields.get("name") or fields.get("mode")
    return get_args(tag.annotation) if tag else ()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
