"""The demo's recipe on a little of the demo's footage, for tests of what a stranger runs first."""

from __future__ import annotations

from pathlib import Path

from ego2robot import config, models, pipeline
from ego2robot.errors import UserError
from ego2robot.sample import make_footage


def hand_models_missing() -> str:
    """Why the demo cannot run here, or nothing."""
    try:
        models.hand_networks("full", pull_if_missing=True)
    except UserError as error:
        return str(error)
    return ""


def run_demo(folder: Path, *overrides: str, minutes: float = 1.2) -> pipeline.Outcome:
    """Footage in ``folder/footage``, the run in ``folder/run``."""
    make_footage(folder / "footage", minutes=minutes, videos=1, seed=5)
    paths = [f"source.path={folder / 'footage'}", f"run_dir={folder / 'run'}"]
    return pipeline.run(config.load("demo", [*paths, "skills.projections=[tsne]", *overrides]))
