"""Does resident memory depend on the length of a video?

Runs the whole curation on one short generated video and on a long one, the short one's packets again and
again in one file, each in a process of its own, and reads the memory of all its processes (summed
proportional set size, so that shared pages count once) four times a second. The figure that matters is the
ratio of the two peaks: 1 means flat.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import psutil
from common import RESULTS, write_result

from ego2robot.sample import make_footage


def proportional_bytes(process: psutil.Process) -> int:
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def repeat(video: Path, times: int, out: Path) -> None:
    """``times`` times the packets of a video, one after the other, as one file."""
    with av.open(str(out), "w") as made, av.open(str(video)) as first:
        stream = made.add_stream_from_template(first.streams.video[0])
        length = Fraction(first.duration or 0, av.time_base)
        for k in range(times):
            with av.open(str(video)) as again:
                for packet in again.demux(again.streams.video[0]):
                    if packet.pts is None or packet.dts is None or not packet.time_base:
                        continue  # the demuxer's end mark
                    shift = round(k * length / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    made.mux(packet)


def run(footage: Path, run_dir: Path, workers: int, stride_s: float) -> dict[str, Any]:
    """One run over ``footage`` and the peak of its memory while it curated."""
    arguments = [
        f"source.path={footage}",
        f"run_dir={run_dir}",
        f"workers={workers}",
        "clips.duration_s=6",
        f"clips.stride_s={stride_s:g}",
        "gate.min_motion=0.02",
        "embed.videomae.weights=none",
        "embed.clip.weights=none",
        "export.enabled=false",
    ]
    command = [sys.executable, "-m", "ego2robot.cli", "run", "folder", *arguments]
    began = time.monotonic()
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
        process = psutil.Process(job.pid)
        while job.poll() is None:
            samples.append((time.monotonic() - began, proportional_bytes(process)))
            time.sleep(0.25)
    if job.returncode:
        raise SystemExit(f"the run over {footage} failed with exit code {job.returncode}")
    status = subprocess.run(
        [sys.executable, "-m", "ego2robot.cli", "status", str(run_dir), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    state = json.loads(status.stdout)
    mib = [bytes_ / 2**20 for _, bytes_ in samples]
    quarters = [max(mib[i * len(mib) // 4 : (i + 1) * len(mib) // 4]) for i in range(4)]
    return {
        "clips": state["clips"],
        "kept": state["kept"],
        "seconds": round(time.monotonic() - began, 1),
        "clips_per_s": round(state["clips_per_s"], 3),
        "peak_MiB": round(max(mib), 1),
        "peak_MiB_by_quarter_of_the_run": [round(q, 1) for q in quarters],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", type=float, default=10, help="minutes")
    parser.add_argument("--long", type=float, default=180, help="minutes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stride", type=float, default=15, help="seconds from clip to clip")
    parser.add_argument("--scratch", type=Path, help="folder for footage and runs; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        short, long = Path(scratch) / "short", Path(scratch) / "long"
        make_footage(short, minutes=args.short, videos=1, video_minutes=args.short)
        long.mkdir()
        times = round(args.long / args.short)
        repeat(short / "ego_000.mp4", times, long / "ego_000.mp4")
        for footage, minutes in ((short, args.short), (long, times * args.short)):
            measured = run(footage, Path(scratch) / f"{footage.name}-run", args.workers, args.stride)
            results[footage.name] = {"minutes": minutes, **measured}
            print(footage.name, results[footage.name], flush=True)
    ratio = results["long"]["peak_MiB"] / results["short"]["peak_MiB"]
    body = {"workers": args.workers, "stride_s": args.stride, **results, "ratio_of_peaks": round(ratio, 3)}
    path = write_result("memory", __doc__, body, ("torch", "av", "mediapipe"), args.out)
    print(f"{ratio:.3f} times the memory for {args.long / args.short:g} times the video; {path.name}")


if __name__ == "__main__":
    main()
