"""The privacy filter: sums of Rényi differential privacy at *one* order, fixed before anything is spent.

Plans are chosen by people who saw the results of earlier ones, so plain composition does not apply. Sums of RDP at an
order that was fixed beforehand do bound an adaptive sequence (Feldman and Zrnic 2021; Lécuyer 2021); the best of
several orders, taken afterwards, does not without a price (decision 0017). All rounding is towards privacy.
"""

import math
from collections.abc import Iterable
from fractions import Fraction

from concord_shared.errors import UsageError

__all__ = ["choose_order", "conversion", "epsilon_of_sum", "rdp_cap"]


def conversion(order: float, delta: float) -> float:
    """What ε exceeds the RDP at `order` α by: ε = r + ln((α−1)/α) − (ln δ + ln α)/(α−1). Canonne, Kamath and Steinke
    2020, Proposition 12.
    """
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def rdp_cap(epsilon: float, delta: float, order: float) -> Fraction:
    """The largest sum of RDP at `order` that gives (ε, δ); negative where there is none. Rounded down."""
    exceeds = conversion(order, delta)
    slack = 8 * math.ulp(max(abs(epsilon), abs(exceeds), 1.0))
    return Fraction(epsilon) - Fraction(exceeds) - Fraction(slack)


def epsilon_of_sum(total: Fraction, delta: float, order: float) -> float:
    """The ε of a sum of RDP, for people to read; nothing spent is 0."""
    return max(0.0, float(total) + conversion(order, delta)) if total > 0 else 0.0


def choose_order(orders: Iterable[float], epsilon: float, delta: float) -> float:
    """The order at which the budget holds most Gaussian noise: RDP of a Gaussian is α·ρ, so the largest cap / α.

    Raises:
        UsageError: too small for this δ at every order.
    """
    found = [(rdp_cap(epsilon, delta, order) / Fraction(order), order) for order in orders]
    best, order = max(found)
    if best <= 0:
        raise UsageError(
            f"ε {epsilon:g} at δ {delta:g} is too small to be counted: nothing would fit. Set a larger --epsilon, or a "
            "larger --delta"
        )
    return order
