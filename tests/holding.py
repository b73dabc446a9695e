"""Stands in for long videos: the real scoring work, but a unit stops after its first clip while it is held.

``RUN/slurm/hold`` holds the units of some videos; ``RUN/slurm/held`` is there once one is.
"""

import time
from pathlib import Path

from ego2robot.jobs.worker import scoring as real_scoring

VIDEOS = ("4.mp4", "5.mp4")


def scoring(work):
    score = real_scoring(work)
    folder = Path(work.cfg.run_dir, "slurm")

    def held(unit):
        for i, scored in enumerate(score(unit)):
            while i and unit.video.name in VIDEOS and (folder / "hold").exists():
                (folder / "held").touch()
                time.sleep(0.1)
            yield scored

    return held
