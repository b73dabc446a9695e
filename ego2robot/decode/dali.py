"""Decoding with NVIDIA DALI 2 on a GPU, from memory that is mapped and not read ahead.

Kept for comparison: it opens and indexes the video anew for every group of frames, gives RGB at full
size, does not pass over damage, and is known to hang at a variable frame rate, which is therefore
refused.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.utils.dlpack

from ego2robot.blobs import local_blob, read_error
from ego2robot.decode import hardware
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.pyav import EPSILON_S, container_of, packet_times
from ego2robot.decode.surfaces import Scaled
from ego2robot.errors import VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

CODECS = ("h264", "hevc", "vp9", "av1")
GROUP_BYTES = 256 << 20  # RGB at full size that is decoded at once, on the GPU
STEADY = 0.25  # of a frame's duration, which every frame keeps at a constant rate
HINT = "use decode.backend=pyav"


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "not installed: pip install nvidia-dali-cuda130 (or -cuda120)"
    if missing := hardware.missing():
        return missing
    try:
        dali = importlib.import_module("nvidia.dali")
        importlib.import_module("nvidia.dali.fn")
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load ({_first_line(error)})"
    if int(dali.__version__.partition(".")[0]) < 2:
        return f"version {dali.__version__} is too old: pip install --upgrade nvidia-dali-cuda130"
    return None


class DALI:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "dali"
    devices: tuple[str, ...] = ("cuda",)
    planes: tuple[str, ...] = ("rgb",)

    def missing(self) -> str | None:
        return _missing()

    def version(self) -> str:
        return str(importlib.import_module("nvidia.dali").__version__)

    def refuses(self, info: VideoInfo) -> str | None:
        if info.codec not in CODECS:
            return f"is only used for {', '.join(CODECS)}, not {info.codec}"
        if info.bit_depth > 8:
            return f"is only used for 8 bits, not {info.bit_depth}"
        return hardware.refuses(info)

    def read(
        self,
        name: str,
        blob: Blob,
        info: VideoInfo,
        times_s: np.ndarray,
        spec: FrameSpec,
        device: str,
        fast: bool = False,
    ) -> Iterator[FrameBatch]:
        if not len(times_s):
            return
        if (container := container_of(name, blob)).startswith("mpeg"):
            raise VideoError(name, f"DALI does not count the frames of {container}", HINT, "unsupported")
        try:
            shown = np.sort(packet_times(name, blob))
        except (av.FFmpegError, OSError) as error:
            raise read_error(name, error) from None
        steps = np.diff(shown)
        if len(steps) and np.abs(steps - np.median(steps)).max() > STEADY * np.median(steps):
            raise VideoError(name, "its frame rate varies, at which DALI may hang", HINT, "unsupported")
        due = np.asarray(times_s, np.float64) + info.start_s
        due = due[due + EPSILON_S < shown[-1] + 1 / info.fps]
        indices = np.maximum(np.searchsorted(shown, due + EPSILON_S, side="right") - 1, 0)
        scaled = Scaled(info, spec, device)
        group = max(1, GROUP_BYTES // (3 * info.width * info.height))
        try:
            here = local_blob(blob)
        except OSError as error:
            raise read_error(name, error) from None
        offset = 0 if here.whole_file else here.offset
        encoded = np.memmap(Path(here.path), np.uint8, "r", offset, (here.size,))
        try:
            pipeline = _pipeline(hardware.device_index(device))
            for at in range(0, len(indices), group):
                wanted = indices[at : at + group].astype(np.int32)
                (outputs,) = pipeline.run(encoded=[encoded], frames=[wanted])
                rgb_THWC = torch.utils.dlpack.from_dlpack(outputs[0])
                for k, rgb_HWC in zip(wanted, rgb_THWC, strict=True):
                    if full := scaled.add(rgb_HWC, float(shown[k]) - info.start_s, False):
                        yield full
                # The pictures are the pipeline's: they must have been read before it goes on.
                torch.cuda.current_stream(rgb_THWC.device).synchronize()
        except (RuntimeError, ValueError) as error:
            at_s = times_s[scaled.first]
            raise VideoError(
                name, f"DALI fails after {at_s:.1f} s ({_first_line(error)})", HINT, "unsupported"
            ) from None
        if rest := scaled.take():
            yield rest


def _pipeline(device: int) -> Any:
    """A pipeline from a whole video in memory and frame numbers to RGB [T, H, W, 3] on the GPU."""
    dali, fn = importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.fn")
    types = importlib.import_module("nvidia.dali.types")
    pipeline = dali.Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=device,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1, no_copy=True)
        frames = fn.external_source(name="frames", device="cpu", dtype=types.INT32, ndim=1)
        pipeline.set_outputs(fn.decoders.video(encoded, frames=frames, device="mixed", affine=False))
    pipeline.build()
    return pipeline


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
