"""What Flower reads from the environment when it is imported; so this is called before."""

import importlib
import logging
import os
from pathlib import Path

__all__ = ["quiet_flower"]


def quiet_flower(home: Path) -> None:
    """No telemetry, no look for updates, nothing installed at run time, its files below `home`; warnings only. And no
    proxy: Flower's clients would ask it, and none of these processes calls another machine.
    """
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None)
        os.environ.pop(name.lower(), None)
    os.environ.update(
        {
            "FLWR_HOME": str(home / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
    )
    importlib.import_module("flwr.supercore.logger")  # sets a level and a handler of its own
    logger = logging.getLogger("flwr")
    logger.setLevel(logging.WARNING)
    logger.handlers.clear()
