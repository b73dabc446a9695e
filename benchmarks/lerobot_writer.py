"""Episodes written by lerobot's own add_frame and save_episode; runs in lerobot's environment.

    .venv-lerobot/bin/python benchmarks/lerobot_writer.py FRAMES OUT --fps 6

FRAMES holds ``<number>.npy`` (uint8 RGB [T, H, W, 3]) and ``vectors.npz`` (``state`` and ``action``, float32
[T, D] each, the same for every episode). Frames are in memory before the clock starts. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("frames", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=4, help="of lerobot's image writer; 4 is its advice")
    parser.add_argument("--codec", default="libsvtav1")
    args = parser.parse_args()
    episodes = [np.load(path) for path in sorted(args.frames.glob("*.npy"))]
    vectors = np.load(args.frames / "vectors.npz")
    picture = {"dtype": "video", "shape": episodes[0].shape[1:], "names": ["height", "width", "channels"]}
    features = {"observation.images.top": picture}
    for name, key in (("observation.state", "state"), ("action", "action")):
        columns = [f"{key}_{i}" for i in range(vectors[key].shape[1])]
        features[name] = {"dtype": "float32", "shape": (len(columns),), "names": columns}
    began, spent = time.perf_counter(), os.times()
    dataset = LeRobotDataset.create(
        "local/bench",
        args.fps,
        features,
        root=args.out,
        image_writer_threads=args.threads,
        vcodec=args.codec,
    )
    for frames in episodes:
        for k, frame in enumerate(frames):
            state, action = vectors["state"][k], vectors["action"][k]
            dataset.add_frame(
                {
                    "observation.images.top": frame,
                    "observation.state": state,
                    "action": action,
                    "task": "work",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    seconds, after = time.perf_counter() - began, os.times()
    cpu = sum(after[:4]) - sum(spent[:4])
    print(json.dumps({"frames": sum(map(len, episodes)), "seconds": seconds, "cpu_s": cpu}))


if __name__ == "__main__":
    main()
