"""Which strategies go with which local work and which privacy: one function, which every check of a plan asks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concord_shared.plan.schema import Plan

__all__ = ["why_not_together"]


def why_not_together(plan: "Plan") -> str:
    """Why the plan's strategy does not go with its training, rounds or privacy, and what does; "" where it goes."""
    if plan.training.local_seconds and plan.strategy.name != "fednova":
        return (
            "training.local_seconds lets a slow node take fewer steps, and its update would count as one of many: "
            "choose strategy fednova, which counts by steps"
        )
    if plan.rounds.deadline_s <= plan.training.local_seconds:
        return (
            f"training.local_seconds = {plan.training.local_seconds:g} leaves no time to answer within "
            f"rounds.deadline_s = {plan.rounds.deadline_s:g}"
        )
    if plan.noise == "dp-sgd" and getattr(plan.model, "norm", "") == "batch":
        return (
            'privacy.dp.unit = "record" needs each row by itself, and with BatchNorm the rows of a batch see each '
            "other: use a model with GroupNorm, or none"
        )
    match plan.strategy.name:
        case "fednova":
            return _fednova(plan)
        case "scaffold":
            return _scaffold(plan)
        case "ditto" | "fedrep" if plan.noise != "none":
            return _uncovered(plan)
        case "fedbn" if plan.noise in ("distributed", "central"):
            return _uncovered(plan)
    return ""


def _uncovered(plan: "Plan") -> str:
    return (
        f"strategy {plan.strategy.name} trains what stays at a node without a place in the budget of privacy.dp, and "
        "its figures leave: choose fedavg or fedprox, or leave privacy.dp out"
    )


def _fednova(plan: "Plan") -> str:
    if plan.training.optimiser != "sgd" or plan.training.nesterov:
        return 'strategy fednova weighs the steps of SGD, with or without momentum: set training.optimiser = "sgd"'
    if plan.noise != "none":
        return "strategy fednova tells how many steps a node took, which no noise of privacy.dp hides; choose fedavg"
    if plan.privacy.mode == "robust":
        return 'strategy fednova believes what each node says of its steps, and privacy.mode = "robust" no node\'s word'
    return ""


def _scaffold(plan: "Plan") -> str:
    if plan.training.optimiser != "sgd" or plan.training.momentum or plan.training.gradient_clip:
        return (
            "strategy scaffold takes a node's gradient from the way that its model went, which is that of plain SGD: "
            'set training.optimiser = "sgd", momentum = 0 and gradient_clip = 0'
        )
    if plan.noise in ("distributed", "central"):
        return 'strategy scaffold sends a second vector, which the noise of privacy.dp.unit = "node" does not cover'
    if plan.privacy.mode == "robust":
        return 'strategy scaffold keeps a sum of control variates that one node can bend: not with mode "robust"'
    return ""
