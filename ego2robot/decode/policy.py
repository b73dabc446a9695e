"""Which decoder reads a video. The one place that knows all of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from ego2robot_kernels.camera import small_greys

from ego2robot.decode import hardware, vrs
from ego2robot.decode.base import Backend, FrameBatch
from ego2robot.decode.cuvid import CUVID
from ego2robot.decode.dali import DALI
from ego2robot.decode.decord import Decord
from ego2robot.decode.nvdec import NVDEC
from ego2robot.decode.pyav import PyAV
from ego2robot.decode.pynvvideocodec import PyNvVideoCodec
from ego2robot.decode.stills import Stills
from ego2robot.decode.torchcodec import TorchCodec
from ego2robot.errors import UserError, VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

# Setting up a decoder on the GPU costs about as much as decoding so much video on a core.
WORTH_A_GPU_S = 2.0
MAX_FAILURES = 3  # videos in a row, before a decoder is not asked any more
# Around damage the CPU decodes at least so many frames; after so many such places, all that is left.
MIN_ON_CPU, MAX_TURNS = 64, 8
log = logging.getLogger(__name__)


@cache
def _backends() -> tuple[Backend, ...]:
    return PyAV(), NVDEC(), CUVID(), TorchCodec(), PyNvVideoCodec(), DALI(), Decord()


def backends() -> dict[str, Backend]:
    """All decoders by name, usable here or not, in the order in which ``auto`` tries them."""
    return {backend.name: backend for backend in _backends()}


def pick(
    info: VideoInfo, wanted: str, device: str, decoded_s: float | None = None
) -> tuple[Backend, str | None]:
    """The decoder for a video, and why it is not the one that was asked for (None when it is).

    A decoder on a GPU comes with the CPU behind it, see :class:`OrCPU`.

    Args:
        wanted: ``auto`` or a decoder's name.
        device: where the frames are wanted; decoders that leave them there are preferred.
        decoded_s: how much of the video will be decoded in one go. ``auto`` leaves what is too short to
            be worth a GPU to the CPU.

    Raises:
        UserError: the decoder that was asked for does not exist or is not usable here.
        VideoError: no decoder here takes such a video.
    """
    stills = Stills()
    if stills.refuses(info) is None:  # no video stream: nothing else reads it
        return stills, None
    known = backends()
    where = device.partition(":")[0]
    reason = None
    if wanted != "auto":
        if wanted not in known:
            raise UserError(f"no decoder {wanted!r} (decoders: auto, {', '.join(known)})")
        if missing := known[wanted].missing():
            raise UserError(f"decode.backend={wanted}: {missing}, or use decode.backend=auto")
        if not _serves(known[wanted], where):
            raise UserError(f"decode.backend={wanted} decodes on a GPU: add device=cuda, or use pyav")
        refusal = _refusal(known[wanted], info, where)
        if refusal is None:
            return _backed(known[wanted], where), None
        reason = f"{wanted}: {refusal}"
    refusals = [reason] if reason else []
    if wanted == "auto" and decoded_s is not None and decoded_s < WORTH_A_GPU_S:
        where = "cpu"
    for backend in sorted(known.values(), key=lambda b: where not in b.devices):
        if backend.name == wanted or not _serves(backend, where) or backend.missing():
            continue
        refusal = _refusal(backend, info, where)
        if refusal is None:
            return _backed(backend, where), reason
        refusals.append(f"{backend.name}: {refusal}")
    raise VideoError(f"{info.codec} video", "; ".join(refusals), "re-encode the video", "unsupported")


def _serves(backend: Backend, where: str) -> bool:
    return where in backend.devices or "cpu" in backend.devices


def _refusal(backend: Backend, info: VideoInfo, where: str) -> str | None:
    """Why a decoder does not take a video there; some of them only know what they take on a CPU."""
    on_gpu = where != "cpu" and where in backend.devices
    return backend.refuses(info) or (hardware.refuses(info) if on_gpu else None)


def _backed(backend: Backend, where: str) -> Backend:
    return OrCPU(backend, _backends()[0]) if where != "cpu" and where in backend.devices else backend


def describe() -> list[tuple[str, str | None, str]]:
    """Name, what is missing (None: usable) and version of every decoder."""
    found = []
    for name, backend in backends().items():
        missing = backend.missing()
        found.append((name, missing, "" if missing else backend.version()))
    found.append((vrs.CODEC, vrs.missing(), "" if vrs.missing() else vrs.version()))
    return found


class OrCPU:
    """A decoder on a GPU that the CPU takes over from, in the middle of a video if need be.

    It does where the decoder gives up, where it reports damage, which the CPU judges until it is over, and
    where the stream ends early. So what is damaged, and what is decoded at all, is the same with a GPU and
    without. A decoder that fails time after time is not asked again; why is logged once, on one line.
    """

    _failures: ClassVar[dict[str, int]] = {}  # videos in a row that a decoder gave up, by its name
    _told: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, backend: Backend, cpu: Backend) -> None:
        self._backend, self._cpu = backend, cpu
        self.name, self.devices, self.planes = backend.name, backend.devices, backend.planes

    def missing(self) -> str | None:
        return self._backend.missing()

    def version(self) -> str:
        return self._backend.version()

    def refuses(self, info: VideoInfo) -> str | None:
        return self._backend.refuses(info)

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
        given, with_greys = 0, False
        turns = 0 if self._failures.get(self.name, 0) < MAX_FAILURES else MAX_TURNS
        while given < len(times_s):
            base = given
            if turns < MAX_TURNS:
                turns += 1
                try:
                    for batch in self._backend.read(name, blob, info, times_s[base:], spec, device, fast):
                        if batch.corrupt.any():
                            break
                        given = base + batch.first + len(batch.times_s)
                        with_greys = batch.greys_Thw is not None
                        yield dataclasses.replace(batch, first=base + batch.first)
                    else:
                        turns = MAX_TURNS  # it has seen the end
                    self._failures[self.name] = 0
                except torch.OutOfMemoryError:
                    raise  # not the decoder's fault, and the CPU's frames would not fit either
                except VideoError as error:
                    turns = MAX_TURNS
                    self._failed(name, error.cause)
                except (RuntimeError, OSError) as error:
                    turns = MAX_TURNS
                    self._failed(name, (str(error).strip() or type(error).__name__).splitlines()[0])
            base = given
            if base == len(times_s):
                return
            for batch in self._cpu.read(name, blob, info, times_s[base:], spec, "cpu", fast):
                given = base + batch.first + len(batch.times_s)
                frames_THWC = batch.frames_THWC.to(device)
                # All frames of a video have their greys, or none.
                greys_Thw = small_greys(frames_THWC) if with_greys else None
                yield dataclasses.replace(
                    batch, first=base + batch.first, frames_THWC=frames_THWC, greys_Thw=greys_Thw
                )
                if turns < MAX_TURNS and given - base >= MIN_ON_CPU and not batch.corrupt.any():
                    break  # past the damage
            else:
                return

    def _failed(self, name: str, cause: str) -> None:
        self._failures[self.name] = failures = self._failures.get(self.name, 0) + 1
        if failures == MAX_FAILURES:
            log.warning(
                "decoder %s fails again and again (%s): the CPU decodes from here on", self.name, cause
            )
        elif (self.name, cause) not in self._told:
            self._told.add((self.name, cause))
            log.warning("decoder %s: %s: %s: the CPU decodes what is left of it", self.name, name, cause)
