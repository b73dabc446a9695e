"""Decoding with PyNvVideoCodec 2, NVIDIA's own binding of its video engines.

libav reads the packets, so that times are exact and byte ranges are read in place; PyNvVideoCodec decodes
them. It copies every picture into buffers that its next packet overwrites. It conceals damage: only
packets that do not parse and pictures that never come are reported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import av
import numpy as np
import torch

from ego2robot.decode import hardware, surfaces
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.bitstream import StartCodes, headers, vp9_shown
from ego2robot.decode.surfaces import DamagedPacketError, Decoded, DecoderError, EnginePool, Planes
from ego2robot.types import Blob, FrameSpec, VideoInfo

CODECS = {"h264": "H264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1"}
SURFACES = {"NV12": torch.uint8, "P016": torch.uint16}
_pool = EnginePool()


@cache
def _missing() -> str | None:
    try:
        version = importlib.metadata.version("PyNvVideoCodec")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: pip install PyNvVideoCodec"
    if int(version.partition(".")[0]) < 2:
        return f"version {version} is too old: pip install 'PyNvVideoCodec>=2'"
    if missing := hardware.missing():
        return missing
    try:
        importlib.import_module("PyNvVideoCodec")
    except (ImportError, OSError, RuntimeError) as error:
        # Its import asks for the encoder's library even where only decoding is wanted.
        return f"does not load ({_first_line(error)}): {hardware.DRIVER_HINT}"
    return None


class PyNvVideoCodec:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "pynvvideocodec"
    devices: tuple[str, ...] = ("cuda",)
    planes: tuple[str, ...] = ("rgb", "nv12", "p010")

    def missing(self) -> str | None:
        return _missing()

    def version(self) -> str:
        return importlib.metadata.version("PyNvVideoCodec")

    def refuses(self, info: VideoInfo) -> str | None:
        if info.codec not in CODECS:
            return f"is only used for {', '.join(CODECS)}, not {info.codec}"
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
        @contextmanager
        def engine(stream: av.VideoStream) -> Iterator[PyNvEngine]:
            context = stream.codec_context
            # The same headers need the same surfaces: only then may a decoder go on with another video.
            key = (device, info.codec, context.extradata, context.width, context.height, info.pix_fmt)
            made: PyNvEngine | None = _pool.take(key)
            if made is None:
                made = PyNvEngine(info.codec, hardware.device_index(device))
            made.follow(stream)
            yield made
            made.reset()
            _pool.give(key, made)  # not reached after an error: then it is thrown away

        yield from surfaces.read_packets(name, blob, info, times_s, spec, device, engine, fast)


class PyNvEngine:
    """One decoder of PyNvVideoCodec. See :class:`ego2robot.decode.surfaces.Engine`."""

    silent = True

    def __init__(self, codec: str, device: int) -> None:
        import PyNvVideoCodec as nvc

        self._nvc, self._codec, self._device = nvc, codec, device
        self.stream = torch.cuda.Stream(device)
        try:
            self._decoder = nvc.CreateDecoder(
                gpuid=device,
                codec=getattr(nvc.cudaVideoCodec, CODECS[codec]),
                cudacontext=hardware.context(device),
                cudastream=self.stream.cuda_stream,
                usedevicememory=True,
            )
        except Exception as error:  # noqa: BLE001 - its exceptions have no common base
            raise DecoderError(f"PyNvVideoCodec cannot decode it ({_first_line(error)})") from None
        self._begun = False
        self._shown: deque[int | None] = deque()

    def follow(self, stream: av.VideoStream) -> None:
        """Takes a stream whose packets come next."""
        self._start_codes = StartCodes(stream)
        self._headers = headers(self._codec, stream.codec_context.extradata)
        self._width = stream.codec_context.width
        self._space = int(stream.codec_context.colorspace)
        self._range = int(stream.codec_context.color_range)
        self._reordered = self._codec != "vp9"

    def decode(self, packet: av.Packet) -> list[Decoded]:
        pts = packet.pts  # the packet is empty after the filter
        if pts is None:
            raise DecoderError("its packets have no presentation times")
        found = []
        if not self._begun:
            self._begun = True
            if self._headers:
                found += self._send(np.frombuffer(self._headers, np.uint8), pts)
        for part in self._start_codes(packet):
            if part.size:
                found += self._send(np.frombuffer(part, np.uint8), pts)
        return found

    def drain(self) -> list[Decoded]:
        found = self._send(np.zeros(0, np.uint8), None)
        self._begun = False
        return found

    def reset(self) -> None:
        if self._begun:
            self.drain()
        self._start_codes.reset()
        self._shown.clear()

    def _send(self, data: np.ndarray, pts: int | None) -> list[Decoded]:
        if not self._reordered and len(data):
            # The parser's times go wrong around pictures that are not shown; VP9 never reorders.
            self._shown.extend([pts] * vp9_shown(data.data))
        packet = self._nvc.PacketData()
        packet.bsl_data, packet.bsl = data.ctypes.data if len(data) else 0, len(data)
        packet.pts = pts or 0
        try:
            frames = self._decoder.Decode(packet)
        except Exception as error:  # noqa: BLE001 - its exceptions have no common base
            if _is_fatal(error):
                raise DecoderError(f"PyNvVideoCodec stopped ({_first_line(error)})") from None
            raise DamagedPacketError(_first_line(error)) from None
        return [self._decoded(frame) for frame in frames]

    def _decoded(self, frame: Any) -> Decoded:
        pts = frame.getPTS() if self._reordered or not self._shown else self._shown.popleft()
        return Decoded(pts, False, lambda: self._planes(frame), lasts=False)

    def _planes(self, frame: Any) -> Planes:
        kind = str(frame.format).rpartition(".")[2]
        if kind not in SURFACES:
            raise DecoderError(f"PyNvVideoCodec gives {kind} surfaces")
        height, width = self._decoder.GetHeight(), self._decoder.GetWidth()
        pitch = width * SURFACES[kind].itemsize  # its buffers are packed
        luma, chroma = frame.GetPtrToPlane(0), frame.GetPtrToPlane(1)
        if chroma - luma != height * pitch:
            raise DecoderError("PyNvVideoCodec's buffers are not laid out as known here")
        y, uv = hardware.device_planes(
            luma, chroma, pitch, height, width, SURFACES[kind], self._device, self._decoder
        )
        y = y[:, : self._width] if width - self._width == 1 else y  # it rounds odd widths up
        return surfaces.planes(y, uv, self._codec, self._space, self._range)


def _is_fatal(error: Exception) -> bool:
    """Whether the decoder itself failed, rather than the packet that it was given."""
    text = str(error).lower()
    return any(
        word in text for word in ("not supported", "out of memory", "out_of_memory", "no_device", "context")
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
