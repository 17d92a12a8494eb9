"""The coordinator's side: the driver and round machine of concord, with Flower's Grid between them and the nodes."""

import json
from contextlib import closing

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from concord_flower.grid_transport import GridTransport
from concord_flower.setting import Setting
from concord_local.progress import observer
from concord_server.checkpoints import RunStore
from concord_server.driver import Driver
from concord_shared.models import new_vector
from concord_shared.strategies import strategy_for
from concord_shared.transport import NodeEntry

__all__ = ["app"]

INTRODUCTION_TIMEOUT_S = 120.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    setting = Setting.of(context)
    plan = setting.load_plan().plan
    layout, start = new_vector(plan)
    nodes = _introductions(grid)
    setting.directory.mkdir(parents=True, exist_ok=True)
    store = RunStore(setting.directory)
    with observer() as observe, closing(GridTransport(grid)) as transport:
        observe({"kind": "note", "text": f"{plan.name}: {len(nodes)} nodes, run directory {setting.directory}"})
        result = Driver(plan, strategy_for(plan), layout, start, nodes, transport, store, observe).run()
        observe({"kind": "note", "text": f"model digest {result.model_digest}"})
    summary = {"model_digest": result.model_digest, "plan_digest": plan.digest, "metrics": result.metrics}
    (setting.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def _introductions(grid: Grid) -> list[NodeEntry]:
    """Who the nodes of this run are, by their own word."""
    asked = [Message(RecordDict(), node_id, "query.introduction") for node_id in grid.get_node_ids()]
    replies = list(grid.send_and_receive(asked, timeout=INTRODUCTION_TIMEOUT_S))
    problems = [reply.error.reason for reply in replies if reply.has_error()]
    if problems or len(replies) < len(asked):
        raise RuntimeError(
            f"{len(replies) - len(problems)} of {len(asked)} nodes introduced themselves: {problems[:1]}"
        )
    return [_entry(reply) for reply in replies]


def _entry(reply: Message) -> NodeEntry:
    about = reply.content.config_records["node"]
    rows, evaluation_rows = (int(str(about[name])) for name in ("rows", "evaluation_rows"))
    return NodeEntry(str(about["name"]), reply.metadata.src_node_id, rows, evaluation_rows)
