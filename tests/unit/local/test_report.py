"""The report of a run: one file that asks for nothing else and lets nothing from a file become markup."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_local.report import write_report
from concord_local.report.charts import line_chart, scale_of
from concord_local.report.figures import Series, format_figure, format_gain, wilson_interval
from concord_shared.errors import ArtefactError
from concord_shared.plan import load_plan

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """Collects what a browser would: tags with attributes, and text; checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def figures_of(matrix: Any) -> dict[str, Any]:
    counts = np.array(matrix)
    return {"rows": int(counts.sum()), "loss": 0.5, "accuracy": float(np.trace(counts) / counts.sum()), "auc": None}


def classification(
    directory: Path, nodes: dict[str, list[int]], rounds: int = 3, classes: tuple[str, ...] = ()
) -> Path:
    """A run of `heart-disease`, with training rows by class; each node has more test rows wrong than the last."""
    plan = load_plan("heart-disease", [f"rounds.count={rounds}"]).plan.document()
    plan["data"]["classes"] = list(classes or plan["data"]["classes"])
    size = len(plan["data"]["classes"])
    matrices = {name: np.diag([20] * size) + np.eye(size, k=1, dtype=int) * index for index, name in enumerate(nodes)}
    total = sum(matrices.values())
    per_node = {name: figures_of(matrix) for name, matrix in matrices.items()}
    metrics = {**figures_of(total), "confusion": total.tolist()}
    records = []
    for number in range(1, rounds + 1):
        records.append(train(number, rounds, list(nodes)))
        records.append({"kind": "evaluate", "round": number, "of": rounds, "metrics": metrics, "per_node": per_node})
    data = {
        name: {"train": sum(counts), "validation": 0, "test": 20, "classes": counts} for name, counts in nodes.items()
    }
    return write(directory, plan, data, records, summary_of(plan, metrics, per_node, list(nodes)[-1]))


def regression(directory: Path) -> Path:
    plan = load_plan("wine-quality").plan.document()
    metrics = {"rows": 30, "loss": 0.25, "rmse": 0.5, "mae": 0.4, "r2": 0.3}
    per_node = {"red": {**metrics, "rmse": 0.4}, "white": {**metrics, "rmse": 0.61}}
    node = {"train": 100, "validation": 0, "test": 15, "target_mean": 5.5, "target_deviation": 0.8}
    records = [
        train(1, 1, ["red", "white"]),
        {"kind": "evaluate", "round": 1, "metrics": metrics, "per_node": per_node},
    ]
    write(directory, plan, {"red": node, "white": node}, records, summary_of(plan, metrics, per_node, "white"))
    pairs = [("(intercept)", 5.8, 0.01), ("alcohol", 0.31, 0.02), ("ph", -0.08, None)]
    rows = [{"feature": f, "output": "quality", "coefficient": c, "standard_error": e} for f, c, e in pairs]
    save(directory, "coefficients.json", rows)
    return directory


def train(number: int, of: int, survivors: list[str], **more: Any) -> dict[str, Any]:
    return {"kind": "train", "round": number, "of": of, "survivors": survivors, "failures": {}, "silent": [], **more}


def summary_of(plan: dict[str, Any], metrics: dict[str, Any], per_node: dict[str, Any], worst: str) -> dict[str, Any]:
    return {
        "plan": plan["name"],
        "plan_digest": "a" * 64,
        "model_digest": "b" * 64,
        "deterministic": True,
        "nodes": len(per_node),
        "rounds": plan["rounds"]["count"],
        "metrics": metrics,
        "per_node": per_node,
        "worst_node": {"node": worst},
        "bytes_up": 4801,
        "bytes_down": 14_244_000,
        "seconds": {"total": 72.0, "training": 1.0, "startup": 2.0},
        "peak_pss_mb": 437.9,
    }


def write(directory: Path, plan: Any, nodes: Any, records: list[dict[str, Any]], summary: Any) -> Path:
    save(directory, "plan.json", plan)
    save(
        directory, "simulation.json", {"data": "some-data", "partition": "natural:hospital", "workers": 2, "faults": ""}
    )
    save(directory, "environment.json", {"concord": "0.1.0", "python": "3.11.7", "device": "cpu", "cores": 2})
    save(directory, "data.json", {"classes": plan["data"]["classes"], "nodes": nodes})
    save(directory, "summary.json", summary)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return directory


def save(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value), "utf-8")


def comparison_of(figure: str, rows: list[tuple[str, Any, Any]]) -> dict[str, Any]:
    return {
        "headline": figure,
        "rows": [
            {
                "node": name,
                "train_rows": 9,
                "test_rows": 9,
                "alone": alone,
                "alone_on_all": 0.6,
                "federated": together,
                "pooled": 0.9,
            }
            for name, alone, together in rows
        ],
        "all": {"test_rows": 18, "alone_mean": 0.6, "alone_best": 0.65, "federated": 0.85, "pooled": 0.9},
    }


def append(directory: Path, *records: dict[str, Any]) -> None:
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def report(directory: Path) -> str:
    write_report(directory)
    return (directory / "report.html").read_text("utf-8")


def assert_self_contained(html: str) -> None:
    """Nothing that a browser fetches or runs; links lead to places in the page."""
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, name, target)
    assert not re.search(r"url\(|@import|https?://", html)


def test_report_writes_plots_and_one_page_that_asks_for_nothing_else(tmp_path: Path) -> None:
    classification(tmp_path, {"north": [30, 10], "south": [0, 25]})
    save(tmp_path, "comparison.json", comparison_of("accuracy", [("north", 0.7, 0.8), ("south", 0.9, 0.8)]))
    html = report(tmp_path)
    assert_self_contained(html)
    plots = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(plots) == {"curves.png", "data.png", "confusion.png", "comparison.png"}
    assert all(png.startswith(PNG) for png in plots.values())
    assert "default-src 'none'" in html


def test_report_shows_every_text_in_two_languages(tmp_path: Path) -> None:
    page = Page(report(classification(tmp_path, {"north": [30, 10], "south": [0, 25]})))
    languages = [attributes["lang"] for _, attributes in page.tags if "lang" in attributes]
    assert languages[0] == "en"
    assert languages[1:].count("en") == languages.count("zh-Hans") > 50


def test_report_names_its_pictures_and_tables(tmp_path: Path) -> None:
    page = Page(report(classification(tmp_path, {"north": [30, 10], "south": [0, 25]})))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 2
    assert all(attributes["aria-labelledby"] in ids for attributes in pictures)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")


HOSTILE = [
    "<b>x</b>",
    '"><script>alert(1)</script>',
    "{{ 7 * 7 }}",
    "$\\frac{$",
    "第一医院",
    "a\nb\tc",
    "x" * 300,
    "%s%d",
]


def test_report_escapes_names_classes_and_reasons(tmp_path: Path) -> None:
    classes = ("<i>yes</i>", "$no$", "否", "</table>")
    classification(tmp_path, {name: [5, 6, 7, 8] for name in HOSTILE}, classes=classes)
    reason = "<img src=x onerror=alert(2)>"
    append(tmp_path, {"kind": "train", "round": 4, "of": 4, "aborted": reason, "failures": {"<b>x</b>": reason}})
    save(tmp_path, "comparison.json", comparison_of("accuracy", [(name, 0.5, 0.75) for name in HOSTILE]))
    html = report(tmp_path)
    assert_self_contained(html)
    page = Page(html)
    assert "<b>x</b>" not in html
    assert not {"img", "i>yes"} & {tag for tag, _ in page.tags}
    for expected in ("<b>x</b>", "{{ 7 * 7 }}", "第一医院", "<i>yes</i>", "</table>", reason):
        assert expected in page.text


def test_report_without_comparison_says_nothing_of_baselines(tmp_path: Path) -> None:
    text = Page(report(classification(tmp_path, {"north": [30, 10], "south": [0, 25]}))).text
    assert "Alone, federated, or pooled?" not in text
    assert not (tmp_path / "plots" / "comparison.png").exists()


def test_report_counts_who_gains_and_who_loses(tmp_path: Path) -> None:
    rows = [("a", 0.7, 0.8), ("b", 0.7, 0.9), ("c", 0.8, 0.8), ("d", 0.9, 0.8), ("e", None, None)]
    classification(tmp_path, {name: [3, 4] for name, _, _ in rows})
    save(tmp_path, "comparison.json", comparison_of("accuracy", rows))
    text = Page(report(tmp_path)).text
    assert "On their own rows 2 nodes gain, 1 ties and 1 loses." in text
    assert "25.0 points better" in text


def ranking(directory: Path) -> Path:
    """A run of `restaurants-ncf` with a comparison, worse than alone by a little."""
    plan = load_plan("restaurants-ncf").plan.document()
    metrics = {"rows": 30, "loss": 0.25, "hit_rate_10": 0.4, "ndcg_10": 0.2}
    per_node = {"north": metrics, "south": {**metrics, "ndcg_10": 0.1}}
    node = {"train": 100, "validation": 0, "test": 15, "target_mean": 1.0, "target_deviation": 0.0}
    records = [{"kind": "evaluate", "round": 1, "metrics": metrics, "per_node": per_node}]
    write(directory, plan, {"north": node, "south": node}, records, summary_of(plan, metrics, per_node, "south"))
    compared = comparison_of("ndcg_10", [("north", 0.1697, 0.2), ("south", 0.1, 0.1)])
    compared["all"] |= {"alone_mean": 0.2009, "federated": 0.2, "popularity": 0.1234}
    save(directory, "comparison.json", compared)
    return directory


def test_a_gain_is_in_points_only_where_its_figure_is_a_percentage(tmp_path: Path) -> None:
    text = Page(report(ranking(tmp_path))).text
    assert "the federated model is 0.0009 worse than" in text
    assert "联邦模型比各节点单独训练的平均水平 差 0.0009 。" in text
    assert "+0.0303" in text
    assert "points" not in text
    assert "百分点" not in text
    classification(tmp_path, {"north": [30, 10], "south": [0, 25]})
    save(tmp_path, "comparison.json", comparison_of("accuracy", [("north", 0.7, 0.8), ("south", 0.9, 0.8)]))
    text = Page(report(tmp_path)).text
    assert "25.0 points better" in text
    assert "25.0 个百分点" in text
    assert "相对单独的提升 (points) （百分点）" in text


def test_report_of_a_ranking_says_what_popularity_comes_to(tmp_path: Path) -> None:
    assert "By popularity alone, without a model 仅凭流行度，不用模型 0.1234" in Page(report(ranking(tmp_path))).text
    comparison = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    del comparison["all"]["popularity"]
    save(tmp_path, "comparison.json", comparison)
    assert "By popularity" not in Page(report(tmp_path)).text


def test_report_of_a_language_model_shows_each_figure_once(tmp_path: Path) -> None:
    plan = load_plan("shakespeare-gpt").plan.document()
    metrics = {"rows": 30, "tokens": 92206, "loss": 2.5, "perplexity": 12.18, "accuracy": 0.4}
    per_node = {"romeo": metrics, "juliet": {**metrics, "loss": 2.25}}
    node = {"train": 12345, "validation": 0, "test": 15}
    records = [{"kind": "evaluate", "round": 1, "metrics": metrics, "per_node": per_node}]
    write(tmp_path, plan, {"romeo": node, "juliet": node}, records, summary_of(plan, metrics, per_node, "romeo"))
    html = report(tmp_path)
    [heads] = re.findall(r'aria-label="figures of each node"><table>\s*<thead>(.*?)</thead>', html, re.DOTALL)
    words = re.findall(r'<span lang="en">(.*?)</span>', heads)
    assert words == ["Node", "loss", "training rows", "rows evaluated", "rounds answered"]
    assert html.count("2.2500") == 1
    tiles = dict(re.findall(r'<dt><span lang="en">([^<]*)</span>.*?</dt><dd>([^<]*)</dd>', html))
    assert tiles["tokens"] == "92,206"
    assert tiles["training rows"] == "24,690"


OF_THE_SHARED_MODEL = (
    *("The line is the shared model", "曲线是共享模型", "One shared model need not", "同一个共享模型"),
    *("final model", "最终模型", "One logistic-regression model", "一个 logistic-regression 模型"),
    *(
        "On everybody’s test rows the federated model",
        "在全体测试行上，联邦模型",
        "Federated: this run",
        "联邦训练：本次运行",
    ),
)
OF_NODES_OWN = (
    *("The line is each node’s own model over its own rows", "曲线是各节点自己的模型在自己数据上的结果"),
    *("Each node with its own model", "各节点自己的模型的表现"),
    *("each node’s own model on its own rows, 81 in all", "各节点自己的模型在自己的测试行上，共 81 行"),
    *("Federated: each node’s own model, on its own rows", "联邦训练：各节点自己的模型，在各自的测试行上"),
    *("holds the shared part alone", "只含共享部分", "at every node with its own model", "各节点用自己的模型"),
    *("What each node keeps of its own model", "各节点自己模型中留在节点的部分"),
)


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        ("ditto", ("a whole model near the shared one", "贴近共享模型、留在该节点的完整模型")),
        ("fedavg", ("the shared part with what stayed at the node", "共享部分加上留在该节点的部分")),
    ],
)
def test_report_of_nodes_own_models_says_nothing_of_the_shared_one(
    tmp_path: Path, strategy: str, own: tuple[str, str]
) -> None:
    """fedavg: where the model itself declares personal parameters."""
    classification(tmp_path, {"north": [30, 10], "south": [0, 25]})
    save(tmp_path, "comparison.json", comparison_of("accuracy", [("north", 0.7, 0.8), ("south", 0.9, 0.8)]))
    save(tmp_path, "plan.json", load_plan("heart-disease", [f"strategy.name={strategy}"]).plan.document())
    shared = report(tmp_path)
    assert [words for words in OF_THE_SHARED_MODEL if words not in Page(shared).text] == []
    assert [words for words in OF_NODES_OWN if words in shared] == []
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    save(tmp_path, "summary.json", summary | {"personal": True})
    personal = report(tmp_path)
    assert_self_contained(personal)
    text = Page(personal).text
    assert [words for words in (*OF_NODES_OWN, *own) if words not in text] == []
    assert [words for words in OF_THE_SHARED_MODEL if words in text] == []
    assert "concord evaluate RUN --data SPEC --node NAME" in text
    assert "concord predict RUN --data SPEC --node NAME" in text
    assert "On their own rows 1 node gains, 0 tie and 1 loses." in text
    assert '<line class="ref alone"' in shared
    assert '<line class="ref alone"' not in personal, "a level of everybody's rows under a line of each one's own"


def test_report_marks_the_worst_node_once(tmp_path: Path) -> None:
    html = report(classification(tmp_path, {"north": [30, 10], "south": [0, 25]}))
    (row,) = re.findall(r'<tr class="worst">.*?</tr>', html, re.DOTALL)
    assert "south" in row
    assert html.index('<tr class="worst">') < html.index("north</th>")  # worst first


def test_report_tells_dropouts_and_aborted_rounds(tmp_path: Path) -> None:
    classification(tmp_path, {"north": [30, 10], "south": [0, 25], "west": [4, 4]})
    append(
        tmp_path,
        train(4, 5, ["north"], silent=["west"], scaled_down=2) | {"failures": {"south": "dropped out"}},
        {"kind": "train", "round": 5, "of": 5, "aborted": "1 of 2 answers", "failures": {"south": "late"}},
    )
    text = Page(report(tmp_path)).text
    assert "2 steps did not go entirely as planned: 2 failed answers, 1 missing one, 1 aborted round." in text
    for expected in ("south: dropped out", "west: no answer", "1 of 2 answers", "2 Update blocks were longer"):
        assert expected in text


def test_report_of_a_run_without_events_says_so(tmp_path: Path) -> None:
    text = Page(report(classification(tmp_path, {"north": [30, 10], "south": [0, 25]}))).text
    assert "None: every node that was asked answered" in text


def test_report_of_a_regression(tmp_path: Path) -> None:
    html = report(regression(tmp_path))
    assert_self_contained(html)
    text = Page(html).text
    assert "RMSE (lower is better)" in text
    assert re.search(r'<p class="number">0\.5000</p>', html)
    assert "0.3100 ± 0.0200" in text
    assert "moments" in text
    assert not (tmp_path / "plots" / "confusion.png").exists()


def test_report_is_honest_about_plain_mode(tmp_path: Path) -> None:
    text = Page(report(classification(tmp_path, {"north": [30, 10]}))).text
    assert "no secure aggregation and no differential privacy" in text
    assert "The coordinator saw what each node sent, in the clear" in text


def test_report_with_1000_nodes_is_quick_and_small(tmp_path: Path) -> None:
    classes = tuple(f"class {index}" for index in range(10))
    counts = np.random.default_rng(0).integers(0, 50, (1000, 10)).tolist()
    nodes = {f"node-{index:04d}": row for index, row in enumerate(counts)}
    classification(tmp_path, nodes, rounds=20, classes=classes)
    rows = [(name, 0.5 + index / 4000, 0.75) for index, name in enumerate(nodes)]
    save(tmp_path, "comparison.json", comparison_of("accuracy", rows))
    started = time.process_time()
    html = report(tmp_path)
    assert time.process_time() - started < 10
    assert len(html) < 3_000_000
    assert_self_contained(html)


def test_report_with_more_classes_than_a_table_can_hold(tmp_path: Path) -> None:
    classes = tuple(f"class {index}" for index in range(47))
    classification(tmp_path, {f"node-{index}": [index] * 47 for index in range(3)}, classes=classes)
    rows = [(f"input {index}", output, index / 9, None) for index in range(50) for output in classes[:3]]
    keys = ("feature", "output", "coefficient", "standard_error")
    save(tmp_path, "coefficients.json", [dict(zip(keys, row, strict=True)) for row in rows])
    html = report(tmp_path)
    assert_self_contained(html)
    pictures = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    assert len(pictures) == 2
    assert all(attributes["alt"] for attributes in pictures)


def test_report_when_nothing_could_be_evaluated(tmp_path: Path) -> None:
    classification(tmp_path, {"north": [30, 10], "south": [0, 25]})
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    save(tmp_path, "summary.json", summary | {"metrics": {"rows": 0}, "per_node": {}, "worst_node": None})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train(1, 1, ["north", "south"])) + "\n", "utf-8")
    assert_self_contained(report(tmp_path))


def test_report_refuses_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"plan\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [
        ("accuracy", 0.9638, "96.4%"),
        ("rmse", 0.74941, "0.7494"),
        ("r2", -0.5, "−0.5000"),
        ("auc", None, "–"),
        ("loss", float("nan"), "–"),
        ("rmse", 12345.6, "1.235e+04"),
        ("tokens", 92206, "92,206"),
        ("tokens", 7, "7"),
    ],
)
def test_figures_are_written_as_people_read_them(figure: str, value: float | None, expected: str) -> None:
    assert format_figure(figure, value) == expected


def test_a_gain_too_small_to_show_has_no_sign() -> None:
    assert format_gain("accuracy", -0.0001) == "0"
    assert format_gain("accuracy", -0.0313) == "−3.1"


def test_wilson_interval_of_the_published_example() -> None:
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662, and 0 of 20 gives 0 to 0.1611."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_scale_has_round_ticks_and_holds_both_ends() -> None:
    scale = scale_of(0.217, 0.964)
    assert scale.ticks == (0.2, 0.4, 0.6, 0.8, 1.0)
    assert scale_of(3.0, 3.0).low < 3.0 < scale_of(3.0, 3.0).high


def test_a_course_to_compare_with_is_drawn_where_the_line_is() -> None:
    series = Series("loss", (1, 2, 3), *[(3.0, 2.0, 1.0)] * 5)
    chart = line_chart(series, {}, [(1, 3.0), (3, 1.0), (4, 0.5)])
    assert chart is not None
    assert chart.course.split() == [chart.line.split()[0], chart.line.split()[-1]]  # nothing beyond the line
    assert line_chart(series, {}).course == ""  # type: ignore[union-attr]


def test_one_node_far_away_does_not_flatten_the_curve() -> None:
    series = Series("loss", (1, 2), (2.0, 1.0), (1.0, 0.9), (1.5, 1.0), (2.5, 1.1), (1e9, 1e9))
    chart = line_chart(series, {})
    assert chart is not None
    assert float(chart.y_ticks[-1][1]) < 10
