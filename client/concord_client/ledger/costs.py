"""What a plan costs on so many training rows, by this node's own arithmetic: nothing that was sent is believed."""

from dataclasses import dataclass

from concord_shared.plan.schema import Plan

__all__ = ["Cost", "cost_of", "unbounded_because"]


@dataclass(frozen=True)
class Cost:
    """rdp: of one round, at the accounting's orders. epsilon, delta: of the whole plan by itself."""

    rdp: tuple[float, ...]
    epsilon: float
    delta: float


def unbounded_because(plan: Plan) -> str:
    """Why nothing that this node does bounds what a plan may tell of its rows; empty where something does."""
    if plan.noise == "none":
        return "it has no differential privacy"
    if plan.noise == "central":
        return "its noise is for the coordinator to add, which this node cannot see to"
    return ""


def cost_of(plan: Plan, rows: int) -> Cost | None:
    """None where it has no bound. Takes seconds, the first time that a plan is asked about.

    Raises:
        PlanError: no noise keeps the plan's promise.
    """
    from concord_shared.accounting import plan_epsilon, round_rdp

    dp = plan.privacy.dp
    if dp is None or unbounded_because(plan):
        return None
    return Cost(round_rdp(plan, rows), plan_epsilon(plan, rows), dp.delta)
