"""What a card says: rounded rows never below the truth, coarse shares, SPDX licences, valid Croissant."""

import json
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from concord_shared.cards import figure, most_rows, rows_text, told_rows
from concord_shared.croissant import croissant_of, croissant_text
from concord_shared.documents import CardColumn, DatasetCard, DataTerms, Quality, Terms
from concord_shared.errors import DocumentRefusedError, UsageError
from concord_shared.licences import read_licence
from concord_shared.signing import new_identity_key, open_envelope, seal


def card(**changes: Any) -> DatasetCard:
    fields: dict[str, Any] = {
        "node": "ward-a",
        "organisation": "hospital-a",
        "dataset": "patients",
        "dataset_version": "d" * 64,
        "title": "Patients",
        "rows": 303,
        "input": "table",
        "issued_at": 1_800_000_000,
    }
    return DatasetCard(**fields | changes)


FULL = card(
    title="<script>alert(1)</script>",
    description="Cardiology & more",
    rows=300,
    rows_told="about",
    columns=("age", "sex"),
    details=(
        CardColumn(name="age", kind="number", unit="a", range=("0", "120"), description="at admission"),
        CardColumn(name="sex", kind="category", categories=("f", "m")),
    ),
    keywords=("cardiology",),
    languages=("en", "zh-Hans"),
    licence="CC-BY-4.0",
    quality=Quality(minimum=10, missing={"age": "5%", "sex": "<10"}, duplicates="<10", largest_class="55%"),
    terms=DataTerms(
        purposes=("research",),
        who=("lab",),
        not_after=1_900_000_000,
        minimum_cohort=3,
        epsilon="3",
        outputs=("release",),
    ),
)


@given(st.integers(0, 1 << 52), st.integers(2, 1000))
def test_told_rows_are_never_fewer_than_there_are(rows: int, minimum: int) -> None:
    for about in (True, False):
        told, word = told_rows(rows, about, minimum)
        assert most_rows(card(rows=told, rows_told=word)) >= rows
        if rows < minimum:
            assert (told, word) == (minimum, "fewer")


@pytest.mark.parametrize(
    ("rows", "told"),
    [(0, "fewer than 10"), (9, "fewer than 10"), (14, "about 10"), (47, "about 50"), (303, "about 300"),
     (1289, "about 1300"), (98765, "about 99000")],
)  # fmt: skip
def test_about_tells_two_digits_and_no_unit(rows: int, told: str) -> None:
    number, word = told_rows(rows, True, 10)
    assert rows_text(card(rows=number, rows_told=word)) == told


def test_shares_are_steps_of_at_least_the_minimum_count() -> None:
    assert figure(0, 300, 10) == figure(9, 300, 10) == "<10"
    assert figure(10, 300, 10) == figure(20, 300, 10) == "5%"
    assert figure(299, 300, 10) == figure(300, 300, 10) == "100%"
    assert figure(2_600, 100_000, 10) == "3%"
    assert figure(12, 19, 10) == figure(0, 19, 10) == ""


@given(st.integers(20, 5000), st.integers(10, 50), st.data())
def test_a_share_never_tells_one_count(rows: int, minimum: int, data: st.DataObject) -> None:
    """Whatever is told, a count that is a fifth of the minimum away would have been told the same."""
    count = data.draw(st.integers(0, rows))
    others = (count - minimum // 5, count + minimum // 5)
    near = {figure(other, rows, minimum) for other in others if 0 <= other <= rows}
    assert figure(count, rows, minimum) in near


@pytest.mark.parametrize(
    ("text", "read"),
    [("", ""), ("  ", ""), ("cc0-1.0", "CC0-1.0"), ("MIT OR (Apache-2.0 AND CC-BY-4.0)",) * 2,
     ("LicenseRef-hospital-a",) * 2, ("GPL-2.0-only WITH Classpath-exception-2.0",) * 2],
)  # fmt: skip
def test_a_licence_is_an_spdx_expression(text: str, read: str) -> None:
    assert read_licence(text) == read


@pytest.mark.parametrize("text", ["free", "MIT AND", "(MIT", "MIT MIT", "MIT\x00", "(" * 200, "x" * 400, "<b>MIT</b>"])
def test_anything_else_is_refused_as_a_licence(text: str) -> None:
    with pytest.raises(UsageError, match="SPDX"):
        read_licence(text)


def test_a_card_without_the_new_fields_keeps_its_bytes() -> None:
    """Cards and agreements that were signed before there were any are what they were."""
    assert set(json.loads(card().canonical)) == {
        "schema", "node", "organisation", "dataset", "dataset_version", "title", "description", "rows", "input",
        "columns", "licence", "issued_at",
    }  # fmt: skip
    assert set(Terms(not_after=1).model_dump()) == {"minimum_cohort", "rounds_max", "models", "not_after", "use"}
    assert "outputs" in Terms(not_after=1, outputs=()).model_dump()


def test_a_full_card_is_signed_and_opened() -> None:
    key = new_identity_key()
    assert open_envelope(seal(FULL, key), DatasetCard, [key.public_key()]) == FULL


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "x" * 301},
        {"keywords": ["x"] * 51},
        {"keywords": ["x" * 61]},
        {"languages": ["<script>"]},
        {"columns": ["x"] * 10_001},
        {"rows": -1},
        {"rows": 1 << 60},
        {"terms": {"purposes": ["a b"]}},
        {"terms": {"torture": True}},
        {"terms": {"epsilon": "nan"}},
        {"terms": {"outputs": ["sell"]}},
        {"quality": {"minimum": 10, "duplicates": "3 rows"}},
        {"details": [{"name": "age", "range": ["0", "inf"]}]},
        {"shown_to": "all"},
    ],
)
def test_a_card_of_absurd_or_unknown_fields_is_refused(changes: dict[str, Any]) -> None:
    given = json.loads(FULL.canonical) | changes
    with pytest.raises(DocumentRefusedError):
        DatasetCard.from_canonical(json.dumps(given, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(ValidationError):
        DatasetCard.model_validate(given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [card(), FULL], ids=["short", "full"])
def test_croissant_is_valid_for_mlcroissant(made: DatasetCard) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlcroissant

    read = mlcroissant.Dataset(jsonld=json.loads(croissant_text(made)))
    issues = read.metadata.ctx.issues
    assert (set(issues.errors), set(issues.warnings)) == (set(), set())
    assert read.metadata.name == "ward-a-patients"
    assert (read.metadata.distribution, read.metadata.record_sets) == ([], [])


@pytest.mark.filterwarnings("ignore")
def test_mlcroissant_does_refuse_what_is_wrong() -> None:
    """The control of the test above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlcroissant

    wrong = croissant_of(FULL) | {"recordSet": [{"@type": "cr:RecordSet", "@id": "r", "name": "r", "field": [
        {"@type": "cr:Field", "@id": "r/age", "name": "age", "dataType": "sc:Float"}]}]}  # fmt: skip
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=wrong)


def test_croissant_tells_the_terms_and_that_nothing_can_be_downloaded() -> None:
    found = croissant_of(FULL)
    assert "distribution" not in found
    assert "cannot be downloaded" in found["conditionsOfAccess"]
    assert found["license"] == "https://spdx.org/licenses/CC-BY-4.0"
    [permission] = found["usageInfo"]["odrl:permission"]
    said = {each["odrl:leftOperand"]["@id"]: each["odrl:rightOperand"] for each in permission["odrl:constraint"]}
    assert said["odrl:purpose"] == ["research"]
    assert said["odrl:recipient"] == ["lab"]
    assert said["odrl:dateTime"]["@value"].startswith("2030-03-17")
    assert said["urn:concord:terms:1:minimum-cohort"] == 3
    [prohibition] = found["usageInfo"]["odrl:prohibition"]
    assert prohibition["odrl:action"] == {"@id": "cc:CommercialUse"}
    assert [column["name"] for column in found["variableMeasured"]] == ["age", "sex"]


def test_croissant_may_stand_in_a_page() -> None:
    text = croissant_text(FULL)
    assert not set("<>&") & set(text)
    assert json.loads(text) == croissant_of(FULL)
