"""Tables of ratings: who rated what. Users are numbered here and named to nobody."""

from pathlib import Path

import numpy as np
import pytest

from concord_client.data import differences, read_batches, read_data
from concord_client.registry import add_dataset, card_of
from concord_shared.errors import ContractError
from helpers import RANKING, RATINGS, plan_of
from unit.client.fake_coordinator import NOW, partner_in

PLAN = plan_of(RATINGS)
GUEST = "kanarienvogel"
ROWS = f"guest,place,stars\n{GUEST},a,4\nbob,b,0\n{GUEST},c,1.5\n"


def spec(folder: Path, text: str) -> str:
    (folder / "ratings.csv").write_text(text, "utf-8")
    return f"csv:{folder / 'ratings.csv'}"


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ContractError) as caught:
        read_data(spec(folder, text), PLAN)
    return str(caught.value)


def test_users_are_numbered_as_they_come_and_items_by_the_contract(tmp_path: Path) -> None:
    data = read_data(spec(tmp_path, ROWS), PLAN)
    assert data.inputs.tolist() == [[0, 0], [1, 1], [0, 2]]
    assert data.targets.tolist() == [4, 0, 1.5]
    assert data.groups["guest"].tolist() == [GUEST, "bob", GUEST]


def test_in_batches_a_user_keeps_the_number(tmp_path: Path) -> None:
    batches = list(read_batches(spec(tmp_path, ROWS), PLAN, rows=1))
    assert np.concatenate([batch.inputs for batch in batches]).tolist() == [[0, 0], [1, 1], [0, 2]]


def test_an_item_that_the_contract_does_not_name_is_unknown_and_no_error(tmp_path: Path) -> None:
    text = "guest,place,stars\nann,z,4\nann,y,1\nbob,a,2\n"
    assert read_data(spec(tmp_path, text), PLAN).inputs.tolist() == [[0, -1], [0, -1], [1, 0]]


def test_a_ranking_needs_no_ratings(tmp_path: Path) -> None:
    data = read_data(spec(tmp_path, "guest,place\nann,a\nann,c\n"), plan_of(RANKING))
    assert data.inputs.tolist() == [[0, 0], [0, 2]]
    assert data.targets.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("guest,place,stars\nann,a,4.5\nann,b,-1\nbob,a,4\n", "target stars: 2 values are missing or outside"),
        ("guest,place,stars\nann,a,\n", "target stars: 1 values are missing or outside"),
        ("guest,place,stars\nann,a,good\n", "target stars: 1 values are not numbers"),
        ("place,stars\na,4\n", "column guest: missing; the plan's contract names it"),
        ("guest,stars\nann,4\n", "column place: missing; the plan's contract names it"),
        ("guest,place\nann,a\n", "target stars: missing; the plan's contract names it"),
        ("guest,place,stars\n,a,4\nann, ,3\nann,a,2\n", "column guest: 1 rows do not say it"),
        ("guest,place,stars\nann,a,4\nann,b,3\nann,a,4\nann,a,1\n", "2 rows rate what the same user rated in another"),
    ],
)
def test_what_does_not_fit_is_told_in_counts(text: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, text)


def test_a_repeated_rating_is_found_in_another_batch(tmp_path: Path) -> None:
    batches = read_batches(spec(tmp_path, "guest,place,stars\nann,a,4\nbob,a,1\nann,a,3\n"), PLAN, rows=1)
    with pytest.raises(ContractError, match="1 rows rate what the same user rated"):
        list(batches)


def test_ratings_are_needed_to_predict_too(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="target stars: missing"):
        read_data(spec(tmp_path, "guest,place\nann,a\n"), PLAN, labelled=False)


def test_no_refusal_names_a_user(tmp_path: Path) -> None:
    text = f"guest,place,stars\n{GUEST},a,99\n{GUEST},a,{GUEST}\n{GUEST},,1\n{GUEST},a,2\n"
    found = " ".join(map(str, differences(spec(tmp_path, text), PLAN)))
    assert "rows rate what the same user" in found
    assert GUEST not in found + refusal(tmp_path, text)


def test_a_card_says_of_ratings_which_columns_they_have_and_about_how_many(tmp_path: Path) -> None:
    partner = partner_in(tmp_path / "node")
    lines = "".join(f"{GUEST}{number},a,1\n" for number in range(4))
    plan = tmp_path / "plan.toml"
    plan.write_text(RATINGS, "utf-8")
    source = spec(tmp_path, f"guest,place,stars\n{lines}")
    dataset = add_dataset(partner.store, "ratings", source, NOW, plan=str(plan))
    card = card_of(partner.home, partner.store, dataset, NOW)
    partner.store.close()
    assert card.columns == ("guest", "place", "stars")
    assert (card.rows, card.rows_told) == (10, "fewer")
    assert GUEST not in card.model_dump_json()
