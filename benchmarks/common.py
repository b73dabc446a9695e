"""What every benchmark says beside its figures: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """CPU model and cores, the versions of ``packages``, and the commit that was measured."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
    }


def write_result(
    name: str, question: str | None, body: Mapping[str, Any], packages: Sequence[str], folder: Path = RESULTS
) -> Path:
    """Writes ``<date>-<machine>-<name>.json``: the question (a docstring's first line) and the figures."""
    about = machine(packages)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']} {about['cores']} cores".lower()).strip("-")
    path = folder / f"{datetime.date.today().isoformat()}-{slug}-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    first = (question or "").splitlines()[0] if question else ""
    path.write_text(
        json.dumps({"question": first, "machine": about, **body}, indent=1) + "\n", encoding="utf-8"
    )
    return path
