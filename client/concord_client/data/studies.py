"""Published studies whose files have no header: which columns they hold, and which rows the study kept."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from concord_client.data.contract import Tally, tolerated_by
from concord_client.data.dataset import RawData
from concord_client.data.tables import TableDecoder
from concord_shared.errors import DataError
from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "read_adult",
    "read_heart_disease",
    "read_sentiment",
    "read_sib200",
    "read_sms_spam",
    "read_tang_poems",
    "read_tiny_shakespeare",
    "read_wine_quality",
]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
HEART_COLUMNS = [
    *("age", "sex", "chest_pain", "resting_blood_pressure", "cholesterol", "fasting_blood_sugar", "resting_ecg"),
    *("max_heart_rate", "exercise_angina", "st_depression", "slope", "vessels", "thal", "diagnosis"),
]
ADULT_COLUMNS = [
    *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship"),
    *("race", "sex", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income"),
]
EMPLOYER_ROWS_MIN = 900
"""Of a work class that is a node of its own; the few rows of smaller ones are Private's."""
SIB_LANGUAGES = ("zho_Hans", "zho_Hant", "yue_Hant", "jpn_Jpan")
"""Simplified and traditional Chinese, Cantonese, Japanese: languages whose characters are mostly shared."""
SPEAKER_LETTERS_MIN, HELD_OUT = 2000, 0.1
"""Of a speaker who is a node; the share at the end of what each says that is held out."""
POETS = 20
SENTIMENT_FILES = {
    "amazon": "amazon_cells_labelled.txt",
    "imdb": "imdb_labelled.txt",
    "yelp": "yelp_labelled.txt",
}
WINE_COLUMNS = [
    *("fixed_acidity", "volatile_acidity", "citric_acid", "residual_sugar", "chlorides", "free_sulfur_dioxide"),
    *("total_sulfur_dioxide", "density", "ph", "sulphates", "alcohol", "quality"),
]


def read_heart_disease(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """UCI Heart Disease by hospital, with FLamby's rows and split.

    `flamby_split.csv` names them: center, row (0-based in the hospital's file), set, label.
    """
    import polars as pl

    frames = []
    split = _table(directory / "flamby_split.csv")
    if not {"center", "row", "set", "label"} <= set(split.columns):
        raise DataError(f"{directory}/flamby_split.csv: expected the columns center, row, set, label")
    for center, hospital in enumerate(HOSPITALS):
        raw = _table(directory / f"processed.{hospital}.data", HEART_COLUMNS)
        kept = split.filter(pl.col("center").is_in([str(center), hospital]))
        rows = _whole_numbers(kept, "row", directory, len(raw))
        frames.append(
            raw[rows].with_columns(
                *(pl.Series(name, _categories(raw[rows], name)) for name in ("chest_pain", "resting_ecg")),
                disease=pl.Series(["yes" if label else "no" for label in _whole_numbers(kept, "label", directory, 2)]),
                hospital=pl.lit(hospital),
                split=kept["set"],
            )
        )
    return _rows_of(pl.concat(frames), plan, directory)


def read_adult(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """UCI Adult with its official test rows; the group `employer` is the work class, unknown where it is missing."""
    import polars as pl

    parts = []
    for name, split in (("adult.data", "train"), ("adult.test", "test")):
        file = next((path for path in (directory / f"{name}.gz", directory / name) if path.is_file()), directory / name)
        frame = _table(file, ADULT_COLUMNS, comment="|").with_columns(pl.all().str.strip_chars().replace("?", None))
        frame = frame.filter(pl.any_horizontal(pl.all().is_not_null()))  # both files end with an empty line
        parts.append(frame.with_columns(pl.col("income").str.strip_suffix("."), split=pl.lit(split)))
    frame = pl.concat(parts)
    employer = pl.col("workclass").fill_null("unknown")
    common = (pl.len().over(employer) >= EMPLOYER_ROWS_MIN).alias("common")
    frame = frame.with_columns(common, employer=employer)
    employer = pl.when("common").then("employer").otherwise(pl.lit("Private"))
    return _rows_of(frame.with_columns(employer=employer).drop("common"), plan, directory)


def read_sib200(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """SIB-200 topics (Adelani et al. 2024): the group `language`, and its own split."""
    import polars as pl

    frames = []
    for language in SIB_LANGUAGES:
        for part, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
            frame = _table(directory / f"{language}.{part}.tsv", separator="\t")
            if not {"category", "text"} <= set(frame.columns):
                raise DataError(f"{directory}/{language}.{part}.tsv: expected the columns category and text")
            columns = frame.select("category", "text")
            frames.append(columns.with_columns(language=pl.lit(language), split=pl.lit(split)))
    return _rows_of(pl.concat(frames), plan, directory)


def read_wine_quality(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """UCI Wine Quality, red and white; comma-separated, without a header."""
    import polars as pl

    frames = []
    for colour in ("red", "white"):
        frame = _table(directory / f"winequality-{colour}.csv", WINE_COLUMNS)
        frames.append(frame.with_columns(colour=pl.lit(colour)))
    return _rows_of(pl.concat(frames), plan, directory)


def read_tiny_shakespeare(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """Karpathy's tiny Shakespeare by speaker, of those with at least 2,000 characters: the group `speaker`.

    What each of them says is cut into windows of `length_max` characters, the last of one the first of the next, so
    that each character but the first is once the next one of another. The last tenth is held out for the test.
    """
    said: dict[str, list[str]] = {}
    for speech in _text(directory / "input.txt").split("\n\n"):
        speaker, colon, words = speech.strip("\n").partition(":\n")
        if colon:
            said.setdefault(speaker, []).append(words)
    parts = []
    for speaker, speeches in said.items():
        text = "\n\n".join(speeches)
        if len(text) >= SPEAKER_LETTERS_MIN:
            held_out = len(text) - round(len(text) * HELD_OUT)
            for split, part in (("train", text[:held_out]), ("test", text[held_out:])):
                parts += [(window, split, speaker) for window in _windows(part, plan.data.length_max)]
    return _texts_of(parts, "speaker", plan, directory)


def read_tang_poems(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """Poems of the Tang dynasty by the 20 poets with most of them: the group `author`. Every 5th poem is for the test;
    windows as of `read_tiny_shakespeare`.
    """
    frame = _table(directory / "tang_poems.tsv.gz", separator="\t")
    if not {"author", "split", "text"} <= set(frame.columns):
        raise DataError(f"{directory}: expected the columns author, split, text")
    poems = frame.select("text", "split", "author").rows()
    count = Counter(author for _, _, author in poems)
    poets = {author for author, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))[:POETS]}
    parts = [
        (window, split, author)
        for text, split, author in poems
        if author in poets
        for window in _windows(text, plan.data.length_max)
    ]
    return _texts_of(parts, "author", plan, directory)


def read_sentiment(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """Sentences of three sites, each praise or blame (Kotzias et al. 2015): the group `site`."""
    parts = []
    for site, name in SENTIMENT_FILES.items():
        for line in _text(directory / name).split("\n"):
            sentence, tab, label = line.rpartition("\t")
            if tab:
                parts.append((sentence.strip(), "positive" if label.strip() == "1" else "negative", site))
    return _labelled_texts(parts, "site", plan, directory)


def read_sms_spam(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """Short messages, wanted or not (Almeida and Hidalgo 2011)."""
    lines = [line.partition("\t") for line in _text(directory / "SMSSpamCollection").split("\n")]
    return _labelled_texts([(text, label, "") for label, tab, text in lines if tab], "", plan, directory)


def _labelled_texts(parts: list[tuple[str, str, str]], group: str, plan: Plan, directory: Path) -> RawData:
    """From (text, label, group); without a group where its name is empty."""
    import polars as pl

    text, label, owner = zip(*parts, strict=True) if parts else ((), (), ())
    columns = {plan.data.text: text, plan.data.target: label, **({group: owner} if group else {})}
    return _rows_of(pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)), plan, directory)


def _texts_of(parts: list[tuple[str, str, str]], group: str, plan: Plan, directory: Path) -> RawData:
    """From (text, split, group)."""
    import polars as pl

    text, split, owner = zip(*parts, strict=True) if parts else ((), (), ())
    columns = {plan.data.text: text, "split": split, group: owner}
    return _rows_of(pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)), plan, directory)


def _windows(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters that share one; none of a single character."""
    return [text[start : start + size] for start in range(0, len(text) - 1, size - 1)]


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected this file of the study, as UTF-8 text: {error}") from error


def _rows_of(frame: "pl.DataFrame", plan: Plan, directory: Path) -> RawData:
    tally = Tally(plan.data, tolerated_by(plan))
    data = TableDecoder(plan.data, tally).decode(frame)
    tally.look_at(data)
    tally.raise_for(str(directory))
    return data


def _whole_numbers(frame: "pl.DataFrame", column: str, directory: Path, below: int) -> list[int]:
    """The split file's numbers, each from 0 to below `below`."""
    import polars as pl

    if column not in frame.columns:
        raise DataError(f"{directory}/flamby_split.csv: expected a column {column}")
    numbers = frame[column].cast(pl.Float64, strict=False).cast(pl.Int64, strict=False).to_list()
    wrong = sum(number is None or not 0 <= number < below for number in numbers)
    if wrong:
        raise DataError(
            f"{directory}/flamby_split.csv: column {column}: {wrong} values are not numbers from 0 to {below - 1}"
        )
    return numbers


def _categories(frame: "pl.DataFrame", column: str) -> list[str | None]:
    """`3.0` is the category 3; anything else stays as it is, for the contract to refuse."""
    return [None if text is None else text.strip().removesuffix(".0") for text in frame[column]]


def _table(
    file: Path, columns: list[str] | None = None, comment: str | None = None, separator: str = ","
) -> "pl.DataFrame":
    """All columns as text; without a header the names are `columns`. Lines that begin with `comment` are left out.
    Between tabs, a quotation mark is a letter like others.
    """
    import polars as pl

    try:
        frame = pl.read_csv(
            file,
            has_header=columns is None,
            infer_schema=False,
            null_values=["?", ""],
            comment_prefix=comment,
            separator=separator,
            quote_char=None if separator == "\t" else '"',
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: expected this file of the study, got: {error}") from error
    if columns is not None and len(frame.columns) != len(columns):
        raise DataError(f"{file}: expected {len(columns)} columns, got {len(frame.columns)}")
    return frame if columns is None else frame.rename(dict(zip(frame.columns, columns, strict=True)))
