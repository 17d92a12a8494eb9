"""README and examples are true of the code as it is."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from concord_client.cli import app as node_app
from concord_local.cli import app
from concord_local.together import STRATEGIES, cells, what_goes_together
from concord_shared.errors import PlanError
from concord_shared.plan import load_plan, parse_plan, shipped_plans
from concord_shared.plan.schema import Plan

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "deploy" / "README.zh.md").read_text("utf-8")
OF_RUN_SH = ("test", "wheel", "--with")  # what run.sh does itself; every other word is a command of `concord`
COMMANDS = {"concord": typer.main.get_command(app), "concord-node": typer.main.get_command(node_app)}


def _code(text: str) -> list[str]:
    """Every command of `text`: lines of its bash blocks without comments, and inline code."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:bash deploy/run\.sh|concord|concord-node)\s[^`]*)`", text)
    return sorted({" ".join(line.split()) for line in lines if line})


def _ours(line: str) -> list[list[str]]:
    """The words of each `concord` or `concord-node` in a shell line; other programs are not ours to check."""
    parts = re.split(r"&&|&$|\s>.*", re.sub(r"[…\[\]]|RUN RUN", " ", line.replace("bash deploy/run.sh", "run.sh")))
    found = [shlex.split(part) for part in parts if part.strip()]
    return [words for words in found if words[0] in COMMANDS or words[0] == "run.sh"]


@pytest.mark.parametrize("line", sorted(set(_code(README)) | set(_code(CHINESE))))
def test_every_command_and_option_exists(line: str) -> None:
    for name, *rest in _ours(line):
        if name == "run.sh" and (not rest or rest[0] in OF_RUN_SH):
            continue
        command = COMMANDS["concord" if name == "run.sh" else name]
        while rest and hasattr(command, "commands") and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        assert not hasattr(command, "commands") or not rest or rest[0].startswith("-"), f"no command {line!r}"
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("--")} <= options


def test_run_sh_knows_the_words_that_are_its_own() -> None:
    script = (ROOT / "deploy" / "run.sh").read_text("utf-8")
    assert all(re.search(rf"(^|\W){re.escape(word)}\W", script) for word in OF_RUN_SH)


@pytest.mark.parametrize("text", [README, CHINESE], ids=["en", "zh"])
def test_links_lead_somewhere(text: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        base = ROOT if text is README else ROOT / "deploy"
        assert (base / target).exists(), target


def test_every_claim_of_security_names_a_test_that_exists() -> None:
    """A row of SECURITY.md's tables of claims links to test files; the names after a link are in that file."""
    text = (ROOT / "deploy" / "SECURITY.md").read_text("utf-8")
    links = re.findall(r"\]\(\.\./(tests/[^)]+)\)((?:,? `[A-Za-z_…]+`)*)", text)
    assert len(links) > 10
    for file, names in links:
        source = (ROOT / file).read_text("utf-8")
        for name in re.findall(r"`([A-Za-z_]+)…?`", names):
            assert re.search(rf"(def|class) {name}", source), f"{file}: no {name}"
    tables = re.findall(r"\| claim \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 5
    assert all("](../tests/" in row for row in rows)


@pytest.mark.parametrize("text", [README, CHINESE], ids=["en", "zh"])
def test_the_example_plan_is_valid(text: str) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", text, re.S)
    assert parse_plan(example, "README").plan.strategy.name == "fedprox"


def test_both_languages_show_the_same_figures_and_commands() -> None:
    assert _code(README) == _code(CHINESE)
    figures = re.compile(r"\b0\.\d{2,}\b")
    assert sorted(figures.findall(README)) == sorted(figures.findall(CHINESE))


@pytest.mark.parametrize("name", list(shipped_plans()))
def test_shipped_plans_say_what_they_are(name: str) -> None:
    loaded = load_plan(name)
    assert loaded.plan.name == name
    assert loaded.about.title
    assert loaded.about.title_zh
    assert loaded.about.target


def test_every_section_of_a_plan_refuses_an_unknown_key() -> None:
    for section in Plan.model_fields:
        if section in ("name", "kind", "seed"):
            continue
        with pytest.raises(PlanError, match=rf"{section}\.no_such_key"):
            load_plan("digits-cnn", ["strategy.name=fedavg", "privacy.mode=plain", f"{section}.no_such_key=1"])


def test_top_level_holds_what_was_agreed() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    allowed = {"pyproject.toml", "README.md", "server", "client", "shared", "deploy", "tests"}
    assert found - {"runs", "dist", "build"} <= allowed


def test_what_goes_together_is_what_trying_finds() -> None:
    head, _, *rows = re.search(r"\| model \| `fedavg` .*?\n\n", README, re.S)[0].strip().splitlines()  # type: ignore[index]
    assert [cell.strip(" `") for cell in head.strip("|").split("|")][1:] == list(STRATEGIES)
    said = {}
    for row in rows:
        name, *told = (cell.strip() for cell in row.strip("|").split("|"))
        said[name.replace("`", "")] = told
    found = what_goes_together()
    assert said == {model: cells(each) for model, each in found.items()}
    assert all(any(cell != "–" for cell in each) for each in said.values()), "each model trains with something"
    reasons = {reason for each in found.values() for keys in each.values() for reason in keys.values() if reason}
    assert all(len(reason) > 40 for reason in reasons)
