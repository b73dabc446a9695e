"""Which share of a GPU's memory bandwidth do the kernels reach, and what do their CPU references do?

Each kernel first has to give what its CPU reference gives. Then it runs over inputs that take turns, together
far larger than the L2 cache. The bytes that it must move at least (those of its docstring; of pictures that
are looked at here and there, all 32-byte sectors that hold a pixel in use) are divided by its time and by
what a plain copy on the same device reaches, reading and writing. Calls are queued behind a kernel that
sleeps, so that the device's time is measured and not Python's, which stands beside it.

Without a GPU the references alone are timed, on one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write_result
from ego2robot_kernels import crops, greys, model_input, motion, surface

FRAME = (360, 640)
SECTOR = 32  # bytes that memory gives at once
IN_TURN = 512 << 20  # bytes of inputs that take turns, at least; an H200's L2 holds 50 MB
CLIP = model_input.Picture(
    resample="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
COLOUR: dict[str, Any] = {"matrix": "bt709", "full_range": False}


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of input.

    Attributes:
        unit: what is counted.
        batch: of those in a call on a GPU, when there is time.
        make: how many, which seed, device → inputs of a call.
        call: inputs → tensors.
        bytes_each: that must move for one of them.
        off: share of values that may differ from the reference by a little.
    """

    unit: str
    batch: int
    make: Callable[[int, int, str], Any]
    call: Callable[[Any], tuple[torch.Tensor, ...]]
    bytes_each: float
    off: float = 0.0


def noise(shape: tuple[int, ...], seed: int, device: str, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Made where it is used: the host's generator would take longer than the measurement."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator)
    words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device, generator=generator)
    return (words & -64).view(dtype)  # ten bits count


def surfaces(height: int, width: int, dtype: torch.dtype, batch: int) -> Case:
    pitch = -(-width // 256) * 256

    def make(n: int, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        luma = noise((n, height, pitch), seed, device, dtype)[:, :, :width]
        chroma = noise((n, height // 2, pitch), seed + 1, device, dtype)[:, :, :width]
        return luma, chroma.unflatten(2, (width // 2, 2))

    def call(planes: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        high, wide = FRAME
        return surface.convert_surfaces(
            *planes, height=high, width=wide, content=(0, 0, high, wide), **COLOUR
        )

    size = 2 if dtype == torch.uint16 else 1
    moved = 1.5 * height * width * size + 3 * FRAME[0] * FRAME[1] + math.prod(motion.SIZE)
    return Case("pictures", batch, make, call, moved)


def sectors(bytes_used: np.ndarray) -> int:
    """Bytes of memory that must be read for some bytes of a row."""
    return len(np.unique(np.unique(bytes_used) // SECTOR)) * SECTOR


def motion_of_frames() -> Case:
    used = 18  # of the 36 of a clip
    rows, columns = (
        motion.taps(source, target, across)
        for source, target, across in zip(FRAME, motion.SIZE, (False, True), strict=True)
    )
    read = len(np.unique(rows[:2])) * sectors(columns[:2] * 3)
    return Case(
        "clips",
        64,
        lambda n, seed, device: noise((n, 2 * used, *FRAME, 3), seed, device),
        lambda frames: (motion.motion(frames),),
        used * read,
    )


def motion_of_greys() -> Case:
    used = 18
    return Case(
        "clips",
        1024,
        lambda n, seed, device: noise((n, 2 * used, *motion.SIZE), seed, device),
        lambda pictures: (greys.motion_from_greys(pictures),),
        used * math.prod(motion.SIZE),
    )


def inputs(picture: model_input.Picture, frames: int, batch: int) -> Case:
    """``frames`` of 36, evenly, of each clip."""
    indices = np.linspace(0, 35, frames).astype(int).tolist() if frames > 1 else [18]
    high, wide = FRAME
    _, new_wide, _, left = picture.resized(high, wide)
    taps = [
        model_input.pillow_taps(wide, new_wide, i, picture.resample)
        for i in (left, left + picture.crop[1] - 1)
    ]
    first, last = taps[0][0], taps[1][0] + len(taps[1][1])
    read = high * sectors(np.arange(3 * first, 3 * last))
    return Case(
        "clips",
        batch,
        lambda n, seed, device: list(noise((n, 36, *FRAME, 3), seed, device)),
        lambda clips: (model_input.model_inputs(clips, [indices] * len(clips), picture),),
        frames * (read + 3 * math.prod(picture.crop) * 2),
    )


def letterboxes() -> Case:
    size, side = 192, max(FRAME)
    (low_y, *y), (low_x, *x) = (crops.line_taps(length, side, size) for length in FRAME)
    rows = np.unique(np.concatenate([(low_y + i)[w > 0] for i, w in enumerate(y)]))
    columns = np.unique(np.concatenate([(low_x + i)[w > 0] for i, w in enumerate(x)]))
    read = len(rows) * sectors(columns * 3)
    return Case(
        "frames",
        512,
        lambda n, seed, device: noise((n, *FRAME, 3), seed, device),
        lambda frames: (crops.letterbox(frames, size, torch.float16),),
        read + 3 * size * size * 2,
    )


def rotated_crops() -> Case:
    """Squares of 100 to 250 pixels anywhere in the frame, any turn; each is read once."""
    size, sides = 224, (100.0, 250.0)

    def make(n: int, seed: int, device: str) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng(seed)
        centre = rng.uniform(130, FRAME[0] - 130, (n, 2)) * (FRAME[1] / FRAME[0], 1)
        rect = np.concatenate([centre, rng.uniform(*sides, (n, 1)), rng.uniform(-3, 3, (n, 1))], 1)
        where = torch.arange(n, device=device), torch.from_numpy(rect.astype(np.float32)).to(device)
        return noise((n, *FRAME, 3), seed, device), *where

    mean_area = (sides[1] ** 3 - sides[0] ** 3) / (3 * (sides[1] - sides[0]))
    # A GPU's cosine may differ in its last bit from the host's: a position then moves by 1/32 pixel.
    return Case(
        "crops",
        1024,
        make,
        lambda of: (crops.crops(*of, size, torch.float16),),
        3 * mean_area + 3 * size * size * 2,
        off=0.01,
    )


CASES: dict[str, Callable[[], Case]] = {
    "surface_nv12_1080p": lambda: surfaces(1080, 1920, torch.uint8, 256),
    "surface_p010_1080p": lambda: surfaces(1080, 1920, torch.uint16, 128),
    "surface_nv12_2160p": lambda: surfaces(2160, 3840, torch.uint8, 64),
    "surface_nv12_256p": lambda: surfaces(256, 456, torch.uint8, 512),
    "motion": motion_of_frames,
    "motion_from_greys": motion_of_greys,
    "model_input_videomae": lambda: inputs(model_input.Picture(), 16, 32),
    "model_input_clip": lambda: inputs(CLIP, 1, 256),
    "letterbox": letterboxes,
    "crops": rotated_crops,
}


def agreement(case: Case) -> dict[str, Any]:
    """Whether the kernel gives what the reference gives, on two of the real size."""
    given = case.make(2, 11, "cpu")

    def moved(value: Any) -> Any:
        return value.cuda() if isinstance(value, torch.Tensor) else type(value)(moved(v) for v in value)

    off = [
        float((ours.cpu() != reference).float().mean())
        for ours, reference in zip(case.call(moved(given)), case.call(given), strict=True)
    ]
    return {"agrees": max(off) <= case.off, "values_that_differ": max(off)}


def copy_rate(seconds: float) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds([lambda: target.copy_(source)], seconds)[0]


def device_seconds(calls: Sequence[Callable[[], Any]], seconds: float) -> tuple[float, float]:
    """Seconds of the device and of Python for one call, the median over rounds through all ``calls``."""
    for call in calls:  # compiles, fills caches of tables and of memory
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    host = (time.perf_counter() - began) / len(calls)
    torch.cuda.synchronize()
    rounds: list[float] = []
    repeats = max(1, 16 // len(calls))
    sleep = int((2 * host * repeats * len(calls) + 2e-3) * 2e9)  # cycles, at 2 GHz at most
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(sleep)
        start.record()
        for _ in range(repeats):
            for call in calls:
                call()
        stop.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(stop) / 1000 / (repeats * len(calls)))
    return statistics.median(rounds), host


def on_gpu(quick: bool) -> dict[str, Any]:
    seconds = 0.3 if quick else 1.5
    copied = copy_rate(seconds)
    found: dict[str, Any] = {"copy_GBps": round(copied / 1e9, 1), "kernels": {}}
    for name, make in CASES.items():
        case = make()
        row: dict[str, Any] = agreement(case)
        for batch in (1, case.batch):
            given = [case.make(batch, seed, "cuda") for seed in range(_turns(case, batch))]
            calls = [lambda inputs=inputs: case.call(inputs) for inputs in given]  # noqa: B023
            took, host = device_seconds(calls, seconds)
            rate = batch * case.bytes_each / took
            row[f"batch_{batch}"] = {
                f"{case.unit}_per_s": round(batch / took, 1),
                "device_us": round(took * 1e6, 2),
                "python_us": round(host * 1e6, 1),
                "GBps": round(rate / 1e9, 1),
                "share_of_copy": round(rate / copied, 4),
            }
            del given, calls
        row["bytes_each"] = int(case.bytes_each)
        row["share_of_copy"] = row[f"batch_{case.batch}"]["share_of_copy"]
        found["kernels"][name] = row
        torch.cuda.empty_cache()
    return found


def _turns(case: Case, batch: int) -> int:
    return max(2, min(32, math.ceil(IN_TURN / (batch * case.bytes_each))))


def on_cpu(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        case = make()
        given = case.make(1, 0, "cpu")
        case.call(given)
        took: list[float] = []
        end = time.perf_counter() + (0.5 if quick else 2.0)
        while len(took) < 3 or time.perf_counter() < end:
            began = time.perf_counter()
            case.call(given)
            took.append(time.perf_counter() - began)
        found[name] = {f"{case.unit}_per_s": round(1 / min(took), 2)}
    return found


def run(quick: bool) -> dict[str, Any]:
    """Rates and shares on a GPU, else the references' rates on this CPU."""
    if not torch.cuda.is_available():
        return {"cpu": on_cpu(quick), "gpu": "not measured: torch finds none"}
    return {"gpu": on_gpu(quick)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    body = run(args.quick)
    path = write_result("kernels", __doc__, body, ("torch", "triton", "numpy"), args.out)
    if "cpu" in body:
        for name, row in body["cpu"].items():
            ((unit, rate),) = row.items()
            print(f"{name:22} {rate:10.1f} {unit}")
    else:
        print(f"copy: {body['gpu']['copy_GBps']} GB/s, read and written")
        for name, row in body["gpu"]["kernels"].items():
            says = "as the reference" if row["agrees"] else f"WRONG in {row['values_that_differ']:.2%}"
            print(f"{name:22} {row['share_of_copy']:6.1%} of a copy's bandwidth; {says}")
    print(path.name)


if __name__ == "__main__":
    main()
