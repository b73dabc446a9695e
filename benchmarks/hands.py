"""Does our hand detector find what MediaPipe finds, and is it faster, on this CPU?

Agreement: MediaPipe's HandLandmarker in image mode and ours look at the same pictures: every frame of the
mixer clip, the gesture photographs, the Aria recording (where projectaria-tools is installed), generated
footage, and copies of them that are rotated, mirrored, scaled and darkened. Presence is the share of frames
with a hand in both or in neither; landmarks of matched hands are compared in pixels of a 640 x 360 frame;
sides before (the network's own opinion) and after one hand per side was settled. The same for half
precision against float32.

Speed: both take turns on the frames of the mixer clip, each one's best turn counts, and the answer is a ratio
to MediaPipe, higher is faster, by the clock and by CPU time. Pin the process to one core (``taskset -c 0``)
to compare equal cores: MediaPipe takes more threads where it finds them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from ego2robot import models
from ego2robot.hands_net.pipeline import HandNet
from ego2robot.sample import make_footage
from ego2robot.stages import hands_torch
from ego2robot.stages.hands import MediaPipeHands
from ego2robot.stages.sides import Candidate, one_per_side

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
Detector = Callable[[np.ndarray], list[list[Candidate]]]
NEAR_PX = 40.0  # hands further apart than this at 640 x 360 are not the same one


def video(path: Path, every: int = 1) -> np.ndarray:
    """uint8 [T, h, w, 3]: frames as the pipeline has them, scaled into 640 x 360."""
    with av.open(str(path)) as container:
        return np.stack(
            [fit(f.to_image()) for i, f in enumerate(container.decode(video=0)) if i % every == 0]
        )


def fit(image: Image.Image) -> np.ndarray:
    scale = min(640 / image.width, 360 / image.height)
    size = round(image.width * scale / 2) * 2, round(image.height * scale / 2) * 2
    return np.array(image.convert("RGB").resize(size, Image.Resampling.BOX))


def aria(path: Path) -> np.ndarray | None:
    try:
        from projectaria_tools.core import data_provider
    except ImportError:
        return None
    provider = data_provider.create_vrs_data_provider(str(path))
    stream = provider.get_stream_id_from_label("camera-rgb")
    # Read at once: the recording's buffer is used again for the next frame.
    return np.stack(
        [
            fit(Image.fromarray(provider.get_image_data_by_index(stream, i)[0].to_numpy_array()))
            for i in range(provider.get_num_data(stream))
        ]
    )


def pictures() -> Iterator[tuple[str, np.ndarray]]:
    """Name and uint8 [T, h, w, 3] of every set that can be had here."""
    if SAMPLES.is_dir():
        yield "mixer", video(SAMPLES / "two_hands_mixer_20s.mp4")
        for name in ("call", "four", "rock"):
            yield f"photograph {name}", fit(Image.open(SAMPLES / f"hand_{name}.jpg"))[None]
        frames = aria(SAMPLES / "aria_8frames.vrs")
        if frames is not None:
            yield "aria", frames
    with tempfile.TemporaryDirectory() as folder:
        footage = make_footage(Path(folder), minutes=1.5, width=1280, height=720, fps=15)
        yield "generated", video(footage.videos[0], every=5)


def copies(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "as it is", frames
    yield "rotated 90", np.ascontiguousarray(np.rot90(frames, 1, (1, 2)))
    yield "rotated 180", np.ascontiguousarray(np.rot90(frames, 2, (1, 2)))
    tilted = [np.array(Image.fromarray(f).rotate(25, Image.Resampling.BILINEAR)) for f in frames]
    yield "rotated 25", np.stack(tilted)
    yield "mirrored", np.ascontiguousarray(frames[:, :, ::-1])
    half = (frames.shape[2] // 2, frames.shape[1] // 2)
    yield "half as large", np.stack([np.array(Image.fromarray(f).resize(half)) for f in frames])
    yield "darkened", (frames * 0.35).astype(np.uint8)


def mediapipe_detector(detector: MediaPipeHands) -> Detector:
    return lambda frames: [detector._candidates(frame) for frame in frames]


def torch_detector(net: HandNet, batch: int = 8) -> Detector:
    def run(frames: np.ndarray) -> list[list[Candidate]]:
        found: list[list[Candidate]] = []
        for first in range(0, len(frames), batch):
            hands = net(torch.from_numpy(frames[first : first + batch])).cpu()
            found += hands_torch._candidates(hands, frames.shape[1:3])
        return found

    return run


def network(dtype: torch.dtype) -> HandNet:
    palm, landmark = (
        models.network_path(name) for name in ("palm_detection_full.tflite", "hand_landmark_full.tflite")
    )
    return HandNet(palm, landmark, dtype=dtype)


def compare(
    found: list[list[Candidate]], wanted: list[list[Candidate]], size: tuple[int, int]
) -> dict[str, Any]:
    """Sums over frames, for ``shares``. Landmarks in pixels of the frame scaled into 640 x 360."""
    height, width = size
    scale = min(640 / width, 360 / height) * np.array([width, height])
    sums: dict[str, Any] = dict.fromkeys(
        ("frames", "presence", "count", "hands", "sides", "settled", "settled_sides"), 0
    )
    sums["errors_px"] = []
    for ours, theirs in zip(found, wanted, strict=True):
        sums["frames"] += 1
        sums["presence"] += bool(ours) == bool(theirs)
        sums["count"] += len(ours) == len(theirs)
        for a, b, error in matched(ours, theirs, scale):
            sums["hands"] += 1
            sums["sides"] += (a.p_left >= 0.5) == (b.p_left >= 0.5)
            sums["errors_px"].append(error)
        mine, other = one_per_side(ours, 0), one_per_side(theirs, 0)
        for a, b, _ in matched(mine, other, scale):
            sums["settled"] += 1
            sums["settled_sides"] += a.side == b.side
    return sums


def matched(ours: list[Any], theirs: list[Any], scale: np.ndarray) -> list[tuple[Any, Any, float]]:
    """Pairs of hands, nearest first, each hand once, with their mean distance."""
    pairs = sorted(
        (float(np.linalg.norm((a.landmarks - b.landmarks)[:, :2] * scale, axis=1).mean()), i, j)
        for i, a in enumerate(ours)
        for j, b in enumerate(theirs)
    )
    used_i: set[int] = set()
    used_j: set[int] = set()
    found = []
    for error, i, j in pairs:
        if error < NEAR_PX and i not in used_i and j not in used_j:
            used_i.add(i)
            used_j.add(j)
            found.append((ours[i], theirs[j], error))
    return found


def shares(sums: list[dict[str, Any]]) -> dict[str, Any]:
    def total(key: str) -> int:
        return sum(s[key] for s in sums)

    errors = np.concatenate([s["errors_px"] for s in sums]) if sums else np.zeros(0)
    share = {
        "frames": total("frames"),
        "hands": total("hands"),
        "presence": round(total("presence") / total("frames"), 4),
        "same_count": round(total("count") / total("frames"), 4),
    }
    if len(errors):
        share |= {
            "side": round(total("sides") / total("hands"), 4),
            "settled_side": round(total("settled_sides") / max(total("settled"), 1), 4),
            "landmarks_mean_px": round(float(errors.mean()), 4),
            "landmarks_median_px": round(float(np.median(errors)), 4),
            "landmarks_max_px": round(float(errors.max()), 3),
        }
    return share


def agreement(reference: Detector, others: dict[str, Detector], base: str) -> dict[str, Any]:
    """Each of ``others`` against the reference and against ``base`` of them, by set, by copy and in all."""
    sums: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, frames in pictures():
        for how, copy in copies(frames):
            theirs = reference(copy)
            found = {key: detector(copy) for key, detector in others.items()}
            pairs = {f"{key} against mediapipe": (found[key], theirs) for key in others}
            pairs |= {f"{key} against {base}": (found[key], found[base]) for key in others if key != base}
            for title, (a, b) in pairs.items():
                one = compare(a, b, copy.shape[1:3])
                for group in ("all", name, how):
                    sums.setdefault(title, {}).setdefault(group, []).append(one)
    return {title: {group: shares(s) for group, s in groups.items()} for title, groups in sums.items()}


def speed(runs: dict[str, Detector], frames: np.ndarray, turns: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run(frames)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    base = "mediapipe"
    return {
        name: {
            "speed": round(min(wall[base]) / min(wall[name]), 3),
            "speed_by_cpu_time": round(min(cpu[base]) / min(cpu[name]), 3),
            "frames_per_cpu_second": round(len(frames) / min(cpu[name]), 1),
            "cpu_seconds": [round(s, 3) for s in cpu[name]],
        }
        for name in runs
    }


def machine() -> dict[str, Any]:
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "mediapipe", "numpy")},
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--every", type=int, default=4, help="of the mixer clip's frames, for the speed")
    parser.add_argument("--only-speed", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models.network_path("hand_landmark_full.tflite", pull_if_missing=True)
    ours = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}
    body: dict[str, Any] = {"question": __doc__.splitlines()[0], "machine": machine()}
    with MediaPipeHands() as mediapipe:
        reference = mediapipe_detector(mediapipe)
        nets = {name: network(dtype) for name, dtype in ours.items()}
        detectors = {name: torch_detector(net) for name, net in nets.items()}
        if SAMPLES.is_dir():
            frames = video(SAMPLES / "two_hands_mixer_20s.mp4", args.every)
            body["speed"] = speed({"mediapipe": reference, **detectors}, frames, args.turns)
            for name, row in body["speed"].items():
                ratio = f"{row['speed']:5.2f} x (by CPU time {row['speed_by_cpu_time']:.2f} x)"
                print(f"{name:16} {ratio}, {row['frames_per_cpu_second']} frames/s of CPU")
        if not args.only_speed:
            body["agreement"] = agreement(reference, detectors, "torch float32")
            for title, groups in body["agreement"].items():
                for group, row in groups.items():
                    print(f"{title}, {group}: {row}")
    about = body["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']} {about['cores']} cores".lower()).strip("-")
    path = args.out / f"{datetime.date.today().isoformat()}-{slug}-hands.json"
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(path.name)


if __name__ == "__main__":
    main()
