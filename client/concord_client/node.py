"""The node's side of a round: from an Offer to the blocks of its answer. The walk of an update, steps 1 to 6."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from concord_client.batches import Rows
from concord_client.consent import check_offer
from concord_client.data import NodeDataset, Split
from concord_client.state import NodeStates
from concord_client.trainer import Workbench, round_learning_rate
from concord_client.turn import Turn, personal_of
from concord_shared.accounting import noise_multiplier
from concord_shared.blocks import encode_update, lanes_of
from concord_shared.compression import compressed_blocks, left_over, packed, selected
from concord_shared.errors import ArtefactError, ConsentRefusedError, DataError
from concord_shared.fitting import fit_locally, programme_of
from concord_shared.image_cleaning import for_training
from concord_shared.messages import RAW, Offer, answer, read_array, read_offer
from concord_shared.noise import SecretStream, noised_statistics, noised_update, round_by_chance
from concord_shared.preprocessing import Fitted
from concord_shared.seeds import derive_seed
from concord_shared.statistics import Batch, Programme
from concord_shared.strategies.base import LocalWork, State, Strategy
from concord_shared.tensors import Float32Vector, model_digest

__all__ = ["Node"]


@dataclass
class Node:
    """One partner's node: its data, the plan that it holds, and the bench that it trains on.

    before_batch: raises where the work must stop, as when an approval is withdrawn: before the next batch of training
    or evaluation, and before rows are read for anything else.
    """

    dataset: NodeDataset
    bench: Workbench
    strategy: Strategy
    states: NodeStates
    own_models: bool = False
    before_batch: Callable[[], None] | None = None
    _fitted: dict[str, Fitted] = field(default_factory=dict)

    def respond(self, message: Message) -> Message:
        """Answers one message of a round.

        Raises:
            ConcordError: consent refused, data that do not fit, training that diverged.
        """
        offer = read_offer(message)
        check_offer(offer, self.bench.plan, self.dataset.name, self.own_models)
        if offer.kind == "statistics":
            return answer(message, offer, self._statistics(offer), {})
        theta, broadcast = self._read_model(message, offer)
        started = time.perf_counter()
        if offer.kind == "evaluate":
            blocks, notes = self._evaluate(offer, theta), dict[str, Any]()
        else:
            blocks, notes = self._train(offer, theta, broadcast)
        return answer(message, offer, blocks, notes | {"seconds": time.perf_counter() - started})

    def _read_model(self, message: Message, offer: Offer) -> tuple[Float32Vector, State]:
        layout = self.bench.layout
        record = message.content.array_records.get("model")
        if record is None or offer.layout_digest != layout.digest:
            raise ConsentRefusedError("the message carries no model of the plan's layout")
        wanted = self.strategy.broadcast if offer.kind == "train" else ()
        if set(record) != {"theta", *(f"state.{name}" for name in wanted)}:
            raise ConsentRefusedError("the message carries tensors that the plan's strategy does not declare")
        try:
            theta = read_array(record["theta"], np.dtype(np.float32), (layout.size,), RAW)
            broadcast = {
                name: read_array(record[f"state.{name}"], np.dtype(np.float32), (layout.size,), RAW) for name in wanted
            }
        except ValueError as error:
            raise ConsentRefusedError(f"the message's model does not fit: {error}") from error
        if model_digest(layout, theta) != offer.model_digest:
            raise ConsentRefusedError("the model that arrived is not the one that the offer names")
        return theta, broadcast

    def _statistics(self, offer: Offer) -> dict[str, NDArray[Any]]:
        rows, plan = self.dataset.size(Split.TRAIN), self.bench.plan
        if rows > offer.rows_max:
            raise ConsentRefusedError(f"the offer sums at most {offer.rows_max} rows, this node alone has {rows}")
        if plan.statistics is not None and rows < plan.statistics.minimum_count:
            raise ConsentRefusedError(f"this node has fewer rows than the {plan.statistics.minimum_count} of the plan")
        programme = programme_of(plan)
        try:
            known = programme.read(offer.round_number, offer.preprocessing)
        except ValueError as error:
            raise ConsentRefusedError(f"the offer carries {error}") from error
        sums = programme.measure(offer.round_number, self._batches(), known, offer.rows_max)
        if isinstance(programme, Programme) and plan.privacy.mode == "plain" and plan.noise == "none":
            sums = programme.without_small_cells(offer.round_number, sums)
        if isinstance(programme, Programme) and plan.noise == "tallies":
            spread = programme.deviations(offer.round_number, offer.rows_max, noise_multiplier(plan, rows))
            sums = noised_statistics(plan, spread, sums, SecretStream())
        return {"statistics": sums, "lanes": self._lanes()}

    def _evaluate(self, offer: Offer, theta: Float32Vector) -> dict[str, NDArray[Any]]:
        node_state = self.states.current(self.dataset.name, offer.applied_round)
        self.bench.load(self.strategy.own(theta, node_state), personal_of(self.bench, node_state))
        split = Split.TEST if self.bench.plan.evaluation.on == "test" else Split.VALIDATION
        known = self._rows(offer, Split.TRAIN) if self.bench.plan.data.input == "ratings" else None
        sums = self.bench.evaluate(self._rows(offer, split), self.before_batch, known)
        return {"metrics": sums.vector, "lanes": self._lanes()}

    def _train(
        self, offer: Offer, theta: Float32Vector, broadcast: State
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        plan, size = self.bench.plan, self.dataset.size(Split.TRAIN)
        if size == 0:
            raise DataError(f"node {self.dataset.name} has no training rows")
        incoming = self._evaluate(offer, theta)["metrics"] if offer.evaluate_incoming else None
        work, turn = self._work(offer, theta, broadcast)
        result = self.strategy.local(work)
        node_state = turn.kept(result.node_state)
        vectors = self.strategy.encode(work, result)
        declared, number = self.strategy.blocks(plan, self.bench.layout), offer.round_number
        blocks = compressed_blocks(plan, declared)
        whole, part = selected(plan, declared, number, vectors, work.node_state)
        stream = SecretStream()
        update = encode_update(
            blocks, part, size, plan.rounds.weight_cap, offer.nodes_max, lambda values: round_by_chance(values, stream)
        )
        sent = packed(blocks, update, offer.nodes_max)
        node_state = {**node_state, **left_over(plan, declared, number, whole, update, size, offer.nodes_max)}
        sent = noised_update(plan, blocks, sent, offer.nodes_max, stream)
        if node_state:
            self.states.write_pending(self.dataset.name, number, node_state)
        notes = {
            "rows": size,
            "steps": result.steps,
            "norms": update.norms,
            "precision": self.bench.precision,
            **({"micro_batch": self.bench.micro_batch} if self.bench.micro_batch else {}),
        }
        return sent | ({"metrics": incoming} if incoming is not None else {}), notes

    def _work(self, offer: Offer, theta: Float32Vector, broadcast: State) -> tuple[LocalWork, Turn]:
        plan, name = self.bench.plan, self.dataset.name
        node_state = self.states.settle(name, offer.applied_round)
        turn = Turn(
            self.bench,
            theta,
            personal_of(self.bench, node_state),
            lambda: self._training_rows(offer),
            round_learning_rate(plan.training, offer.round_number, plan.rounds.count),
            derive_seed(plan.seed, "train", offer.round_number, name),
            self.before_batch,
        )
        work = LocalWork(
            plan=plan,
            layout=self.bench.layout,
            theta=theta,
            broadcast=broadcast,
            node_state=node_state,
            learning_rate=turn.learning_rate,
            train=turn.train,
            rows=lambda: self._arrays(offer, Split.TRAIN),
        )
        return work, turn

    def _training_rows(self, offer: Offer) -> Rows:
        raw, targets = self._take(Split.TRAIN)
        raw = for_training(self.bench.plan, raw, offer.round_number, self.dataset.name)
        return self.bench.rows(self._preprocessing(offer).transform(raw), targets)

    def _rows(self, offer: Offer, split: Split) -> Rows:
        return self.bench.rows(*self._arrays(offer, split))

    def _arrays(self, offer: Offer, split: Split) -> tuple[NDArray[np.float32], NDArray[Any]]:
        inputs, targets = self._take(split)
        return self._preprocessing(offer).transform(inputs), targets

    def _take(self, split: Split) -> tuple[NDArray[Any], NDArray[Any]]:
        if self.before_batch:
            self.before_batch()
        return self.dataset.take(split)

    def _batches(self) -> Iterator[Batch]:
        for batch in self.dataset.batches():
            if self.before_batch:
                self.before_batch()
            yield batch

    def _preprocessing(self, offer: Offer) -> Fitted:
        """The federation's, as the offer carries it; or this node's own, where the plan's scope is per-node."""
        if offer.preprocessing not in self._fitted:
            if self.bench.plan.preprocessing.scope == "per-node":
                fitted = fit_locally(self.bench.plan, self._take(Split.TRAIN)[0])
            else:
                fitted = self._read_preprocessing(offer)
            self._fitted = {offer.preprocessing: fitted}
        return self._fitted[offer.preprocessing]

    def _read_preprocessing(self, offer: Offer) -> Fitted:
        """The coordinator's document, if it is of this plan."""
        try:
            fitted = Fitted.from_document(json.loads(offer.preprocessing))
        except (ValueError, RecursionError, ArtefactError) as error:
            raise ConsentRefusedError(f"the offer carries no preprocessing that can be read: {error}") from error
        plan = self.bench.plan
        if (fitted.contract, fitted.preprocessing) != (plan.data, plan.preprocessing):
            raise ConsentRefusedError("the offer's preprocessing is for another contract than the plan's")
        if plan.needs_statistics and not fitted.is_complete:
            raise ConsentRefusedError("the offer's preprocessing does not describe every column of the contract")
        return fitted

    def _lanes(self) -> NDArray[Any]:
        size = max(1, self.dataset.size(Split.TRAIN))
        return lanes_of(size, self.bench.plan.rounds.weight_cap)
