"""Labels that a model of the other rows disagrees with: found, shown to the owner, and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from concord_client import registry
from concord_client.cli import app
from concord_client.data import RawData
from concord_client.suspects import find_suspects
from concord_shared.errors import DataError, UsageError
from helpers import REGRESSION, TABLE, plan_of
from unit.client.fake_coordinator import NOW, partner_in

PLAN = plan_of(TABLE, "training.learning_rate=0.5")


def rows(count: int, wrong: int, rng: np.random.Generator) -> tuple[RawData, set[int]]:
    """Those over 60 are ill, but for `wrong` rows that say otherwise; nobody is near 60."""
    ages = np.where(rng.random(count) < 0.5, rng.uniform(10, 45, count), rng.uniform(75, 110, count))
    targets = (ages > 60).astype(np.int64)
    chosen = rng.choice(count, wrong, replace=False)
    targets[chosen] = 1 - targets[chosen]
    inputs = np.stack([ages, rng.integers(0, 3, count).astype(float), rng.normal(0, 1, count).clip(-5, 5)], 1)
    return RawData(inputs, targets), {int(row) + 1 for row in chosen}


def test_wrong_labels_are_found_and_right_ones_are_not(rng: np.random.Generator) -> None:
    data, wrong = rows(300, 12, rng)
    found = find_suspects(PLAN, data, passes=20, device="cpu")
    assert {suspect.row for suspect in found} == wrong
    assert [each.probability for each in found] == sorted((each.probability for each in found), reverse=True)
    for suspect in found:
        assert suspect.label == PLAN.data.classes[data.targets[suspect.row - 1]]
        assert suspect.likely != suspect.label


def test_noise_for_privacy_is_not_added_to_what_stays_here(rng: np.random.Generator) -> None:
    """With this little ε a model of so few rows would be noise alone."""
    dp = "privacy={mode='plain', dp={unit='record', epsilon=0.5, delta=1e-5, clip=0.1}}"
    data, wrong = rows(300, 12, rng)
    ages = RawData(data.inputs / [100, 1, 1], data.targets)
    plan = plan_of(TABLE, "training.learning_rate=0.5", "preprocessing={scope='none'}", dp)
    found = {suspect.row for suspect in find_suspects(plan, ages, passes=30, device="cpu")}
    assert found <= wrong
    assert len(found) >= 10


def test_a_number_has_no_wrong_class_and_too_few_rows_have_no_others(rng: np.random.Generator) -> None:
    with pytest.raises(UsageError, match="those of a classification"):
        find_suspects(plan_of(REGRESSION), RawData(np.zeros((20, 3)), np.zeros(20)))
    with pytest.raises(DataError, match="9 rows are too few"):
        find_suspects(PLAN, rows(9, 1, rng)[0])


def test_the_command_shows_rows_to_the_owner_and_posts_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    partner = partner_in(tmp_path / "home")
    data, wrong = rows(100, 4, rng)
    names = [column.name for column in PLAN.data.columns]
    cells = [
        [str(age), PLAN.data.columns[1].categories[int(city)], str(dose), PLAN.data.classes[target]]
        for (age, city, dose), target in zip(data.inputs, data.targets, strict=True)
    ]
    (tmp_path / "own.csv").write_text("\n".join(",".join(row) for row in [[*names, "ill"], *cells]), "utf-8")
    (tmp_path / "plan.toml").write_text(TABLE + "[training]\nlearning_rate = 0.5\n", "utf-8")
    registry.add_dataset(partner.store, "own", f"csv:{tmp_path / 'own.csv'}", NOW)
    before = len(partner.store.outbox()), len(partner.store.egress())
    words = ["data", "suspects", "own", "--plan", str(tmp_path / "plan.toml"), "--passes", "60"]
    words += ["--home", str(partner.home.path)]
    told = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert told["rows"] == 100
    found = {each["row"] for each in told["suspects"]}
    assert found <= wrong
    assert len(found) >= 3
    shown = CliRunner().invoke(app, [*words, "--most", "1"], catch_exceptions=False).stdout
    assert f"{len(found)} of 100 rows look mislabelled" in shown
    assert len(shown.splitlines()) == 4
    assert (len(partner.store.outbox()), len(partner.store.egress())) == before
