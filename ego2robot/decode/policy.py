"""Which decoder reads a video. The one place that knows all of them."""

from __future__ import annotations

from functools import cache

from ego2robot.decode.base import Backend
from ego2robot.decode.decord import Decord
from ego2robot.decode.pyav import PyAV
from ego2robot.decode.torchcodec import TorchCodec
from ego2robot.errors import UserError, VideoError
from ego2robot.types import VideoInfo


@cache
def _backends() -> tuple[Backend, ...]:
    return PyAV(), TorchCodec(), Decord()


def backends() -> dict[str, Backend]:
    """All decoders by name, usable here or not, in the order in which ``auto`` tries them."""
    return {backend.name: backend for backend in _backends()}


def pick(info: VideoInfo, wanted: str, device: str) -> tuple[Backend, str | None]:
    """The decoder for a video, and why it is not the one that was asked for (None when it is).

    Args:
        wanted: ``auto`` or a decoder's name.
        device: where the frames are wanted; decoders that leave them there are preferred.

    Raises:
        UserError: the decoder that was asked for does not exist or is not usable here.
        VideoError: no decoder here takes such a video.
    """
    known = backends()
    reason = None
    if wanted != "auto":
        if wanted not in known:
            raise UserError(f"no decoder {wanted!r} (decoders: auto, {', '.join(known)})")
        if missing := known[wanted].missing():
            raise UserError(f"decode.backend={wanted}: {missing}, or use decode.backend=auto")
        refusal = known[wanted].refuses(info)
        if refusal is None:
            return known[wanted], None
        reason = f"{wanted}: {refusal}"
    refusals = [reason] if reason else []
    for backend in sorted(known.values(), key=lambda b: device.partition(":")[0] not in b.devices):
        if backend.name == wanted or backend.missing():
            continue
        refusal = backend.refuses(info)
        if refusal is None:
            return backend, reason
        refusals.append(f"{backend.name}: {refusal}")
    raise VideoError(f"{info.codec} video", "; ".join(refusals), "re-encode the video", "unsupported")


def describe() -> list[tuple[str, str | None, str]]:
    """Name, what is missing (None: usable) and version of every decoder."""
    found = []
    for name, backend in backends().items():
        missing = backend.missing()
        found.append((name, missing, "" if missing else backend.version()))
    return found
