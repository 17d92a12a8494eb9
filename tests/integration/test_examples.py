"""The worked examples run as they are written; the data are small ones in the place of a reader's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import data_root, needs

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def run(name: str, directory: Path) -> str:
    """Every bash block of an example, in one shell that stops at the first error."""
    text = (EXAMPLES / f"{name}.md").read_text("utf-8")
    script = "\n".join(["set -euo pipefail", *re.findall(r"```bash\n(.*?)```", text, re.S)])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if data_root() is not None:
        environment["CONCORD_DATA"] = str(data_root())
    done = subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs("heart_disease")
def test_hospital_table(tmp_path: Path) -> None:
    assert "Test accuracy:" in run("hospital-table", tmp_path)


def test_image_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for place in range(90):
        label = ("cat", "dog")[place % 2]
        pixels = rng.integers(60, 100, (16, 16)).astype(np.uint8)
        pixels[: 8 if label == "cat" else 16, 4:12] += 80
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    assert "Test accuracy:" in run("image-folder", tmp_path)
    assert len((tmp_path / "predictions.csv").read_text("utf-8").splitlines()) == 91


def test_chinese_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = {"心脏": "心脏病血压胸痛医院", "天气": "天气云雨雪风阳光"}
    lines = ["text,label,site"]
    for place in range(120):
        label = ("心脏", "天气")[place % 2]
        lines.append(f"{''.join(rng.choice(list(letters[label]), 6))},{label},site-{place % 3}")
    (tmp_path / "texts.csv").write_text("\n".join(lines), "utf-8")
    accuracy = re.search(r"Test accuracy: ([\d.]+)%", run("chinese-text", tmp_path))
    assert accuracy is not None
    assert float(accuracy[1]) > 80


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.md")), ids=lambda file: file.stem)
def test_each_example_is_run_by_a_test_of_its_name(file: Path) -> None:
    assert f"def test_{file.stem.replace('-', '_')}(" in Path(__file__).read_text("utf-8")
