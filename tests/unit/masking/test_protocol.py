"""FSA-1: the exact sum of whoever survived, or nothing."""

import itertools

import numpy as np
import pytest

from concord_shared.blocks import LANES, Block
from concord_shared.errors import UsageError
from concord_shared.masking.attempt import STAGES
from concord_shared.masking.thresholds import thresholds_for
from unit.masking.kit import World, assert_exact, names_of, play


class TestThresholds:
    @pytest.mark.parametrize(
        ("nodes", "collusion", "minimum", "expected"),
        [
            (3, 0, 3, (2, 3)),
            (3, 1, 3, (3, 3)),
            (4, None, 3, (3, 3)),
            (5, 1, 3, (4, 4)),
            (10, None, 3, (7, 7)),
            (20, None, 3, (14, 14)),
            (100, None, 3, (67, 67)),
            (10, None, 9, (7, 9)),
        ],
    )
    def test_the_table_of_the_design(
        self, nodes: int, collusion: int | None, minimum: int, expected: tuple[int, int]
    ) -> None:
        needed = thresholds_for(nodes, collusion, minimum)
        assert (needed.opening, needed.survivors) == expected

    def test_no_two_openings_for_any_size(self) -> None:
        """An honest node opens once: no two disjoint honest groups may each be enough with c colluders."""
        for nodes in range(2, 129):
            for collusion in range(nodes):
                try:
                    needed = thresholds_for(nodes, collusion, 2)
                except UsageError:
                    continue
                honest = nodes - collusion
                assert needed.opening > collusion
                assert 2 * (needed.opening - collusion) > honest
                assert needed.survivors - collusion >= 2

    @pytest.mark.parametrize(("nodes", "collusion", "minimum"), [(129, None, 3), (2, None, 3), (5, 4, 3), (4, 0, 5)])
    def test_what_can_never_be_enough_is_said_before(self, nodes: int, collusion: int | None, minimum: int) -> None:
        with pytest.raises(UsageError, match=r"masked step of \d+ nodes"):
            thresholds_for(nodes, collusion, minimum)


class TestTheSum:
    @pytest.mark.parametrize("count", [3, 4, 7, 10])
    def test_is_exact(self, count: int) -> None:
        world = World(count)
        assert_exact(world, play(world))

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize(("count", "losses"), [(4, 1), (10, 3)])
    def test_is_exact_whoever_is_lost_at_any_stage(self, count: int, losses: int, stage: str) -> None:
        world = World(count)
        lost = set(world.names[1 : 1 + losses])
        outcome = play(world, {stage: lost})
        assert_exact(world, outcome)
        late = stage in ("consent", "open")
        assert set(outcome.survivors) == (set(world.names) if late else set(world.names) - lost)

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_hundred_nodes_lose_thirty(self, stage: str) -> None:
        world = World(100)
        assert_exact(world, play(world, {stage: set(world.names[5:35])}))

    def test_losses_spread_over_all_stages(self) -> None:
        chance = np.random.default_rng(7)
        for _ in range(20):
            world = World(int(chance.integers(4, 13)))
            gone = chance.choice(world.names, world.needed.losses, replace=False)
            lost: dict[str, set[str]] = {}
            for name in gone:
                lost.setdefault(str(chance.choice(STAGES)), set()).add(str(name))
            assert_exact(world, play(world, lost))

    @pytest.mark.parametrize("stage", STAGES)
    def test_one_loss_too_many_gives_nothing(self, stage: str) -> None:
        world = World(10)
        outcome = play(world, {stage: set(world.names[:4])})
        assert outcome.sums is None

    def test_three_nodes_tolerate_no_loss(self) -> None:
        world = World(3)
        assert world.needed.losses == 0
        assert play(world, {"masked": {world.names[0]}}).sums is None

    def test_wide_and_narrow_rings_and_long_blocks(self) -> None:
        size = (256 << 10) // 4 + 3  # one more chunk of the stream than fits
        world = World(4, blocks=(Block("a", size), Block("b", 2 * size, ring_bits=64), Block("c", 1), LANES))
        assert_exact(world, play(world, {"masked": {world.names[2]}}))

    def test_does_not_depend_on_which_openers_answer(self) -> None:
        for openers in itertools.combinations(names_of(5), 4):
            world = World(5)
            assert_exact(world, play(world, {"open": set(world.names) - set(openers)}))


class TestTheMasks:
    def test_hide_the_update_and_each_other(self) -> None:
        """Nodes whose Updates are all zero: what they sent, summed, has bytes as uniform as chance allows."""
        world = World(4, blocks=(Block("delta", 200_000), LANES))
        for name in world.names:
            world.updates[name]["delta"][:] = 0
        outcome = play(world, until="masked")
        assert outcome.sums is not None
        counts = np.bincount(outcome.sums["delta"].view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 400  # chi square, 255 degrees of freedom

    def test_are_fresh_in_every_attempt(self) -> None:
        first, second = World(4), World(4, attempt_number=2)
        sums = [play(world, until="masked").sums for world in (first, second)]
        assert sums[0] is not None
        assert sums[1] is not None
        assert not np.array_equal(sums[0]["delta"], sums[1]["delta"])
