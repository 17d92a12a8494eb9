"""A plan in plain words, for whoever decides on it: what it does, what it needs, and what leaves this machine."""

from collections.abc import Iterator
from typing import Any

from concord_shared.guarantee import guarantee_of
from concord_shared.plan.privacy import Private, Robust
from concord_shared.plan.rounds import Share
from concord_shared.plan.schema import Plan
from concord_shared.plan.statistics import StatisticsSection
from concord_shared.statistics import Programme

__all__ = ["describe_plan", "plan_difference"]


def describe_plan(plan: Plan) -> list[str]:
    """What the plan does, what it needs, and what leaves this machine; a sentence each."""
    return [*_purpose(plan), *_needs(plan), *_work(plan), *_leaves(plan)]


def plan_difference(old: Plan, new: Plan) -> list[str]:
    """What changed from one plan to another: `rounds.count: 10 → 50`."""
    before, after = dict(_flat(old.document())), dict(_flat(new.document()))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    return [f"{key}: {_shown(before, key)} → {_shown(after, key)}" for key in keys]


def _purpose(plan: Plan) -> Iterator[str]:
    if plan.kind == "statistics":
        yield "Trains no model: it asks what the rows of all nodes are like, together."
        yield f"Asks all nodes and needs the answers of {_share(plan.rounds.quorum, 'those')}."
        return
    yield (
        f"Trains the model {plan.model.name} with {plan.strategy.name} for {_count(plan.rounds.count, 'round')}. "
        "The model's code is that of this node's own installation."
    )
    yield (
        f"Each round asks {_share(plan.rounds.cohort, 'nodes')} and needs the answers of "
        f"{_share(plan.rounds.quorum, 'those')}."
    )


def _needs(plan: Plan) -> Iterator[str]:
    data = plan.data
    if data.input == "image":
        channels, height, width = data.shape
        yield f"Needs images of {width}×{height} pixels in {_count(channels, 'channel')}."
    elif data.input == "text":
        yield f"Needs a column {data.text} with texts of at most {data.length_max} characters."
    elif data.input == "array":
        yield f"Needs arrays of {' × '.join(map(str, data.shape))} {data.dtype}, as the model's wheel reads them."
    elif data.input == "ratings":
        yield (
            f"Needs a table that says in {data.user} who, and in {data.item} which of {len(data.items)} items. What is "
            "learned of users stays at this node and is not kept; what is learned of items is sent."
        )
    else:
        yield f"Needs a table with the columns {', '.join(column.name for column in data.columns)}."
    if plan.kind == "statistics":
        return
    if data.task == "classification":
        yield f"Learns to tell {data.target}: {', '.join(data.classes)}."
    elif data.task == "own":
        yield f"Learns what that wheel's model answers: {' × '.join(map(str, data.target_shape))} numbers a row."
    elif data.task == "ranking":
        yield f"Learns which {data.item} a {data.user} takes next."
    elif data.task == "language-model":
        yield f"Learns to tell the next token of {data.text}, and may come to know texts by heart."
    else:
        yield f"Learns to predict the number {data.target}."


def _work(plan: Plan) -> Iterator[str]:
    if plan.statistics is not None:
        rows = "all rows" if plan.statistics.rows == "all" else "its training rows"
        yield f"This node reads {rows} once for each of {_count(Programme.of(plan).stages, 'stage')}."
        return
    training = plan.training
    amount = (
        f"{_count(training.local_epochs, 'pass', 'passes')} over the training rows"
        if training.local_epochs
        else _count(training.local_steps, "step")
    )
    if training.local_seconds:
        amount += f", for {training.local_seconds:g} seconds at most,"
    size = f"up to {training.batch_size}" if training.batch_share else str(training.batch_size)
    share = f" ({training.batch_share:.3g} of its rows)" if training.batch_share else ""
    yield (
        f"In each round this node does {amount} in batches of {size}{share}, with {training.optimiser} at "
        f"learning rate {training.learning_rate:g}."
    )
    if plan.is_repeatable:
        yield "Trains with one thread, so that the result can be repeated bit for bit."


def _leaves_of_statistics(plan: Plan, asked: StatisticsSection) -> Iterator[str]:
    of = {
        "moments": "sums and squares of numbers (for means and variances)",
        "extremes": f"the {_nth(asked.minimum_count)} smallest and largest value of each number column",
        "classes": f"how many rows are of each {plan.data.target}",
        "correlation": "sums of products of each two number columns",
        "sites": "how far this node's means and shares are from everybody's",
    }
    said = [of[name] for name in asked.of]
    if asked.quantiles:
        said.append(f"the quantiles {', '.join(f'{level:g}' for level in asked.quantiles)} of each number column")
    if asked.bins:
        said.append(f"a histogram of {asked.bins} bins for each number column")
    yield (
        "Leaves this machine: for each column how many values there are, are missing, or are outside of the contract, "
        f"and how many are of each category; {'; '.join(said)}. No row leaves."
    )
    small = "" if plan.privacy.dp else f", but no count below {asked.minimum_count}"
    yield (f"Told of all nodes together{small}; a node with fewer than {asked.minimum_count} rows takes no part.")


def _nth(count: int) -> str:
    return "" if count == 1 else f"{count}th"


def _leaves(plan: Plan) -> Iterator[str]:
    if plan.statistics is not None:
        yield from _leaves_of_statistics(plan, plan.statistics)
        if plan.privacy.mode == "plain":
            yield "The coordinator sees this node's figures by themselves, in the clear."
        else:
            yield from _leaves_masked(plan)
        yield from _promised(plan)
        return
    yield (
        "Leaves this machine each round: the change of the model's parameters (of length at most "
        f"{plan.rounds.update_bound:g}), the number of training rows, and sums of measures over {plan.evaluation.on} "
        "rows. No row leaves."
    )
    if plan.needs_statistics:
        yield "Leaves once, before training: for each column the sums that mean and spread are made of."
    if plan.privacy.mode == "plain":
        yield "The coordinator sees this node's update by itself, in the clear." + (
            "" if plan.privacy.dp else " Updates can tell something about rows."
        )
    elif isinstance(plan.privacy, Robust):
        steer = f"so that {_count(plan.privacy.attackers, 'node')} among them cannot steer the model, "
        if plan.noise == "central":
            steer = "which steers nothing here, for the model is made of their noised sum, "
        yield (
            "The coordinator sees this node's update by itself, in the clear: it compares the nodes' updates, "
            f"{steer}and keeps with the run how far each stood from the others. Every node counts the same, however "
            f"many rows it has, and a round needs at least {2 * plan.privacy.attackers + 1} updates."
            + ("" if plan.privacy.dp else " Updates can tell something about rows.")
        )
        if plan.privacy.quarantine_after:
            yield (
                "A node whose updates stand out in "
                f"{_count(plan.privacy.quarantine_after, 'round')} in a row is left out of the rest of the run; that "
                "can happen to an honest node with unusual rows, and the coordinator's people can take it back."
            )
    elif isinstance(plan.privacy, Private):
        yield from _leaves_masked(plan)
    yield from _promised(plan)


def _leaves_masked(plan: Plan) -> Iterator[str]:
    assert isinstance(plan.privacy, Private)
    yield (
        "All of it leaves under masks: the coordinator learns sums over at least "
        f"{plan.privacy.minimum_cohort} nodes, and of this node alone nothing, as long as the other nodes' keys "
        "are theirs (pin those you know in policy.toml) and few of them help it."
    )


def _promised(plan: Plan) -> Iterator[str]:
    guarantee = guarantee_of(plan)
    if guarantee is not None:
        yield from guarantee.sentences()
    elif plan.privacy.mode == "private":
        small = "batches are tiny" if plan.kind == "train" else "few rows are in it"
        yield f"A sum can tell something about rows too, above all where {small}."


def _share(share: Share, of: str) -> str:
    if share == "all":
        return f"all {of}"
    return f"{share} of the nodes" if isinstance(share, int) else f"at least {share:.0%} of {of}"


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            yield from _flat(item, f"{prefix}[{item.get('name', '')}]")
    else:
        yield prefix, value


def _shown(document: dict[str, Any], key: str) -> str:
    return str(document[key]) if key in document else "nothing"
