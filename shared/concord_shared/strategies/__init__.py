"""Strategies: each is a few pure functions, `init` and `apply` at the coordinator, `local` and `encode` at the node."""

from concord_shared.strategies.base import LocalResult, LocalWork, State, Strategy
from concord_shared.strategies.registry import strategy_for

__all__ = ["LocalResult", "LocalWork", "State", "Strategy", "strategy_for"]
