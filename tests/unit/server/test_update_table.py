"""The table of Updates and the rule over it: exact, in any order of arrival, in little memory, on the disk."""

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_server.robust import table as tables
from concord_server.robust.combining import Combined, combine
from concord_server.robust.table import UpdateTable, table_bytes
from concord_shared.blocks import LANES, Block, lanes_of
from concord_shared.errors import ArtefactError
from concord_shared.plan.privacy import Robust
from concord_shared.quantiser import levels_of

NODES = ("a", "b", "c", "d", "e", "f", "g")
SIZE = 257
RULES = ("nnm-trimmed-mean", "trimmed-mean", "median", "clipped-mean")
rule_by_rule = pytest.mark.parametrize("rule", RULES)


def robust(rule: str, attackers: int = 2) -> Robust:
    return Robust(mode="robust", rule=rule, attackers=attackers)  # type: ignore[arg-type]


def updates(bits: Any = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Ring integers of norms up to the bound, as nodes send them."""
    chance, levels = np.random.default_rng(seed), levels_of(bits, len(NODES))
    rows = chance.normal(size=(len(NODES), SIZE))
    rows *= chance.uniform(0.1, 1, (len(NODES), 1)) * levels / np.linalg.norm(rows, axis=1, keepdims=True)
    return dict(zip(NODES, np.rint(rows).astype(f"<i{bits // 8}"), strict=True))


def filled(folder: Path, sent: dict[str, np.ndarray], order: Any = NODES, bits: Any = 32) -> tuple[UpdateTable, Block]:
    block = Block("delta", SIZE, "uniform", 3.0, bits)
    table = UpdateTable((block, LANES), NODES, folder)
    for node in order:
        table.add(node, {"delta": sent[node], "lanes": lanes_of(10, 100)})
    return table, block


def combined(folder: Path, rule: str, order: Any = NODES, nodes: Any = NODES, bits: Any = 32) -> Combined:
    table, block = filled(folder, updates(bits), order, bits)
    return combine(table, block, nodes, robust(rule), len(NODES))


def by_hand(sent: dict[str, np.ndarray], rule: str, f: int) -> list[float]:
    """The rule in whole numbers of unlimited size, in levels."""
    rows = [[int(value) for value in sent[node]] for node in sorted(sent)]
    count = len(rows)
    if rule == "nnm-trimmed-mean":

        def apart(left: list[int], right: list[int]) -> int:
            return sum((one - other) ** 2 for one, other in zip(left, right, strict=True))

        mixed = []
        for own in rows:
            near = sorted(range(count), key=lambda index: (apart(own, rows[index]), index))[: count - f]
            mixed.append([sum(rows[index][place] for index in near) for place in range(SIZE)])
        rows = mixed
    columns = [sorted(column) for column in zip(*rows, strict=True)]
    if rule == "median":
        return [column[count // 2] for column in columns]
    scale = count - f if rule == "nnm-trimmed-mean" else 1
    return [sum(column[f : count - f]) / (count - 2 * f) / scale for column in columns]


@pytest.mark.parametrize("rule", RULES[:3])
def test_the_rule_is_that_of_exact_integers(rule: str, tmp_path: Path) -> None:
    unit = 3.0 / levels_of(32, len(NODES))
    expected = np.array(by_hand(updates(), rule, 2)) * unit
    assert combined(tmp_path, rule).mean.tolist() == pytest.approx(expected.tolist(), rel=1e-15)


def test_clipped_mean_scales_to_the_median_norm(tmp_path: Path) -> None:
    rows = np.stack([updates()[node].astype(np.float64) for node in NODES]) * 3.0 / levels_of(32, len(NODES))
    norms = np.linalg.norm(rows, axis=1)
    expected = (rows * np.minimum(1, np.median(norms) / norms)[:, None]).mean(0)
    np.testing.assert_allclose(combined(tmp_path, "clipped-mean").mean, expected, rtol=1e-12)


@rule_by_rule
@pytest.mark.parametrize("bits", [32, 64])
def test_not_a_bit_depends_on_the_order_of_arrival_or_on_the_pieces(
    rule: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = combined(tmp_path, rule, bits=bits)
    chance = np.random.default_rng(1)
    for _ in range(3):
        other = combined(tmp_path, rule, chance.permutation(NODES).tolist(), bits=bits)
        assert other.mean.tobytes() == first.mean.tobytes()
        assert other.distance.tobytes() == first.distance.tobytes()
    monkeypatch.setattr(tables, "PIECE_VALUES", 7 * 13)
    pieced = combined(tmp_path, rule, bits=bits)
    if bits == 32 and rule != "clipped-mean":
        assert pieced.mean.tobytes() == first.mean.tobytes(), "whole numbers, however they are added"
    np.testing.assert_allclose(pieced.mean, first.mean, rtol=1e-12)


@rule_by_rule
def test_figures_are_those_of_the_rows(rule: str, tmp_path: Path) -> None:
    found, unit = combined(tmp_path, rule), 3.0 / levels_of(32, len(NODES))
    rows = np.stack([updates()[node].astype(np.float64) for node in NODES]) * unit
    np.testing.assert_allclose(found.norm, np.linalg.norm(rows, axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.distance, np.linalg.norm(rows - found.mean, axis=1), rtol=1e-9)
    cosine = rows @ found.mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(found.mean)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-9)
    ordered = rows.argsort(0).argsort(0)
    np.testing.assert_allclose(found.trimmed, ((ordered < 2) | (ordered > 4)).mean(1))


def test_only_those_who_answered_are_in_it(tmp_path: Path) -> None:
    sent = updates()
    survivors = ("a", "c", "d", "f", "g")
    table, block = filled(tmp_path, sent, survivors)
    found = combine(table, block, survivors, robust("median"), len(NODES)).mean
    expected = by_hand({node: sent[node] for node in survivors}, "median", 2)
    assert found.tolist() == pytest.approx((np.array(expected) * 3.0 / levels_of(32, 7)).tolist(), rel=1e-15)
    assert table.nodes == set(survivors)


def test_integer_blocks_are_summed_as_ever(tmp_path: Path) -> None:
    table, _ = filled(tmp_path, updates())
    assert {name: values.tolist() for name, values in table.sums().items()} == {"lanes": [70, 7, 0, 0]}


def test_real_blocks_have_the_sum_of_plain_mode_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concord_server.robust.table.PIECE_VALUES", 100)
    sent, survivors = updates(), ("a", "c", "g")
    table, _ = filled(tmp_path, sent)
    expected = sum(sent[node].astype(np.int64) for node in survivors)
    total = table.totals(survivors)["delta"]
    assert total.dtype == sent["a"].dtype
    assert total.tolist() == np.asarray(expected).tolist()


def test_a_node_is_never_taken_twice(tmp_path: Path) -> None:
    sent = updates()
    table, _ = filled(tmp_path, sent)
    with pytest.raises(AssertionError):
        table.add("a", {"delta": sent["b"], "lanes": lanes_of(10, 100)})
    [(_, rows)] = table.pieces("delta", ["a"])
    assert rows[0].tolist() == sent["a"].tolist()


def test_wide_and_narrow_blocks_lie_side_by_side(tmp_path: Path) -> None:
    blocks = (Block("narrow", 3, "uniform"), Block("wide", 2, "uniform", ring_bits=64), LANES)
    table = UpdateTable(blocks, ("a", "b"), tmp_path)
    for node, base in (("b", 10), ("a", 2**40)):
        wide = np.array([base, -base])
        table.add(node, {"narrow": np.arange(3, dtype="<i4") - 1, "wide": wide, "lanes": lanes_of(1, 1)})
    [(_, wide)] = table.pieces("wide", ("a", "b"))
    [(_, narrow)] = table.pieces("narrow", ("a", "b"))
    assert wide.tolist() == [[2**40, -(2**40)], [10, -10]]
    assert narrow.tolist() == [[-1, 0, 1]] * 2


def resident(folder: Path) -> int:
    """Bytes of files in `folder`, named or not, that this process holds in memory; 0 where the system does not say."""
    maps = Path("/proc/self/smaps")
    found, inside = 0, False
    for line in maps.read_text("utf-8").splitlines() if maps.exists() else []:
        if "-" in line.split()[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_resident_sees_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the next test."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("skipped: needs /proc/self/smaps")
    monkeypatch.setattr(UpdateTable, "_forget", lambda table: None)
    table, block = filled(tmp_path, updates())
    assert resident(tmp_path) >= table_bytes((block, LANES), len(NODES))
    assert len(table.nodes) == 7


@pytest.mark.parametrize("rule", ["nnm-trimmed-mean", "clipped-mean"])
def test_memory_is_that_of_one_model_whatever_the_nodes(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 Updates of 200,000 numbers are 32 MB on the disk; all that is allocated for them is a few models' worth."""
    monkeypatch.setattr(tables, "PIECE_VALUES", 1 << 15)
    block, nodes = Block("delta", 200_000, "uniform"), tuple(f"n{index:02}" for index in range(40))
    assert table_bytes((block, LANES), 40) == 32_000_000
    row = np.arange(200_000, dtype="<i4")
    tracemalloc.start()
    try:
        table = UpdateTable((block, LANES), nodes, tmp_path)
        for node in nodes:
            table.add(node, {"delta": row, "lanes": lanes_of(1, 1)})
        combine(table, block, nodes, robust(rule, 10), 40)
        peak = tracemalloc.get_traced_memory()[1]
        assert resident(tmp_path) < 1_000_000
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000, "a model in float64 is 1.6 MB"


def test_the_file_goes_with_the_process(tmp_path: Path) -> None:
    table, _ = filled(tmp_path, updates())
    assert list(tmp_path.iterdir()) == [], "nothing to clean up, even after kill -9"
    assert len(table.nodes) == 7


def test_a_full_disk_is_said_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ArtefactError, match="no room for the table of Updates") as caught:
        UpdateTable((Block("delta", 5, "uniform"), LANES), NODES, tmp_path)
    assert isinstance(caught.value.__cause__, OSError), "by which a coordinator knows that its run waits"


def test_two_steps_have_tables_of_their_own(tmp_path: Path) -> None:
    first, _ = filled(tmp_path, updates(seed=1))
    second, _ = filled(tmp_path, updates(seed=2))
    rows = [next(table.pieces("delta", ["a"]))[1][0].tolist() for table in (first, second)]
    assert rows[0] != rows[1]
