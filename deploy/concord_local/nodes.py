"""Builds the nodes of one process: each a Flower ClientApp over its own rows, all on one workbench."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from concord_client.app import build_client_app
from concord_client.devices import choose_device
from concord_client.node import Node
from concord_client.state import NodeStates
from concord_client.tasks import task_of
from concord_client.trainer import Workbench
from concord_local.attacks import Attack, HostileNode, flipped
from concord_local.federation import Federation
from concord_shared.errors import ConcordError, UsageError
from concord_shared.models.registry import ModelBuilder, build_model, example_inputs, input_shape
from concord_shared.plan.models import OwnModel
from concord_shared.plan.schema import Plan
from concord_shared.strategies import Strategy, strategy_for

__all__ = ["NodeHost", "model_builder", "try_own_model"]

EXAMPLE_ROWS = 2


@dataclass
class NodeHost:
    """Answers messages for any node of a federation, one after the other, in this process."""

    plan: Plan
    federation: Federation
    states: Path
    device: str = "auto"
    strategy: Strategy | None = None
    attack: Attack | None = None

    def __post_init__(self) -> None:
        self._bench = Workbench(self.plan, choose_device(self.device), model_builder(self.plan))
        self._apps: dict[int, tuple[ClientApp, Context]] = {}

    def warm_up(self) -> None:
        """One throw-away step, so that kernels are chosen before the first offer and not during it."""
        if self.plan.kind == "statistics":
            return
        size = self.plan.training.batch_size
        targets = np.zeros((size, *self.plan.data.target_shape), np.int64)
        with _blaming_own(self.plan):
            self._bench.warm_up(self._bench.rows(example_inputs(self.plan, size), targets))

    def respond(self, message: Message) -> Message:
        app, context = self._app_of(message.metadata.dst_node_id)
        return app(message, context)

    def _app_of(self, node_id: int) -> tuple[ClientApp, Context]:
        if node_id not in self._apps:
            context = Context(run_id=0, node_id=node_id, node_config={}, state=RecordDict(), run_config={})
            self._apps[node_id] = (build_client_app(self._node(self.federation.names[node_id - 2])), context)
        return self._apps[node_id]

    def _node(self, name: str) -> Node:
        node = Node(
            dataset=self.federation.dataset(name),
            bench=self._bench,
            strategy=self.strategy or strategy_for(self.plan),
            states=NodeStates(self.states),
            own_models=True,
        )
        return node if self.attack is None or name not in self.attack.nodes else self._hostile(node, self.attack)

    def _hostile(self, node: Node, attack: Attack) -> Node:
        mates = [replace(node, dataset=self.federation.dataset(name)) for name in attack.nodes]
        rows = flipped(node.dataset, self.plan) if attack.kind == "label-flip" else node.dataset
        return HostileNode(rows, node.bench, node.strategy, node.states, True, attack=attack, mates=tuple(mates))


def model_builder(plan: Plan) -> ModelBuilder:
    """The plan's model by name, or the person's own function from their own file, on their own machine."""
    if not isinstance(plan.model, OwnModel):
        return build_model
    return _own_builder(plan.model.source)


def _own_builder(source: str) -> ModelBuilder:
    file, _, function = source.rpartition(":")
    spec = importlib.util.spec_from_file_location("concord_own_model", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise UsageError(f"--model {source}: expected FILE.py:FUNCTION, and the file to exist")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any fault of a person's own file is theirs to read
        raise UsageError(f"--model {source}: {file} cannot be loaded: {type(error).__name__}: {error}") from error
    build: Callable[[], object] | None = getattr(module, function, None)
    if not callable(build):
        raise UsageError(
            f"--model {source}: {file} has no function {function!r}; it takes nothing and returns a Module"
        )

    def builder(plan: Plan) -> nn.Module:
        try:
            model = build()
        except Exception as error:
            raise UsageError(f"--model {source}: {function} failed: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {source}: expected a torch.nn.Module, got {type(model).__name__}")
        parameters = list(model.parameters())
        if any(map(is_lazy, parameters)):
            raise UsageError(f"--model {source}: it has lazy layers, without sizes yet; give each layer its sizes")
        if not any(parameter.requires_grad for parameter in parameters):
            raise UsageError(
                f"--model {source}: it has no parameter that training could move; add a layer, or leave "
                "requires_grad on"
            )
        return model

    return builder


def try_own_model(plan: Plan, model: nn.Module) -> None:
    """One step's gradient over example rows, so that what does not fit shows before anything is written or started.

    Raises:
        UsageError: the model fails, or its answers have another shape than the plan's task reads.
    """
    assert isinstance(plan.model, OwnModel)
    task = task_of(plan, model)
    targets = torch.zeros(EXAMPLE_ROWS, *plan.data.target_shape, dtype=task.targets_dtype)
    with _blaming_own(plan), torch.random.fork_rng(devices=[]):
        outputs = model(torch.from_numpy(example_inputs(plan, EXAMPLE_ROWS)))
        _check_answers(plan, outputs, plan.model.source)
        task.loss(outputs, targets).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def _check_answers(plan: Plan, outputs: object, source: str) -> None:
    width = len(plan.data.classes) or 1
    each = f"one for each of the plan's {width} classes" if plan.data.classes else "one, for the plan's target"
    got = (
        f"have shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"are of type {type(outputs).__name__}"
    )
    if not isinstance(outputs, Tensor) or outputs.shape != (EXAMPLE_ROWS, width):
        raise UsageError(
            f"--model {source}: its answers to {EXAMPLE_ROWS} rows {got}, expected a tensor of shape "
            f"{[EXAMPLE_ROWS, width]}: a row's numbers are {each}; correct its last layer"
        )


@contextmanager
def _blaming_own(plan: Plan) -> Iterator[None]:
    """Any fault of a person's own model is theirs to read."""
    try:
        yield
    except ConcordError:
        raise
    except Exception as error:
        if not isinstance(plan.model, OwnModel):
            raise
        raise UsageError(
            f"--model {plan.model.source}: one step over rows of shape {list(input_shape(plan))} fails: "
            f"{type(error).__name__}: {error}. Correct the model, or the plan's [data]"
        ) from error
