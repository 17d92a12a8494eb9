"""A whole federation on one machine. The only code that sees coordinator and nodes at once.

from concord_local import simulate
result = simulate("digits-cnn", overrides=["rounds.count=5"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concord_local.simulation import SimulationResult, simulate

__all__ = ["SimulationResult", "simulate"]


def __getattr__(name: str) -> Any:
    """Imports on first use: `import concord_local` must not cost the import of torch."""
    if name in __all__:
        from concord_local import simulation

        return getattr(simulation, name)
    raise AttributeError(name)
