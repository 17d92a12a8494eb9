"""The plan: what to run, as immutable data with a digest. No participants in it, no code.

data, preparation, models (and vision), training, strategies, rounds, privacy, statistics
           its sections, their types, ranges and defaults; all of it is part of the digest
section    what each of them is: frozen, strict, closed
checks     which sections go together (together: what each strategy wants)
schema     the plan of these sections, its document and its digest
load       from a file, with `--set`
sizes      how many parameters a model has
"""

from concord_shared.plan.data import Column, DataContract
from concord_shared.plan.load import LoadedPlan, load_plan, parse_plan, shipped_plans
from concord_shared.plan.schema import Plan, SimulateDefaults, parse_plan_document

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
