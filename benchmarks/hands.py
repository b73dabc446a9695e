"""Does our hand detector find what MediaPipe finds, and is it faster, on this CPU? What does a GPU do?

Agreement: MediaPipe's HandLandmarker in image mode and ours look at the same pictures: every frame of the
mixer clip, the gesture photographs, the Aria recording (where projectaria-tools is installed), generated
footage, and copies of them that are rotated, mirrored, scaled and darkened. Presence is the share of frames
with a hand in both or in neither; landmarks of matched hands are compared in pixels of a 640 x 360 frame;
sides before (the network's own opinion) and after one hand per side was settled. The same for half
precision against float32.

Speed: both take turns on the frames of the mixer clip, each one's best turn counts, and the answer is a ratio
to MediaPipe, higher is faster, by the clock and by CPU time. Pin the process to one core (``taskset -c 0``)
to compare equal cores: MediaPipe takes more threads where it finds them.

GPU: frames of 360 x 640 that are on the device already, with hands (the mixer clip, else generated footage)
and without (its background, as noise), through both networks and all between them; for each size of batch
called step by step, as one CUDA graph, and as one of compiled networks. What is found is held against float32
on the CPU. MediaPipe is needed for the comparison with it alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import RESULTS, Skip, write_result
from PIL import Image

from ego2robot import models
from ego2robot.hands_net.captured import Captured
from ego2robot.hands_net.pipeline import FoundHands, HandNet
from ego2robot.sample import make_footage
from ego2robot.stages import hands_torch
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


def pictures(every: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and uint8 [T, h, w, 3] of every set that can be had here; of videos each so many-th frame."""
    if SAMPLES.is_dir():
        yield "mixer", video(SAMPLES / "two_hands_mixer_20s.mp4", every)
        for name in ("call", "four", "rock"):
            yield f"photograph {name}", fit(Image.open(SAMPLES / f"hand_{name}.jpg"))[None]
        frames = aria(SAMPLES / "aria_8frames.vrs")
        if frames is not None:
            yield "aria", frames
    with tempfile.TemporaryDirectory() as folder:
        footage = make_footage(Path(folder), minutes=1.5, width=1280, height=720, fps=15)
        yield "generated", video(footage.videos[0], 5 * every)


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


def mediapipe_detector() -> Detector | None:
    """MediaPipe's own; None where it is not installed or does not load."""
    try:
        from tests.mediapipe_reference import MediaPipeHands
    except ImportError:
        return None
    detector = MediaPipeHands()
    return lambda frames: [detector._candidates(frame) for frame in frames]


def torch_detector(net: HandNet, batch: int = 8) -> Detector:
    def run(frames: np.ndarray) -> list[list[Candidate]]:
        found: list[list[Candidate]] = []
        for first in range(0, len(frames), batch):
            hands = net(torch.from_numpy(frames[first : first + batch])).cpu()
            found += hands_torch._candidates(hands, [frames.shape[1:3]] * len(hands.present_BK))
        return found

    return run


def network(dtype: torch.dtype, **options: Any) -> HandNet:
    return HandNet(*models.hand_networks("full"), dtype=dtype, **options)


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


def agreement(reference: Detector, others: dict[str, Detector], base: str, every: int) -> dict[str, Any]:
    """Each of ``others`` against the reference and against ``base`` of them, by set, by copy and in all."""
    sums: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, frames in pictures(every):
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


# -- on a GPU -------------------------------------------------------------------------------------


def gpu_frames() -> dict[str, torch.Tensor]:
    """uint8 [T, 360, 640, 3] on the GPU, with hands in all and in none."""
    with tempfile.TemporaryDirectory() as folder:
        if SAMPLES.is_dir():
            found = video(SAMPLES / "two_hands_mixer_20s.mp4")
        else:
            footage = make_footage(Path(folder), minutes=1, width=1280, height=720, fps=15)
            found = video(footage.videos[0], every=3)
    whole = np.zeros((len(found), 360, 640, 3), np.uint8)
    top, left = (360 - found.shape[1]) // 2, (640 - found.shape[2]) // 2
    whole[:, top : top + found.shape[1], left : left + found.shape[2]] = found
    noise = np.random.default_rng(0).integers(0, 256, (64, 360, 640, 3), np.uint8)
    return {"with hands": torch.from_numpy(whole).cuda(), "without hands": torch.from_numpy(noise).cuda()}


def seconds(work: Callable[[], Any], least: float) -> float:
    """Median of one call, by the device's own events; some calls are under way at a time, as in a run."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    each: list[float] = []
    began = time.perf_counter()
    while len(each) < 5 or time.perf_counter() - began < least:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(4):
            work()
        last.record()
        last.synchronize()
        each.append(first.elapsed_time(last) / 4000)
    return float(np.median(each))


def gpu_ways(dtype: torch.dtype, n_frames: int) -> Iterator[tuple[str, Callable[[torch.Tensor], FoundHands]]]:
    yield "eager, palms counted on the host", network(dtype, device="cuda")
    yield "eager", network(dtype, device="cuda", every_slot=True)
    yield "graph", Captured(network(dtype, device="cuda", every_slot=True), n_frames)
    compiled = network(dtype, device="cuda", every_slot=True)
    compiled.palm = torch.compile(compiled.palm, dynamic=False)
    compiled.landmark = torch.compile(compiled.landmark, dynamic=False)
    yield "graph of compiled networks", Captured(compiled, n_frames)


def gpu_speed(frames: dict[str, torch.Tensor], batches: list[int], least: float) -> list[dict[str, Any]]:
    rows = []
    for n_frames in batches:
        for way, look in gpu_ways(torch.float16, n_frames):
            for content, all_frames in frames.items():
                batch = all_frames[torch.arange(n_frames, device="cuda") % len(all_frames)]
                torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                found = look(batch).cpu()
                first_s = time.perf_counter() - began
                each_s = seconds(lambda look=look, batch=batch: look(batch), least)
                rows.append(
                    {
                        "batch": n_frames,
                        "way": way,
                        "content": content,
                        "frames_per_s": round(n_frames / each_s),
                        "first_call_s": round(first_s, 2),
                        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                        "share_with_a_hand": round(float(found.present_BK.any(1).float().mean()), 3),
                    }
                )
                print(rows[-1])
            del look
            torch.cuda.empty_cache()
    return rows


def gpu_agreement(frames_BHWC: torch.Tensor) -> dict[str, Any]:
    """Each way in float16 against float32 on the CPU, and one way against itself in other company."""
    host = frames_BHWC.cpu().numpy()
    wanted = torch_detector(network(torch.float32))(host)
    sizes = [host.shape[1:3]] * len(host)
    found: dict[str, Any] = {}
    for way, look in gpu_ways(torch.float16, len(frames_BHWC)):
        hands = look(frames_BHWC)
        candidates = hands_torch._candidates(hands.cpu(), sizes)
        found[way] = shares([compare(candidates, wanted, host.shape[1:3])])
        turned, table = look(frames_BHWC.flip(0)).packed().flip(0), hands.packed()
        found[way]["same_to_the_last_bit_in_another_place"] = bool(
            torch.equal(turned[hands.present_BK], table[hands.present_BK])
        )
        print(way, found[way])
    return found


def gpu(quick: bool) -> dict[str, Any]:
    """All that is measured on the GPU. Its memory is read before and after many batches as well."""
    frames = gpu_frames()
    speeds = gpu_speed(frames, [128] if quick else [64, 128, 256, 512], 0.3 if quick else 1.0)
    best = max((row for row in speeds if row["content"] == "with hands"), key=lambda r: r["frames_per_s"])
    with hands_torch.TorchHands(device="cuda") as detector:
        clip = frames["with hands"][:96]
        looked = np.arange(0, len(clip), 3)
        clips = [(clip, looked, None)] * 16
        detector.detect_batch(clips)
        held = torch.cuda.memory_allocated()
        each_s = seconds(lambda: detector.detect_batch(clips), 0.3 if quick else 2.0)
        grown = torch.cuda.memory_allocated() - held
    return {
        "device": torch.cuda.get_device_name(),
        "gpu_hands_frames_per_s": best["frames_per_s"],
        "best": best,
        "detect_batch_frames_per_s": round(len(looked) * len(clips) / each_s),
        "detect_batch_memory_grown_bytes": int(grown),
        "by_batch": speeds,
        "agreement_with_float32_on_the_cpu": gpu_agreement(frames["with hands"][:64]),
    }


# -- all of it ------------------------------------------------------------------------------------


def cpu_speed(turns: int, every: int) -> dict[str, Any] | None:
    """Beside MediaPipe on the mixer clip, or None where either is missing."""
    reference = mediapipe_detector()
    if reference is None or not SAMPLES.is_dir():
        return None
    found = speed(
        {"mediapipe": reference, **ours()}, video(SAMPLES / "two_hands_mixer_20s.mp4", every), turns
    )
    for name, row in found.items():
        ratio = f"{row['speed']:5.2f} x (by CPU time {row['speed_by_cpu_time']:.2f} x)"
        print(f"{name:16} {ratio}, {row['frames_per_cpu_second']} frames/s of CPU")
    return found


def ours() -> dict[str, Detector]:
    dtypes = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}
    return {name: torch_detector(network(dtype)) for name, dtype in dtypes.items()}


def run(quick: bool) -> dict[str, Any]:
    """The part that ``bench.py`` and ``gpu_proof.py`` ask for."""
    models.hand_networks("full", pull_if_missing=True)
    if torch.cuda.is_available():
        return {"gpu": gpu(quick)}
    torch.set_num_threads(1)
    found = cpu_speed(2 if quick else 4, 20 if quick else 8)
    if found is None:
        raise Skip("mediapipe or ../shared/samples is not there")
    best = hands_torch.default_dtype("cpu")
    return {"cpu": found, "cpu_hands_vs_mediapipe": found[f"torch {str(best)[6:]}"]["speed_by_cpu_time"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--every", type=int, default=4, help="of the mixer clip's frames, for the speed")
    parser.add_argument("--sparse", type=int, default=1, help="each so many-th frame for the agreement")
    parser.add_argument("--only", choices=("speed", "agreement", "gpu"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models.hand_networks("full", pull_if_missing=True)
    # Who shares caches and cores with others measures them as well.
    body: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "sparse": args.sparse,
        "load_average": round(os.getloadavg()[0], 1),
    }
    if args.only in (None, "speed"):
        body["speed"] = cpu_speed(args.turns, args.every) or "mediapipe or the samples are not there"
    if args.only in (None, "agreement"):
        reference = mediapipe_detector()
        if reference is None:
            body["agreement"] = "mediapipe is not there"
        else:
            body["agreement"] = agreement(reference, ours(), "torch float32", args.sparse)
            for title, groups in body["agreement"].items():
                for group, row in groups.items():
                    print(f"{title}, {group}: {row}")
    if args.only in (None, "gpu"):
        body["gpu"] = gpu(False) if torch.cuda.is_available() else "no GPU"
    print(write_result("hands", __doc__, body, ("torch", "mediapipe", "numpy"), args.out).name)


if __name__ == "__main__":
    main()
