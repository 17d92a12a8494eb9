"""A partner's side: the ClientApp of `concord-node`, over the rows of the partition that Flower gives this node."""

from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from concord_client.app import build_client_app
from concord_client.data import read_data, resolve_spec
from concord_client.devices import choose_device, prepare_process
from concord_client.node import Node
from concord_client.state import NodeStates
from concord_client.trainer import Workbench
from concord_flower.setting import Setting
from concord_local.federation import Federation
from concord_shared.strategies import strategy_for
from concord_shared.transport import NodeEntry

__all__ = ["app"]

Nodes = list[tuple[NodeEntry, ClientApp]]

app = ClientApp()


@app.train()
@app.evaluate()
@app.query("statistics")
def respond(message: Message, context: Context) -> Message:
    _, node_app = _own(context)
    return node_app(message, context)


@app.query("introduction")
def introduce(message: Message, context: Context) -> Message:
    """Says who this node is: Flower numbers nodes anew in each run, a plan's rounds know them by name."""
    entry, _ = _own(context)
    record = ConfigRecord({"name": entry.name, "rows": entry.rows, "evaluation_rows": entry.evaluation_rows})
    return Message(RecordDict({"node": record}), reply_to=message)


def _own(context: Context) -> tuple[NodeEntry, ClientApp]:
    partition, count = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
    return _nodes(Setting.of(context), count)[partition]


@lru_cache(maxsize=1)
def _nodes(setting: Setting, count: int) -> Nodes:
    """All nodes of a run, as this process may be any of them: one copy of the rows, one bench."""
    prepare_process(threads=1)
    loaded = setting.load_plan()
    plan, simulate = loaded.plan, loaded.simulate
    federation = Federation.of(read_data(resolve_spec(simulate.data), plan), plan, simulate.partition, count)
    bench, strategy = Workbench(plan, choose_device()), strategy_for(plan)
    states = NodeStates(setting.directory / "nodes")
    return [
        (entry, build_client_app(Node(federation.dataset(entry.name), bench, strategy, states)))
        for entry in federation.entries(plan)
    ]
