"""Step 1 of the walk: a node acts only on an offer that fits what it agreed to."""

from concord_shared.errors import ConsentRefusedError
from concord_shared.fitting import programme_of
from concord_shared.masking.attempt import STAGES
from concord_shared.messages import Offer
from concord_shared.plan.schema import Plan

__all__ = ["check_offer"]

NODES_MAX = 100_000


def check_offer(offer: Offer, plan: Plan, node: str, own_models: bool) -> None:
    """Raises unless the offer is for this node and for the plan that it holds.

    Args:
        plan: the plan that this node holds and approved.
        own_models: only a simulation on a person's own machine may train their own module.

    Raises:
        ConsentRefusedError: with the reason.
    """
    if offer.node != node:
        raise ConsentRefusedError(f"the offer is for node {offer.node!r}, this is {node!r}")
    if offer.plan_digest != plan.digest:
        raise ConsentRefusedError(
            f"the offer asks for plan {offer.plan_digest[:12]}, this node holds {plan.digest[:12]} only"
        )
    if plan.model.name == "own" and not own_models:
        raise ConsentRefusedError("the plan names a person's own code; a node runs only models that it has installed")
    _check_purpose(offer, plan)
    if not 1 <= offer.nodes_max <= NODES_MAX or offer.rows_max < 1:
        raise ConsentRefusedError(f"a cohort of {offer.nodes_max} nodes is outside 1…{NODES_MAX}")
    last = programme_of(plan).stages if offer.kind == "statistics" else plan.rounds.count
    if not 1 <= offer.round_number <= last:
        raise ConsentRefusedError(f"the plan has no {offer.kind} round {offer.round_number}")


def _check_purpose(offer: Offer, plan: Plan) -> None:
    """The plan asks for this kind of answer at all, and in this round."""
    if offer.kind == "statistics" and not plan.needs_statistics:
        raise ConsentRefusedError("the plan asks for no statistics over nodes")
    if offer.evaluate_incoming and not (plan.evaluation.incoming and offer.kind == "train"):
        raise ConsentRefusedError("the plan asks for no evaluation with training")
    if offer.stage not in (STAGES if plan.privacy.mode == "private" else ("",)):
        raise ConsentRefusedError(
            f"the offer asks for the stage {offer.stage!r}, but the plan's privacy.mode is {plan.privacy.mode}"
        )
    if offer.kind == "evaluate" and not plan.evaluates_after(offer.round_number):
        raise ConsentRefusedError(f"the plan has no evaluation after round {offer.round_number}")
