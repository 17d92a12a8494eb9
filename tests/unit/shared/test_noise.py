"""Integer noise: its distribution, its secrecy, and what it does to an Update."""

import math
import os

import numpy as np
import pytest
from numpy.typing import NDArray

from concord_shared.blocks import Block, encode_update
from concord_shared.noise import (
    CHUNK,
    SecretStream,
    coarse_levels,
    node_deviation,
    noised_sums,
    noised_update,
    round_by_chance,
    sum_deviation,
)
from concord_shared.plan import Plan
from helpers import IMAGES, plan_of

DRAWS = 200_000


def hidden_plan(mode: str = "private", *overrides: str) -> Plan:
    dp = f"privacy={{mode='{mode}', dp={{unit='node', epsilon=3.0, delta=1e-5, clip=10.0}}}}"
    return plan_of(IMAGES, dp, *overrides)


def weights(deviation: float, reach: int) -> NDArray[np.float64]:
    points = np.arange(-reach, reach + 1)
    found = np.exp(-(points**2) / (2 * deviation**2))
    return np.asarray(found / found.sum())


def chi_square(seen: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Against its own deviations: how many of them it lies above its mean."""
    value = float(((seen - expected) ** 2 / expected).sum())
    return (value - len(seen)) / math.sqrt(2 * len(seen))


@pytest.mark.parametrize("deviation", [0.5, 1.0, 4.0, 30.0])
def test_a_narrow_draw_has_the_weights_of_the_discrete_gaussian(deviation: float) -> None:
    reach = round(3 * deviation)
    draws = SecretStream().integers(deviation, DRAWS)
    seen = np.bincount(np.clip(draws, -reach, reach) + reach, minlength=2 * reach + 1)
    exact = weights(deviation, 12 * reach)
    middle = exact[11 * reach : 13 * reach + 1].copy()
    middle[[0, -1]] += exact[: 11 * reach].sum()
    assert chi_square(seen, middle * DRAWS) < 6


@pytest.mark.parametrize("deviation", [1024.0, 1025.0, 40_000.0, 3e7, 1e12])
def test_a_wide_draw_is_a_gaussian_of_that_deviation(deviation: float) -> None:
    draws = SecretStream().integers(deviation, DRAWS)
    assert draws.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * DRAWS))
    assert abs(draws.mean()) < 5 * deviation / math.sqrt(DRAWS)
    edges = np.linspace(-3, 3, 25)
    seen, _ = np.histogram(draws / deviation, [-np.inf, *edges, np.inf])
    below = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    assert chi_square(seen, np.diff([0, *below, 1]) * DRAWS) < 6


def test_a_wide_draw_leaves_no_residue_out() -> None:
    """A sum of a coarse and a fine part: every residue of the coarse step comes as often as any other."""
    residues = np.bincount(SecretStream().integers(5e5, DRAWS) % 128, minlength=128)
    assert chi_square(residues, np.full(128, DRAWS / 128)) < 6


def test_uniforms_and_normals_are_what_they_say() -> None:
    stream = SecretStream()
    uniforms = stream.uniforms(DRAWS)
    assert 0 < uniforms.min() < uniforms.max() < 1
    assert chi_square(np.histogram(uniforms, 64, (0, 1))[0], np.full(64, DRAWS / 64)) < 6
    normals = stream.normals(DRAWS + 1)
    assert len(normals) == DRAWS + 1
    assert normals.std() == pytest.approx(1, rel=5 / math.sqrt(2 * DRAWS))
    neighbours = np.corrcoef(normals[:-1], normals[1:])[0, 1]
    halves = np.corrcoef(normals[: CHUNK // 2], normals[CHUNK // 2 : CHUNK])[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(DRAWS)
    assert abs(halves) < 5 / math.sqrt(CHUNK // 2)


def test_streams_differ_and_rest_on_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not np.array_equal(SecretStream().words(4), SecretStream().words(4))
    stream = SecretStream()
    assert not np.array_equal(stream.words(4), stream.words(4))
    monkeypatch.setattr(os, "urandom", lambda size: b"k" * size)
    assert np.array_equal(SecretStream().words(4), SecretStream().words(4))


def test_rounding_by_chance_keeps_the_mean_and_moves_nothing_by_a_whole_level() -> None:
    reals = np.full(DRAWS, 2.3)
    rounded = round_by_chance(reals, SecretStream())
    assert set(rounded) == {2.0, 3.0}
    assert rounded.mean() == pytest.approx(2.3, abs=0.01)
    assert round_by_chance(np.array([-5.0, 7.0]), SecretStream()).tolist() == [-5.0, 7.0]


@pytest.mark.parametrize("size", [1, 650, 26_010, 693_962, 10_000_000])
def test_an_update_has_levels_enough_that_rounding_hardly_makes_it_longer(size: int) -> None:
    levels = coarse_levels(size)
    assert levels >= 20 * math.sqrt(size)
    assert (levels + math.sqrt(size)) / levels <= 1.05


@pytest.mark.parametrize("vector", [np.ones(500), np.eye(500)[0], -np.linspace(0, 1, 500)], ids=["flat", "one", "ramp"])
def test_no_update_is_longer_in_levels_than_what_its_noise_is_made_for(vector: NDArray[np.float64]) -> None:
    plan = hidden_plan()
    block = Block("delta", 500, "uniform", 10.0, levels=coarse_levels(500))
    stream = SecretStream()
    for scale in (1e-3, 1.0, 1e6):
        update = encode_update((block,), {"delta": vector * scale}, 5, 5, 3, lambda part: round_by_chance(part, stream))
        length = float(np.linalg.norm(update.blocks["delta"].astype(np.float64)))
        assert length * plan_multiplier(plan) <= sum_deviation(plan, 500)
        assert update.blocks["lanes"].tolist() == [5, 1, 0, 0]


def plan_multiplier(plan: Plan) -> float:
    from concord_shared.accounting import noise_multiplier

    return noise_multiplier(plan, 1)


@pytest.mark.parametrize(("nodes", "honest"), [(3, 3), (5, 3), (10, 4), (100, 34)])
def test_the_guaranteed_survivors_without_colluders_make_up_the_noise(nodes: int, honest: int) -> None:
    """m − c of the thresholds: (3, 0), (4, 1), (7, 3), (67, 33)."""
    plan = hidden_plan()
    assert node_deviation(plan, 500, nodes) * math.sqrt(honest) == pytest.approx(sum_deviation(plan, 500))


def test_only_noised_blocks_are_noised_and_only_by_whom_the_plan_names() -> None:
    blocks = (Block("delta", 500, "uniform", 10.0, levels=coarse_levels(500)), Block("metrics", 3, "none"))
    plain = {"delta": np.zeros(500, "<i4"), "metrics": np.arange(3, dtype="<i4"), "lanes": np.arange(4, dtype="<i8")}
    private, central = hidden_plan(), hidden_plan("plain")
    for plan, at_nodes in ((private, True), (central, False), (plan_of(IMAGES), False)):
        sent = noised_update(plan, blocks, plain, 5, SecretStream())
        assert sent["delta"].any() == at_nodes
    for plan, at_coordinator in ((private, False), (central, True), (plan_of(IMAGES), False)):
        summed = noised_sums(plan, blocks, plain, 5)
        assert summed["delta"].any() == at_coordinator
        assert summed["metrics"] is plain["metrics"]
        assert summed["lanes"] is plain["lanes"]
    assert not plain["delta"].any()
