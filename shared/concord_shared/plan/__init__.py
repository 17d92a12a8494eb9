"""The plan: what to run, as immutable data with a digest. No participants in it, no code."""

from concord_shared.plan.load import LoadedPlan, load_plan, parse_plan, shipped_plans
from concord_shared.plan.schema import Column, DataContract, Plan, SimulateDefaults, parse_plan_document

__all__ = [
    "Column",
    "DataContract",
    "LoadedPlan",
    "Plan",
    "SimulateDefaults",
    "load_plan",
    "parse_plan",
    "parse_plan_document",
    "shipped_plans",
]
