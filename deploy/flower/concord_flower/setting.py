"""What both sides read from the run's configuration (`[tool.flwr.app.config]`, changed with `flwr run -c`)."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from concord_shared.plan import load_plan
from concord_shared.plan.load import LoadedPlan

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """directory: where the coordinator keeps checkpoints, and nodes what stays with them between rounds."""

    plan: str
    overrides: tuple[str, ...]
    directory: Path

    @classmethod
    def of(cls, context: Context) -> "Setting":
        config = context.run_config
        temporary = Path(tempfile.gettempdir()) / f"concord-flower-{context.run_id}"
        directory = Path(str(config["out"])) if config["out"] else temporary
        return cls(str(config["plan"]), tuple(str(config["set"]).split()), directory)

    def load_plan(self) -> LoadedPlan:
        return load_plan(self.plan, self.overrides)
