"""A dataset as lerobot's own writer leaves it, with its default codec.

    .venv-lerobot/bin/python tests/lerobot_writer.py EPISODES OUT FPS

EPISODES holds ``<number>.npz`` with ``frames`` (uint8 RGB [T, H, W, 3]), ``state`` and ``action`` (float32
[T, D]) and ``task``. Runs in lerobot's own environment, so it imports nothing of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

VECTORS = {"observation.state": "state", "action": "action"}


def main() -> None:
    episodes = [np.load(path) for path in sorted(Path(sys.argv[1]).glob("*.npz"))]
    shape = episodes[0]["frames"].shape[1:]
    features = {
        "observation.images.top": {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    }
    for name, key in VECTORS.items():
        columns = [f"{key}_{i}" for i in range(episodes[0][key].shape[1])]
        features[name] = {"dtype": "float32", "shape": (len(columns),), "names": columns}
    dataset = LeRobotDataset.create("local/written", int(sys.argv[3]), features, root=Path(sys.argv[2]))
    for episode in episodes:
        values = {name: episode[key] for name, key in VECTORS.items()}
        for k, frame in enumerate(episode["frames"]):
            row = {name: value[k] for name, value in values.items()}
            dataset.add_frame({"observation.images.top": frame, **row, "task": str(episode["task"])})
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    main()
