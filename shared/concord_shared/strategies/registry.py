"""The strategies that a plan may name."""

from concord_shared.plan.schema import Plan
from concord_shared.strategies.adaptive import fedadagrad, fedadam, fedyogi
from concord_shared.strategies.averaging import fedavg, fedavgm, fedprox
from concord_shared.strategies.base import Strategy
from concord_shared.strategies.fedbn import fedbn
from concord_shared.strategies.fedrep import fedrep
from concord_shared.strategies.least_squares import least_squares

__all__ = ["strategy_for"]

_STRATEGIES = {
    strategy.name: strategy
    for strategy in (fedavg, fedavgm, fedprox, fedadam, fedyogi, fedadagrad, fedbn, fedrep, least_squares)
}


def strategy_for(plan: Plan) -> Strategy:
    return _STRATEGIES[plan.strategy.name]
