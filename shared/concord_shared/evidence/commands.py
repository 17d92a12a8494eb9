"""How both commands print what a capsule shows."""

import sys
from typing import Any

from concord_shared.text import printable

__all__ = ["show_capsule"]


def show_capsule(found: dict[str, Any]) -> None:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found["metrics"].items())
    rows = [
        f"run {found['run']} of {found['federation']} is what it says: {found['state']}",
        f"  plan {found['plan']} ({found['plan_digest'][:16]}…), study {found['study']}, asked by "
        f"{found['organisation']}",
        f"  {len(found['nodes'])} nodes ({', '.join(found['nodes'])}), {found['approvals']} approvals; "
        f"privacy mode {found['privacy_mode']}",
        f"  {found['steps']} steps with {found['updates']} Updates: each with its node's signature and a receipt",
        f"  {found['audit_entries']} entries of the audit log, each proven to be in it",
        f"  model {found['model_digest'] or 'none'}{', released' if found['released'] else ''}",
    ]
    if figures:
        rows.append(f"  {figures}")
    sys.stdout.write("".join(printable(row) + "\n" for row in rows))
