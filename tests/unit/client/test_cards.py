"""An owner's choices, the card that is made of them, the quality of rows, and the commands around all of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client import cards, quality, registry
from concord_client.cards import CardChoices, card_with, choices_of, put_choices
from concord_client.store import Dataset, NodeStore
from concord_shared.croissant import croissant_of
from concord_shared.documents import CardColumn, DatasetCard, Quality, Terms
from concord_shared.errors import ConcordError, DataError, UsageError
from concord_shared.plan import Plan
from concord_shared.signing import Envelope, open_envelope, seal
from helpers import plan_of
from unit.client.fake_coordinator import DAY, NOW, REQUESTER, TABLE_PLAN, Partner, partner_in, use_commands_at
from unit.client.node_cli import run, run_json

CANARY = "canary-7391"


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    use_commands_at(made, monkeypatch)
    yield made
    made.store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    with NodeStore(tmp_path / "node.db") as opened:
        yield opened


def dataset(**changes: Any) -> Dataset:
    fields: dict[str, Any] = {
        "name": "patients",
        "version": "a" * 64,
        "spec": "csv:/secret/path.csv",
        "title": "Patients",
        "description": "",
        "rows": 303,
        "input": "table",
        "columns": ("age", "sex", "ill"),
        "licence": "",
        "registered_at": NOW,
    }
    return Dataset(**fields | changes)


def made(choices: CardChoices, **changes: Any) -> DatasetCard:
    return card_with("acme-1", "acme", dataset(**changes), choices, NOW)


# The card


def test_without_choices_a_card_tells_what_it_always_told() -> None:
    card = made(CardChoices())
    assert (card.rows, card.rows_told, card.columns) == (303, "", ("age", "sex", "ill"))
    assert card.details == card.keywords == ()
    assert card.quality is card.terms is None


def test_few_rows_are_never_told_exactly() -> None:
    for rows in ("exact", "about"):
        card = made(CardChoices(rows=rows), rows=7)  # type: ignore[arg-type]
        assert (card.rows, card.rows_told) == (10, "fewer")
    assert made(CardChoices(minimum=400)).rows == 400


def test_hidden_columns_are_in_no_part_of_the_card() -> None:
    choices = CardChoices(
        hidden=("sex",),
        described=(CardColumn(name="sex", kind="category", categories=("f", "m")), CardColumn(name="age", unit="a")),
        quality=Quality(minimum=10, missing={"age": "5%", "sex": "5%"}),
        quality_of="a" * 64,
    )
    card = made(choices)
    assert "sex" not in card.model_dump_json()
    assert card.quality == Quality(minimum=10, missing={"age": "5%"})
    assert made(choices.model_copy(update={"columns": "none"})).columns == ()


def test_quality_of_other_content_or_under_a_higher_minimum_is_not_told() -> None:
    choices = CardChoices(quality=Quality(minimum=10, duplicates="5%"), quality_of="a" * 64)
    assert made(choices).quality is not None
    assert made(choices, version="b" * 64).quality is None
    assert made(choices.model_copy(update={"minimum": 20})).quality is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"title": "x" * 301}, "title"),
        ({"licence": "do what you like"}, "SPDX"),
        ({"columns": tuple(f"{index:05}" + "x" * 200 for index in range(9000))}, "--columns none"),
        ({"columns": ("x" * 301,)}, "columns"),
    ],
)
def test_a_card_that_nobody_would_take_is_not_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made(CardChoices(), **changes)


def test_choices_stay_when_the_dataset_is_registered_anew_and_go_with_it(partner: Partner, tmp_path: Path) -> None:
    run("data", "describe", "patients", "--keyword", "hearts", "--term", "purpose=research")
    run("data", "add", "patients", f"csv:{tmp_path / 'patients.csv'}", "--replace")
    assert choices_of(partner.store, "patients").keywords == ("hearts",)
    run("data", "remove", "patients", "--yes")
    assert choices_of(partner.store, "patients") == CardChoices()


def test_what_was_allowed_is_in_the_audit_log(partner: Partner) -> None:
    run("data", "describe", "patients", "--term", "epsilon=3")
    [entry] = [entry for entry, _ in partner.store.log_entries() if entry.action == "dataset:describe"]
    assert json.loads(entry.detail["terms"])["epsilon"] == "3"


# Quality


def table(path: Path, rows: int) -> Path:
    """60 % missing in `b`, a tenth of the rows repeated, a value that must never leave."""
    body = [f"{row if row % 10 else 0},{'' if row % 5 < 3 else row},{CANARY}" for row in range(rows)]
    path.write_text("\n".join(["a,b,c", *body]) + "\n", "utf-8")
    return path


def test_a_table_is_measured_without_a_plan(store: NodeStore, tmp_path: Path) -> None:
    held = registry.add_dataset(store, "t", f"csv:{table(tmp_path / 't.csv', 1000)}", NOW)
    found = quality.measure(held, 10)
    assert found.missing == {"a": "<10", "b": "60%", "c": "<10"}
    assert found.duplicates == "10%"
    assert CANARY not in found.model_dump_json()


def test_a_share_of_few_rows_is_not_told(store: NodeStore, tmp_path: Path) -> None:
    held = registry.add_dataset(store, "t", f"csv:{table(tmp_path / 't.csv', 15)}", NOW)
    assert quality.measure(held, 10).missing == {"a": "", "b": "", "c": ""}
    assert quality.measure(held, 2).missing == {"a": "<2", "b": "60%", "c": "<2"}


def test_images_without_a_plan_are_refused_by_name(store: NodeStore) -> None:
    held = registry.add_dataset(store, "digits", "digits", NOW)
    with pytest.raises(UsageError, match="--plan"):
        quality.measure(held, 10)


def test_a_file_that_cannot_be_read_is_named_without_a_value(store: NodeStore, tmp_path: Path) -> None:
    held = registry.add_dataset(store, "t", f"csv:{table(tmp_path / 't.csv', 20)}", NOW)
    (tmp_path / "t.csv").write_bytes(f"a,b,c\n1,2,3,4,{CANARY}\n".encode())
    with pytest.raises(DataError) as caught:
        quality.measure(held, 10)
    assert CANARY not in str(caught.value)


def labelled(path: Path, wrong: int) -> tuple[Path, Plan]:
    """800 rows in two clear groups, a quarter in the second; of the first, `wrong` have the other label."""
    chance = np.random.default_rng(0)
    lines = ["age,weight,ill"]
    for row in range(800):
        ill = row % 4 == 0
        age, weight = chance.normal((80, 90) if ill else (30, 60), 4)
        label = "yes" if ill or (row % 4 >= 1 and row < wrong * 4 // 3) else "no"
        lines.append(f"{age:.2f},{'' if row % 8 == 0 else round(weight, 2)},{label}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path, plan_of(TABLE_PLAN)


@pytest.mark.parametrize(("wrong", "told"), [(0, "<10"), (80, "10%")])
def test_wrong_labels_are_suspected_and_nothing_else(store: NodeStore, tmp_path: Path, wrong: int, told: str) -> None:
    file, plan = labelled(tmp_path / "t.csv", wrong)
    held = registry.add_dataset(store, "t", f"csv:{file}", NOW)
    found = quality.measure_by(held, plan, 10)
    assert found.suspect_labels == told
    assert found.missing == {"age": "<10", "weight": "12%"}
    assert (found.largest_class, found.smallest_class) == (("76%", "24%") if not wrong else ("66%", "34%"))
    assert found.duplicates == "<10"


def test_images_are_measured_by_a_plan(store: NodeStore) -> None:
    from concord_shared.plan import load_plan

    held = registry.add_dataset(store, "digits", "digits", NOW)
    found = quality.measure_by(held, load_plan("digits-cnn").plan, 10)
    assert (found.missing, found.duplicates) == ({}, "<10")
    assert found.largest_class == found.smallest_class == "10%"


TEXT_PLAN = """
name = "texts"
[data]
task = "classification"
input = "text"
text = "words"
length_max = 100
target = "kind"
classes = ["prose", "verse"]
[preprocessing.text]
bins = 64
[model]
name = "logistic-regression"
"""


def test_texts_are_measured_by_a_plan(store: NodeStore, tmp_path: Path) -> None:
    rows = [f"{'ab' if row % 2 else 'xy'} {row % 40},{'verse' if row % 2 else 'prose'}" for row in range(400)]
    (tmp_path / "t.csv").write_text("\n".join(["words,kind", *rows]) + "\n", "utf-8")
    held = registry.add_dataset(store, "t", f"csv:{tmp_path / 't.csv'}", NOW)
    found = quality.measure_by(held, plan_of(TEXT_PLAN), 10)
    assert (found.duplicates, found.suspect_labels) == ("90%", "<10")
    assert found.largest_class == found.smallest_class == "50%"


# The commands


@pytest.mark.parametrize("plan", [[], ["--plan", "tiny.toml"]])
def test_quality_is_of_the_registered_rows_and_read_as_the_policy_says(
    partner: Partner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    held = registry.current_dataset(partner.store, "patients")
    file = Path(held.spec.partition(":")[2])
    (tmp_path / "elsewhere").mkdir()
    partner.home.policy_file.write_text(f"[data]\nroots = ['{tmp_path / 'elsewhere'}']\n", "utf-8")
    with pytest.raises(DataError, match="outside"):
        run("data", "describe", "patients", "--quality", *plan)
    partner.home.policy_file.write_text("", "utf-8")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="changed since registration"):
        run("data", "describe", "patients", "--quality", *plan)


def test_describe_says_what_would_leave_and_sends_nothing(partner: Partner) -> None:
    shown = run(
        *("data", "describe", "patients", "--title", "Heart patients", "--licence", "cc-by-4.0", "--rows", "about"),
        *("--keyword", "cardiology", "--language", "en", "--unit", "weight=kg", "--range", "age=0..120"),
        *("--categories", "ill=no,yes", "--column", "age=at admission", "--hide", "weight", "--quality"),
        *("--term", "purpose=research", "--term", "purpose=care", "--term", f"who={REQUESTER}"),
        *(
            "--term",
            "until=2027-12-31",
            "--term",
            "minimum-cohort=3",
            "--term",
            "epsilon=3",
            "--term",
            "output=release",
        ),
    )
    for part in ("about 20", "CC-BY-4.0", "0 to 120", "no, yes", "research, care", "2027-12-31", "stays here"):
        assert part in shown
    assert partner.coordinator.received == {} or "cards" not in partner.coordinator.received
    told = run_json("data", "card", "patients")
    assert told["columns"] == ["age", "ill"]
    assert [each["name"] for each in told["details"]] == ["age", "ill"]
    assert told["terms"]["outputs"] == ["release"]


def test_describe_by_a_plan_takes_the_contract_and_no_value_of_a_row(partner: Partner, tmp_path: Path) -> None:
    run("data", "describe", "patients", "--plan", str(tmp_path / "tiny.toml"), "--quality", "--minimum-count", "5")
    told = run_json("data", "card", "patients")
    assert {each["name"]: (each["kind"], each["range"], each["categories"]) for each in told["details"]} == {
        "age": ("number", ["0", "120"], []),
        "weight": ("number", ["0", "400"], []),
        "ill": ("category", None, ["no", "yes"]),
    }
    assert told["quality"] == {
        "minimum": 5,
        "missing": {"age": "<5", "weight": "<5"},
        "duplicates": "<5",
        "largest_class": "50%",  # 13 of 20: steps of at least five rows
        "smallest_class": "50%",
        "suspect_labels": told["quality"]["suspect_labels"],
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "roughly"], "rows"),
        (["--licence", "free"], "SPDX"),
        (["--language", "English"], "languages"),
        (["--hide", "name"], "no column name"),
        (["--unit", "name=kg"], "expected COLUMN="),
        (["--range", "age=0-120"], "LOW..HIGH"),
        (["--range", "age=9..1"], "LOW..HIGH"),
        (["--range", "age=nan..1"], "LOW..HIGH"),
        (["--term", "colour=red"], "expected KEY=VALUE"),
        (["--term", "until=soon"], "expected a day"),
        (["--term", "minimum-cohort=many"], "whole number"),
        (["--term", "epsilon=-inf"], "epsilon"),
        (["--term", "purpose=Any Purpose"], "purposes"),
        (["--term", "output=sale"], "outputs"),
        (["--keyword", "x" * 61], "keywords"),
    ],
)
def test_describe_names_the_mistake_and_changes_nothing(partner: Partner, words: list[str], said: str) -> None:
    with pytest.raises(ConcordError, match=said):
        run("data", "describe", "patients", "--keyword", "kept", *words)
    assert choices_of(partner.store, "patients") == CardChoices()


def test_a_term_is_lifted_by_an_empty_value(partner: Partner) -> None:
    run("data", "describe", "patients", "--term", "purpose=research", "--term", "output=none")
    assert run_json("data", "card", "patients")["terms"]["outputs"] == []
    run("data", "describe", "patients", "--term", "output=")
    assert run_json("data", "card", "patients")["terms"]["purposes"] == ["research"]
    run("data", "describe", "patients", "--term", "purpose=")
    assert "terms" not in run_json("data", "card", "patients")


def test_wider_terms_let_in_an_agreement_that_was_refused(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    run("data", "describe", "patients", "--term", "minimum-cohort=5")
    given = partner.agreement(terms=Terms(not_after=NOW + DAY, minimum_cohort=3))
    assert "at least 5" in partner.refused("agreement", partner.agreed(given))
    run("data", "describe", "patients", "--term", "minimum-cohort=3")
    assert partner.store.agreement("heart-acme") == given


def test_whoever_approves_reads_what_was_agreed_that_data_and_model_are_for(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    terms = Terms(not_after=NOW + DAY, purposes=("research",), outputs=())
    partner.apply("agreement", partner.agreed(partner.agreement(terms=terms)))
    partner.apply("plan", partner.request())
    [asked] = run_json("approvals", "list")["requests"]
    shown = run("approvals", "show", asked["id"])
    assert "data for   research" in shown
    assert "model for  nothing" in shown


def test_a_preview_sends_nothing_and_the_card_is_what_it_showed(partner: Partner) -> None:
    run("data", "describe", "patients", "--rows", "about", "--keyword", "cardiology")
    shown = run("data", "publish", "patients", "--preview")
    assert "about 20" in shown
    assert "stays here" in shown
    assert "cards" not in partner.coordinator.received
    previewed = run_json("data", "publish", "patients", "--preview")
    assert run_json("data", "publish", "patients", "--yes")["card"] == "sent"
    [sent] = partner.coordinator.received["cards"]
    envelope = Envelope.model_validate_json(json.dumps(sent))
    card = open_envelope(envelope, DatasetCard, [partner.home.identity_key().public_key()])
    assert card.model_dump(mode="json") | {"card": ""} == previewed
    assert card.rows_told == "about"


def test_every_field_of_a_card_is_in_the_preview(partner: Partner, tmp_path: Path) -> None:
    """What leaves is what was shown: each text and number of the card stands in the table."""
    run(
        *("data", "describe", "patients", "--plan", str(tmp_path / "tiny.toml"), "--quality", "--minimum-count", "5"),
        *(
            "--description",
            "words of mine",
            "--keyword",
            "hearts",
            "--term",
            "purpose=research",
            "--term",
            "epsilon=2.5",
        ),
    )
    told, shown = run_json("data", "card", "patients"), run("data", "publish", "patients", "--preview")
    known = {"issued_at", "minimum", "node", "dataset", "rows_told"}  # not of the data; the minimum is in each figure

    def texts(value: Any, key: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from texts(item, name)
        elif isinstance(value, list):
            for item in value:
                yield from texts(item, key)
        elif value not in (None, "", 0) and key not in known:
            yield str(value)

    assert [text for text in texts(told) if text not in shown] == []
    assert [name for name in told["quality"]["missing"] if f"missing in {name}" not in shown] == []


def test_nobody_is_there_to_be_asked(partner: Partner) -> None:
    with pytest.raises(UsageError, match="--yes"):
        run("data", "publish", "patients", stdin="")
    assert "cards" not in partner.coordinator.received


def test_the_card_as_croissant(partner: Partner) -> None:
    told = json.loads(run("data", "card", "patients", "--croissant"))
    dataset = partner.store.dataset("patients")
    assert dataset is not None
    assert told == croissant_of(registry.card_of(partner.home, partner.store, dataset, NOW))


def test_hostile_words_cannot_steer_the_owners_terminal(partner: Partner) -> None:
    held = partner.store.dataset("patients")
    assert held is not None
    put_choices(partner.store, held, CardChoices(keywords=("good\x1b[2Kevil\u202e",)))
    assert all(line.isprintable() for line in run("data", "publish", "patients", "--preview").splitlines())


def test_cards_module_says_nothing_of_where_data_lie() -> None:
    assert "/secret" not in made(CardChoices()).model_dump_json()
    assert cards.columns_told(dataset(), CardChoices(columns="none")) == ()
