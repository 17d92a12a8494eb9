"""Local training and evaluation: step 3 of the walk, θ_global → θ_local.

No Python work per sample: rows are gathered once an epoch, batches are views into them, the optimiser is
fused.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from concord_client.batches import Batch, Rows
from concord_client.devices import autocast_dtype, room_for_rows
from concord_client.passes import Parts, blocks_of, new_scaler, recompute_activations, take_step
from concord_client.ranks import Ranks
from concord_client.tasks import task_of
from concord_shared.accounting import noise_multiplier, sampling_of
from concord_shared.errors import DataError, TrainingDivergedError, UsageError
from concord_shared.metrics import MetricSums, no_sums
from concord_shared.models import new_model, partition_of, vector_of
from concord_shared.models.partition import COUNTERS
from concord_shared.models.registry import ModelBuilder, build_model
from concord_shared.optimisers import SGD, Adam, AdamW
from concord_shared.plan.schema import Plan
from concord_shared.plan.training import Training
from concord_shared.strategies.base import Adjust, Part
from concord_shared.tensors import Float32Vector, Layout

__all__ = ["Workbench", "be_deterministic", "check_model", "finite", "new_optimiser", "round_learning_rate"]

log = logging.getLogger(__name__)


def round_learning_rate(training: Training, round_number: int, rounds: int) -> float:
    """The learning rate of a round (1…rounds) by the plan's schedule."""
    if training.schedule == "cosine":
        return float(training.learning_rate * 0.5 * (1 + np.cos(np.pi * (round_number - 1) / rounds)))
    if training.schedule == "step":
        return float(
            training.learning_rate * training.schedule_factor ** ((round_number - 1) // training.schedule_step)
        )
    return training.learning_rate


def be_deterministic(wanted: bool) -> None:
    """Refuses operations without a deterministic form. `torch.use_deterministic_algorithms` says the same to
    torch.compile too, which is not used here, and takes a second and a quarter to import it.
    """
    torch.set_deterministic_debug_mode("error" if wanted else "default")


def new_optimiser(training: Training, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    if training.optimiser == "sgd":
        return SGD(
            parameters,
            learning_rate,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
            fused=fused,
        )
    kind = Adam if training.optimiser == "adam" else AdamW
    return kind(
        parameters,
        learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        fused=fused,
    )


def finite(vector: Float32Vector) -> Float32Vector:
    """The vector itself. Raises: TrainingDivergedError: it holds NaN or Inf."""
    if not np.isfinite(vector).all():
        raise TrainingDivergedError(
            "training diverged: the parameters hold NaN or Inf. Lower training.learning_rate, or set "
            "training.gradient_clip"
        )
    return vector


def check_model(plan: Plan, model: nn.Module) -> None:
    """Raises: UsageError: the model's layers cannot be trained as the plan's [training] says."""
    if _has_batch_norm(model) and (problem := plan.training.batch_norm_problem):
        raise UsageError(problem)
    if plan.training.recompute_activations:
        blocks_of(model)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class Workbench:
    """One model in memory, on one device, that any node of this process trains on in turn.

    layout: of what travels, the shared part. partition: with what stays at the node, and what nobody trains.
    devices: more than one where several work out each batch's gradient together, `device` first.
    """

    def __init__(
        self, plan: Plan, device: torch.device, build: ModelBuilder = build_model, devices: Sequence[str] = ()
    ) -> None:
        be_deterministic(plan.training.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass; we never read what we did not write
        if device.type == "cuda" and plan.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses determinism without it
            torch.backends.cudnn.benchmark = False
        self.plan = plan
        self.device = device
        self.model = new_model(plan, build).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.partition = partition_of(plan, self.model)
        self.layout = self.partition.shared
        self._tensors: dict[str, Tensor] = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self._fresh = vector_of(self.model, self.partition.personal)
        self._shared = [self._tensors[name] for name, _ in self.layout.entries]
        self._batch_norm = _has_batch_norm(self.model)
        self._dtype = autocast_dtype(plan.training.precision, device)
        self._parts = Parts(plan.training.micro_batch, not plan.training.deterministic and not self._batch_norm)
        check_model(plan, self.model)
        if plan.training.recompute_activations:
            recompute_activations(self.model)
        self.task = task_of(plan, self.model)
        self._ranks: Ranks | None = None
        if len(devices) > 1:
            if why := self._why_alone():
                log.warning("this plan trains on the first of resources.devices alone: %s", why)
            else:
                self._ranks = Ranks(plan, devices, torch.get_num_threads())

    def _why_alone(self) -> str:
        if self.plan.training.deterministic:
            return "training.deterministic is on, and sums over devices are rounded otherwise than on one"
        if self._batch_norm:
            return "its model has BatchNorm, which compares the rows of a batch"
        if self.task.alone:
            return self.task.alone
        if self.plan.noise == "dp-sgd":
            return "it hides each row by itself"
        return ""

    def close(self) -> None:
        """Ends the processes of further devices, where there are any."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    @property
    def precision(self) -> str:
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self._dtype]

    @property
    def micro_batch(self) -> int:
        """The rows at once that memory was found to hold; 0 where it holds what the plan says."""
        return 0 if self._parts.size == self.plan.training.micro_batch else self._parts.size

    def rows(self, inputs: NDArray[Any], targets: NDArray[Any]) -> Rows:
        """From prepared inputs `(n, …)` and targets `(n,)`, which a language model has not: its text tells them."""
        tensor = torch.from_numpy(inputs)
        if tensor.nbytes <= room_for_rows(self.device) or self.task.alone or self.plan.noise == "dp-sgd":
            return self.task.rows(tensor.to(self.device), targets)
        log.info("rows stay in main memory, each batch goes to the device", extra={"bytes": tensor.nbytes})
        return replace(self.task.rows(tensor, targets), device=self.device)

    def warm_up(self, rows: Rows) -> None:
        """One forward and backward pass over `rows`; changes nothing but running statistics, which `load` sets anew."""
        if self._batch_norm and len(rows) < 2:
            return  # nor is it ever trained on one row
        self.task.meet(rows)
        plainly = new_scaler(None, self.device).scale
        self._parts.add_gradient(len(rows), partial(self._add_gradient, rows, plainly), self._forget_gradient)
        self._forget_gradient()

    def load(self, theta: Float32Vector, personal: Float32Vector | None = None) -> None:
        """theta: the shared part `(d,)`. personal: a node's own; the seeded start where it has none yet."""
        self._load(self.layout, theta)
        self._load(self.partition.personal, self._fresh if personal is None else personal)
        for name in self._tensors:
            if name.endswith(COUNTERS):
                self._tensors[name].zero_()  # another node's batches

    def _load(self, layout: Layout, vector: Float32Vector) -> None:
        vector = vector if vector.flags.writeable else vector.copy()  # torch wants writable memory even to read it
        with torch.no_grad():
            for name, view in layout.split(vector).items():
                self._tensors[name].copy_(torch.from_numpy(view))

    def read(self) -> Float32Vector:
        """The shared part as a vector (d,).

        Raises:
            TrainingDivergedError: it holds NaN or Inf.
        """
        return self._read(self.layout)

    def read_personal(self) -> Float32Vector:
        """What stays at the node, of the model as it is. Raises: TrainingDivergedError: as `read`."""
        return self._read(self.partition.personal)

    def _read(self, layout: Layout) -> Float32Vector:
        return finite(layout.join({name: self._tensors[name].detach().cpu().numpy() for name, _ in layout.entries}))

    def trained(self, part: Part = "all") -> list[nn.Parameter]:
        """The parameters that training moves, in the model's order."""
        shared, personal = self.layout.entries, self.partition.personal.entries
        moved = {"all": shared + personal, "shared": shared, "personal": personal}[part]
        names = {name for name, _ in moved}
        return [parameter for name, parameter in self.model.named_parameters() if name in names]

    def train(
        self,
        rows: Rows,
        learning_rate: float,
        seed: int,
        adjust: Adjust | None = None,
        optimiser: torch.optim.Optimizer | None = None,
        before_batch: Callable[[], None] | None = None,
        part: Part = "all",
        epochs: int = 0,
        timed: bool = True,
    ) -> int:
        """The plan's local epochs or steps over `rows`, from the loaded model; returns the steps taken.

        optimiser: one to go on with; by default a fresh one. before_batch: raises to stop before the next batch.
        seed: of the order of rows; without meaning where the plan asks for DP-SGD, whose chance is secret. timed:
        whether the plan's local_seconds end it.
        """
        training = self.plan.training
        if self._batch_norm and len(rows) < 2:
            raise DataError("a model with BatchNorm needs at least 2 training rows: it compares the rows of a batch")
        parameters = self.trained(part)
        start = [parameter.detach().clone() for parameter in self._shared] if adjust else []
        optimiser = optimiser or new_optimiser(training, parameters, learning_rate)
        if self.plan.noise == "dp-sgd":
            return self._train_privately(
                rows, optimiser, (lambda: adjust(self._shared, start)) if adjust else None, before_batch
            )
        clip: Callable[[], object] = (
            (lambda: nn.utils.clip_grad_norm_(parameters, training.gradient_clip))
            if training.gradient_clip
            else (lambda: None)
        )
        self.model.train()
        torch.manual_seed(seed)  # dropout and the like
        scaler, steps = new_scaler(self._dtype, self.device), 0
        until = time.monotonic() + training.local_seconds if timed and training.local_seconds else math.inf
        for inputs, targets in self.batches(rows, seed, epochs):
            if steps and time.monotonic() >= until:
                break
            if before_batch:
                before_batch()
            add = self._add_gradient if self._ranks is None else self._add_gradient_of_all
            self._parts.add_gradient(
                len(targets), partial(add, Rows(inputs, targets), scaler.scale), self._forget_gradient
            )
            scaler.unscale_(optimiser)
            if adjust:
                for parameter in self._shared:
                    if parameter.grad is None:  # this step did not use it
                        parameter.grad = torch.zeros_like(parameter)
                with torch.no_grad():
                    adjust(self._shared, start)
            clip()
            steps += take_step(scaler, optimiser)
        return steps

    def _add_gradient(self, batch: Rows, scale: Callable[[Tensor], Tensor], size: int, whole: float = 0.0) -> None:
        """The gradient of the batch's mean loss, in parts of `size` rows. whole: as of `add_share`."""
        whole = whole or (self.task.counted(batch.targets) if size < len(batch) else 0.0)
        for inputs, targets in batch.batches(size):
            with self._autocast():
                loss = self.task.loss(self.model(inputs), targets)
            if whole:
                loss = loss * (self.task.counted(targets) / whole)
            scale(loss).backward()  # type: ignore[no-untyped-call]

    def _add_gradient_of_all(self, batch: Rows, scale: Callable[[Tensor], Tensor], size: int) -> None:
        """As `_add_gradient`, each device its share."""
        assert self._ranks is not None
        trained, whole = self.trained(), self.task.counted(batch.targets)
        factor = float(scale(batch.inputs.new_ones((), dtype=torch.float32)))
        mine = self._ranks.hand_out(trained, batch.inputs, batch.targets, size, whole, factor)
        failed: Exception | None = None
        try:
            self._add_gradient(Rows(*mine), scale, size, whole)
        except Exception as error:
            failed = error.with_traceback(None)  # which holds what took the memory
        self._ranks.add_gradients(trained)  # the others' are there, whatever happened here
        if failed is not None:
            raise failed

    def add_share(self, inputs: Tensor, targets: Tensor, size: int, whole: float, factor: float) -> None:
        """Adds this device's share of a batch's gradient, of the loss times `factor`. whole: what the whole batch's
        mean loss is a mean of.
        """
        if len(targets):
            self._add_gradient(Rows(inputs, targets), lambda loss: loss * factor, size, whole)

    def _forget_gradient(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def _train_privately(
        self,
        rows: Rows,
        optimiser: torch.optim.Optimizer,
        adjust: Callable[[], None] | None,
        before_batch: Callable[[], None] | None,
    ) -> int:
        from concord_client.private_training import train_privately  # Opacus takes seconds to import

        assert self.plan.privacy.dp is not None
        return train_privately(
            self.model,
            lambda outputs, targets: self.task.loss(outputs, targets, "none"),
            rows.inputs,
            rows.targets,
            optimiser,
            sampling_of(self.plan, len(rows)),
            noise_multiplier(self.plan, len(rows)),
            self.plan.privacy.dp.clip,
            adjust,
            before_batch,
        )

    def evaluate(
        self, rows: Rows, before_batch: Callable[[], None] | None = None, known: Rows | None = None
    ) -> MetricSums:
        """Sums over `rows` with the loaded model, in float32. before_batch: as in `train`. known: of a recommender, the
        training rows of the same users, which say who they are.
        """
        self.model.eval()
        total = no_sums(self.plan.data)
        if before_batch:
            before_batch()
        self.task.meet(known or rows)
        with torch.inference_mode():
            for inputs, targets in rows.batches(self.task.rows_at_once):
                if before_batch:
                    before_batch()
                if len(targets):
                    total += self.task.sums(inputs, targets)
        return total

    def predict(self, rows: Rows) -> NDArray[np.float32]:
        """Probabilities `(n, classes)`, or predicted values `(n,)`: of a language model how unlikely each text is to
        it, as the mean loss of its tokens.
        """
        self.model.eval()
        with torch.inference_mode():
            return self.task.answers(rows)

    def batches(self, rows: Rows, seed: int, epochs: int = 0) -> Iterator[Batch]:
        """Of the plan's local epochs or steps, or of so many epochs."""
        training = self.plan.training
        generator = torch.Generator().manual_seed(seed)
        left = -1 if epochs else training.local_steps or -1
        epochs = epochs or training.local_epochs or training.local_steps  # an epoch has at least one step
        for _ in range(epochs):
            epoch = self.task.epoch(rows, generator)
            order = torch.randperm(len(epoch), generator=generator)
            for batch in epoch.batches_in(order, training.batch_of(len(epoch))):
                if left == 0:
                    return
                if self._batch_norm and len(batch[1]) < 2:
                    continue  # of one row there is no variance
                left -= 1
                yield batch

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)
