"""Decoding on a GPU's video engines with the FFmpeg that PyAV's wheel brings.

Needs nothing but the driver's video libraries. libav parses the stream and the engine decodes it, so
that damage, times and reordering are judged as on the CPU; damage inside a slice that the hardware
conceals is not reported. Each picture is copied on the GPU from the decoder's own surface into one that
lasts, on the default stream (FFmpeg, libavcodec/nvdec.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel, hwdevices_available

from ego2robot.decode import hardware, surfaces
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.surfaces import Decoded, DecoderError, EnginePool, Planes
from ego2robot.types import Blob, FrameSpec, VideoInfo

CODECS = ("h264", "hevc", "vp9", "av1")
# What a surface of libav's CUDA frames may hold, and how its samples are stored.
SURFACES = {"nv12": torch.uint8, "p010le": torch.uint16, "p012le": torch.uint16, "p016le": torch.uint16}
_pool = EnginePool()


class NVDEC:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "nvdec"
    devices: tuple[str, ...] = ("cuda",)
    planes: tuple[str, ...] = ("rgb", "nv12", "p010")

    def missing(self) -> str | None:
        if "cuda" not in hwdevices_available():
            return "this PyAV is built without CUDA: install its wheel (pip install --only-binary av av)"
        return hardware.missing()

    def version(self) -> str:
        return f"{av.__version__} (FFmpeg {av.ffmpeg_version_info})"

    def refuses(self, info: VideoInfo) -> str | None:
        if info.codec not in CODECS:
            return f"is only used for {', '.join(CODECS)}, not {info.codec}"
        if (info.width if info.rotation % 180 else info.height) % 2:
            return "FFmpeg misplaces the chroma of surfaces of odd height"
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
        def engine(stream: av.VideoStream) -> Iterator[PyAVEngine]:
            context = stream.codec_context
            key = (device, info.codec, context.extradata, context.width, context.height, info.pix_fmt)
            made: PyAVEngine | None = _pool.take(key)
            if made is None:
                made = PyAVEngine(info.codec, context.extradata, hardware.device_index(device))
            made.tagged(context)
            yield made
            made.reset()
            _pool.give(key, made)  # not reached after an error: then it is thrown away

        yield from surfaces.read_packets(name, blob, info, times_s, spec, device, engine, fast)


class PyAVEngine:
    """libav's decoder of one codec on a GPU. See :class:`ego2robot.decode.surfaces.Engine`.

    Args:
        extradata: the codec's headers as the container has them.
    """

    silent = False

    def __init__(self, codec: str, extradata: bytes | None, device: int) -> None:
        self._device = device
        self.stream = torch.cuda.default_stream(device)  # FFmpeg's copies run there
        # FFmpeg refuses a primary context whose flags are not its own, so it is given torch's as the
        # current one (libavutil/hwcontext_cuda.c).
        hardware.context(device)
        options: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
        acceleration = HWAccel("cuda", str(device), False, options, is_hw_owned=True)
        try:
            self._context = av.CodecContext.create(codec, "r", hwaccel=acceleration)
        except (av.FFmpegError, NotImplementedError, ValueError) as error:
            raise DecoderError(f"no decoder on the GPU ({error})") from None
        if not self._context.is_hwaccel:
            raise DecoderError(f"this FFmpeg has no {codec} decoder for the GPU")
        self._context.thread_count = 1
        if extradata:
            self._context.extradata = extradata
        self._space, self._range, self._codec = 2, 0, codec

    def tagged(self, context: av.VideoCodecContext) -> None:
        """Takes over the colours that the container's headers give a stream."""
        self._space, self._range = int(context.colorspace), int(context.color_range)

    def decode(self, packet: av.Packet) -> list[Decoded]:
        return [self._decoded(frame) for frame in self._context.decode(packet)]

    def drain(self) -> list[Decoded]:
        return [self._decoded(frame) for frame in self._context.decode(None)]

    def reset(self) -> None:
        if self._context.is_open:
            self._context.flush_buffers()

    def _decoded(self, frame: av.VideoFrame) -> Decoded:
        pts = frame.pts if frame.pts is not None else frame.dts
        return Decoded(pts, frame.is_corrupt, lambda: self._planes(frame), lasts=True)

    def _planes(self, frame: av.VideoFrame) -> Planes:
        surface = self._context.sw_format
        if frame.format.name != "cuda" or surface is None or surface.name not in SURFACES:
            raise DecoderError(f"the GPU's decoder gives {frame.format.name} pictures")
        luma, chroma = frame.planes
        if luma.line_size != chroma.line_size:
            raise DecoderError("the GPU's decoder gives planes of different pitches")
        y, uv = hardware.device_planes(
            luma.buffer_ptr,
            chroma.buffer_ptr,
            luma.line_size,
            frame.height,
            frame.width,
            SURFACES[surface.name],
            self._device,
            frame,
        )
        space = int(frame.colorspace) if int(frame.colorspace) != 2 else self._space
        tagged = int(frame.color_range) or self._range
        return surfaces.planes(y, uv, self._codec, space, tagged)
