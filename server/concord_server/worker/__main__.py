"""`python -m concord_server.worker DIR`: started and kept by `concord server up`."""

import signal
import sys
from pathlib import Path

from concord_server.logs import start_logging
from concord_server.settings import Home
from concord_server.superlink.environment import quiet_flower


def main() -> None:
    home = Home.open(Path(sys.argv[1]))
    start_logging("worker", home.settings.log_level)
    quiet_flower(home.path)
    from concord_server.worker.loop import Worker, superlink_link

    home.database().check()
    worker = Worker(home, superlink_link(home))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()


main()
