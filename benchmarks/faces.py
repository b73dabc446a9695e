"""How many faces of which size does the privacy export cover, and how often does it cover something else?

    python benchmarks/faces.py PHOTOGRAPHS VIDEO_WITHOUT_FACES

Photographs of one person each (none is part of this project) are scaled until the face has a size, and put
into frames of the video. So they are what the detector can find when it is large: frontal or nearly so,
sharp, whole. Faces seen from the side or behind, blurred or hidden are missed more often than these figures
say.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import RESULTS, write_result
from PIL import Image, ImageOps

from ego2robot.export import privacy

SIZES = (10, 14, 20, 28, 40, 56, 80, 112, 160)  # pixels from brows to chin, in 360 x 640
HEIGHT, WIDTH = 360, 640
COVERED = 0.9  # of a face's box, for it to count
SURE = 0.7  # of the detector at full size, for a photograph to be taken


def photographs(folder: Path, net: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures with exactly one face, and its box."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        picture.thumbnail((1400, 1400))
        pixels = np.array(picture)
        faces = net(torch.from_numpy(pixels)[None])
        sure = faces.box_BK4[0][faces.score_BK[0] >= SURE].numpy()
        if len(sure) == 1:
            found.append((pixels, sure[0]))
    return found


def background(path: Path, every: int) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = [
            frame.reformat(width=WIDTH, height=HEIGHT, format="rgb24").to_ndarray()
            for i, frame in enumerate(container.decode(video=0))
            if i % every == 0
        ]
    return np.stack(frames)


def placed(
    frame: np.ndarray, photograph: np.ndarray, box: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Puts a photograph into a frame, its face ``size`` pixels high; where the face then is."""
    scale = size / (box[3] - box[1])
    height, width = (max(2, round(n * scale)) for n in photograph.shape[:2])
    small = np.array(Image.fromarray(photograph).resize((width, height), Image.Resampling.LANCZOS))
    rows, columns = min(height, HEIGHT), min(width, WIDTH)
    middle = (box[:2] + box[2:]) / 2 * scale
    cut_x = int(np.clip(middle[0] - columns / 2, 0, width - columns))
    cut_y = int(np.clip(middle[1] - rows / 2, 0, height - rows))
    x, y = int(rng.integers(0, WIDTH - columns + 1)), int(rng.integers(0, HEIGHT - rows + 1))
    frame[y : y + rows, x : x + columns] = small[cut_y : cut_y + rows, cut_x : cut_x + columns]
    return box * scale + np.array([x - cut_x, y - cut_y] * 2)


def changed_share(before: np.ndarray, after: np.ndarray, box: np.ndarray) -> float:
    x0, y0, x1, y1 = box.round().astype(int)
    part = np.s_[max(0, y0) : y1, max(0, x0) : x1]
    return float((before[part] != after[part]).any(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = privacy.face_net()
    faces, frames = photographs(args.photographs, net), background(args.video, 8)
    rng = np.random.default_rng(0)
    recall: dict[str, float] = {}
    seconds, n = 0.0, 0
    for size in SIZES:
        covered = 0
        for i, (photograph, box) in enumerate(faces):
            frame = frames[i % len(frames)].copy()
            truth = placed(frame, photograph, box, size, rng)
            before = frame.copy()
            began = time.process_time()
            privacy.blur_faces(torch.from_numpy(frame)[None], net)
            seconds, n = seconds + time.process_time() - began, n + 1
            covered += changed_share(before, frame, truth) >= COVERED
        recall[str(size)] = round(covered / len(faces), 3)
        print(f"{size} px: {recall[str(size)]:.3f} covered", flush=True)
    every = background(args.video, 1)
    _, wrong = privacy.blur_faces(torch.from_numpy(every), net)
    body = {
        "photographs": len(faces),
        "covered_by_height_in_pixels_of_360": recall,
        "frames_without_faces": len(every),
        "of_these_changed": wrong,
        "cpu_ms_a_frame": round(1e3 * seconds / n, 1),
    }
    path = write_result("faces", __doc__, body, ("torch", "numpy"), args.out)
    print(f"{wrong} of {len(every)} frames without faces changed; {path.name}")


if __name__ == "__main__":
    main()
