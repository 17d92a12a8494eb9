"""Drives one run: feeds events to the round machine and performs its commands.

Everything that a command depends on is durable before the command is carried out: the checkpoint of round r
is on the disk before the offers of round r + 1 leave.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from concord_server.checkpoints import Checkpoint, StepStore
from concord_server.collector import RingSum
from concord_server.machine import (
    Abandon,
    Answered,
    Ask,
    Begin,
    Command,
    Event,
    Failed,
    Finish,
    Lost,
    RunState,
    Settle,
    Settled,
    Tick,
    advance,
    awaits,
    begin_at,
    wake_at,
)
from concord_server.replies import (
    Expectation,
    accept_binding,
    accept_masked,
    accept_reply,
    norm_problem,
    statistics_slack,
)
from concord_server.robust.anomalies import Quarantine, report
from concord_server.robust.combining import combine
from concord_server.robust.table import UpdateTable
from concord_server.schedule import Schedule, Step
from concord_server.unmasking import MaskedCollection
from concord_shared.blocks import LANES, Block, decode_means
from concord_shared.compression import compressed_blocks, expanded
from concord_shared.errors import RoundAbortedError, RunFailedError, TrainingDivergedError, UpdateRefusedError
from concord_shared.fitting import fit, programme_of
from concord_shared.masking.attempt import MaskedAttempt, Signers
from concord_shared.messages import Offer, bytes_of, model_record, offer_message
from concord_shared.metrics import Figures, metric_sums, metrics_block
from concord_shared.noise import check_noise, node_deviation, noised_sums
from concord_shared.plan.privacy import Robust
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import unfitted
from concord_shared.signed_rounds import Sent, sent_of
from concord_shared.strategies.base import Strategy
from concord_shared.tensors import Float32Vector, Layout, model_digest
from concord_shared.transport import NodeEntry, Transport

__all__ = ["Driver", "RunResult"]

Integers = NDArray[np.signedinteger[Any]]
Observer = Callable[[Mapping[str, Any]], None]
POLL_S = 1.0
NOTES_MAX = 4096
STATEMENT_BYTES_MAX = 256 << 10
REASON_MAX = 500


@dataclass(frozen=True)
class RunResult:
    """A finished run: its model, the last evaluation over all nodes, and each node's figures (plain mode)."""

    theta: Float32Vector
    model_digest: str
    state: Mapping[str, NDArray[Any]]
    preprocessing: Mapping[str, Any]
    metrics: Figures
    per_node: Mapping[str, Figures]
    bytes_down: int
    bytes_up: int
    training_s: float


@dataclass
class _Collecting:
    """The step in progress: what was sent, and what has been summed. offers: of the present stage."""

    offers: dict[str, Offer]
    blocks: tuple[Block, ...]
    total: RingSum | UpdateTable
    opened_s: float
    bytes_before: tuple[int, int]
    masked: MaskedCollection | None = None
    metrics: dict[str, Figures] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    sent: dict[str, Sent] = field(default_factory=dict)
    anomalies: dict[str, Any] = field(default_factory=dict)


class Driver:
    """One run of one plan over named nodes.

    Args:
        start: the seeded model (or another version of it), used when the store holds no checkpoint.
        signers: where the plan asks for masks, the identity keys of all that the manifest names; those of them that
            are not among `nodes` are absent.
        run: its id, where a manifest gives it one; a random one else, so that no reply of another run fits.
        observer: called with each record of metrics.jsonl, for progress; what it raises ends the run, which can be
            resumed from its last checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        strategy: Strategy,
        layout: Layout,
        start: Float32Vector,
        nodes: Sequence[NodeEntry],
        transport: Transport,
        store: StepStore,
        observer: Observer = lambda record: None,
        clock: Callable[[], float] = time.monotonic,
        run: str = "",
        signers: Signers | None = None,
    ) -> None:
        self._plan, self._strategy, self._layout = plan, strategy, layout
        self._programme = programme_of(plan)
        self._nodes = {node.name: node for node in nodes}
        self._names = {node.node_id: node.name for node in nodes}
        named = self._nodes.keys() | (signers.keys.keys() if signers else ())
        self._schedule = Schedule(plan, tuple(sorted(named)), frozenset(named) - self._nodes.keys())
        check_noise(plan, layout.size, len(self._schedule.step("train", 1).cohort))
        self._robust = plan.privacy if isinstance(plan.privacy, Robust) else None
        self._quarantine = Quarantine(self._robust.quarantine_after if self._robust else 0)
        self._rows_max = 1 << (max(1, sum(node.rows for node in nodes)) - 1).bit_length()
        self._transport, self._store, self._signers = transport, store, signers or Signers()
        self._observer, self._clock = observer, clock
        first, state = unfitted(plan).document(), strategy.init(plan, layout)
        stored = store.load(plan.digest, layout)
        if stored:
            self._now = replace(stored, attempt=stored.attempt + 1)
        else:
            digest, run = model_digest(layout, start), run or secrets.token_hex(8)
            self._now = Checkpoint(plan.digest, start, digest, state, run=run, preprocessing=first)
        self._open: _Collecting | None = None
        self._last: tuple[Figures, dict[str, Figures]] = ({}, {})
        self._bytes_down, self._bytes_up = (int(self._now.counters.get(key, 0)) for key in ("down", "up"))
        self.first_offer_s: float | None = None
        self.last_applied_s: float | None = None
        self._example = ""

    def run(self) -> RunResult:
        """Runs to the end.

        Raises:
            RunFailedError: the run ended without its model, with the reason.
        """
        state, commands = self._begin()
        while state.phase != "ended" or commands:
            state, commands = self._perform(state, commands) if commands else self._listen(state)
        return RunResult(
            theta=self._now.theta,
            model_digest=self._now.model_digest,
            state=self._now.state,
            preprocessing=self._now.preprocessing,
            metrics=self._last[0],
            per_node=self._last[1],
            bytes_down=self._bytes_down,
            bytes_up=self._bytes_up,
            training_s=(self.last_applied_s or 0.0) - (self.first_offer_s or 0.0),
        )

    def _begin(self) -> tuple[RunState, tuple[Command, ...]]:
        step: Step | None = self._schedule.first()
        if self._now.done is not None:
            for record in self._store.records():
                self._remember(record)
            self._leave_out()
            kind, number = self._now.done
            step = self._schedule.after(self._schedule.step(kind, number))  # type: ignore[arg-type]
        if step is None:  # the run had ended before it was resumed
            return RunState(self._schedule.first(), "ended"), ()
        return self._advance(begin_at(step, self._now.aborts, bool(self._now.applied)), Begin(self._clock()))

    def _advance(self, state: RunState, event: Event) -> tuple[RunState, tuple[Command, ...]]:
        return advance(self._schedule, self._plan.rounds.aborts_max, state, event)

    def _perform(self, state: RunState, commands: tuple[Command, ...]) -> tuple[RunState, tuple[Command, ...]]:
        following: tuple[Command, ...] = ()
        for command in commands:
            match command:
                case Ask(step, stage, nodes):
                    self._ask(step, stage, nodes)
                case Settle(step, survivors):
                    state, following = self._advance(state, self._settle(step, survivors))
                case Abandon(step, reason):
                    self._abandon(step, reason, state)
                case Finish(outcome="failed", reason=reason):
                    raise RunFailedError(f"the run failed at {reason}{self._example}")
        return state, following

    # Asking

    def _ask(self, step: Step, stage: str, nodes: tuple[str, ...]) -> None:
        preprocessing = json.dumps(dict(self._now.preprocessing))
        offers = {name: self._offer(step, stage, name, preprocessing) for name in nodes}
        if stage == step.stages[0].name:
            blocks = self._blocks(step)
            table = self._robust is not None and step.kind == "train"
            total = UpdateTable(blocks, step.cohort, self._store.folder) if table else RingSum(blocks)
            moved = self._bytes_down, self._bytes_up
            self._open = _Collecting(offers, blocks, total, self._clock(), moved, self._masked(step, offers))
            if step.kind == self._plan.kind and self.first_offer_s is None:
                self.first_offer_s = self._clock()
        assert self._open is not None
        self._open.offers = offers
        if self._open.masked is not None:
            self._open.masked.begin(stage, nodes)
        self._transport.send(self._messages(step, self._open))

    def _masked(self, step: Step, offers: Mapping[str, Offer]) -> MaskedCollection | None:
        if step.masks is None:
            return None
        offer = next(iter(offers.values()))
        return MaskedCollection(
            MaskedAttempt(
                offer=offer,
                identities=tuple((name, self._signers.keys[name]) for name in step.cohort),
                thresholds=step.masks,
                weight_cap=self._plan.rounds.weight_cap,
                manifest=self._signers.manifest,
            )
        )

    def _messages(self, step: Step, current: _Collecting) -> Iterator[Message]:
        """One at a time, the largest node first: the last to finish then waits least. All share one model."""
        wanted = self._strategy.broadcast if step.kind == "train" else ()
        broadcast = {name: self._now.state[name].astype(np.float32) for name in wanted}
        first = all(offer.stage == step.stages[0].name for offer in current.offers.values())
        model = model_record(self._now.theta, broadcast) if first and step.kind != "statistics" else None
        for name in sorted(current.offers, key=lambda name: (-self._nodes[name].rows, name)):
            offer = current.offers[name]
            records = current.masked.request(offer.stage, name) if current.masked else {}
            message = offer_message(offer, model, self._nodes[name].node_id, time.time(), records)
            self._bytes_down += bytes_of(message)
            yield message

    def _offer(self, step: Step, stage: str, name: str, preprocessing: str) -> Offer:
        return Offer(
            run=self._now.run,
            kind=step.kind,
            round_number=step.number,
            attempt=self._now.attempt,
            node=name,
            plan_digest=self._plan.digest,
            model_digest=self._now.model_digest,
            layout_digest=self._layout.digest,
            nodes_max=len(step.cohort),
            rows_max=self._rows_max,
            applied_round=self._now.applied.get(name, 0),
            evaluate_incoming=step.kind == "train" and self._plan.evaluation.incoming,
            preprocessing=preprocessing,
            stage=stage,
        )

    def _blocks(self, step: Step) -> tuple[Block, ...]:
        if step.kind == "statistics":
            return self._programme.block(step.number), LANES
        if step.kind == "evaluate":
            return metrics_block(self._plan.data), LANES
        incoming = (metrics_block(self._plan.data),) if self._plan.evaluation.incoming else ()
        blocks = compressed_blocks(self._plan, self._strategy.blocks(self._plan, self._layout))
        return *blocks, LANES, *incoming

    # Listening

    def _listen(self, state: RunState) -> tuple[RunState, tuple[Command, ...]]:
        wake = wake_at(state)
        assert wake is not None
        messages = self._transport.receive(max(0.0, min(POLL_S, wake - self._clock())))
        for message in messages:
            name = self._names.get(message.metadata.src_node_id)
            if name is None or not awaits(state, name):
                continue  # nobody we asked, or already counted: never summed twice
            assert self._open is not None
            if message.metadata.reply_to_message_id != self._open.offers[name].message_id:
                self._open.late.add(name)  # an answer to an earlier offer; the one to this may still come
                continue
            state, commands = self._advance(state, self._take(name, message))
            if commands:
                return state, commands
        return self._advance(state, Tick(self._clock()))

    def _take(self, name: str, message: Message) -> Event:
        assert self._open is not None
        current = self._open
        self._bytes_up += bytes_of(message)
        expected = Expectation(
            current.offers[name],
            self._nodes[name],
            current.blocks,
            self._plan.rounds.weight_cap,
            self._plan.data,
            self._programme,
            self._slack(current.offers[name]),
        )
        try:
            blocks = self._accept(name, message, expected)
            _check_statement(message)
        except UpdateRefusedError as error:
            current.failures[name] = str(error)[:REASON_MAX]
            return Failed(name, self._clock())
        if blocks:
            current.total.add(name, blocks)
            if (sent := sent_of(message)) is not None:
                current.sent[name] = sent
        if current.masked is not None:
            return Answered(name, self._clock())
        if "metrics" in blocks:
            figures = metric_sums(self._plan.data, blocks["metrics"]).figures()
            current.metrics[name] = {key: value for key, value in figures.items() if key != "confusion"}
        current.notes[name] = _notes(message, current.blocks)
        return Answered(name, self._clock())

    def _slack(self, offer: Offer) -> NDArray[np.float64] | None:
        """Of one node's statistics."""
        return (
            statistics_slack(self._plan, offer.round_number, offer.rows_max, 1) if offer.kind == "statistics" else None
        )

    def _accept(self, name: str, message: Message, expected: Expectation) -> Mapping[str, Integers]:
        """The blocks of an answer that brings some.

        Raises:
            UpdateRefusedError.
        """
        assert self._open is not None
        masked, stage = self._open.masked, expected.offer.stage
        if masked is None:
            return accept_reply(message, expected)
        if stage == "masked":
            return accept_masked(message, expected)
        accept_binding(message, expected)
        masked.accept(stage, name, message.content.config_records)
        return {}

    # Settling

    def _settle(self, step: Step, survivors: tuple[str, ...]) -> Settled | Lost:
        assert self._open is not None
        current = self._open
        sums = current.total.sums()
        if current.masked is not None:
            try:
                self._unmask(step, survivors, sums, current.masked)
            except RoundAbortedError as error:
                return Lost(self._clock(), str(error))
        if step.kind == "statistics":
            self._settle_statistics(step, sums)
        elif step.kind == "train":
            self._settle_training(step, survivors, sums)
        record = self._record(step, survivors, sums)
        self._remember(record)
        self._close(step, record, 0 if step.kind == "train" else self._now.aborts)
        return Settled(self._clock())

    def _unmask(
        self, step: Step, survivors: tuple[str, ...], sums: Mapping[str, Integers], masked: MaskedCollection
    ) -> None:
        """Opens the sums in place. What single replies are checked for in plain mode, only the sums can be here."""
        assert self._open is not None
        masked.open(sums)
        for liar in sorted(masked.liars):
            self._open.failures[liar] = "shares: a share that it gave does not fit"
        weight, count, scaled, over_cap = (int(value) for value in sums[LANES.name])
        most = sum(max(1, min(self._nodes[name].rows, self._plan.rounds.weight_cap)) for name in survivors)
        if count != len(survivors) or not 0 < weight <= most or min(scaled, over_cap) < 0:
            raise RoundAbortedError("the opened sum is not one of the survivors' Updates; the model stays as it was")
        if problem := self._problem(step, survivors, sums, self._open.blocks):
            raise RoundAbortedError(f"the opened sum holds what no sum of honest Updates can: {problem}")

    def _problem(
        self, step: Step, survivors: tuple[str, ...], sums: Mapping[str, Integers], blocks: tuple[Block, ...]
    ) -> str:
        nodes = [self._nodes[name] for name in survivors]
        rows = sum(node.rows for node in nodes)
        weight = int(sums[LANES.name][0]) / self._plan.rounds.weight_cap
        for block in blocks:
            if block.weight == "none":
                continue
            share = weight if block.weight == "examples" else float(len(survivors))
            noise = node_deviation(self._plan, block.size, len(step.cohort)) * len(survivors) ** 0.5
            if problem := norm_problem(block, sums[block.name], share, len(step.cohort), len(survivors), noise):
                return problem
        if "statistics" in sums:
            loose = statistics_slack(self._plan, step.number, self._rows_max, len(survivors))
            return self._programme.problem(step.number, sums["statistics"], rows, self._rows_max, loose) or ""
        if "metrics" in sums:
            evaluated = sum(node.evaluation_rows for node in nodes)
            return metric_sums(self._plan.data, sums["metrics"]).problem(evaluated) or ""
        return ""

    def _settle_statistics(self, step: Step, sums: Mapping[str, Integers]) -> None:
        found = self._programme.absorb(step.number, sums["statistics"], self._now.preprocessing, self._rows_max)
        done = step.number == self._programme.stages
        if done and self._plan.kind == "train":
            found = fit(self._plan, found).document()
        self._now = replace(self._now, preprocessing=found)

    def _settle_training(self, step: Step, survivors: tuple[str, ...], sums: Mapping[str, Integers]) -> None:
        declared = self._strategy.blocks(self._plan, self._layout)
        blocks = compressed_blocks(self._plan, declared)
        assert self._open is not None
        table = self._open.total
        means: Mapping[str, NDArray[Any]] = {}
        if isinstance(table, UpdateTable):
            means = self._combine(step, survivors, table, blocks)
            sums = {**sums, **table.totals(survivors)} if self._plan.noise == "central" else sums
        if not isinstance(table, UpdateTable) or self._plan.noise == "central":
            sums = noised_sums(self._plan, blocks, sums, len(step.cohort))
            means = decode_means(blocks, sums, len(step.cohort), self._plan.rounds.weight_cap)
        means = expanded(self._plan, declared, step.number, means)
        share = self._weight(survivors, declared) / self._weight(self._nodes, declared)
        theta, state = self._strategy.apply(self._plan, self._layout, self._now.theta, self._now.state, means, share)
        if not np.isfinite(theta).all():
            raise TrainingDivergedError(
                f"round {step.number}: the new model holds NaN or Inf; lower the strategy's server_learning_rate"
            )
        applied = {**self._now.applied, **dict.fromkeys(survivors, step.number)}
        digest = model_digest(self._layout, theta)
        self._now = replace(
            self._now, theta=theta, model_digest=digest, state=state, version=step.number, applied=applied
        )

    def _weight(self, names: Iterable[str], blocks: tuple[Block, ...]) -> int:
        """What these nodes weigh together in the blocks' means, by the rows that are registered."""
        by_rows, cap = any(block.weight == "examples" for block in blocks), self._plan.rounds.weight_cap
        return sum(min(self._nodes[name].rows, cap) if by_rows else 1 for name in names)

    def _combine(
        self, step: Step, survivors: tuple[str, ...], table: UpdateTable, blocks: tuple[Block, ...]
    ) -> dict[str, NDArray[np.float64]]:
        """By block what the plan's rule makes of the Updates; notes who stands out in the first, that of the model."""
        assert self._robust is not None
        assert self._open is not None
        assert all(block.weight == "uniform" for block in blocks), "a weight that a node names would be a lever"
        means = {}
        for block in blocks:
            found = combine(table, block, survivors, self._robust, len(step.cohort))
            means[block.name] = found.mean
            self._open.anomalies = self._open.anomalies or report(survivors, found, self._robust)
        return means

    def _record(self, step: Step, survivors: tuple[str, ...], sums: Mapping[str, Integers]) -> dict[str, Any]:
        assert self._open is not None
        current = self._open
        lanes = sums[LANES.name]
        record = self._outline(step, survivors)
        if step.kind == "train":
            record |= {
                "model_digest": self._now.model_digest,
                "scaled_down": int(lanes[2]),
                "rows_above_cap": int(lanes[3]),
            }
            record["notes"] = current.notes
            if current.anomalies:
                record["anomalies"] = current.anomalies
                record |= self._suspect(step, current.anomalies)
        if "metrics" in sums:
            record["metrics"] = metric_sums(self._plan.data, sums["metrics"]).figures()
            record["per_node"] = dict(sorted(current.metrics.items()))
        return record

    def _suspect(self, step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
        """Whom this round puts into quarantine; nobody where too few would be left to ask, which is said."""
        suspects = self._quarantine.suspects(step.number, found)
        if not suspects:
            return {}
        out = self._quarantine.nodes | suspects.keys()
        following = self._schedule.step("train", step.number), self._schedule.step("evaluate", step.number)
        fewest = min((len(each.cohort) - len(out) - each.quorum for each in following), default=0)
        if fewest < 0:
            return {
                "quarantine_withheld": f"{', '.join(sorted(suspects))} would be left out, but without them a round has "
                f"{-fewest} too few for its quorum; they are still asked. Look at their figures; stop the run, or "
                "start one without them"
            }
        return {"quarantined": suspects}

    def _leave_out(self) -> None:
        """From the next step on, nobody in quarantine is asked."""
        if self._robust is not None:
            self._quarantine.lift(self._store.lifted())
            self._schedule = replace(self._schedule, absent=self._quarantine.nodes)

    def _outline(self, step: Step, answered: tuple[str, ...]) -> dict[str, Any]:
        """What every line of metrics.jsonl says of its step."""
        assert self._open is not None
        current = self._open
        return {
            "kind": step.kind,
            "round": step.number,
            "of": self._programme.stages if step.kind == "statistics" else self._plan.rounds.count,
            "survivors": list(answered),
            "failures": current.failures,
            "silent": sorted(set(step.cohort) - step.absent - set(answered) - current.failures.keys()),
            "late": sorted(current.late),
            **({"left_out": sorted(self._quarantine.nodes & set(step.cohort))} if self._quarantine.nodes else {}),
            "seconds": round(self._clock() - current.opened_s, 4),
            "bytes_down": self._bytes_down - current.bytes_before[0],
            "bytes_up": self._bytes_up - current.bytes_before[1],
        }

    def _abandon(self, step: Step, reason: str, state: RunState) -> None:
        """The model stays. A step that ended the run is not noted as done: resuming asks for it again."""
        assert self._open is not None
        self._example = "".join(f". {node}: {text}" for node, text in sorted(self._open.failures.items())[:1])
        record = self._outline(step, tuple(sorted(self._open.total.nodes))) | {"aborted": reason}
        if state.phase == "ended":
            self._store.append(record)
            self._observer(record)
        else:
            self._close(step, record, state.aborts)

    def _close(self, step: Step, record: Mapping[str, Any], aborts: int) -> None:
        assert self._open is not None
        taken = () if "aborted" in record else record["survivors"]
        sent = {name: self._open.sent[name] for name in taken if name in self._open.sent}
        self._open = None
        self._transport.withdraw()
        self._store.append(record, sent)
        counters = {"down": self._bytes_down, "up": self._bytes_up}
        self._now = replace(self._now, done=(step.kind, step.number), aborts=aborts, counters=counters)
        self._store.save(self._now)
        if step.kind == self._plan.kind:
            self.last_applied_s = self._clock()
        self._observer(record)
        self._leave_out()

    def _remember(self, record: Mapping[str, Any]) -> None:
        self._quarantine.note(record)
        if record["kind"] == "evaluate" and "metrics" in record:
            self._last = (record["metrics"], record["per_node"])


def _check_statement(message: Message) -> None:
    """Raises: UpdateRefusedError: what the node signed is larger than what is worth keeping."""
    sent = sent_of(message)
    if sent is not None and len(sent.statement) > STATEMENT_BYTES_MAX:
        raise UpdateRefusedError("layout", f"it says more beside its blocks than {STATEMENT_BYTES_MAX} bytes")


def _notes(message: Message, blocks: tuple[Block, ...]) -> dict[str, Any]:
    """The node's remarks on its own work: shown, never computed with. Only what is expected is kept."""
    record = message.content.config_records.get("notes")
    text = None if record is None else record.get("json")
    if not isinstance(text, str) or len(text) > NOTES_MAX:
        return {}
    try:
        notes = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(notes, dict):
        return {}
    kept: dict[str, Any] = {
        name: notes[name] for name in ("rows", "steps", "seconds", "micro_batch") if _is_number(notes.get(name))
    }
    norms = notes.get("norms")
    if isinstance(norms, dict):
        kept["norms"] = {block.name: norms[block.name] for block in blocks if _is_number(norms.get(block.name))}
    return kept | ({"precision": notes["precision"]} if notes.get("precision") in ("fp32", "bf16", "fp16") else {})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15  # no NaN, no Inf
