"""A wheel with a model of its own, laid out as an installer lays it out."""

import base64
import hashlib
from pathlib import Path

MODEL = """
from torch import nn


def build(plan):
    width = plan.model.settings.get("width", 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, len(plan.data.classes)))
"""


def install(folder: Path, package: str = "their-models", code: str = MODEL, **files: str) -> Path:
    """Writes the wheel into `folder`, a directory of the path. files: further ones, by name with `__` for `/`."""
    module = package.replace("-", "_")
    about = f"{module}-1.0.dist-info"
    contents = {
        f"{module}/__init__.py": code,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{about}/entry_points.txt": f"[concord.models]\nsmall-net = {module}:build\n",
        f"{about}/INSTALLER": "pip\n",
        **{name.replace("__", "/"): content for name, content in files.items()},
    }
    lines = []
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    (folder / about / "RECORD").write_text("\n".join([*lines, f"{about}/RECORD,,", ""]), "utf-8")
    return folder / module / "__init__.py"
