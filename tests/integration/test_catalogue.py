"""The catalogue at the coordinator: search, filters, pages, side by side, requests within terms; hostile cards."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner
from worlds import STUDY, World, body, now, small_plan

from concord_client.cards import CardChoices, card_with
from concord_client.store import Dataset
from concord_local.cli import app
from concord_server import client_catalogue, client_nouns
from concord_server.client import Coordinator as Api
from concord_server.database import Database, utc_now
from concord_server.datasets.catalogue import Filters, found_by
from concord_server.datasets.service import view
from concord_server.nodes.tables import Node
from concord_server.organisations.tables import Organisation
from concord_shared.canonical import canonical_bytes
from concord_shared.documents import CardColumn, DatasetCard, DataTerms, Quality
from concord_shared.errors import ApiError, ConflictError, UsageError
from concord_shared.protocol import CardWithdrawal
from concord_shared.signing import Envelope, new_identity_key, seal, write_private_key
from coordinators import new_database_url

CARDS: dict[str, dict[str, Any]] = {
    "hearts": {
        "title": "Heart PATIENTS of Ward A",
        "description": "Échographie, 100% complete",
        "columns": ("Age", "blood_pressure"),
        "details": (CardColumn(name="Age", kind="number", unit="a", range=("0", "120"), description="at admission"),),
        "keywords": ("Cardiology", "心脏"),
        "languages": ("en",),
        "licence": "CC-BY-4.0",
        "rows": 300,
        "rows_told": "about",
        "input": "table",
        "quality": Quality(minimum=10, missing={"Age": "5%"}),
        "terms": DataTerms(purposes=("research", "care"), minimum_cohort=3, outputs=("release",)),
    },
    "lungs": {"title": "Lungs", "columns": ("age", "smokes"), "rows": 5000, "input": "table", "keywords": ("x_ray",)},
    "scans": {"title": "Scans", "rows": 10, "rows_told": "fewer", "input": "image", "licence": "LicenseRef-own",
              "terms": DataTerms(purposes=("care",))},
}  # fmt: skip


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    url = new_database_url(request.getfixturevalue("postgresql")) if request.param == "postgresql" else ""
    world = World(tmp_path_factory.mktemp("catalogue") / "c", url)
    for name, card in CARDS.items():
        assert world.publish("ward-b" if name == "lungs" else "ward-a", name, **card).status_code == 204
    world.study(members=("hospital-a", "hospital-b"))
    world.keep()
    yield world
    world.close()


@pytest.fixture
def world(made: World) -> World:
    made.clear()
    return made


def found(world: World, **wanted: Any) -> list[str]:
    return [each["dataset"] for each in world.api("lab").pages("/api/v1/datasets", **wanted)]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["hearts", "scans", "lungs"]),
        ({"q": "heart"}, ["hearts"]),
        ({"q": "PATIENTS ward-a"}, ["hearts"]),
        ({"q": "ÉCHOGRAPHIE"}, ["hearts"]),
        ({"q": "心脏"}, ["hearts"]),
        ({"q": "ｃardiology"}, ["hearts"]),
        ({"q": "admission"}, ["hearts"]),
        ({"q": "smokes"}, ["lungs"]),
        ({"q": "hospital-b"}, ["lungs"]),
        ({"q": "heart lungs"}, []),
        ({"q": "100%"}, ["hearts"]),
        ({"q": "1%c"}, []),
        ({"q": "x_ray"}, ["lungs"]),
        ({"q": "x.ray"}, []),
        ({"q": "x_r_y"}, []),
        ({"q": "/"}, ["hearts", "scans", "lungs"]),
        ({"q": "\\"}, []),
        ({"q": "'; DROP TABLE dataset_card; --"}, []),
        ({"q": "\x00heart"}, ["hearts"]),
        ({"organisation": "hospital-b"}, ["lungs"]),
        ({"input": "image"}, ["scans"]),
        ({"licence": "cc-by-4.0"}, ["hearts"]),
        ({"licence": "CC-BY-%"}, []),
        ({"licence": "\x00"}, []),
        ({"purpose": "research"}, ["hearts", "lungs"]),
        ({"purpose": "care"}, ["hearts", "scans", "lungs"]),
        ({"purpose": "car"}, ["lungs"]),
        ({"rows_min": 10}, ["hearts", "lungs"]),
        ({"rows_min": 301}, ["lungs"]),
        ({"column": "AGE"}, ["hearts", "lungs"]),
        ({"column": "ag"}, []),
        ({"column": "blood_pressure"}, ["hearts"]),
        ({"column": "blood%"}, []),
        ({"column": "age", "purpose": "research", "q": "ward", "rows_min": 1000}, ["lungs"]),
    ],
)
def test_each_filter_narrows_and_nothing_in_it_is_a_wildcard(world: World, wanted: Any, names: list[str]) -> None:
    assert found(world, **wanted) == names


def test_what_is_found_comes_in_pages(world: World) -> None:
    for number in range(7):
        world.publish("ward-c", f"d{number}", title="Paged")
    first = world.people["lab"].get("/api/v1/datasets", params={"q": "paged", "limit": 5}).json()
    assert len(first["items"]) == 5
    rest = world.people["lab"].get("/api/v1/datasets", params={"q": "paged", "limit": 5, "after": first["next"]}).json()
    assert [each["dataset"] for each in rest["items"]] == ["d5", "d6"]
    assert rest["next"] is None


def test_a_card_is_told_as_it_was_signed(world: World) -> None:
    told = world.api("lab").get("/api/v1/datasets/ward-a/hearts")
    assert (told["rows"], told["rows_told"], told["keywords"]) == (300, "about", ["Cardiology", "心脏"])
    assert told["details"][0]["range"] == ["0", "120"]
    assert told["quality"]["missing"] == {"Age": "5%"}
    assert told["terms"]["purposes"] == ["research", "care"]


def test_a_withdrawn_card_is_found_no_more_at_once(world: World) -> None:
    site = world.sites["ward-a"]
    word = CardWithdrawal(node="ward-a", organisation="hospital-a", dataset="hearts", issued_at=now())
    assert site.client.post("/api/node/cards", json=body(word, site.keys.identity)).status_code == 204
    assert found(world, q="heart") == []
    assert found(world, column="age") == ["lungs"]
    assert world.people["lab"].get("/api/v1/datasets/ward-a/hearts/croissant").status_code == 404


def test_a_later_card_is_found_by_its_own_words_only(world: World) -> None:
    assert world.publish("ward-a", "hearts", title="Kidneys").status_code == 204
    assert found(world, q="kidneys") == ["hearts"]
    assert found(world, q="cardiology") == found(world, column="blood_pressure") == []


# Hostile cards


def refused(world: World, status: int, said: str, **changes: Any) -> None:
    """A card of any fields, signed by its node as it should be."""
    site = world.sites["ward-a"]
    given = json.loads(
        DatasetCard(node="ward-a", organisation="hospital-a", dataset="evil", dataset_version="d" * 64, title="Evil",
                    rows=1, input="table", issued_at=now()).canonical
    )  # fmt: skip
    payload = base64.b64encode(canonical_bytes(given | changes)).decode()
    envelope = Envelope(payload_type=DatasetCard.payload_type(), payload=payload, signatures=())
    signed = envelope.signed_by(site.keys.identity).model_dump(mode="json")
    answer = site.client.post("/api/node/cards", json=signed)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]
    assert found(world, q="evil") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"terms": {"purposes": [], "may_do": "anything"}}, "not a document"),
        ({"terms": {"purposes": ["research"] * 101}}, "not a document"),
        ({"price": 5}, "not a document"),
        ({"title": "x" * 301}, "not a document"),
        ({"keywords": ["x"] * 51}, "not a document"),
        ({"columns": [f"{number:0300}" for number in range(9_000)]}, "at most 1048576 bytes"),
        ({"columns": ["x"] * 10_001}, "not a document"),
        ({"rows": 1 << 60}, "not a document"),
        ({"rows": -5}, "not a document"),
        ({"languages": ["<b>"]}, "not a document"),
        ({"licence": "<script>alert(1)</script>"}, "SPDX"),
        ({"quality": {"minimum": 10, "duplicates": "7 rows: 3, 9, 12"}}, "not a document"),
    ],
)
def test_a_signed_card_of_absurd_fields_is_refused(world: World, changes: dict[str, Any], said: str) -> None:
    refused(world, 400, said, **changes)


def test_markup_and_control_characters_stay_text(world: World) -> None:
    title = '</script><script>alert("1")</script>\x00\x1b[2K\u202e & more'
    assert world.publish("ward-a", "evil", title=title, keywords=("<b>", "a\x00b")).status_code == 204
    listed = world.people["lab"].get("/api/v1/datasets", params={"q": "alert"})
    assert listed.headers["content-type"] == "application/json"
    assert listed.headers["x-content-type-options"] == "nosniff"
    assert listed.json()["items"][0]["title"] == title
    told = world.people["lab"].get("/api/v1/datasets/ward-a/evil/croissant")
    assert told.headers["content-type"] == "application/ld+json"
    assert not set("<>&") & set(told.text)
    assert told.json()["alternateName"] == title


# Access


def test_a_request_fits_the_terms_of_the_cards(world: World) -> None:
    lab = world.api("lab")
    with pytest.raises(UsageError, match="one of care, research"):
        client_catalogue.request_access(lab, world.keys["lab"], STUDY, ["ward-a/hearts"])
    made = client_catalogue.request_access(
        lab, world.keys["lab"], STUDY, ["ward-a/hearts", "ward-a/scans"], purposes=["care"]
    )
    terms = client_nouns.told(made)["terms"]
    assert (terms["minimum_cohort"], terms["purposes"], terms["outputs"]) == (3, ["care"], ["release"])
    made = client_nouns.offer_agreement(world.api("hospital-a"), world.keys["hospital-a"], made["agreement"])
    assert made["state"] == "agreed"


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"minimum_cohort": 3, "outputs": ("release",)}, "names no purpose"),
        ({"purposes": ("ads",), "minimum_cohort": 3, "outputs": ("release",)}, "names ads"),
        ({"purposes": ("care",), "minimum_cohort": 2, "outputs": ("release",)}, "asks for 2 nodes"),
        ({"purposes": ("care",), "minimum_cohort": 3}, "does not say"),
        ({"purposes": ("care",), "minimum_cohort": 3, "outputs": ("release", "commercial")}, "allow release"),
    ],
)
def test_a_request_beyond_the_terms_is_refused_at_once(world: World, terms: dict[str, Any], said: str) -> None:
    with pytest.raises(ConflictError, match=said):
        client_nouns.request_agreement(world.api("lab"), world.keys["lab"], STUDY, ["ward-a/hearts"], terms=terms)


def test_an_offer_beyond_the_terms_is_refused_at_once(world: World) -> None:
    made = client_catalogue.request_access(
        world.api("lab"), world.keys["lab"], STUDY, ["ward-a/hearts"], purposes=["care"]
    )
    with pytest.raises(ConflictError, match="asks for 2 nodes"):
        client_nouns.offer_agreement(
            world.api("hospital-a"), world.keys["hospital-a"], made["agreement"], terms={"minimum_cohort": 2}
        )


def test_terms_that_are_over_are_said_before_anything_is_signed(world: World) -> None:
    world.publish("ward-a", "hearts", terms=DataTerms(not_after=now() + 3600))
    with pytest.raises(UsageError, match="end within a day"):
        client_catalogue.request_access(world.api("lab"), world.keys["lab"], STUDY, ["ward-a/hearts"])


@pytest.mark.parametrize("outputs", [("commercial",), ("release",)])
def test_a_model_is_released_only_where_the_agreements_allow_it(world: World, outputs: tuple[str, ...]) -> None:
    for node in ("ward-a", "ward-b", "ward-c"):
        world.publish(node)
    world.agreed("hospital-a", ("ward-a/heart",), outputs=outputs)
    world.agreed("hospital-b", ("ward-b/heart", "ward-c/heart"))
    plan = small_plan()
    world.queued(plan, "run-1")
    assert world.lease("w") == "run-1"
    for number in (1, 2):
        world.step("run-1", "w", number, f"{number}" * 64)
    model = world.finish_with_model("run-1", "w", plan)
    if outputs == ("release",):
        assert client_nouns.release_model(world.api("lab"), world.keys["lab"], model)
        return
    with pytest.raises(ApiError, match="ward-a/heart allows no release"):
        client_nouns.release_model(world.api("lab"), world.keys["lab"], model)


def test_an_approval_may_have_the_rows_that_a_rounded_card_can_mean(world: World) -> None:
    world.publish("ward-a", rows=100, rows_told="about")
    world.agreed("hospital-a", ("ward-a/heart",))
    plan = small_plan()
    client_nouns.submit_plan(world.api("lab"), STUDY, plan)
    assert world.approve("ward-a", plan, rows=85, evaluation_rows=20).status_code == 204
    assert world.approve("ward-a", plan, rows=86, evaluation_rows=20, sequence=2).status_code == 409


# The commands


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `concord …` as a person of the lab."""
    monkeypatch.setattr(Api, "from_profile", classmethod(lambda cls: world.api("lab")))

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, list(words), standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.output

    return run


def test_search_and_show_print_what_is_told(command: Any) -> None:
    shown = command("dataset", "search", "cardiology", "--column", "age")
    assert "ward-a/hearts" in shown
    assert "about 300" in shown
    assert "lungs" not in shown
    assert "fewer than 10" in command("dataset", "list")
    assert json.loads(command("dataset", "search", "--rows-min", "301", "--json"))["items"][0]["rows"] == 5000
    told = json.loads(command("dataset", "show", "ward-a/hearts", "--croissant"))
    assert told["usageInfo"]["@type"] == "odrl:Offer"


def test_compare_lays_cards_side_by_side(command: Any, world: World) -> None:
    world.publish("ward-c", "hearts", **CARDS["hearts"] | {"details": (), "rows": 90, "rows_told": ""})
    told = json.loads(command("dataset", "compare", "ward-a/hearts", "ward-c/hearts", "ward-b/lungs", "--json"))
    assert told["fields"]["rows"] == {"ward-a/hearts": "about 300", "ward-c/hearts": "90", "ward-b/lungs": "5000"}
    assert told["columns"]["Age"]["ward-a/hearts"] == "number; in a; 0 to 120"
    assert told["differing"] == ["Age", "blood_pressure", "age", "smokes"]
    assert told["fields"]["terms: minimum cohort"]["ward-b/lungs"] == ""
    shown = command("dataset", "compare", "ward-a/hearts", "ward-c/hearts")
    assert "* column Age" in shown
    assert "\n  column blood" not in shown
    with pytest.raises(UsageError, match="two datasets"):
        command("dataset", "compare", "ward-a/hearts", "ward-a/hearts")


def test_request_asks_within_the_terms(command: Any, world: World, tmp_path: Path) -> None:
    write_private_key(tmp_path / "key", world.keys["lab"])
    shown = command(
        *("dataset", "request", STUDY, "ward-a/hearts", "--purpose", "research", "--id", "asked"),
        *("--key", str(tmp_path / "key")),
    )
    assert "asked: requested" in shown
    assert "for: research" in shown
    assert "models may be used for: release" in shown
    assert "at least" in shown or "fewer than 3 nodes" in shown


# The database


def test_cards_of_before_are_found_after_the_upgrade(database_url: str) -> None:
    """0003 on a database that holds a card; and down again, with the card."""
    database = Database(database_url)
    database.upgrade("0002")
    card = DatasetCard(node="n", organisation="o", dataset="d", dataset_version="d" * 64, title="Old ÄRA 100%",
                       rows=7, input="table", columns=("Age",), licence="CC0-1.0", issued_at=1)  # fmt: skip
    envelope = seal(card, new_identity_key()).model_dump_json()
    with database.session() as session:
        session.add(Organisation(name="o", title="o", created_at=utc_now()))
        session.flush()
        keys = {"identity_key": "i", "flower_key": "f", "tls_key": "t"}
        certificate = {"certificate_serial": "1", "certificate_not_after": utc_now(), "enrolled_at": utc_now()}
        session.add(Node(name="n", organisation="o", state="active", **keys, **certificate))
        session.flush()
        session.execute(
            text("INSERT INTO dataset_card (name, node, dataset, organisation, title, version, issued_at, envelope, "
                 "updated_at) VALUES ('n/d', 'n', 'd', 'o', 'Old', :version, 1, :envelope, '2026-01-01 00:00:00')"),
            {"version": "d" * 64, "envelope": envelope},
        )  # fmt: skip
    database.upgrade()
    database.check()
    with database.reading() as session:
        for wanted in ({"q": "ära"}, {"column": "age"}, {"rows_min": 7}, {"licence": "cc0-1.0"}, {"purpose": "any"}):
            rows = list(session.exec(found_by(Filters(**fields(wanted)))))
            assert [view(row).rows for row in rows] == [7], wanted
        assert list(session.exec(found_by(Filters(**fields({"rows_min": 8}))))) == []
    database.downgrade("0002")
    with database.session() as session:
        assert session.execute(text("SELECT title FROM dataset_card")).scalar() == "Old"
    database.close()


def fields(wanted: dict[str, Any]) -> dict[str, Any]:
    names = ("q", "organisation", "input", "licence", "purpose", "rows_min", "column")
    return dict.fromkeys(names) | wanted


@pytest.mark.benchmark
def test_search_over_a_thousand_cards_takes_less_than_100_ms(world: World) -> None:
    """Cards with 40 described columns each; the whole request, with its page of 50 cards."""
    described = tuple(CardColumn(name=f"column-{index}", kind="number", unit="mg") for index in range(40))
    site = world.sites["ward-c"]
    for number in range(1000):
        dataset = Dataset(
            name=f"d{number}", version="d" * 64, spec="", title=f"Cohort {number} of ward C", rows=1000 + number,
            description=f"Patients of the year {1900 + number % 100}. " * 20, input="table", licence="CC-BY-4.0",
            columns=tuple(each.name for each in described), registered_at=now(),
        )  # fmt: skip
        choices = CardChoices(
            keywords=("cardiology", f"group-{number % 7}"), described=described,
            terms=DataTerms(purposes=("research", "care")[: 1 + number % 2]),
        )  # fmt: skip
        card = card_with("ward-c", "hospital-b", dataset, choices, now())
        assert site.client.post("/api/node/cards", json=body(card, site.keys.identity)).status_code == 204
    wanted = [
        {"q": "patients 1942"},
        {"q": "nothing-of-the-kind"},
        {"purpose": "care", "column": "column-7", "rows_min": 1500},
        {"q": "cardiology group-3", "licence": "CC-BY-4.0"},
    ]
    spent: dict[str, list[float]] = {}
    for each in wanted:
        for _ in range(15):
            begun = time.perf_counter()
            answer = world.people["lab"].get("/api/v1/datasets", params=each)
            spent.setdefault(str(each), []).append(time.perf_counter() - begun)
            assert answer.status_code == 200
    medians = {what: sorted(times)[len(times) // 2] for what, times in spent.items()}
    for what, seconds in medians.items():
        print(f"{seconds * 1000:6.1f} ms  {what}")
    assert max(medians.values()) < 0.1
