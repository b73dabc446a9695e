"""How much faster than the guide's own way do EgoDex recordings become trajectories?

The guide's way (RFM and Robometer, ``dataset_guides/EgoDex.md``): OpenCV decodes every frame, each is
turned to RGB and resized to 256 x 256, 32 are kept, libx264 encodes them with its defaults. Its code holds
all frames at full size before it resizes. Both are measured, and the ratio that counts is the one to the
first, which costs less. A third, which is not the guide's, decodes everything and resizes only what is
kept. Ours is what a worker of `ego2robot export trajectories` does with one recording: poses, task, frames,
mp4.

They take turns in one process; what counts is CPU time, that of all threads, which is what decides where
there is a process for each core: the least of a few turns, since what else runs can only add to it. Also:
the whole command with two processes on the wall clock, its memory (summed proportional set sizes), and how
near the frames of all ways are to the true ones.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import h5py
import numpy as np
import psutil
from common import CACHE, RESULTS, cpu_seconds, write_result
from decode import KINDS, footage
from memory import proportional_bytes

from ego2robot.export import trajectories_config
from ego2robot.export.trajectories import row_of
from ego2robot.trajectories import chosen, episodes, read
from tests.egodex_files import ATTRIBUTES, JOINTS, moving, write_poses

SECONDS, SIZE, KEPT = 10, 256, 32
# Measured once: the first takes ten times as long and 4 GB, the second is for comparison only.
ONCE = ("guide_as_its_code", "opencv_resizing_what_is_kept")
GUIDE_POSES = ("leftHand", "rightHand", "leftIndexFingerTip", "rightIndexFingerTip", "camera")


def recordings(folder: Path, kind: str, n: int) -> Path:
    """A part of ``n`` recordings of 10 s; their videos differ by a few bytes after the last box."""
    video = footage(SECONDS)[kind]
    part = folder / kind
    for i in range(n):
        task = part / "bench"
        task.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, task / f"{i}.mp4")
        with (task / f"{i}.mp4").open("ab") as file:  # an empty box of its own number
            file.write((12).to_bytes(4, "big") + b"free" + i.to_bytes(4, "big"))
        confidences = {name: np.ones(SECONDS * 30, np.float32) for name in JOINTS}
        write_poses(task / f"{i}.hdf5", POSES, confidences, ATTRIBUTES)
    return part


POSES = moving(SECONDS * 30)


# -- the guide's way ------------------------------------------------------------------------------


def _numbers(data: Path) -> tuple[np.ndarray, str]:
    with h5py.File(data, "r") as file:
        places = [file[f"transforms/{name}"][:][:, :3, 3] for name in GUIDE_POSES]
        return np.concatenate(places, 1), str(file.attrs["llm_description"])


def guide_resized_as_read(video: Path) -> tuple[bytes, np.ndarray]:
    """Every frame is resized as it comes: no frame is held at full size."""
    actions, _ = _numbers(video.with_suffix(".hdf5"))
    capture = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG)
    small = []
    while True:
        there, frame = capture.read()
        if not there:
            break
        frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        small.append(cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    capture.release()
    kept = np.unique(np.linspace(0, len(small) - 1, KEPT, dtype=int))
    return _encode([small[i] for i in kept]), actions[kept]


def guide_as_its_code(video: Path) -> tuple[bytes, np.ndarray]:
    """All frames are held at full size, in a list and then in one array; those that are kept are resized."""
    actions, _ = _numbers(video.with_suffix(".hdf5"))
    capture = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG)
    held = []
    while True:
        there, frame = capture.read()
        if not there:
            break
        held.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    frames = np.array(held)
    kept = np.unique(np.linspace(0, len(frames) - 1, KEPT, dtype=int))
    small = [cv2.resize(frames[i], (SIZE, SIZE), interpolation=cv2.INTER_AREA) for i in kept]
    return _encode(small), actions[kept]


def opencv_resizing_what_is_kept(video: Path) -> tuple[bytes, np.ndarray]:
    """Every frame is decoded and turned to RGB; those that are kept (the container says how many there are)
    are resized."""
    actions, _ = _numbers(video.with_suffix(".hdf5"))
    capture = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG)
    kept = np.unique(np.linspace(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) - 1, KEPT, dtype=int))
    wanted, small, i = set(kept.tolist()), [], 0
    while True:
        there, frame = capture.read()
        if not there:
            break
        frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if i in wanted:
            small.append(cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        i += 1
    capture.release()
    return _encode(small), actions[kept]


def _encode(frames: list[np.ndarray]) -> bytes:
    """As ``ffmpeg -c:v libx264 -profile:v high -pix_fmt yuv420p``: preset medium, crf 23."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"profile": "high"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


# -- ours -----------------------------------------------------------------------------------------


def _settings(part: Path, out: Path, workers: int) -> trajectories_config.Settings:
    return trajectories_config.load(
        None,
        {
            "dataset.dataset_path": str(part),
            "output.output_dir": str(out),
            "output.num_workers": workers,
        },
    )


def one_by_one(part: Path) -> Callable[[Path], tuple[bytes, np.ndarray]]:
    settings = _settings(part, part / "out", 1)
    by_path = {e.candidate.blob.path: e for e in episodes(str(part), settings.choice)}  # type: ignore[union-attr]

    def ours(video: Path) -> tuple[bytes, np.ndarray]:
        row = row_of(read(by_path[str(video)], str(part), settings.choice), settings)
        return row["frames"], np.array(row["actions"], np.float32)

    return ours


def two_processes(part: Path, out: Path, n: int) -> dict[str, Any]:
    """The same recordings by our command with two processes, from its start to its end; by the guide's way
    with two, once they are there; and with one and OpenCV's threads, as its code is, from its start."""
    videos = sorted((part / "bench").glob("*.mp4"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(guide_resized_as_read, videos[:2], chunksize=1)
        began = time.monotonic()
        pool.map(guide_resized_as_read, videos, chunksize=1)
        guide_s = time.monotonic() - began
    ours = _command(part, out, n)
    # Looking at memory takes time of its own, so a second run is looked at.
    ours["peak_MiB"] = _command(part, out.with_name(f"{out.name}-watched"), n, memory=True)["peak_MiB"]
    began = time.monotonic()
    subprocess.run([sys.executable, __file__, "--guide", str(part)], check=True)
    alone_s = time.monotonic() - began
    return {
        **ours,
        "guide_with_2_processes_seconds_without_start": round(guide_s, 2),
        "times_the_guide_with_2_processes": round(guide_s / ours["seconds"], 2),
        "guide_with_1_process_seconds": round(alone_s, 2),
        "times_the_guide_with_1_process": round(alone_s / ours["seconds"], 2),
    }


def _command(part: Path, out: Path, n: int, memory: bool = False) -> dict[str, Any]:
    command = [sys.executable, "-m", "ego2robot.cli", "export", "trajectories", str(part), str(out)]
    began, peak = time.monotonic(), 0
    before = cpu_seconds()
    with subprocess.Popen([*command, "--output.num_workers=2"], stdout=subprocess.DEVNULL) as job:
        process = psutil.Process(job.pid)
        while job.poll() is None:
            if memory:
                peak = max(peak, proportional_bytes(process))
            time.sleep(0.2 if memory else 0.02)
    if job.returncode:
        raise SystemExit(f"the export failed with exit code {job.returncode}")
    seconds = time.monotonic() - began
    return {
        "recordings": n,
        "seconds": round(seconds, 2),
        "cpu_s_with_start": round(cpu_seconds() - before, 2),
        "peak_MiB": round(peak / 2**20, 1),
    }


# -- measuring ------------------------------------------------------------------------------------


def _true_frames(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(
        [cv2.resize(every[i], (SIZE, SIZE), interpolation=cv2.INTER_AREA) for i in chosen(len(every), KEPT)]
    )


def _psnr(data: bytes, truth: np.ndarray) -> float:
    with av.open(io.BytesIO(data)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == truth.shape
    return float(10 * np.log10(255**2 / np.mean((frames.astype(np.float64) - truth) ** 2)))


def measure(kind: str, part: Path, rounds: int) -> dict[str, Any]:
    ways = {
        "ours": one_by_one(part),
        "guide_resized_as_read": guide_resized_as_read,
        "guide_as_its_code": guide_as_its_code,
        "opencv_resizing_what_is_kept": opencv_resizing_what_is_kept,
    }
    videos = sorted((part / "bench").glob("*.mp4"))
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for name, way in ways.items():  # imports, caches
        if name not in ONCE:
            way(videos[0])
    for k in range(rounds):
        for name, way in ways.items():
            if k and name in ONCE:
                continue
            before = cpu_seconds()
            answers[name] = way(videos[k % len(videos)])
            cpu[name].append(cpu_seconds() - before)
    truth = _true_frames(videos[0])
    actions = [answer[1] for answer in answers.values()]
    assert all((a == actions[0]).all() for a in actions)
    least = {name: min(values) for name, values in cpu.items()}
    median = {name: statistics.median(values) for name, values in cpu.items()}
    codec, gop, bframes, _ = KINDS[kind]
    return {
        "encoder": codec,
        "gop": gop,
        "b_frames": bframes,
        "cpu_s_a_recording": {name: round(value, 3) for name, value in least.items()},
        "cpu_s_all": {name: [round(v, 3) for v in values] for name, values in cpu.items()},
        "times_the_guide": round(least["guide_resized_as_read"] / least["ours"], 2),
        "times_the_guide_by_medians": round(median["guide_resized_as_read"] / median["ours"], 2),
        "times_the_guides_code": round(least["guide_as_its_code"] / least["ours"], 2),
        "times_opencv_resizing_what_is_kept": round(least["opencv_resizing_what_is_kept"] / least["ours"], 2),
        "psnr_dB": {name: round(_psnr(answer[0], truth), 2) for name, answer in answers.items()},
        "mp4_bytes": {name: len(answer[0]) for name, answer in answers.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--recordings", type=int, default=8, help="for the whole command")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--guide", type=Path, metavar="PART", help="only do a part the guide's way")
    args = parser.parse_args()
    if args.guide:
        for video in sorted((args.guide / "bench").glob("*.mp4")):
            guide_resized_as_read(video)
        return
    load = [round(v, 2) for v in os.getloadavg()]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        for kind in KINDS:
            part = recordings(Path(scratch), kind, 1)
            found[kind] = measure(kind, part, args.rounds)
            print(kind, found[kind], flush=True)
        part = recordings(Path(scratch) / "command", "h264_gop30", args.recordings)
        command = two_processes(part, Path(scratch) / "out", args.recordings)
        print(command, flush=True)
    ascending = sorted(found, key=lambda kind: found[kind]["times_the_guide"])
    body = {
        "footage": f"{SECONDS} s of 1920 x 1080 at 30 frames/s, 3.8 to 4.5 Mbit/s, generated, with noise",
        "load_average_before": load,
        "lowest": found[ascending[0]]["times_the_guide"],
        "kinds": {kind: found[kind] for kind in ascending},
        "command_with_2_processes": command,
    }
    packages = ("av", "opencv-contrib-python", "h5py", "numpy", "torch")
    path = write_result("trajectories", __doc__, body, packages, args.out)
    print(f"{body['lowest']} times the guide's way where it is least ({ascending[0]}); {path.name}")


if __name__ == "__main__":
    main()
