"""The card that lies beside a model: what it is, what it was trained on, how well it does, what it promises."""

from typing import Any

from concord_shared import __version__
from concord_shared.guarantee import guarantee_of
from concord_shared.plan.privacy import Robust
from concord_shared.plan.schema import Plan

__all__ = ["model_card", "own_model"]


def model_card(plan: Plan, summary: dict[str, Any]) -> str:
    """Markdown with a YAML head, as model hubs read it. summary: its figures are of nodes' own models where it says
    `personal`.
    """
    figures = "\n".join(
        f"| {name} | {value:.4f} |" for name, value in summary["metrics"].items() if isinstance(value, float)
    )
    worst = summary["worst_node"]
    worst_line = f"\nWorst node: {worst['node']}.\n" if worst else ""
    guarantee = guarantee_of(plan)
    without = "" if guarantee else ", no differential privacy"
    privacy = (
        f"under masks: the coordinator learned sums over nodes only (secure aggregation FSA-1{without})"
        if plan.privacy.mode == "private"
        else f"in the clear to the coordinator (privacy mode `{plan.privacy.mode}`: no secure aggregation{without})"
    )
    rule = (
        f"\nThe Updates were combined by `{plan.privacy.rule}`, which bounds what {plan.privacy.attackers} of the "
        "nodes could do to the model. Figures above are sums of what nodes say of themselves.\n"
        if isinstance(plan.privacy, Robust)
        else ""
    )
    whose = "of each node's own model on its test rows" if summary["personal"] else "on the nodes' test rows"
    use = _use(plan, summary["personal"])
    promise = "\n\n".join(guarantee.sentences()) + "\n\n" if guarantee else ""
    return f"""---
library_name: concord
tags: [federated-learning, {plan.model.name}, {plan.data.task}]
---
# {plan.name}

A `{plan.model.name}` model for {plan.data.task}, trained by concord {__version__} over {summary["nodes"]} nodes in
{summary["rounds"]} round(s) with `{plan.strategy.name}`. No node's rows left it; its Updates did,
{privacy}.

{promise}| figure {whose} | |
|---|---|
{figures}
{worst_line}{rule}
- plan digest `{summary["plan_digest"]}`
- model digest `{summary["model_digest"]}`
- deterministic: {str(summary["deterministic"]).lower()} (`environment.json` says on what)

{use}
"""


def own_model(plan: Plan) -> str:
    """What a node's own model is, of a plan whose figures are of these."""
    if plan.strategy.name == "ditto":
        return "a whole model near the shared one, which stayed at the node"
    return "the shared part with what stayed at the node"


def _use(plan: Plan, personal: bool) -> str:
    if not personal:
        return """`model.safetensors` holds the weights and, in its metadata, the fitted preprocessing. Use it with
`concord predict RUN --data SPEC`, RUN being the directory of this card."""
    return f"""The figures are of each node's own model: {own_model(plan)}.
`model.safetensors` holds the shared part alone and, in its metadata, the fitted preprocessing; no figure here is of it.
Of a simulated run, `concord evaluate RUN --data SPEC --node NAME` and `concord predict RUN --data SPEC --node NAME`
use the node's own model, RUN being the directory of this card; at a node that took part, `concord-node models evaluate`
and `concord-node models predict` do."""
